import io
import json
import platform
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file

from families import OF_A_FAMILY
from fedsmoothlora import methods
from fedsmoothlora.config import read, recipes
from fedsmoothlora.data.media_sources import load_images
from fedsmoothlora.data.packaged import mnist_5k
from fedsmoothlora.data.raw import RawImages
from fedsmoothlora.data.settings import DataSettings
from fedsmoothlora.errors import ConfigError
from fedsmoothlora.runs.session import run
from layer_names import QKV, attention

SILENT = Console(file=io.StringIO())
# transformers keeps its old names in files.
IN_MODEL = {
    f"attention.attention.{old}": attention(0, part).partition(".0.")[2]
    for old, part in zip(("query", "key", "value"), QKV, strict=True)
}
# A shipped recipe in a few seconds: everything that costs time is shrunk, nothing else.
SMALL = {
    "training.rounds": 1,
    "training.epochs": None,
    "training.steps": 2,
    "data.train_rows": 200,
    "data.test_rows": 50,
    "partition.clients": 2,
    "machine.threads": 1,
}

# Loads saved models as anyone would, and prints the accuracy and loss of each on images with labels.
PLAIN_TRANSFORMERS = """
import json, sys
import numpy as np, torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification

torch.set_num_threads(1)
saved = np.load(sys.argv[1])
images = [Image.fromarray(pixels) for pixels in saved["pixels"]]
found = []
for folder in sys.argv[2:]:
    model = AutoModelForImageClassification.from_pretrained(folder).eval()
    processor = AutoImageProcessor.from_pretrained(folder)
    with torch.no_grad():
        logits = model(**processor(images, return_tensors="pt")).logits
    loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(saved["labels"]))
    found.append((float((logits.argmax(-1).numpy() == saved["labels"]).mean()), float(loss)))
assert not any(name.partition(".")[0] in ("fedsmoothlora", "peft") for name in sys.modules)
print(json.dumps(found))
"""


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def last(folder: Path, name: str) -> float:
    return [line["value"] for line in lines(folder) if line["client"] is None and line["name"] == name][-1]


def evaluated_elsewhere(
    folders: Sequence[Path], test: RawImages, tmp_path: Path
) -> list[tuple[float, float]]:
    """Accuracy and loss of each folder's model, in a process that does not know this package."""
    np.savez(tmp_path / "test.npz", pixels=test.pixels, labels=test.labels)
    models = [str(folder / "model") for folder in folders]
    done = subprocess.run(
        [sys.executable, "-c", PLAIN_TRANSFORMERS, str(tmp_path / "test.npz"), *models],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [(accuracy, loss) for accuracy, loss in json.loads(done.stdout)]


@pytest.mark.parametrize("recipe", [name for name in sorted(recipes()) if name.startswith("quickstart")])
def test_every_quickstart_recipe_runs(recipe: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = run(recipe, SMALL, out=out, console=SILENT)
    assert result.folder == out
    assert result.accuracy == last(out, "accuracy")
    assert (out / "model" / "model.safetensors").is_file()


@pytest.mark.report
def test_the_folder_has_all_files_of_the_run(toy_table: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "out"
    written = io.StringIO()
    run(toy_table, out=out, console=Console(file=written, width=80))

    # The role of the default has become the names of the model's layers.
    names = {"lora.target_modules": list(QKV)}
    assert read(out / "config.toml") == read(toy_table, names)
    assert json.loads((out / "evaluation.json").read_text()) == {"test_rows": 64}
    assert f"accuracy {last(out, 'accuracy'):.4f} (majority share 0.2500)" in written.getvalue()
    assert "precision" in written.getvalue()

    environment = json.loads((out / "environment.json").read_text())
    assert environment["python"] == platform.python_version()
    assert environment["device"] == "cpu"
    for library in ("fedsmoothlora", "torch", "transformers", "peft"):
        assert environment["libraries"][library] == version(library)
    here = Path(__file__).parent
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=False)
    if head.returncode == 0:
        assert environment["git_commit"].removesuffix("-dirty") == head.stdout.strip()

    found = lines(out)
    assert all(line.keys() == {"round", "client", "name", "value"} for line in found)
    assert {line["round"] for line in found} == {0, 1, 2, 3}
    globally = {(line["round"], line["name"]) for line in found if line["client"] is None}
    for name in ("accuracy", "loss"):
        assert {(round, name) for round in range(4)} <= globally
    for name in ("train_loss", "bytes_up", "bytes_down", "seconds_round", "clients"):
        assert {(round, name) for round in (1, 2, 3)} <= globally
        assert (0, name) not in globally
    clients = {line["client"] for line in found} - {None}
    assert len(clients) == 3
    samples = {line["client"]: line["value"] for line in found if line["name"] == "samples"}
    assert samples.keys() == clients
    assert sum(samples.values()) == 96

    for name in ("accuracy.png", "loss.png"):
        with Image.open(out / name) as picture:
            picture.load()
            assert min(picture.size) > 300
            assert len(set(picture.convert("L").tobytes())) > 10  # something is drawn

    names = {attention(block, part) for block in (0, 1) for part in QKV}
    updates = sorted((out / "updates").iterdir())
    assert [path.name for path in updates] == ["0001.safetensors", "0002.safetensors", "0003.safetensors"]
    for path in updates:
        assert {name: tuple(value.shape) for name, value in load_file(path).items()} == {
            **{f"{name}/B": (32, 2) for name in names},
            **{f"{name}/A": (2, 32) for name in names},
        }
    assert load_file(out / "head.safetensors").keys() == {"classifier.weight", "classifier.bias"}
    assert not list(out.rglob("*.part"))


def test_the_saved_model_is_pretrained_plus_the_scaled_updates_on_disk(
    toy_table: dict[str, Any], tiny_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    run(toy_table, out=out, console=SILENT)
    before, after = (load_file(path / "model.safetensors") for path in (tiny_folder, out / "model"))
    updates = [load_file(path) for path in sorted((out / "updates").iterdir())]
    adapted = 0
    for name, pretrained in before.items():
        layer = f"dinov2.{name}".removesuffix(".weight")
        for in_file, in_model in IN_MODEL.items():
            layer = layer.replace(in_file, in_model)
        if f"{layer}/B" not in updates[0]:
            assert torch.equal(after[f"dinov2.{name}"], pretrained), name
            continue
        adapted += 1
        change = sum(update[f"{layer}/B"] @ update[f"{layer}/A"] for update in updates)
        torch.testing.assert_close(after[f"dinov2.{name}"], pretrained + 2 * change, rtol=1e-4, atol=1e-5)
        assert not torch.equal(after[f"dinov2.{name}"], pretrained)
    assert adapted == 6
    assert not torch.equal(
        after["classifier.weight"], load_file(out / "head.safetensors")["classifier.weight"]
    )


GLOBAL = [name for name in methods.names() if methods.find(name).traits.global_model]


@pytest.mark.parametrize("method", sorted(set(methods.names()) - set(GLOBAL)))
def test_a_method_without_a_global_model_writes_none(
    toy_table: dict[str, Any], tmp_path: Path, method: str
) -> None:
    out = tmp_path / "out"
    run(toy_table, {"method.name": method}, out=out, console=SILENT)
    assert not (out / "model").exists()
    assert last(out, "mean_of_clients") == 3


@pytest.mark.parametrize(
    "names",
    [
        pytest.param(
            [name for name in GLOBAL if name in OF_A_FAMILY], id="of each family", marks=pytest.mark.slow
        ),
        pytest.param(
            [name for name in GLOBAL if name not in OF_A_FAMILY], id="others", marks=pytest.mark.release
        ),
    ],
)
def test_the_saved_model_of_every_method_is_as_good_without_this_package(
    toy_table: dict[str, Any], tmp_path: Path, names: list[str]
) -> None:
    folders = [tmp_path / method for method in names]
    for method, out in zip(names, folders, strict=True):
        run(toy_table, {"method.name": method}, out=out, console=SILENT)
    test = load_images(DataSettings(source="pkg:textures"), 0).test
    assert isinstance(test, RawImages)
    for out, (accuracy, loss) in zip(folders, evaluated_elsewhere(folders, test, tmp_path), strict=True):
        assert accuracy == pytest.approx(last(out, "accuracy"), abs=1e-9), out.name
        assert loss == pytest.approx(last(out, "loss"), rel=1e-4), out.name


def test_the_same_configuration_gives_the_same_metrics(toy_table: dict[str, Any], tmp_path: Path) -> None:
    first, again = tmp_path / "first", tmp_path / "again"
    run(toy_table, out=first, console=SILENT)
    run(first / "config.toml", out=again, console=SILENT)

    def metrics(folder: Path) -> list[dict[str, Any]]:
        return [line for line in lines(folder) if not line["name"].startswith("seconds")]

    assert metrics(first) == metrics(again)
    models = [load_file(folder / "model" / "model.safetensors") for folder in (first, again)]
    assert all(torch.equal(value, models[1][name]) for name, value in models[0].items())


def test_a_folder_in_use_is_refused_and_left_alone(toy_table: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match="already exists and is not empty"):
        run(toy_table, out=tmp_path, console=SILENT)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_an_empty_folder_is_used(toy_table: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    changes = {"training.rounds": 1, "training.steps": 1, "evaluation.test": False, "data.validation": 0.2}
    run(toy_table, changes, out=out, console=SILENT)
    assert (out / "config.toml").is_file()
    assert json.loads((out / "evaluation.json").read_text()) == {"test_rows": None}


def test_overrides_of_a_config_object_are_refused(toy_table: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="overrides"):
        run(read(toy_table), {"training.rounds": 1}, console=SILENT)


@pytest.mark.release
def test_two_short_rounds_on_the_real_vit_read_digits_clearly_better(tmp_path: Path) -> None:
    out = tmp_path / "out"
    overrides = {
        "training.rounds": 2,
        "training.batch_size": 16,
        "training.lr": 0.003,
        "training.max_grad_norm": 1.0,
        "data.train_rows": 600,
        "data.test_rows": 200,
        "partition.clients": 2,
        "machine.threads": 1,
    }
    result = run("quickstart", overrides, out=out, console=SILENT)
    accuracies = [
        line["value"] for line in lines(out) if line["name"] == "accuracy" and line["client"] is None
    ]
    assert len(accuracies) == 3
    assert accuracies[0] < 0.25
    assert result.accuracy > accuracies[0] + 0.2  # five standard errors of 200 images

    test = load_images(DataSettings(source="pkg:mnist-5k", test_rows=200), read("quickstart").seed).test
    assert isinstance(test, RawImages)
    assert {image.tobytes() for image in test.pixels} <= {i.tobytes() for i in mnist_5k.load()[1].pixels}
    [(accuracy, _)] = evaluated_elsewhere([out], test, tmp_path)
    assert accuracy == pytest.approx(result.accuracy, abs=0.006)  # one image on the edge
