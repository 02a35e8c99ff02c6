"""How evenly a model serves the clients: mean, worst tenth and standard deviation over clients."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from statistics import fmean, pstdev

from fedsmoothlora.federation.records import (
    MEAN_OVER_CLIENTS,
    PREFIXES,
    STD_OVER_CLIENTS,
    WORST_TENTH,
    Metric,
)


def worst_tenth(values: Iterable[float], *, larger_is_better: bool) -> float:
    """The mean over the worst ``ceil(C / 10)`` of ``C`` clients, the "worst ten per cent" of the literature.

    Raises ``ValueError`` if there are no values.
    """
    ordered = sorted(values, reverse=not larger_is_better)
    if not ordered:
        raise ValueError("there are no clients")
    return fmean(ordered[: math.ceil(len(ordered) / 10)])


def fairness(metrics: Sequence[Metric], name: str, *, larger_is_better: bool) -> list[Metric]:
    """Mean, worst tenth and standard deviation over the clients that have a metric, each counted once.

    They are computed for the metric of the global model on the clients' rows, and for those of the clients'
    own and personal models (`fedsmoothlora.federation.records.PREFIXES`). A single client has none of them.
    Values that are not finite are left out.

    Args:
        metrics: the metrics of a round.
        name: the task's main metric.
        larger_is_better: the direction of improvement.
    """
    found = []
    for variant in (name, *(f"{prefix}{name}" for prefix in PREFIXES)):
        values = [
            one.value
            for one in metrics
            if one.client is not None and one.name == variant and math.isfinite(one.value)
        ]
        if len(values) < 2:
            continue
        found += [
            Metric(None, f"{variant}{MEAN_OVER_CLIENTS}", fmean(values)),
            Metric(None, f"{variant}{WORST_TENTH}", worst_tenth(values, larger_is_better=larger_is_better)),
            Metric(None, f"{variant}{STD_OVER_CLIENTS}", pstdev(values)),
        ]
    return found
