"""The metrics that a client may report: their names and ranges."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from fedsmoothlora.federation.records import PREFIXES

# The largest number of metrics in a reply.
MOST = 64

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_.@/-]{0,63}")
_SHARE, _LOSS, _SECONDS = (0.0, 1.0), (-1e6, 1e6), (0.0, 1e8)
# The range of metrics that are not declared here, such as those of other packages.
_OTHER = (-1e12, 1e12)
_SHARES = (
    *("accuracy", "macro_f1", "micro_f1", "auroc", "exact_match", "mean_average_precision"),
    "preference_accuracy",
    *("token_accuracy", "entity_f1", "entity_precision", "entity_recall"),
)
_RANGES: Mapping[str, tuple[float, float]] = {
    **dict.fromkeys(_SHARES, _SHARE),
    **dict.fromkeys(("loss", "train_loss", "train_loss_first", "train_loss_last"), _LOSS),
    **dict.fromkeys(("loss_at_start", "loss_at_end"), _LOSS),
    "perplexity": (0.0, 1e300),
    "epsilon": (0.0, 1e12),
    # Rounding may exceed 1.
    **dict.fromkeys(("mcc", "pearson", "spearman", "start_gradient_cosine"), (-1.001, 1.001)),
}


def checked_metrics(metrics: object) -> tuple[dict[str, float], list[str]]:
    """The valid metrics of a reply, and a reason for each that is not valid.

    A metric is a finite real number in the range of its name. A name consists of letters, digits and
    ``_.@/-``. Metrics that are not declared here, such as those of another package's method, may be up to
    1e12.

    Args:
        metrics: the metrics of a reply; may be any object.
    """
    if not isinstance(metrics, Mapping):
        return {}, ["its metrics are not a mapping from name to number"]
    kept: dict[str, float] = {}
    reasons: list[str] = []
    for name, value in metrics.items():
        if type(name) is not str or not _NAME.fullmatch(name):
            reasons.append("a metric whose name is not valid")
        elif len(kept) == MOST:
            reasons.append(f"{name}: a reply has at most {MOST} metrics")
        elif reason := _reason(name, value):
            reasons.append(f"{name} {reason}")
        else:
            kept[name] = value
    return kept, reasons


def _reason(name: str, value: object) -> str:
    """The reason why a value is not valid for a metric; empty if it is valid."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return f"is a {type(value).__name__}, not a number"
    try:
        number = float(value)
    except OverflowError:
        return "is too large for a number"
    low, high = _range(_measured(name))
    if not math.isfinite(number) or not low <= number <= high:
        return f"= {number:.4g} is not between {low:g} and {high:g}"
    return ""


def _measured(name: str) -> str:
    """The metric's name without the prefix of a client's own model."""
    for prefix in PREFIXES:
        name = name.removeprefix(prefix)
    return name


def _range(name: str) -> tuple[float, float]:
    if name.startswith("seconds"):
        return _SECONDS
    return _RANGES.get(name, _OTHER)
