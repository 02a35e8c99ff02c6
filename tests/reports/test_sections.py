"""The content of single sections of a run's page, without a page around it."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fedsmoothlora.reports import charts
from fedsmoothlora.reports.blocks import Chart, Columns, Grid, Log, Note, Page, Section, Table
from fedsmoothlora.reports.reading import read_run
from fedsmoothlora.reports.rendering import render
from fedsmoothlora.reports.sections.configuration import settings
from fedsmoothlora.reports.sections.confusion import confusion
from fedsmoothlora.reports.sections.curves import curves
from fedsmoothlora.reports.sections.diagnostics import diagnostics
from fedsmoothlora.reports.sections.header import highlights, unfinished
from fedsmoothlora.reports.svg import inline
from fedsmoothlora.reports.terminal import result

Line = tuple[int, str | None, str, float]


def write(folder: Path, lines: list[Line], config: str = "[training]\nrounds = 2\n", **files: Any) -> Path:
    (folder / "config.toml").write_text(config, encoding="utf-8")
    keys = ("round", "client", "name", "value")
    written = [json.dumps(dict(zip(keys, line, strict=True))) + "\n" for line in lines]
    (folder / "metrics.jsonl").write_text("".join(written), encoding="utf-8")
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


ACCURACY: list[Line] = [(k, None, "accuracy", 0.5 + k / 10) for k in range(3)]
CONFUSION = {"classes": ["cat", "dog"], "matrix": [[40, 10], [0, 150]]}


@pytest.mark.parametrize(
    ("lines", "files", "warning"),
    [
        (ACCURACY, {}, ""),
        (ACCURACY[:2], {}, "This run is not finished: 1 of 2 rounds are recorded."),
        ([], {}, "This run is not finished: none of its 2 rounds is recorded yet."),
        (ACCURACY[:2], {"stopped": {"reason": "no better"}}, "This run ended after 1 of 2 rounds: no better"),
    ],
    ids=["finished", "unfinished", "not begun", "stopped early"],
)
def test_an_unfinished_run_says_so(
    tmp_path: Path, lines: list[Line], files: dict[str, Any], warning: str
) -> None:
    run = read_run(write(tmp_path, lines, **files))
    assert unfinished(run).startswith(warning)
    assert bool(unfinished(run)) == bool(warning)
    page = render(Page(title="", heading="", warning=unfinished(run)))
    assert ('class="warning"' in page) == bool(warning)
    titles = [one.title for one in highlights(run)]
    if lines:
        assert titles[0] == ("Latest accuracy" if "not finished" in warning else "Final accuracy")


def test_the_majority_share_is_beside_accuracy(tmp_path: Path) -> None:
    run = read_run(write(tmp_path, ACCURACY, confusion=CONFUSION))
    assert highlights(run)[0].below == "+0.2000 since round 0; majority share 0.7500"
    note, _, table, definitions = confusion(run)
    assert isinstance(note, Note)
    assert "The most frequent class, dog, has 150 of them" in note.text
    assert isinstance(table, Table)
    assert table.columns == ["class", "precision", "recall", "F1", "support"]
    assert [cell.text for cell in table.rows[0][1]] == ["1.0000", "0.8000", "0.8889", "50"]  # type: ignore[union-attr]
    assert isinstance(definitions, Note)
    assert "zero_division=0" in definitions.text


def test_classes_with_the_lowest_f1_are_listed_first(tmp_path: Path) -> None:
    size = 40
    matrix = [[0] * size for _ in range(size)]
    for number in range(size):
        matrix[number][number] = number
        matrix[number][0] += 1
    names = [f"class {number}" for number in range(size)]
    run = read_run(write(tmp_path, ACCURACY, confusion={"classes": names, "matrix": matrix}))
    tables = [block for block in confusion(run) if isinstance(block, Table)]
    assert tables[0].caption == "The 10 of 40 classes with the lowest F1"
    assert [name for name, _ in tables[0].rows][:2] == ["class 0", "class 1"]


@pytest.mark.parametrize(
    ("config", "lines", "files", "rows"),
    [
        ("", [], {"evaluation": {"test_rows": 10}}, "On the test set."),
        ("", [], {"evaluation": {"test_rows": None}}, "On the clients’ validation rows"),
        ("[evaluation]\ntest = false\n", [(1, "a", "accuracy", 0.5)], {}, "On the clients’ validation rows"),
        ("", [(1, None, "mean_of_clients", 2)], {}, "On the clients’ validation rows"),
        ("", [(1, None, "mean_of_clients", 2), (1, "a", "on_test_accuracy", 0.5)], {}, "On the test set."),
        ("", [], {}, "On the test set."),
        ("", [(1, "a", "accuracy", 0.5)], {}, "Round 0"),
    ],
)
def test_captions_name_the_evaluated_rows(
    tmp_path: Path, config: str, lines: list[Line], files: dict[str, Any], rows: str
) -> None:
    run = read_run(write(tmp_path, [*ACCURACY, *lines], config, **files))
    grid = curves(run)[0]
    assert isinstance(grid, Grid)
    assert isinstance(grid.blocks[0], Chart)
    assert grid.blocks[0].caption.startswith(rows)


def test_no_chart_is_alone_in_half_a_row(tmp_path: Path) -> None:
    run = read_run(write(tmp_path, [*ACCURACY, (1, None, "update_norm", 0.5)]))
    for blocks in (curves(run), diagnostics(run)):
        assert isinstance(blocks[0], Grid)
        assert [type(block) for block in blocks[0].blocks] == [Chart, Table]


@pytest.mark.parametrize("count", range(1, 14))
def test_every_row_of_a_grid_is_full(count: int) -> None:
    blocks = [Table(str(number), [], []) for number in range(count)]
    widths = Grid(blocks).widths
    parts = {"third": 2, "half": 3, "whole": 6}
    filled = 0
    for width in widths:
        filled += parts[width]
        assert filled <= 6
        filled %= 6
    assert filled == 0
    assert len(widths) == count


@pytest.mark.parametrize(
    ("kind", "listed"),
    [
        ("text-classification", {"where_column"}),
        ("image-classification", {"image_size", "image_column"}),
        ("of-my-own", {"where_column", "image_size", "image_column"}),
    ],
)
def test_settings_without_use_for_the_task_are_not_listed(
    tmp_path: Path, kind: str, listed: set[str]
) -> None:
    config = (
        f'[task]\nkind = "{kind}"\n[model]\nimage_size = 224\n'
        '[data]\nimage_column = "image"\nwhere_column = "lang"\n[flower]\nclients = []\nwait = 600.0\n'
    )
    (columns,) = settings(read_run(write(tmp_path, [], config)))
    assert isinstance(columns, Columns)
    keys = {key for table in columns.tables for key in table.values}
    assert keys - {"kind"} == listed


def test_rows_by_client_name_the_clients() -> None:
    clients = {f"hospital-of-the-north-{number}-unit": 10 * number for number in range(1, 13)}
    figure = charts.sizes_chart(clients)
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert len(set(labels)) == 12
    drawn = inline(figure, "sizes", "rows")
    for client in clients:
        assert f"<title>{client}</title>" in drawn


def test_classes_that_begin_alike_have_labels_of_their_own() -> None:
    names = [f"acute myeloid leukaemia, type {number} (adult)" for number in range(6)]
    axes = charts.confusion_matrix(names, [[1] * 6] * 6).axes[0]
    for labels in (axes.get_xticklabels(), axes.get_yticklabels()):
        assert len({label.get_text() for label in labels}) == 6


def test_full_texts_of_labels_are_inert() -> None:
    evil = 'a"><script>alert(1)</script><!-- --> #16242c url(#x) \x00\n\u202e and more'
    drawn = inline(charts.sizes_chart({evil: 3, "b": 4}), "sizes", "rows")
    assert "<script" not in drawn
    assert "#16242c url(#x) \\x00\\n\\u202e and more</title>" in drawn
    assert "\x00" not in drawn


def test_control_characters_are_shown_in_texts_and_lines_of_a_log_are_kept() -> None:
    table = Table("t", ["class"], [("a\nb\u202ec", [])])
    page = render(Page(title="", heading="", sections=[Section("s", "S", [table])]))
    assert "a\\nb\\u202ec" in page
    page = render(Page(title="", heading="", sections=[Section("s", "S", [Log("log", "one\ntwo\x1b[0m")])]))
    assert "<pre>one\ntwo\\x1b[0m</pre>" in page


def test_the_terminal_shows_majority_share_and_metrics_by_class(tmp_path: Path) -> None:
    names = ["[red]cat\n", "dog"]
    write(tmp_path, ACCURACY, confusion={**CONFUSION, "classes": names})
    written = io.StringIO()
    for shown in result(tmp_path):
        Console(file=written, width=80).print(shown, highlight=False)
    lines = [line.split() for line in written.getvalue().splitlines()]
    assert lines[0] == ["accuracy", "0.7000", "(majority", "share", "0.7500)"]
    assert ["class", "precision", "recall", "F1", "support"] in lines
    assert ["[red]cat\\n", "1.0000", "0.8000", "0.8889", "50"] in lines


def test_the_terminal_lists_the_lowest_of_many_classes(tmp_path: Path) -> None:
    matrix = [[int(i == k) for k in range(30)] for i in range(30)]
    write(tmp_path, ACCURACY, confusion={"classes": [str(k) for k in range(30)], "matrix": matrix})
    (_, table) = result(tmp_path)
    assert table.row_count == 10  # type: ignore[union-attr]
