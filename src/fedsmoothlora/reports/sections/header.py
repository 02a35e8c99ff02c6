"""The top of the page: whether the run is finished, its facts and its most important metrics."""

from __future__ import annotations

import math
from collections.abc import Callable

from fedsmoothlora.reports import formats
from fedsmoothlora.reports.blocks import Highlight, Number
from fedsmoothlora.reports.cells import finite_sum, in_words, measured
from fedsmoothlora.reports.classes import majority
from fedsmoothlora.reports.metrics import HIGHLIGHTS, METRICS
from fedsmoothlora.reports.reading import RecordedRun, Series

SEEDED_NOISE = "This run is NOT private: its noise and its sampling follow from privacy.seed."


def unfinished(run: RecordedRun) -> str:
    """A sentence on a run that has recorded fewer rounds than planned; empty for all others."""
    rounds = run.metrics.rounds
    if run.stopped is not None:
        return f"This run ended after {rounds} of {run.planned_rounds} rounds: {run.stopped}"
    if run.is_finished:
        return ""
    if rounds is None:
        return f"This run is not finished: none of its {run.planned_rounds} rounds is recorded yet."
    return (
        f"This run is not finished: {rounds} of {run.planned_rounds} rounds are recorded. The page describes "
        f"the run up to round {rounds}."
    )


def not_private(run: RecordedRun) -> str:
    """A sentence on a run whose noise follows from a seed; empty for all others."""
    if not run.is_private or run.setting("privacy", "seed") is None:
        return ""
    return SEEDED_NOISE


def facts(run: RecordedRun) -> dict[str, object]:
    """Method, model and data, as far as the configuration names them."""
    found = {
        "Method": run.setting("method", "name"),
        "Model": run.setting("model", "source"),
        "Data": run.setting("data", "source"),
    }
    return {key: value for key, value in found.items() if value is not None}


def highlights(run: RecordedRun) -> list[Highlight]:
    """The quality of the model, the rounds, and the costs."""
    return [*_quality(run), *_rounds(run), *_privacy(run), *_costs(run)]


def _quality(run: RecordedRun) -> list[Highlight]:
    found = []
    newest = "Final" if run.is_finished else "Latest"
    for name in (*HIGHLIGHTS, "loss", "perplexity"):
        if series := run.metrics.server.get(name):
            value, below = _final(series, formats.form_of(name))
            most = majority(run.confusion) if name == "accuracy" and run.confusion else None
            if most is not None:
                below += f"; majority share {formats.decimals(most.share)}"
            found.append(Highlight(f"{newest} {METRICS[name].label}", value, below))
    return found


def _final(series: Series, form: Callable[[float], str]) -> tuple[Number, str]:
    """The last value, and its change since round 0."""
    last = max(series)
    change = series[last] - series[0] if 0 in series and last > 0 else math.nan
    if not math.isfinite(change):
        return measured(series[last], form), f"after round {last}"
    sign = "+" if change > 0 else "−" if change < 0 else "±"
    return measured(series[last], form), f"{sign}{form(abs(change))} since round 0"


def _rounds(run: RecordedRun) -> list[Highlight]:
    rounds, planned = run.metrics.rounds, run.planned_rounds
    if rounds is None:
        return []
    return [Highlight("Rounds finished", measured(rounds), f"of {planned} planned" if planned else "")]


def _privacy(run: RecordedRun) -> list[Highlight]:
    series = run.metrics.server.get("epsilon")
    if not series:
        return []
    delta = run.setting("privacy", "delta")
    whose = "of a row, the largest" if run.setting("privacy", "unit") == "sample" else "of a client"
    below = f"{whose}, at δ = {delta:g}" if isinstance(delta, float) else whose
    if not_private(run):
        below += "; not private: seeded noise"
    return [Highlight("Epsilon", measured(series[max(series)]), below)]


def _costs(run: RecordedRun) -> list[Highlight]:
    server = run.metrics.server
    found = []
    for name in ("bytes_up", "bytes_down"):
        if total := finite_sum(server.get(name)):
            value = measured(total, formats.form_of(name))
            found.append(Highlight(METRICS[name].title, value, "by all clients together"))
    times = {
        word: total
        for name, word in (("seconds_round", "rounds"), ("seconds_evaluation", "evaluation"))
        if (total := finite_sum(server.get(name))) is not None
    }
    if times:
        value = measured(sum(times.values()), formats.seconds)
        found.append(Highlight("Total time", value, in_words(list(times))))
    return found
