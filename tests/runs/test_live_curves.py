"""Live curves in a notebook, with a display that records what it is asked to show."""

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from rich.console import Console

from fedsmoothlora import ConfigError, LiveCurves, RunInfo, run


class Cell:
    """A cell of a notebook: the objects that it showed, the last one is visible."""

    def __init__(self) -> None:
        self.shown: list[str] = []

    def __call__(self, drawing: Any) -> "Cell":
        self.update(drawing)
        return self

    def update(self, drawing: Any) -> None:
        self.shown.append(drawing._repr_html_())


def test_the_curves_are_drawn_again_after_every_round_and_go_on_after_a_resume(
    toy_table: dict[str, Any], tmp_path: Path
) -> None:
    quiet = Console(quiet=True)
    stopped, resumed = Cell(), Cell()
    first = LiveCurves(display=stopped)
    run(
        toy_table,
        {"training.rounds": 1},
        out=tmp_path / "run",
        console=quiet,
        callbacks=[first],
        outputs=False,
    )

    assert len(stopped.shown) == 3  # the empty drawing, round 0 and round 1
    assert "toy: fedsmoothlora, 3 clients, 1 round" in stopped.shown[0]
    assert "<svg" not in stopped.shown[0]
    assert stopped.shown[-1].count("<svg") == 2  # accuracy and loss

    again = LiveCurves(display=resumed)
    run(resume=tmp_path / "run", console=quiet, callbacks=[again], outputs=False)
    assert resumed.shown == stopped.shown[-1:]


def test_without_a_notebook_the_reason_is_said_before_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "IPython.display", None)
    with pytest.raises(ConfigError, match="IPython is not installed"):
        LiveCurves()


def test_in_a_notebook_ipython_shows_the_drawing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    shown: list[tuple[str, dict[str, Any]]] = []
    ipython = ModuleType("IPython.display")
    ipython.display = lambda drawing, **options: shown.append((drawing.html, options))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "IPython.display", ipython)
    info = RunInfo(name="<name>", folder=tmp_path, method="fedit", rounds=3, clients=2, layers={})
    LiveCurves().on_run_begin(info)
    ((html, options),) = shown
    assert options == {"display_id": True}
    assert "&lt;name&gt;: fedit, 2 clients, 3 rounds" in html
