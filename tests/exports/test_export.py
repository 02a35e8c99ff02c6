"""Runs exported from their folders: finished or not, whole or by client, without their data."""

from __future__ import annotations

import hashlib
import io
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForImageClassification

import fedsmoothlora
from conftest import FinishedRuns
from families import by_family
from fedsmoothlora import Federation, export, load_adapter, methods
from fedsmoothlora.data import registry
from fedsmoothlora.data.images import ImageExamples
from fedsmoothlora.errors import ExportError, InterruptedRunError, NotKeptError, StateError
from fedsmoothlora.federation.client import Learner
from fedsmoothlora.logs import quiet_libraries
from fedsmoothlora.methods import registry as method_registry
from fedsmoothlora.modeling.loading import image_processor
from fedsmoothlora.modeling.settings import ModelSettings
from fedsmoothlora.runs.session import run
from layer_names import QUERY

GLOBAL = [name for name in methods.names() if methods.find(name).traits.global_model]


def quiet() -> Console:
    return Console(file=io.StringIO(), width=200)


@pytest.fixture
def ran(toy_table: dict[str, Any], finished_runs: FinishedRuns, tmp_path: Path) -> Callable[..., Path]:
    """``ran({"method.name": "fedit"})``: the folder of a finished run."""

    def make(overrides: dict[str, Any] | None = None, name: str = "run") -> Path:
        return finished_runs.copy(toy_table, {"training.steps": 3, **(overrides or {})}, tmp_path / name)

    return make


Ran = Callable[..., Path]


@pytest.fixture
def pixels() -> Tensor:
    return torch.randn(5, 3, 28, 28, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def merged_logits(folder: Path, pixels: Tensor) -> Tensor:
    with quiet_libraries():
        model = AutoModelForImageClassification.from_pretrained(folder).eval()
    logits: Tensor = model(pixels).logits
    return logits


@torch.no_grad()
def adapter_logits(folder: Path, pixels: Tensor) -> Tensor:
    logits: Tensor = load_adapter(folder)(pixels).logits
    return logits


def last(folder: Path, name: str, client: str | None = None) -> float:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    found = [line["value"] for line in lines if (line["name"], line["client"]) == (name, client)]
    value: float = found[-1]
    return value


def loss_on_test(model: torch.nn.Module, tiny_folder: Path) -> float:
    images = registry.packaged("fedsmoothlora.data.packaged")["textures"].load()[1]
    examples = ImageExamples(images, image_processor(ModelSettings(source=str(tiny_folder), image_size=28)))
    batch = examples.batch(range(len(examples)))
    with torch.no_grad():
        logits = model(**{name: value for name, value in batch.items() if name != "labels"}).logits
    return float(torch.nn.functional.cross_entropy(logits.double(), batch["labels"]))


@pytest.mark.parametrize("method", by_family(GLOBAL))
def test_the_adapter_of_every_method_equals_its_model(
    ran: Ran, tmp_path: Path, tiny_folder: Path, method: str
) -> None:
    folder = ran({"method.name": method})
    shown = io.StringIO()
    export(folder, out=tmp_path / "adapter", console=Console(file=shown, width=200))
    assert re.search(r"LoRA on 6 layers, rank \d+; whole: classifier", shown.getvalue())
    found = loss_on_test(load_adapter(tmp_path / "adapter"), tiny_folder)
    assert found == pytest.approx(last(folder, "loss"), rel=1e-4)


def test_a_run_and_export_as_merged_write_the_same_model(ran: Ran, tmp_path: Path) -> None:
    folder = ran()
    before = digests(folder)
    export(folder, "merged", out=tmp_path / "merged", console=quiet())
    assert digests(tmp_path / "merged") == digests(folder / "model")
    assert digests(folder) == before  # and nothing in the run's folder was touched
    assert {path.name for path in (folder / "model").iterdir()} == {
        "README.md",
        "config.json",
        "fedsmoothlora.json",
        "model.safetensors",
        "preprocessor_config.json",
    }


def digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_a_frozen_random_head_goes_with_its_lora_merged(ran: Ran, tmp_path: Path, pixels: Tensor) -> None:
    folder = ran(
        {
            "model.head": "lora",
            "lora.head_r": 1,
            "lora.target_modules": [QUERY, "classifier"],
        }
    )
    export(folder, out=tmp_path / "adapter", console=quiet())
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["modules_to_save"], config["target_modules"]) == (["classifier"], [QUERY])
    torch.testing.assert_close(
        adapter_logits(tmp_path / "adapter", pixels),
        merged_logits(folder / "model", pixels),
        rtol=1e-4,
        atol=1e-4,
    )


def test_a_run_of_the_head_alone_has_an_adapter_too(ran: Ran, tmp_path: Path, pixels: Tensor) -> None:
    folder = ran({"lora.target_modules": []})
    export(folder, out=tmp_path / "adapter", console=quiet())
    torch.testing.assert_close(
        adapter_logits(tmp_path / "adapter", pixels), merged_logits(folder / "model", pixels)
    )


def test_an_adapter_of_limited_rank_records_every_layers_error(ran: Ran, tmp_path: Path) -> None:
    folder = ran()
    shown = io.StringIO()
    export(folder, "adapter:2", out=tmp_path / "adapter", console=Console(file=shown, width=200))
    layers = json.loads((tmp_path / "adapter" / "fedsmoothlora.json").read_text())["layers"]
    assert len(layers) == 6
    for name, facts in layers.items():
        assert (facts["exact_rank"], facts["rank"]) == (6, 2)  # three updates of rank 2
        assert 0 < facts["relative_error"] < 1
        error = f"relative error {facts['relative_error']:.2e}"
        assert f"  {name} (32 x 32): rank 2 of 6, {error}\n" in shown.getvalue()
    assert "the exact sum has rank 6" in shown.getvalue()


def test_the_same_scale_by_rslora_or_not_gives_the_same_adapter(ran: Ran, tmp_path: Path) -> None:
    for name, lora in (("plain", {"lora.alpha": 4.0}), ("rslora", {"lora.alpha": 8**0.5})):
        folder = ran({**lora, "lora.use_rslora": name == "rslora"}, name)
        export(folder, out=tmp_path / f"{name}-adapter", console=quiet())
    plain, rslora = (tmp_path / f"{name}-adapter" for name in ("plain", "rslora"))
    configs = [(folder / "adapter_config.json").read_text() for folder in (plain, rslora)]
    assert configs[0] == configs[1]
    assert '"use_rslora": false' in configs[0]
    one, other = (load_file(folder / "adapter_model.safetensors") for folder in (plain, rslora))
    for name in (name for name in one if "lora_A" in name):
        products = [t[name.replace("lora_A", "lora_B")] @ t[name] for t in (one, other)]
        torch.testing.assert_close(products[0], products[1], rtol=1e-3, atol=1e-5)


def test_ranks_that_servers_refuse_are_noted(ran: Ran, tmp_path: Path) -> None:
    folder = ran({"method.name": "full"})
    shown = io.StringIO()
    export(folder, out=tmp_path / "adapter", console=Console(file=shown, width=200))
    assert "rank 32" in shown.getvalue()
    assert "on 6 layers it is larger than their weights: --as merged is smaller" in shown.getvalue()
    assert "vLLM serves ranks up to 16, or 512 with --max-lora-rank" in shown.getvalue()


@pytest.mark.parametrize("method", ["fedsmoothlora", "fedsa", "local"])
def test_the_only_clients_own_model_is_the_one_that_was_measured(
    ran: Ran, tmp_path: Path, tiny_folder: Path, method: str
) -> None:
    folder = ran({"method.name": method, "partition": {"kind": "iid", "clients": 1}})
    export(folder, client="0", out=tmp_path / "adapter", console=quiet())
    found = loss_on_test(load_adapter(tmp_path / "adapter"), tiny_folder)
    # Of one client, the global model is its own.
    assert found == pytest.approx(last(folder, "loss"), rel=1e-4)


def test_each_clients_own_model_is_the_one_that_was_measured(
    ran: Ran, tmp_path: Path, tiny_folder: Path
) -> None:
    folder = ran({"method.name": "local"})
    for client in ("0", "1", "2"):
        out = tmp_path / client
        export(folder, "merged", client=client, out=out, console=quiet())
        with quiet_libraries():
            model = AutoModelForImageClassification.from_pretrained(out).eval()
        assert loss_on_test(model, tiny_folder) == pytest.approx(
            last(folder, "on_test_loss", client), rel=1e-4
        )
        assert f"{last(folder, 'on_test_accuracy', client):.4f}" in (out / "README.md").read_text()


def test_impossible_exports_are_refused_before_anything_is_written(ran: Ran, tmp_path: Path) -> None:
    folder, out = ran({"method.name": "fedit"}), tmp_path / "out"
    for client, words in (("0", "has no model of its own"), ("nobody", "0, 1, 2")):
        with pytest.raises(NotKeptError, match=words):
            export(folder, client=client, out=out, console=quiet())
    for as_ in ("adaptor", "adapter:0", "adapter:x", "adapter:", "merged:2"):
        with pytest.raises(ExportError, match=f"{as_}.*merged, adapter, or adapter:RANK"):
            export(folder, as_, out=out, console=quiet())
    with pytest.raises(ExportError, match=r"no config\.toml"):
        export(tmp_path, out=out, console=quiet())
    assert not out.exists()
    with pytest.raises(ExportError, match="not empty"):
        export(folder, out=folder, console=quiet())


def test_an_older_round_is_exported_while_its_checkpoint_is_kept(
    ran: Ran, tmp_path: Path, tiny_folder: Path
) -> None:
    folder = ran({"checkpoint.keep": 2})
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    (loss,) = [x["value"] for x in lines if (x["round"], x["client"], x["name"]) == (2, None, "loss")]
    export(folder, out=tmp_path / "two", round=2, console=quiet())
    assert loss_on_test(load_adapter(tmp_path / "two"), tiny_folder) == pytest.approx(loss, rel=1e-4)
    with pytest.raises(StateError, match=r"no checkpoint after round 7; it has checkpoints after .*2, 3"):
        export(folder, out=tmp_path / "seven", round=7, console=quiet())


def test_an_unfinished_run_is_exported_without_its_data(
    toy_table: dict[str, Any],
    tmp_path: Path,
    tiny_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    visits, visit = 0, Learner.visit

    def stopping(self: Learner, *arguments: Any) -> Any:
        nonlocal visits
        visits += 1
        if visits == 5:  # in the second round
            raise InterruptedRunError("stop")
        return visit(self, *arguments)

    monkeypatch.setattr(Learner, "visit", stopping)
    with pytest.raises(InterruptedRunError):
        run(toy_table, out=tmp_path / "run", console=quiet())
    with monkeypatch.context() as gone:
        gone.setattr(registry, "packaged", lambda folder: {})
        text = (tmp_path / "run" / "config.toml").read_text().replace("pkg:textures", "gone")
        (tmp_path / "run" / "config.toml").write_text(text)
        export(tmp_path / "run", out=tmp_path / "adapter", console=quiet())
    found = loss_on_test(load_adapter(tmp_path / "adapter"), tiny_folder)
    assert found == pytest.approx(last(tmp_path / "run", "loss"), rel=1e-4)
    assert "1 of 3" in (tmp_path / "adapter" / "README.md").read_text()


def test_a_run_without_a_finished_round_is_not_exported(
    toy_table: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(self: Learner, *arguments: Any) -> Any:
        raise InterruptedRunError("stop")

    monkeypatch.setattr(Learner, "visit", stopped)
    with pytest.raises(InterruptedRunError):
        run(toy_table, out=tmp_path / "run", console=quiet())
    assert [path.name for path in (tmp_path / "run" / "checkpoints").glob("*.json")] == ["0000.json"]
    for as_, round in (("merged", None), ("adapter", None), ("adapter:1", 0)):
        with pytest.raises(ExportError, match="has no finished round"):
            export(tmp_path / "run", as_, out=tmp_path / "out", round=round, console=quiet())
    assert not (tmp_path / "out").exists()


def test_a_run_of_relative_paths_is_exported_from_any_folder(
    toy_table: dict[str, Any],
    tmp_path: Path,
    tiny_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shutil.copytree(tiny_folder, tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    toy_table["model"]["source"] = "./base"
    short = {"training.rounds": 1, "training.steps": 1}
    run(toy_table, short, out="run", console=quiet(), outputs=False)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    export(tmp_path / "run", out="adapter", console=quiet())
    written = json.loads((tmp_path / "elsewhere" / "adapter" / "adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == str(tmp_path / "base")
    assert load_adapter("adapter") is not None
    monkeypatch.chdir(tmp_path)
    run(toy_table, short, resume="run", console=quiet())  # relative again, and the same
    assert (tmp_path / "run" / "model").is_dir()


PREPARING = """
from dataclasses import dataclass
from typing import ClassVar

from fedsmoothlora.algebra.lowrank import LowRank
from fedsmoothlora.methods import Start
from fedsmoothlora.methods.local import Local


@dataclass(frozen=True, kw_only=True)
class Preparing(Local):
    \"\"\"Local training whose starts depend on the pretrained weights.\"\"\"

    name: ClassVar[str] = "preparing"

    def prepare(self, layers, pretrained):
        weights = {name: pretrained(name) for name in layers}
        return {name: LowRank(W[:, :1].contiguous(), W[:1].contiguous()) for name, W in weights.items()}

    def start(self, client):
        shift = {name: client.prepared[name] for name in client.layers}
        return Start(lora=super().start(client).lora, shift=shift)
"""


def test_a_clients_model_of_an_installed_method_that_prepares_from_the_weights(
    toy_table: dict[str, Any], tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = tmp_path / "site" / "preparing-1.0.dist-info"
    info.mkdir(parents=True)
    (tmp_path / "site" / "preparing.py").write_text(PREPARING)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: preparing\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[fedsmoothlora.methods]\npreparing = preparing:Preparing\n")
    method_registry._installed.cache_clear()
    with monkeypatch.context() as installed:
        installed.syspath_prepend(tmp_path / "site")
        toy_table |= {"method": {"name": "preparing"}}
        run(toy_table, {"training.rounds": 1}, out=tmp_path / "run", console=quiet(), outputs=False)
        export(tmp_path / "run", client="1", out=tmp_path / "adapter", console=quiet())
    method_registry._installed.cache_clear()
    found = loss_on_test(load_adapter(tmp_path / "adapter"), tiny_folder)
    assert found == pytest.approx(last(tmp_path / "run", "on_test_loss", "1"), rel=1e-4)


def test_the_exact_rank_is_the_updates_while_that_is_less_than_full(ran: Ran, tmp_path: Path) -> None:
    folder = ran({"method.name": "ffa"})  # one A for all rounds
    export(folder, out=tmp_path / "adapter", console=quiet())
    assert json.loads((tmp_path / "adapter" / "fedsmoothlora.json").read_text())["rank"] == 2


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.hidden = torch.nn.Linear(16, 32)
        self.classifier = torch.nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(torch.relu(self.hidden(x)))


@pytest.mark.usefixtures("ran")
def test_a_federation_of_ones_own_model_saves_an_adapter(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = Net()
    data = torch.utils.data.TensorDataset(torch.randn(24, 16), torch.randint(4, (24,)))
    federation = Federation(
        net,
        [data, data],
        test=data,
        head=["classifier"],
        lora={"r": 2, "target_modules": ["hidden"]},
        options={"gamma": 16, "calibration_batches": 1},
        training={"rounds": 2, "batch_size": 8, "lr": 0.05},
        machine={"threads": 1, "device": "cpu"},
    )
    federation.run(out=tmp_path / "run", console=quiet())
    out = federation.save_adapter(tmp_path / "adapter")
    x = torch.randn(3, 16)
    with torch.no_grad():
        wanted = federation.model()(x)
        assert not torch.allclose(wanted, net(x))
        fresh = Net()
        fresh.load_state_dict(net.state_dict())
        torch.testing.assert_close(load_adapter(out, fresh)(x), wanted, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="give it as base"):
        load_adapter(out)
    with pytest.raises(ValueError, match="another base model"):
        load_adapter(out, Net())
    federation.save_adapter(tmp_path / "approximation", rank=1)
    facts = json.loads((tmp_path / "approximation" / "fedsmoothlora.json").read_text())
    assert (facts["rank"], facts["exact_rank"]) == (1, 4)
    with pytest.raises(ExportError, match=r"Federation\(\.\.\.\).*save_adapter"):
        export(tmp_path / "run", out=tmp_path / "other", console=quiet())


def test_the_names_are_public() -> None:
    assert {"export", "load_adapter"} <= set(fedsmoothlora.__all__)
    assert callable(fedsmoothlora.export)
