import json
from pathlib import Path

import pytest
import torch

from benchmarks.__main__ import BENCHMARKS
from benchmarks.rows import Row, interleaved, peak_allocated
from benchmarks.tables import write_table

ROW = Row(name="a round", value=3.0, unit="s", against=2.0, target="at most 1.05")


def test_a_row_is_one_line_of_json_with_its_ratio() -> None:
    assert "\n" not in ROW.json()
    assert json.loads(ROW.json()) == {
        "name": "a round",
        "value": 3.0,
        "unit": "s",
        "against": 2.0,
        "ratio": 1.5,
        "target": "at most 1.05",
    }


def test_calls_take_turns() -> None:
    called: list[str] = []
    found = interleaved({"a": lambda: called.append("a"), "b": lambda: called.append("b")}, 2)
    assert called == ["a", "b"] * 3
    assert found.keys() == {"a", "b"}


def test_the_peak_counts_memory_that_is_alive_at_the_same_time() -> None:
    def one_after_the_other() -> None:
        for _ in range(3):
            torch.ones(1000)

    assert peak_allocated(one_after_the_other) == 4000
    assert peak_allocated(lambda: [torch.ones(1000) for _ in range(3)]) == 12000


def test_a_table_replaces_only_the_text_between_its_markers(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- one -->\nold\n<!-- /one -->\nbetween\n<!-- two -->\n<!-- /two -->\nafter\n")
    write_table(page, "one", [ROW], threads=1)
    text = page.read_text()
    assert "old" not in text
    assert "| a round | 3 s | 2 s | 1.5 | at most 1.05 |" in text
    assert text.startswith("before\n<!-- one -->\n| 1 thread |")
    assert text.endswith("<!-- /one -->\nbetween\n<!-- two -->\n<!-- /two -->\nafter\n")


def test_a_page_without_the_markers_is_refused(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("<!-- /one -->\n<!-- one -->\n")
    with pytest.raises(ValueError, match="needs the lines <!-- one --> and <!-- /one -->"):
        write_table(page, "one", [ROW], threads=1)
    assert page.read_text() == "<!-- /one -->\n<!-- one -->\n"


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_benchmark_has_its_place_in_the_page(name: str, tmp_path: Path) -> None:
    copy = tmp_path / "performance.md"
    copy.write_text((Path(__file__).parents[2] / "docs" / "performance.md").read_text())
    write_table(copy, name, [ROW], threads=1)
    assert "| a round | 3 s |" in copy.read_text()
