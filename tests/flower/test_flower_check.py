"""What a site and a coordinator can check before they join."""

import io
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from machines import SITES, Machines
from rich.console import Console
from safetensors.torch import load_file, save_file

from fedsmoothlora.config import read
from fedsmoothlora.errors import ConfigError
from fedsmoothlora.runs.check import check


@pytest.fixture
def table(tmp_path: Path, tiny_folder: Path) -> dict[str, Any]:
    return {**Machines(tmp_path, tiny_folder).table, "flower": {"clients": list(SITES)}}


def said(table: dict[str, Any], **how: Any) -> str:
    console = Console(file=io.StringIO(), record=True, width=200)
    check(read(table), console, **how)
    return console.export_text()


def test_a_site_sees_its_rows_and_what_it_must_have_in_common(table: dict[str, Any], tmp_path: Path) -> None:
    text = said(table, site="hospital-b", data=str(tmp_path / "data" / "hospital-b.csv"))
    assert "24 training rows, no test set, 4 classes" in text
    assert re.search(r"hospital-b +24 +3 +6 +6 +6 +6", text)
    assert "hospital-a" not in text
    assert "label map: rows, columns, checks, plain" in text
    assert "tokenizer (SHA-256): none" in text
    assert re.search(r"base weights \(SHA-256\): [0-9a-f]{64}\n", text)


def test_the_hashes_tell_other_weights_and_other_tokenizers(
    table: dict[str, Any], tmp_path: Path, tiny_folder: Path
) -> None:
    def hashes(model: Path) -> list[str]:
        text = said({**table, "model": {**table["model"], "source": str(model)}}, site="hospital-a")
        return re.findall(r"\(SHA-256\): (.*)", text)

    copy = tmp_path / "copy"
    shutil.copytree(tiny_folder, copy)
    first = hashes(tiny_folder)
    assert hashes(copy) == first
    (copy / "tokenizer.json").write_text('{"version": "1.0"}')
    tokenizer, weights = hashes(copy)
    assert (tokenizer != first[0], weights == first[1]) == (True, True)
    tensors = load_file(copy / "model.safetensors")
    name = sorted(tensors)[0]
    tensors[name].view(-1)[0] += 1e-6
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    assert hashes(copy)[1] != first[1]


def test_a_coordinator_checks_all_but_the_data(table: dict[str, Any], tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "data")
    text = said(table)
    assert "0 training rows, 64 test rows, 4 classes" in text
    assert "clients, with data of their own: hospital-a, hospital-b, hospital-c" in text
    assert "a round: 3 clients" in text


def test_a_class_that_is_not_in_the_label_map_is_refused_with_its_row(
    table: dict[str, Any], tmp_path: Path
) -> None:
    table["data"] = {**table["data"], "classes": ["rows", "columns", "checks"]}
    with pytest.raises(
        ConfigError, match=r"hospital-a\.csv: row 4 .*: the class 'plain' is not in data\.classes"
    ):
        said(table, site="hospital-a", data=str(tmp_path / "data" / "hospital-a.csv"))


@pytest.mark.parametrize(
    ("change", "how", "reason"),
    [
        ({"flower": {"clients": ["a", "a"]}}, {}, "'a' must be a name of its own"),
        ({"flower": {"clients": []}}, {"site": "hospital-a", "data": "x"}, "--data goes with --site"),
        ({}, {"data": "x"}, "--data goes with --site"),
        ({}, {"site": "hospital-z"}, "there is no such client; there are hospital-a, hospital-b"),
        ({"data": {"source": "nowhere"}}, {}, "data.classes is missing"),
        ({"data": {"source": "nowhere", "classes": ["x", "y"]}}, {}, "there is nothing to evaluate on"),
    ],
)
def test_what_cannot_be_is_said(
    table: dict[str, Any], change: dict[str, Any], how: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ConfigError, match=reason):
        said({**table, **change}, **how)
