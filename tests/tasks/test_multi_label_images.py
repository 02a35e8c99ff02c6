"""Images with any number of labels: runs learn, and other libraries load their exports."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from peft import PeftModel
from PIL import Image
from rich.console import Console
from transformers import AutoModelForImageClassification

from fedsmoothlora import export, load_adapter
from fedsmoothlora.config import read
from fedsmoothlora.errors import ConfigError
from fedsmoothlora.logs import quiet_libraries
from fedsmoothlora.runs.check import check
from fedsmoothlora.runs.planning import plan
from fedsmoothlora.runs.session import run
from layer_names import QUERY, VALUE

NAMES = ("left", "right", "top")
Labels = Sequence[Sequence[str]]


def quiet() -> Console:
    return Console(file=io.StringIO(), width=200)


def labels_of(count: int) -> Labels:
    """Every third row has none of two of the labels."""
    return [[name for bit, name in enumerate(NAMES) if number >> bit & 1] for number in range(count)]


def picture(labels: Sequence[str], seed: int) -> Image.Image:
    """A dark image whose labelled halves are bright."""
    pixels = np.random.default_rng(seed).integers(0, 60, (28, 28, 3)).astype(np.uint8)
    parts = {"left": pixels[:, :14], "right": pixels[:, 14:], "top": pixels[:14]}
    for name in labels:
        parts[name][..., NAMES.index(name)] += 180
    return Image.fromarray(pixels)


def write(folder: Path, found: Labels, *, form: str = "lists", inside: str = "") -> Path:
    """A folder of images with ``metadata.jsonl`` of lists, or ``metadata.csv`` with columns of 0 and 1."""
    (folder / inside).mkdir(parents=True)
    rows: list[dict[str, Any]] = []
    for number, labels in enumerate(found):
        name = str(Path(inside) / f"{number}.png")
        picture(labels, number).save(folder / name)
        row: dict[str, Any] = {"file_name": name}
        rows.append(row | ({"label": labels} if form == "lists" else {n: int(n in labels) for n in NAMES}))
    if form == "lists":
        (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        with (folder / "metadata.csv").open("w", newline="") as file:
            lines = csv.DictWriter(file, rows[0])
            lines.writeheader()
            lines.writerows(rows)
    return folder


def table_of(model: Path, source: Path, **more: Any) -> dict[str, Any]:
    return {
        "name": "labels",
        "model": {"source": str(model), "image_size": 28},
        "lora": {"r": 2, "alpha": 4, "target_modules": [QUERY, VALUE]},
        "data": {"source": str(source), "validation": 0.25},
        "task": {"kind": "multi-label-image"},
        "partition": {"kind": "iid", "clients": 2},
        "method": {"name": "fedsmoothlora", "gamma": 64, "calibration_batches": 1},
        "training": {"rounds": 2, "steps": 8, "batch_size": 8, "lr": 0.02, "optimizer": "adamw"},
        "machine": {"threads": 1, "device": "cpu"},
        **more,
    }


def test_a_run_learns_and_its_exports_have_equal_outputs(tiny_folder: Path, tmp_path: Path) -> None:
    source = write(tmp_path / "data", labels_of(48))
    result = run(table_of(tiny_folder, source), out=tmp_path / "run", console=quiet())
    assert result.values("loss")[-1] < 0.8 * result.values("loss")[0]
    assert result.values("micro_f1")[-1] > 0.6
    assert {"macro_f1", "mean_average_precision"} <= {line["name"] for line in result.metrics}
    for as_ in ("merged", "adapter"):
        export(result.folder, as_, out=tmp_path / as_, console=quiet())
    pixels = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    auto, problem = AutoModelForImageClassification, "multi_label_classification"
    with quiet_libraries(), torch.no_grad():
        merged = auto.from_pretrained(tmp_path / "merged").eval()
        base = auto.from_pretrained(tiny_folder, num_labels=3, problem_type=problem)
        wanted = merged(pixels).logits
        for model in (PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval(),):
            torch.testing.assert_close(model(pixels).logits, wanted, rtol=1e-4, atol=1e-4)
        own = load_adapter(tmp_path / "adapter")(pixels).logits
        torch.testing.assert_close(own, wanted, rtol=1e-4, atol=1e-4)
    assert merged.config.problem_type == problem
    assert tuple(merged.config.id2label.values()) == NAMES
    assert f'problem_type="{problem}"' in (tmp_path / "adapter" / "README.md").read_text()


@pytest.mark.parametrize("inside", ["", "images"])
def test_columns_of_0_and_1_are_the_same_labels_as_lists(
    tiny_folder: Path, tmp_path: Path, inside: str
) -> None:
    found = []
    for form in ("lists", "columns"):
        source = write(tmp_path / form, labels_of(16), form=form, inside=inside)
        table = table_of(tiny_folder, source)
        table["task"] |= {"label_columns": list(NAMES)} if form == "columns" else {}
        planned = plan(read(table))
        assert planned.outputs == NAMES
        found.append(planned.task_data.train.batch(range(16)))
    for name, value in found[0].items():
        assert torch.equal(value, found[1][name])
    assert found[0]["labels"].dtype == torch.float32
    assert found[0]["labels"].sum(dim=1)[:4].tolist() == [0.0, 1.0, 1.0, 2.0]


def test_declared_labels_are_the_models_outputs_in_their_order(tiny_folder: Path, tmp_path: Path) -> None:
    names = ["top", "right", "left", "bottom"]  # no row has the last one
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.List(datasets.ClassLabel(names=names))}
    )
    found = [[name for name in labels if name != "left"] for labels in labels_of(16)]
    rows = [{"image": picture(labels, n), "label": labels} for n, labels in enumerate(found)]
    datasets.Dataset.from_list(rows, features=features).to_parquet(tmp_path / "rows.parquet")
    planned = plan(read(table_of(tiny_folder, tmp_path / "rows.parquet")))
    assert planned.outputs == tuple(names)


def test_check_counts_the_rows_of_every_label(tiny_folder: Path, tmp_path: Path) -> None:
    out = io.StringIO()
    source = write(tmp_path / "data", labels_of(16))
    check(read(table_of(tiny_folder, source)), Console(file=out, width=200))
    assert "3 labels and their rows: left (8), right (8), top (8)" in out.getvalue()


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        ({"data.classes": ["left", "right"]}, r"metadata.jsonl: row 5 .*there is no label 'top'"),
        ({"task.label_columns": ["left", "top"]}, r"no column 'left' \(task.label_columns\)"),
        ({"task.label_columns": ["a", "a"]}, "two or more different"),
        ({"data.label_column": "file_name"}, "column 'file_name': holds a text, should be a list"),
        ({"partition.kind": "dirichlet", "partition.alpha": 1.0}, "deals rows by their label"),
        ({"data.source": "pkg:mnist-5k"}, "its images have one class each"),
    ],
    ids=["unknown", "no-column", "twice", "no-list", "dirichlet", "packaged"],
)
def test_wrong_labels_are_refused(
    tiny_folder: Path, tmp_path: Path, change: dict[str, Any], wanted: str
) -> None:
    source = write(tmp_path / "data", labels_of(8))
    with pytest.raises(ConfigError, match=wanted):
        plan(read(table_of(tiny_folder, source), change))


def test_folders_of_classes_are_refused(tiny_folder: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / "data" / name).mkdir(parents=True)
        picture([], 0).save(tmp_path / "data" / name / "0.png")
    with pytest.raises(ConfigError, match=r"should have a metadata\.csv"):
        plan(read(table_of(tiny_folder, tmp_path / "data")))


def test_where_sites_hold_the_images_all_agree_on_the_labels(tiny_folder: Path, tmp_path: Path) -> None:
    source = write(tmp_path / "data", labels_of(16))
    table = table_of(tiny_folder, source, flower={"clients": ["a", "b"]})
    with pytest.raises(ConfigError, match=r"data\.classes is missing: if sites hold the data"):
        check(read(table), quiet())
    table["data"] |= {"classes": list(reversed(NAMES))}
    check(read(table), quiet())
    check(read(table), quiet(), site="a", data=str(source))
    assert plan(read(table), sites=("a", "b")).outputs == tuple(reversed(NAMES))
