"""The result of a run: its folder and its metrics."""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedsmoothlora.callbacks import Setback, setbacks
from fedsmoothlora.errors import MetricError
from fedsmoothlora.reports.metrics import HIGHLIGHTS, larger_is_better

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True, kw_only=True, repr=False)
class Result:
    """The result of a run.

    Attributes:
        folder: the run's folder.
        metrics: the lines of its ``metrics.jsonl``: tables with the keys ``round``, ``client``, ``name`` and
            ``value``. ``client`` is None for metrics of the global model and of the server. ``round`` counts
            finished rounds: 0 is the evaluation before any training.
        stopped: why the run ended before its last round; None if it did not.
    """

    folder: Path
    metrics: list[dict[str, Any]]
    stopped: str | None = None

    @property
    def rounds(self) -> int:
        """The number of finished rounds."""
        return max((int(line["round"]) for line in self.metrics), default=0)

    @property
    def names(self) -> list[str]:
        """Names of the recorded metrics of the global model and the server, in the order of recording."""
        return list(dict.fromkeys(line["name"] for line in self.metrics if line["client"] is None))

    def values(self, name: str) -> list[float]:
        """The values of a metric of the global model or the server, by round.

        Raises ``MetricError`` if no such metric was recorded.
        """
        found = [line["value"] for line in self.metrics if line["client"] is None and line["name"] == name]
        if not found:
            close = get_close_matches(name, self.names, n=1)
            meant = f" Did you mean {close[0]!r}?" if close else ""
            raise MetricError(
                f"the run in {self.folder} recorded no metric {name!r}.{meant} "
                f"Recorded: {', '.join(self.names) or 'none'}"
            )
        return found

    def setbacks(self, name: str) -> list[Setback]:
        """The rounds after which a metric of the global model had lost more than half of what it had gained.

        Raises ``MetricError`` if no such metric was recorded.
        """
        self.values(name)
        values = {
            line["round"]: line["value"]
            for line in self.metrics
            if line["client"] is None and line["name"] == name
        }
        return setbacks(name, values, larger_is_better=larger_is_better(name))

    @property
    def accuracy(self) -> float:
        """Accuracy of the final global model.

        Raises ``MetricError`` if the task has no accuracy.
        """
        return self.values("accuracy")[-1]

    def frame(self) -> pandas.DataFrame:
        """The metrics as a pandas frame with one row per round and client.

        Its columns are ``round``, ``client`` and the metrics by name. ``client`` is missing in the rows of
        the global model and the server, and a metric is missing where it was not recorded::

            frame = result.frame()
            by_round = frame[frame.client.isna()].set_index("round").accuracy
        """
        import pandas  # here, because it takes a while to load

        rows: dict[tuple[int, str | None], dict[str, Any]] = {}
        for line in self.metrics:
            key = line["round"], line["client"]
            row = rows.setdefault(key, {"round": key[0], "client": key[1]})
            row[line["name"]] = line["value"]
        ordered = [rows[key] for key in sorted(rows, key=lambda key: (key[0], key[1] or ""))]
        return pandas.DataFrame(ordered, columns=list(dict.fromkeys(["round", "client", *_names(ordered)])))

    def __repr__(self) -> str:
        shown = [name for name in (*HIGHLIGHTS, "loss", "perplexity") if name in self.names]
        metrics = "".join(f", {name}={self.values(name)[-1]:.4f}" for name in shown)
        return f"Result(folder={str(self.folder)!r}, rounds={self.rounds}{metrics})"

    def _repr_html_(self) -> str:
        """Curves, a table of the last metrics and a link to the report, for notebooks."""
        from fedsmoothlora.reports.overview import overview  # here, because it imports matplotlib

        return overview(self.metrics, self.folder, stopped=self.stopped)


def _names(rows: list[dict[str, Any]]) -> list[str]:
    return [name for row in rows for name in row]
