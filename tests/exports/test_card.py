"""The model card says where a model comes from, and its example works."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from tiny_models import Kind, delta, make_kinds

from fedsmoothlora.exports.card import THIS_FOLDER, Provenance, _loading, write_card
from fedsmoothlora.exports.export import write_folder
from fedsmoothlora.exports.trained import Trained
from fedsmoothlora.logs import quiet_libraries
from fedsmoothlora.modeling.fingerprint import weights_sha256


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Kind]:
    return make_kinds(tmp_path_factory.mktemp)


def trained_bert(kind: Kind) -> Trained:
    layer = "bert.encoder.layer.0.attention.self.query"
    head = {"classifier.weight": torch.ones(3, 32), "classifier.bias": torch.ones(3)}
    return Trained(deltas={layer: delta(kind.base().model, layer, 3)}, head=head)


def exported(kind: Kind, as_: str, out: Path, about: Provenance) -> ModelCard:
    with quiet_libraries():
        write_folder(trained_bert(kind), kind.base(), about, as_, out)
    return ModelCard.load(out / "README.md")


FIGURES = {"accuracy": 0.9375, "macro_f1": 0.875}


@pytest.mark.parametrize("as_", ["merged", "adapter", "adapter:2"])
def test_a_card_says_what_the_model_is_and_what_it_came_from(
    kinds: dict[str, Kind], tmp_path: Path, as_: str
) -> None:
    kind = kinds["bert"]
    card = exported(kind, as_, tmp_path / "out", kind.about(metrics=FIGURES))
    data = card.data
    assert data.library_name == ("transformers" if as_ == "merged" else "peft")
    assert data.pipeline_tag == "text-classification"
    assert set(data.tags) == {"federated-learning", "lora", "fedsmoothlora"}
    assert {(one.metric_type, one.metric_value) for one in data.eval_results} == set(FIGURES.items())
    assert {one.dataset_name for one in data.eval_results} == {"made-up.csv"}
    for word in (
        kind.source,
        weights_sha256(kind.base().model, ["classifier"]),
        "made-up.csv",
        "`fedsmoothlora`",
        "3 of 4",
        "good, bad, neither",
        "0.9375",
    ):
        assert word in card.text
    assert ("approximation: the exact adapter has rank 3" in card.text) == (as_ == "adapter:2")
    assert ("the exact model, not with this approximation" in card.text) == (as_ == "adapter:2")
    assert ("LoRA of rank" in card.text) == (as_ != "merged")


@pytest.mark.parametrize("as_", ["merged", "adapter"])
def test_the_lines_that_load_it_do(kinds: dict[str, Kind], tmp_path: Path, as_: str) -> None:
    kind, out = kinds["bert"], tmp_path / "out"
    card = exported(kind, as_, out, kind.about())
    (code,) = re.findall(r"```python\n(.*?)```", card.text, flags=re.DOTALL)
    found: dict[str, torch.nn.Module] = {}
    with quiet_libraries():
        exec(code.replace(THIS_FOLDER, str(out)), found)
    wanted = kind.base().model
    with torch.no_grad():
        for name, value in trained_bert(kind).deltas.items():
            assert not isinstance(value, torch.Tensor)
            wanted.get_submodule(name).weight += value.dense().float()
        wanted.classifier.weight.fill_(1)
        wanted.classifier.bias.fill_(1)
    torch.testing.assert_close(kind.logits(found["model"]), kind.logits(wanted), rtol=1e-4, atol=1e-4)


def test_a_base_from_a_hub_is_linked_at_its_commit(kinds: dict[str, Kind], tmp_path: Path) -> None:
    about = kinds["bert"].about(source="owner/model", revision="abc123")
    card = exported(kinds["bert"], "adapter", tmp_path / "out", about)
    assert card.data.base_model == "owner/model"
    assert "`owner/model`, revision `abc123`" in card.text
    assert 'from_pretrained("owner/model", revision="abc123", num_labels=3' in card.text


def test_a_base_and_data_out_of_packages_come_with_their_licences(
    kinds: dict[str, Kind], tmp_path: Path
) -> None:
    about = kinds["bert"].about(source="pkg:dinov2-small", data="pkg:mnist-5k")
    card = exported(kinds["bert"], "adapter", tmp_path / "out", about)
    assert card.data.base_model is None
    assert card.data.license == "mit"
    assert re.search(r"\| data \| `pkg:mnist-5k` \(licence: .+\) \|", card.text)
    assert 'load_adapter("THIS_FOLDER")' in card.text


def test_images_of_another_size_need_an_argument_which_the_card_says(kinds: dict[str, Kind]) -> None:
    lines = _loading(kinds["vit"].about(), None, {"interpolate_pos_encoding": True})
    assert "model(pixel_values, interpolate_pos_encoding=True)" in lines


def test_a_client_has_a_card_of_its_own(kinds: dict[str, Kind], tmp_path: Path) -> None:
    about = kinds["bert"].about(client="north", metrics={"own_accuracy": 0.5})
    card = exported(kinds["bert"], "adapter", tmp_path / "out", about)
    assert "Client north's own model" in card.text
    assert "right after this client's last training" in card.text


def test_prompts_are_told_as_they_were_written(kinds: dict[str, Kind], tmp_path: Path) -> None:
    prompt = {"template": "Question: {question}\nAnswer:", "chat": False, "system": None}
    plain = exported(kinds["bert"], "adapter", tmp_path / "plain", kinds["bert"].about(prompt=prompt))
    assert "Text in this form:\n\n```\nQuestion: {question}\nAnswer:\n```\n" in plain.text
    prompt |= {"chat": True, "system": "Be brief."}
    chat = exported(kinds["bert"], "adapter", tmp_path / "chat", kinds["bert"].about(prompt=prompt))
    assert "chat template, with this turn of the user (after the system message `Be brief.`):" in chat.text


def test_names_from_elsewhere_are_shown_and_not_rendered(tmp_path: Path) -> None:
    hostile = "a\n# b | <script> [c](d) `e`"
    about = Provenance(
        name=hostile,
        source=hostile,
        revision=None,
        data=hostile,
        method="fedit",
        rounds=1,
        planned_rounds=1,
        clients=2,
        client=hostile,
        metrics={hostile: 1.0},
        classes=(hostile, "\x1b[31m"),
        task=None,
    )
    write_card(about, "0" * 64, None, {}, tmp_path)
    text = ModelCard.load(tmp_path / "README.md").text
    body = text.split("```python")[0]
    assert "\x1b" not in text
    assert "\n# b" not in body
    outside_code = re.sub(r"(?<!\\)`[^`]*`", "", re.sub(r"\\[`<[]", "", body))
    assert not re.search(r"[`<[]", outside_code)
    table = [line for line in body.splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in table} == {3}
