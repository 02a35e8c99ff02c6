"""Image folders through a plan, a run and an export."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from fedsmoothlora.config import Config, read
from fedsmoothlora.errors import ConfigError
from fedsmoothlora.exports.export import export
from fedsmoothlora.flower.site import Site
from fedsmoothlora.runs.planning import plan
from fedsmoothlora.runs.session import run


def folder(root: Path, highest: int = 4000, rows: int = 6) -> Path:
    """Two classes of images of 16 bits with values up to ``highest``, or of 8 bits up to 255."""
    rng = np.random.default_rng(len(root.name))
    kind = np.uint16 if highest > 255 else np.uint8
    for name in ("a", "b"):
        (root / name).mkdir(parents=True)
        for number in range(rows):
            values = rng.integers(0, highest, (28, 28)).astype(kind)
            values[0, 0] = highest
            Image.fromarray(values).save(root / name / f"{number}.png")
    return root


def config(table: dict[str, Any], source: Path, **data: Any) -> Config:
    return read(
        {
            **table,
            "data": {"source": str(source), "classes": ["a", "b"], **data},
            "partition": {"kind": "iid", "clients": 2},
            "training": {"rounds": 1, "batch_size": 4, "lr": 0.01},
        }
    )


def test_the_range_of_16_bits_is_recorded_and_exported(toy_table: dict[str, Any], tmp_path: Path) -> None:
    mine = config(toy_table, folder(tmp_path / "x"), test=str(folder(tmp_path / "test")))
    done = run(mine, out=tmp_path / "run", console=Console(quiet=True)).folder
    assert json.loads((done / "partition.json").read_text())["max_value"] == 4095
    assert "scaled from 0 ... 4095" in (done / "run.log").read_text()
    export(done, "merged", out=tmp_path / "out", console=Console(quiet=True))
    for there in (done / "model", tmp_path / "out"):
        assert json.loads((there / "fedsmoothlora.json").read_text())["max_value"] == 4095
        assert "scaled from 0 ... 4095 to 0 ... 255" in (there / "README.md").read_text()


def test_runs_on_images_of_8_bits_record_no_range(toy_table: dict[str, Any], tmp_path: Path) -> None:
    mine = config(toy_table, folder(tmp_path / "x", 255), validation=0.25)
    assert "max_value" not in plan(mine).partition_table()


def test_where_sites_hold_images_of_16_bits_the_range_is_configured(
    toy_table: dict[str, Any], tmp_path: Path
) -> None:
    source = folder(tmp_path / "x")
    text = "data.max_value is missing: there are images of more than 8 bits"
    with pytest.raises(ConfigError, match=text):
        plan(config(toy_table, source), site="one")
    with pytest.raises(ConfigError, match=text):
        plan(config(toy_table, source, test=str(source)), sites=["one", "two"])
    assert len(plan(config(toy_table, source, max_value=4095), site="one").train) == 12
    assert plan(config(toy_table, source, test=str(source), max_value=4095), sites=["one", "two"]).test


def test_a_site_reads_no_test_set_beside_its_data(toy_table: dict[str, Any], tmp_path: Path) -> None:
    for name in ("train", "test"):
        folder(tmp_path / "x" / name, 255)
    mine = read({**json.loads(json.dumps(toy_table)), "data": {"source": "?", "classes": ["a", "b"]},
                 "partition": {"kind": "by_file"}, "flower": {"clients": ["one", "two"]}})  # fmt: skip
    site = Site.at(mine, {"client-id": "one", "data": str(tmp_path / "x")})
    planned, client = site._plan()
    assert (client, len(planned.train), planned.test) == ("one", 12, None)


def test_a_folder_of_splits_trains_on_one_and_tests_on_the_other(
    toy_table: dict[str, Any], tmp_path: Path
) -> None:
    folder(tmp_path / "x" / "train", 255, rows=5)
    folder(tmp_path / "x" / "test", 255, rows=2)
    folder(tmp_path / "x" / "val", 255, rows=3)
    planned = plan(config(toy_table, tmp_path / "x"))
    assert planned.test is not None
    assert (len(planned.train), len(planned.test)) == (10, 4)
    assert any("val is not read" in note for note in planned.notes)
