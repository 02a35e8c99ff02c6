"""Pictures of a run, drawn from its metrics."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fedsmoothlora.files import write_whole

_INK = "#1f5673"
_CLIENT = "#8fa6b2"


def draw_curves(metrics: Iterable[Mapping[str, Any]], folder: Path) -> list[Path]:
    """Draw accuracy and loss of the global model by round, with each client's training loss.

    Args:
        metrics: lines of ``metrics.jsonl``: round, client, name, value.
        folder: where ``accuracy.png`` and ``loss.png`` go.

    Returns:
        The files written; a metric that was not measured gives none.
    """
    # The object interface, without pyplot: no global state, and no window system is looked for.
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    curves: dict[tuple[str, str | None], list[tuple[int, float]]] = {}
    for line in metrics:
        curves.setdefault((line["name"], line["client"]), []).append((line["round"], line["value"]))
    written = []
    for name, clients_name in (("accuracy", None), ("loss", "train_loss")):
        if (name, None) not in curves:
            continue
        figure = Figure(figsize=(7, 4.2), layout="constrained")
        axes = figure.add_subplot()
        for (other, client), points in curves.items():
            if other == clients_name and client is not None:
                first = "clients' training loss" if client == _first_client(curves, other) else None
                axes.plot(*zip(*points, strict=True), color=_CLIENT, linewidth=1, marker=".", label=first)
        axes.plot(
            *zip(*curves[name, None], strict=True), color=_INK, linewidth=2, marker="o", label="global model"
        )
        axes.set_xlabel("rounds finished")
        axes.set_ylabel(f"{name} on the test set" if clients_name is None else name)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
        path = folder / f"{name}.png"
        with write_whole(path) as temporary:
            figure.savefig(temporary, dpi=120, format="png")
        written.append(path)
    return written


def _first_client(curves: Mapping[tuple[str, str | None], Any], name: str) -> str | None:
    return next(client for other, client in curves if other == name and client is not None)
