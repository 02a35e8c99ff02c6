"""All errors are below one base class, and the command line prints those that users cause in one line."""

import ast
import errno
import io
import json
import os
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import ResNetConfig, ResNetForImageClassification, ViTConfig, ViTForImageClassification

import fedsmoothlora
from fedsmoothlora import Federation, cli, errors
from fedsmoothlora.errors import (
    DataError,
    FedSmoothLoRAError,
    GenerationError,
    NoExportError,
    PrecisionError,
    StateError,
    StorageError,
)
from fedsmoothlora.exports.generation import generate
from fedsmoothlora.modeling.adapters import AdaptedModel
from fedsmoothlora.modeling.settings import LoraSettings
from fedsmoothlora.runs.session import run
from fedsmoothlora.storage.files import write_text
from fedsmoothlora.storage.run_folder import RunFolder

PACKAGE = Path(fedsmoothlora.__file__).parent
Call = Callable[..., str]


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """Run the command line, which must end with one line and exit code 2; the line."""

    def call(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["fedsmoothlora", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert stop.value.code == 2
        said = capsys.readouterr().err
        assert said.startswith("error: ")
        assert said.count("\n") == 1
        return said

    return call


@pytest.fixture
def resnet(tmp_path: Path) -> Path:
    """A model that cannot checkpoint gradients."""
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1])
    ResNetForImageClassification(config).save_pretrained(tmp_path / "resnet")
    return tmp_path / "resnet"


def write(table: dict[str, Any], folder: Path, **sections: dict[str, Any]) -> Path:
    """Write a configuration with these keys; its method is FedIT, which works with every model."""
    table["training"] |= {"rounds": 1, "steps": 1}
    for name, keys in {"method": {"name": "fedit"}, **sections}.items():
        table[name] = keys if name == "method" else table.get(name, {}) | keys
    path = folder / "config.toml"
    path.write_text(tomli_w.dumps(table))
    return path


def test_every_error_is_below_the_base_class_and_a_built_in_one() -> None:
    found = [value for value in vars(errors).values() if isinstance(value, type)]
    assert len(found) > 20
    for error in set(found) - {FedSmoothLoRAError}:
        assert issubclass(error, FedSmoothLoRAError)
        assert issubclass(error, (ValueError, RuntimeError, OSError))
    assert fedsmoothlora.FedSmoothLoRAError is FedSmoothLoRAError


def test_errors_are_defined_in_one_module() -> None:
    for path in PACKAGE.rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names = [node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
        public = [name for name in names if name.endswith("Error") and not name.startswith("_")]
        assert not public or path.name == "errors.py", f"{path}: {public}"


@pytest.mark.parametrize("command", ["check", "run"])
def test_checkpointing_an_unsupported_model_is_one_line(
    refused: Call, toy_table: dict[str, Any], resnet: Path, tmp_path: Path, command: str
) -> None:
    file = write(
        toy_table,
        tmp_path,
        model={"source": str(resnet), "head": "full"},
        lora={"target_modules": []},
        training={"gradient_checkpointing": True},
    )
    out = ("--out", tmp_path / "out") if command == "run" else ()
    assert "training.gradient_checkpointing = true: ResNet" in refused(command, file, *out)


def test_a_model_that_cannot_compute_the_data_is_one_line_of_check(
    refused: Call, toy_table: dict[str, Any], tmp_path: Path
) -> None:
    config = ViTConfig(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=28,
        patch_size=14,
        num_channels=1,
    )
    ViTForImageClassification(config).save_pretrained(tmp_path / "gray")
    file = write(toy_table, tmp_path, model={"source": str(tmp_path / "gray")})
    assert "cannot compute a training batch" in refused("check", file)


@pytest.mark.parametrize("weights", ["missing", "cut off", "of a wrapper", "cut off, of torch"])
def test_weights_that_cannot_be_loaded_are_one_line(
    refused: Call, toy_table: dict[str, Any], resnet: Path, tmp_path: Path, weights: str
) -> None:
    file = resnet / "model.safetensors"
    if weights == "missing":
        file.unlink()
    elif weights == "of a wrapper":  # every parameter would be drawn at random
        save_file({f"net.{name}": value for name, value in load_file(file).items()}, file)
    elif weights == "cut off, of torch":
        torch.save(load_file(file), file.with_name("pytorch_model.bin"))
        file.unlink()
        whole = file.with_name("pytorch_model.bin").read_bytes()
        file.with_name("pytorch_model.bin").write_bytes(whole[:1000])
    else:
        file.write_bytes(file.read_bytes()[:1000])
    config = write(toy_table, tmp_path, model={"source": str(resnet)}, lora={"target_modules": []})
    said = refused("run", config, "--out", tmp_path / "out")
    if weights == "of a wrapper":
        assert f"model.source = '{resnet}': its weights have no parameter of" in said
        assert "the first of their names is 'net." in said
    else:
        assert f"model.source = '{resnet}': its weights cannot be loaded" in said


def test_a_broken_image_that_was_not_verified_is_one_line(
    refused: Call, toy_table: dict[str, Any], tmp_path: Path
) -> None:
    for label in ("cat", "dog"):
        (tmp_path / "images" / label).mkdir(parents=True)
        for number in range(8):
            Image.new("RGB", (28, 28)).save(tmp_path / "images" / label / f"{number}.png")
    for file in (tmp_path / "images").rglob("*.png"):
        file.write_bytes(file.read_bytes()[:50])
    toy_table["data"] = {}
    file = write(
        toy_table,
        tmp_path,
        data={"source": str(tmp_path / "images"), "verify": False, "validation": 0.25},
        partition={"kind": "iid", "clients": 2},
    )
    tables = toy_table["partition"]
    for key in ("alpha", "min_size"):
        tables.pop(key)
    file.write_text(tomli_w.dumps(toy_table))
    said = refused("run", file, "--out", tmp_path / "out")
    assert ".png" in said
    assert "cannot be read" in said or "Pillow" in said


def test_a_label_without_a_logit_is_an_error_of_the_data(tmp_path: Path) -> None:
    rows = [(torch.randn(4), 0), (torch.randn(4), 3)]
    federation = Federation(
        nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)),
        [rows],
        test=rows,
        method="fedit",
        lora={"r": 1, "alpha": 1, "target_modules": ["0"]},
        training={"rounds": 1, "lr": 0.1},
        machine={"threads": 1, "device": "cpu"},
    )
    with pytest.raises(DataError, match="label 3 in the data"):
        federation.run(tmp_path / "out", console=Console(file=io.StringIO()))


def test_a_head_in_integers_is_an_error_of_precision() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    model[1].weight = nn.Parameter(torch.ones(2, 4, dtype=torch.int8), requires_grad=False)
    with pytest.raises(PrecisionError, match="head has quantised weights"):
        AdaptedModel(model, LoraSettings(r=1, alpha=1, target_modules=("0",)), head=("1",))


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("partition.json", "{", "partition.json is not valid JSON"),
        ("metrics.jsonl", "{\n", "metrics.jsonl, line 1: not valid JSON"),
        ("config.toml", "=", "not valid TOML"),
    ],
)
def test_an_altered_run_folder_cannot_be_exported(
    refused: Call, toy_table: dict[str, Any], tmp_path: Path, name: str, text: str, said: str
) -> None:
    file = write(toy_table, tmp_path)
    run(file, out=tmp_path / "run", console=Console(file=io.StringIO()))
    (tmp_path / "run" / name).write_text(text)
    assert said in refused("export", tmp_path / "run", "--out", tmp_path / "export")


def test_a_missing_file_of_a_run_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(StateError, match=r"environment\.json cannot be read: No such file"):
        RunFolder(tmp_path).read_json("environment.json")


@pytest.fixture
def exported(tiny_llama: Path, tmp_path: Path) -> Path:
    """A language model with the facts of an export."""
    folder = tmp_path / "exported"
    folder.mkdir()
    for file in tiny_llama.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    base = {"source": None, "revision": None, "sha256": "", "without": []}
    facts = {"as": "merged", "base": base, "task": "text-generation", "classes": [], "prompt": None}
    (folder / "fedsmoothlora.json").write_text(json.dumps(facts))
    return folder


def test_an_empty_prompt_is_one_line(refused: Call, exported: Path) -> None:
    assert "the prompt is empty" in refused("generate", exported, "")


@pytest.mark.parametrize("temperature", [float("nan"), float("inf"), -1.0])
def test_a_temperature_must_be_a_finite_number(exported: Path, temperature: float) -> None:
    with pytest.raises(GenerationError, match="temperature"):
        generate(exported, "one", temperature=temperature)


@pytest.mark.parametrize("altered", ["missing weights", "cut weights", "other prompt", "no task"])
def test_an_altered_export_is_one_line(refused: Call, exported: Path, altered: str) -> None:
    weights, facts = exported / "model.safetensors", exported / "fedsmoothlora.json"
    table = json.loads(facts.read_text())
    if altered == "missing weights":
        weights.unlink()
    elif altered == "cut weights":
        weights.write_bytes(weights.read_bytes()[:1000])
    elif altered == "other prompt":
        facts.write_text(json.dumps(table | {"prompt": {"temp": "late"}}))
    else:
        del table["task"]
        facts.write_text(json.dumps(table))
    assert str(exported) in refused("generate", exported, "one")
    with pytest.raises(NoExportError):
        generate(exported, "one")


def test_a_file_where_a_folder_should_be_is_named(
    refused: Call, toy_table: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    out = tmp_path / "file" / "out"
    assert refused("run", write(toy_table, tmp_path), "--out", out) == (
        f"error: {out} cannot be written: Not a directory\n"
    )


def test_an_error_of_the_system_that_names_no_file_keeps_its_traceback(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail() -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    # By its name: in the package, `main` is the function.
    monkeypatch.setattr(import_module("fedsmoothlora.cli.main"), "app", fail)
    with pytest.raises(OSError, match="Input/output"):
        cli.main()


def test_a_full_disk_names_the_file_and_leaves_the_old_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def full(*_: object, **__: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    write_text(tmp_path / "file", "old")
    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(StorageError, match=r"file cannot be written: No space left on device"):
        write_text(tmp_path / "file", "new")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


@pytest.mark.parametrize("arguments", [["lst"], ["flower", "initt"]])
def test_a_mistyped_command_is_suggested_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["fedsmoothlora", *arguments])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    assert capsys.readouterr().err.count("Did you mean") == 1
