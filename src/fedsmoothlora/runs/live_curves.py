"""The curves of a run in a notebook, drawn again after every round."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from fedsmoothlora.callbacks import Callback, RunInfo
from fedsmoothlora.errors import ConfigError
from fedsmoothlora.printable import counted

if TYPE_CHECKING:
    from fedsmoothlora.federation.records import RoundRecord


class Shown(Protocol):
    """An output of a notebook's cell that can be replaced, such as IPython's ``DisplayHandle``."""

    def update(self, obj: Any, /) -> object:
        """Show ``obj`` in place of what was shown before."""


@dataclass(frozen=True)
class Drawing:
    """HTML that a notebook shows."""

    html: str

    def _repr_html_(self) -> str:
        return self.html


class LiveCurves(Callback):
    """Draws the metrics of the global model in a notebook, again after every round::

        run("quickstart", callbacks=[LiveCurves()])

    Args:
        display: shows an object with ``_repr_html_`` below the cell and returns an object whose ``update``
            replaces it. By default IPython's ``display``.

    Raises:
        ConfigError: IPython is not installed, and no ``display`` is given.
    """

    def __init__(self, display: Callable[[Any], Shown] | None = None) -> None:
        self._display = display or _ipython_display()
        self._shown: Shown | None = None
        self._run: RunInfo | None = None
        self._lines: list[dict[str, Any]] = []

    def on_run_begin(self, run: RunInfo) -> None:
        """Show the rounds of a resumed run, or an empty drawing."""
        self._run = run
        self._lines = [line for record in run.history for line in _lines(record)]
        self._shown = self._display(self._drawing(run))

    def on_round_end(self, record: RoundRecord) -> None:
        """Draw the curves again."""
        self._lines += _lines(record)
        if self._run is not None and self._shown is not None:
            self._shown.update(self._drawing(self._run))

    def _drawing(self, run: RunInfo) -> Drawing:
        from fedsmoothlora.reports.overview import overview  # here, because it imports matplotlib

        title = f"{run.name}: {run.method}, {counted(run.clients, 'client')}, {counted(run.rounds, 'round')}"
        return Drawing(overview(self._lines, run.folder, title=title))


def _lines(record: RoundRecord) -> list[dict[str, Any]]:
    return [
        {"round": record.round, "client": metric.client, "name": metric.name, "value": metric.value}
        for metric in record.metrics
    ]


def _ipython_display() -> Callable[[Any], Shown]:
    try:
        from IPython.display import display
    except ImportError:
        raise ConfigError(
            "LiveCurves draws in notebooks, and IPython is not installed: pip install ipython"
        ) from None
    return partial(display, display_id=True)
