"""The README's picture of a run is made of the lines that the run printed."""

import re
from pathlib import Path

from tools.terminal_picture import picture

FIGURES = Path(__file__).parents[2] / "docs" / "figures"
RECORDED = (FIGURES / "run.txt").read_text(encoding="utf-8")


def test_the_picture_is_that_of_the_recorded_lines() -> None:
    assert picture(RECORDED) + "\n" == (FIGURES / "run.svg").read_text(encoding="utf-8")


def test_the_picture_needs_no_other_file() -> None:
    svg = picture(RECORDED)
    assert "@font-face" not in svg
    assert re.findall(r"(?:url\(|href=)['\"]?(?!#|http://www.w3.org)[^'\")]+", svg) == []
