"""An adapter is loaded onto the model that it was trained on, and refused for any other."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from tiny_models import Kind, delta, make_kinds, make_llama
from torch import Tensor

from fedsmoothlora import load_adapter
from fedsmoothlora.errors import NoExportError, WrongBaseError
from fedsmoothlora.exports.merged import merge
from fedsmoothlora.exports.trained import Trained
from fedsmoothlora.logs import quiet_libraries
from fedsmoothlora.modeling.fingerprint import weights_sha256


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Kind]:
    return make_kinds(tmp_path_factory.mktemp)


def trained_llama(kind: Kind) -> Trained:
    layer = "model.layers.0.self_attn.q_proj"
    return Trained(deltas={layer: delta(kind.base().model, layer, 2)})


def trained_bert(kind: Kind) -> Trained:
    layer = "bert.encoder.layer.0.attention.self.query"
    head = {"classifier.weight": torch.ones(3, 32), "classifier.bias": torch.ones(3)}
    return Trained(deltas={layer: delta(kind.base().model, layer, 2)}, head=head)


TRAINED = {"llama": trained_llama, "bert": trained_bert}


def exported(kind: Kind, trained: Trained, out: Path, as_: str = "adapter") -> Path:
    with quiet_libraries():
        return kind.write(trained, as_, out)


def logits_of(kind: Kind, trained: Trained) -> Tensor:
    model = kind.base().model
    merge(trained, model)
    return kind.logits(model)


@pytest.mark.parametrize("name", TRAINED)
def test_an_adapter_finds_its_base_by_itself(kinds: dict[str, Kind], tmp_path: Path, name: str) -> None:
    kind = kinds[name]
    trained = TRAINED[name](kind)
    folder = exported(kind, trained, tmp_path / "out")
    wanted = logits_of(kind, trained)
    # The head that the checkpoint lacks was drawn from another seed each time: it is not part of the hash.
    for base in (None, kind.source, kind.base().model):
        torch.testing.assert_close(kind.logits(load_adapter(folder, base)), wanted, rtol=1e-4, atol=1e-4)


def test_another_base_is_refused_with_both_hashes(kinds: dict[str, Kind], tmp_path: Path) -> None:
    kind = kinds["llama"]
    folder = exported(kind, trained_llama(kind), tmp_path / "out")
    right, other = kind.base().model, make_llama()
    other.save_pretrained(tmp_path / "other")
    for base, named in ((str(tmp_path / "other"), "other"), (other, "the given module")):
        with pytest.raises(WrongBaseError) as raised:
            load_adapter(folder, base)
        for word in (str(folder), named, weights_sha256(right)[:16], weights_sha256(other)[:16]):
            assert word in str(raised.value)


def test_one_changed_weight_is_another_base(kinds: dict[str, Kind], tmp_path: Path) -> None:
    kind = kinds["llama"]
    folder = exported(kind, trained_llama(kind), tmp_path / "out")
    for name, value in kind.base().model.state_dict().items():
        base = kind.base().model
        with torch.no_grad():
            base.state_dict()[name].view(-1)[-1] += 1e-3
        with pytest.raises(WrongBaseError):
            load_adapter(folder, base)
        assert value.numel()


def test_a_trained_model_is_not_a_base(kinds: dict[str, Kind], tmp_path: Path) -> None:
    kind = kinds["llama"]
    trained = trained_llama(kind)
    adapter, merged = (exported(kind, trained, tmp_path / as_, as_) for as_ in ("adapter", "merged"))
    with pytest.raises(WrongBaseError):  # the change would be in it twice
        load_adapter(adapter, str(merged))


def test_a_base_in_bfloat16_has_the_hash_of_its_values(kinds: dict[str, Kind]) -> None:
    model = kinds["llama"].base().model
    rounded = model.bfloat16()
    assert weights_sha256(rounded) == weights_sha256(rounded.float())
    assert weights_sha256(rounded) != weights_sha256(kinds["llama"].base().model)


def test_an_export_without_a_recorded_hash_is_loaded(kinds: dict[str, Kind], tmp_path: Path) -> None:
    kind = kinds["llama"]
    trained = trained_llama(kind)
    folder = exported(kind, trained, tmp_path / "out")
    facts = json.loads((folder / "fedsmoothlora.json").read_text())
    del facts["base"]["sha256"]
    (folder / "fedsmoothlora.json").write_text(json.dumps(facts))
    torch.testing.assert_close(
        kind.logits(load_adapter(folder)), logits_of(kind, trained), rtol=1e-4, atol=1e-4
    )


# Each holds the same changes of one DINOv2, exported under another release, whose layers have other names.
RELEASES = Path(__file__).parents[1] / "recorded" / "releases"
releases = pytest.mark.parametrize("release", ["transformers-5.0", "transformers-5.23"])


@releases
def test_an_adapter_of_another_release_of_transformers_is_loaded(
    release: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(RELEASES)
    recorded = load_file("outputs.safetensors")
    with torch.no_grad():
        model = load_adapter(release)
        found = model(pixel_values=recorded["pixel_values"]).logits
        with model.disable_adapter():
            base = model(pixel_values=recorded["pixel_values"]).logits
    torch.testing.assert_close(found, recorded["logits"], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(base, found, atol=1e-2)
    assert sum(isinstance(module, LoraLayer) for module in model.modules()) == 3


@releases
def test_an_adapter_of_another_release_is_refused_for_other_weights_and_unknown_layers(
    release: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied = Path(shutil.copytree(RELEASES, tmp_path / "releases"))
    monkeypatch.chdir(copied)
    facts = json.loads((copied / release / "fedsmoothlora.json").read_text())
    next(iter(facts["layers"].values()))["saved"] = "encoder.gone"
    facts["base"]["sha256"] = "0" * 64  # as under other names
    (copied / release / "fedsmoothlora.json").write_text(json.dumps(facts))
    with pytest.raises(NoExportError, match="does not have: load it with the release of the export"):
        load_adapter(release)
    weights = load_file("vit/model.safetensors")
    weights["layernorm.bias"] += 1
    save_file(weights, "vit/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(WrongBaseError):
        load_adapter(release)


@pytest.mark.parametrize("what", ["missing", "empty", "foreign", "merged", "list"])
def test_a_folder_without_an_exported_adapter_is_refused(
    kinds: dict[str, Kind], tmp_path: Path, what: str
) -> None:
    folder = tmp_path / "folder"
    if what == "merged":
        exported(kinds["llama"], trained_llama(kinds["llama"]), folder, "merged")
    elif what != "missing":
        folder.mkdir()
    if what in ("foreign", "list"):
        table = {"base": {}} if what == "foreign" else []
        (folder / "fedsmoothlora.json").write_text(json.dumps(table))
    with pytest.raises(NoExportError, match=str(folder)):
        load_adapter(folder)
