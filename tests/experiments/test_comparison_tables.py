"""Cells of tables: no spreadsheet runs them, and no Markdown renders them."""

import pytest

from fedsmoothlora.experiments.tables import csv_text, markdown_table, spreadsheet_cell


@pytest.mark.parametrize("text", ["=1+1", "+1", "-cmd|x", "@SUM(A1)", "\t=1", "\r=1"])
def test_a_text_that_a_spreadsheet_would_run_is_quoted(text: str) -> None:
    assert spreadsheet_cell(text) == f"'{text}"


@pytest.mark.parametrize("cell", ["fedit", "a=b", "", -0.5, -1, True, None])
def test_other_cells_stay_as_they_are(cell: object) -> None:
    assert spreadsheet_cell(cell) is cell


def test_tables_hold_names_as_plain_text() -> None:
    assert csv_text(["variant", "score"], [["=cmd", -0.5]]) == "variant,score\n'=cmd,-0.5\n"
    assert markdown_table(["v"], [["a|b\n<i>"]]).splitlines()[-1] == r"| a\|b\\n\<i\> |"
