"""What a frozen model makes of its texts: evaluated once, kept, and the same as the whole model computes."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

from fedsmoothlora.config import read
from fedsmoothlora.errors import ConfigError, ExportError
from fedsmoothlora.exports.export import export
from fedsmoothlora.modeling import features
from fedsmoothlora.modeling.settings import ModelSettings
from fedsmoothlora.runs import session
from fedsmoothlora.runs.planning import build, plan
from fedsmoothlora.runs.session import run
from fedsmoothlora.tasks.text_classification import TextClassification

WORDS = ("red", "blue", "green", "grey")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDSMOOTHLORA_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def table(tiny_bert: Path, tmp_path: Path) -> dict[str, Any]:
    source = tmp_path / "own.jsonl"
    rows = [{"text": f"{'say ' * (i % 3)}{WORDS[i % 4]}", "label": WORDS[i % 4]} for i in range(60)]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "name": "own",
        "model": {"source": str(tiny_bert), "head": "lora"},
        "lora": {"r": 1, "alpha": 4, "target_modules": ["classifier"]},
        "data": {"source": str(source), "validation": 0.2},
        "task": {"kind": "text-classification", "prompt": "{text}", "max_length": 32},
        "partition": {"kind": "iid", "clients": 2},
        "method": {"name": "fedsmoothlora", "gamma": 16, "calibration_batches": 1},
        "training": {"rounds": 2, "batch_size": 8, "lr": 0.02},
        "machine": {"threads": 1, "device": "cpu"},
    }


def quiet(table: dict[str, Any], out: Path) -> session.Result:
    return run(table, out=out, console=Console(file=io.StringIO()))


def frozen(table: dict[str, Any], pooling: str) -> dict[str, Any]:
    return {**table, "task": {**table["task"], "frozen_features": pooling}}


def test_a_mean_is_that_of_the_last_layers_tokens(table: dict[str, Any], tiny_bert: Path) -> None:
    simulation = build(plan(read(frozen(table, "mean"))))
    found = simulation.clients["0"].batch(range(5))
    texts = build(plan(read(table))).clients["0"].batch(range(5))
    base = AutoModel.from_pretrained(tiny_bert).eval()
    for row in range(5):
        ids = texts["input_ids"][row][texts["attention_mask"][row].bool()]
        with torch.inference_mode():
            wanted = base(input_ids=ids[None]).last_hidden_state[0].mean(dim=0)
        torch.testing.assert_close(found["inputs"][row], wanted, rtol=1e-4, atol=1e-5)
    assert torch.equal(found["labels"], texts["labels"])


def test_training_on_what_the_head_is_handed_is_training_the_whole_model(
    table: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_model = TextClassification.load_model

    def without_dropout(*given: Any, **more: Any) -> Any:
        loaded = load_model(*given, **more)
        for module in loaded.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        return loaded

    monkeypatch.setattr(TextClassification, "load_model", without_dropout)
    whole = quiet(table, tmp_path / "whole")
    head = quiet(frozen(table, "head"), tmp_path / "head")
    assert head.values("loss") == pytest.approx(whole.values("loss"), rel=1e-4)
    assert head.values("loss")[-1] < head.values("loss")[0]


def test_the_saved_model_reads_texts(table: dict[str, Any], tmp_path: Path) -> None:
    result = quiet(frozen(table, "head"), tmp_path / "run")
    folder = tmp_path / "run" / "model"
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    simulation = build(plan(read(table)))
    total = rows = 0.0
    for part in simulation.validation.values():
        metrics = simulation.learner.objective.evaluate(model, part, 16, lambda batch: batch).metrics
        total, rows = total + metrics["loss"] * len(part), rows + len(part)
    assert total / rows == pytest.approx(result.values("loss")[-1], rel=1e-4)
    assert AutoTokenizer.from_pretrained(folder).eos_token == "<end>"


def test_no_model_is_saved_that_no_class_of_transformers_computes(
    table: dict[str, Any], tmp_path: Path
) -> None:
    quiet(frozen(table, "mean"), tmp_path / "run")
    assert not (tmp_path / "run" / "model").exists()
    with pytest.raises(ExportError, match="mean of the tokens"):
        export(tmp_path / "run", out=tmp_path / "out", console=Console(file=io.StringIO()))


def test_features_are_evaluated_once(
    table: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned = plan(read(frozen(table, "head")))
    first = build(planned).clients["0"].batch([0, 1])["inputs"]
    (folder,) = (tmp_path / "cache" / "features").iterdir()  # one client's rows are all training rows

    def never(*given: Any) -> None:
        raise AssertionError("evaluated again")

    monkeypatch.setattr(features, "features", never)
    again = build(plan(read(frozen(table, "head")))).clients["0"].batch([0, 1])["inputs"]
    assert torch.equal(first, again)
    assert folder.name.startswith("head-")
    for changes in ({"task.max_length": 5}, {"task.prompt": "a {text}"}, {"task.frozen_features": "mean"}):
        with pytest.raises(AssertionError, match="evaluated again"):
            build(plan(read(frozen(table, "head"), changes)))


@pytest.mark.parametrize("pooling", ["head", "mean"])
def test_other_rows_become_vectors_of_the_pretrained_model_after_it_was_adapted(
    table: dict[str, Any], pooling: str
) -> None:
    planned = plan(read(frozen(table, pooling)))
    expected = build(planned).clients["0"].batch([0, 1, 2])
    rows = planned.train.take(planned.training_rows("0")[:3])
    found = planned.task_data.examples(rows).batch([0, 1, 2])
    torch.testing.assert_close(found["inputs"], expected["inputs"], rtol=1e-4, atol=1e-5)
    assert torch.equal(found["labels"], expected["labels"])


def test_a_head_that_is_no_single_linear_layer_is_refused(table: dict[str, Any], tiny_gpt2: Path) -> None:
    table["lora"]["target_modules"] = ["score"]
    table["model"]["source"] = str(tiny_gpt2)
    with pytest.raises(ValueError, match="one vector for each row"):
        build(plan(read(frozen(table, "head"))))


def test_layers_below_a_frozen_feature_cannot_be_adapted(table: dict[str, Any]) -> None:
    table["lora"]["target_modules"] = ["query", "classifier"]
    with pytest.raises(ConfigError, match=r"query.*task\.frozen_features"):
        plan(read(frozen(table, "mean")))


def test_images_have_no_frozen_features(table: dict[str, Any]) -> None:
    table["task"] = {"kind": "image-classification", "frozen_features": "mean"}
    with pytest.raises(
        ConfigError,
        match=r"task\.frozen_features = 'mean' belongs to task\.kind = .*'text-classification'.*, not 'image",
    ):
        read(table)


def test_the_head_is_found_by_its_kind(tiny_bert: Path) -> None:
    loaded = TextClassification().load_model(ModelSettings(source=str(tiny_bert)), WORDS, seed=0)
    assert features.linear_head(loaded) == "classifier"
