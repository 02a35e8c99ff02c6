"""The top of the page: the run's facts and its most important numbers."""

from __future__ import annotations

import math
from collections.abc import Callable

from fedsmoothlora.reports import formats
from fedsmoothlora.reports.blocks import Highlight, Number
from fedsmoothlora.reports.cells import finite_sum, in_words, measured
from fedsmoothlora.reports.metrics import METRICS
from fedsmoothlora.reports.reading import RecordedRun, Series

_HIGHLIGHTS = ("accuracy", "exact_match", "loss", "perplexity")


def facts(run: RecordedRun) -> dict[str, object]:
    """Method, model and data, as far as the configuration names them."""
    found = {
        "Method": run.setting("method", "name"),
        "Model": run.setting("model", "source"),
        "Data": run.setting("data", "source"),
    }
    return {key: value for key, value in found.items() if value is not None}


def highlights(run: RecordedRun) -> list[Highlight]:
    server = run.metrics.server
    found = [
        Highlight(f"Final {METRICS[name].label}", *_final(server[name], formats.form_of(name)))
        for name in _HIGHLIGHTS
        if server.get(name)
    ]
    rounds, planned = run.metrics.rounds, run.setting("training", "rounds")
    if rounds is not None:
        found.append(
            Highlight("Rounds finished", measured(rounds), f"of {planned} planned" if planned else "")
        )
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


def _final(series: Series, form: Callable[[float], str]) -> tuple[Number, str]:
    """The last value, and its change since round 0."""
    last = max(series)
    change = series[last] - series[0] if 0 in series and last > 0 else math.nan
    if not math.isfinite(change):
        return measured(series[last], form), f"after round {last}"
    sign = "+" if change > 0 else "−" if change < 0 else "±"
    return measured(series[last], form), f"{sign}{form(abs(change))} since round 0"
