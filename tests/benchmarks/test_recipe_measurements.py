"""`python -m benchmarks.recipes` runs a recipe over seeds and compares it with the most frequent class."""

from pathlib import Path

import pytest

from benchmarks.recipes import Measured, comparison, lines
from task_cases import configuration


def test_a_configuration_is_measured_for_every_seed(
    tiny_folder: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    from fedsmoothlora.config import read, to_toml

    kind = "text-classification"
    table = configuration(kind, tmp_path / "case", image_model=tiny_folder, language_model=tiny_llama)
    table["data"] |= {"test": table["data"]["source"].replace("own", "test"), "validation": 0.0}
    rows = Path(table["data"]["source"])
    rows.with_name("test.jsonl").write_text("".join(rows.read_text().splitlines(keepends=True)[:12]))
    file = tmp_path / "own.toml"
    file.write_text(to_toml(read(table)))
    *found, blank, last = lines(str(file), (0, 1), {"training.steps": 1})
    assert len(found) == 4
    assert blank == ""
    assert all("| accuracy |" in line and line.endswith("| 0.6667 |") for line in found[2:])
    assert last.startswith("minus the share of the most frequent class: ")


def test_the_interval_is_student_s() -> None:
    found = [Measured(metric="accuracy", before=0.5, after=0.6 + x, majority=0.5) for x in (0.09, 0.1, 0.11)]
    assert comparison(found) == (
        "minus the share of the most frequent class: +0.2000, 95 % interval +0.1752 to +0.2248 over 3 seeds: "
        "better"
    )
    assert "no difference seen" in comparison(
        [*found[:1], Measured(metric="a", before=0, after=0, majority=1)]
    )
    with pytest.raises(ValueError, match="zip"):
        comparison([Measured(metric="loss", before=1, after=0, majority=None)])
