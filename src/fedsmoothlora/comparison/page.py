"""The page of a comparison: its sections, each made of what was measured, or left out."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean

from fedsmoothlora.comparison import tables
from fedsmoothlora.comparison.results import Results, RunResult
from fedsmoothlora.config import flat, to_toml
from fedsmoothlora.report import charts, pieces
from fedsmoothlora.report.reading import Metrics, Series, Spread
from fedsmoothlora.report.tables import escape, pairs, table

_COLOURS = ("accent", "second", "third", "fourth", "fifth")
_STYLES = ("-", "--", ":", "-.")
# By figure of the server: what is drawn, and what it says.
_SERVER_DIAGNOSTICS = {
    "start_distance": (
        "Distance between clients’ starts",
        "How far apart the clients of a round begin.",
    ),
    "update_norm": ("Norm of the server’s update", "How far a round moves the global model."),
    "update_cosine": (
        "Cosine of consecutive updates",
        "1: a round goes on where the last one went; below 0: it goes back.",
    ),
    "merged_effective_rank": (
        "Effective rank of all that was merged",
        "How many directions the sum of all updates uses.",
    ),
    "left_out": ("Uploads left out", "Clients that diverged, and uploads that were refused."),
}
# The same of figures that every client has; what is drawn is their mean.
_CLIENT_DIAGNOSTICS = {
    "start_error": (
        "Error of the start",
        "What truncating the start cuts away, over the round match.",
    ),
    "ga_kept": ("Alignment kept at the start", "The share of the gradient-aligned matrix left in the LoRA."),
    "start_gradient_cosine": (
        "Alignment of the start with the gradient",
        "Cosine of the start and the client’s own descent direction.",
    ),
}
_JUMP = (
    "Jump of the loss at a round’s boundary",
    "A client’s loss as its round begins, less its loss as its last one ended; below 0, the server helped.",
)


def page(results: Results) -> str:
    """The whole page as HTML."""
    sections = {
        key: (title, body)
        for key, title, write in (
            ("quality", "Final quality", _quality),
            ("curves", "Learning curves", _curves),
            ("cost", "Cost", _cost),
            ("clients", "Clients", _clients),
            ("diagnostics", "Diagnostics", _diagnostics),
            ("runs", "Runs", _runs),
            ("settings", "Settings", _settings),
        )
        if (body := write(results))
    }
    return pieces.document(
        title=f"{results.name}: a comparison",
        headline=_headline(results),
        sections=sections,
        footer="<footer><p>Every number is from the runs’ own files; a dash was not measured.</p></footer>",
    )


def _headline(results: Results) -> str:
    first = results.of(results.labels[0])[0].config
    seeds = f"{results.seeds[0]}" + (f" to {results.seeds[-1]}" if len(results.seeds) > 1 else "")
    partition = ", ".join(
        [first.partition.kind, *(f"{key} {value}" for key, value in first.partition.options().items())]
    )
    facts = {
        "Model": first.model.source,
        "Data": first.data.source,
        "Partition": partition,
        "Rounds": first.training.rounds,
        "Seeds": seeds,
        "Baseline": results.baseline,
    }
    shown = "\n".join(f"<div><dt>{key}</dt><dd>{escape(value)}</dd></div>" for key, value in facts.items())
    states = [run.state for run in results.runs.values()]
    best = _best(results)
    big = [
        pieces.big(
            f"{'Highest' if results.larger_is_better else 'Lowest'} mean {results.metric}",
            tables.four(results.final(best).mean) if best else tables.NOTHING,
            _against_baseline(results, best) if best else "no run has finished",
        ),
        pieces.big("Compared", str(len(results.labels)), f"over {len(results.seeds)} seeds"),
        pieces.big(
            "Runs finished",
            str(states.count("finished")),
            f"of {len(states)}"
            + "".join(
                f", {states.count(state)} {state}"
                for state in ("diverged", "failed", "waiting")
                if state in states
            ),
        ),
    ]
    description = f"<p>{escape(first.description)}</p>\n" if first.description else ""
    return (
        f"<h1>{escape(results.name)}: a comparison</h1>\n{description}"
        f'<dl class="facts">\n{shown}\n</dl>\n<dl class="big">\n{chr(10).join(big)}\n</dl>'
    )


def _against_baseline(results: Results, label: str) -> str:
    if label == results.baseline:
        return f"{label}, the baseline"
    verdict = results.verdict(label)
    than = f" than {results.baseline}" if verdict == "better" else ""
    return f"{tables.marked(results, label)}: {verdict}{than}"


def _best(results: Results) -> str | None:
    means = {label: results.final(label).mean for label in results.labels if results.final(label).n}
    choose = max if results.larger_is_better else min
    return choose(means, key=lambda label: means[label]) if means else None


def _quality(results: Results) -> str:
    compared = {
        label: (found.mean, found.low, found.high)
        for label in results.labels
        if label != results.baseline and (found := results.difference(label)).n
    }
    blocks = []
    if compared:
        told = "; ".join(
            f"{label} {tables.signed(middle)}, {results.verdict(label)}"
            for label, (middle, _, _) in compared.items()
        )
        blocks.append(
            pieces.chart(
                charts.interval_chart(compared, xlabel=f"{results.metric} minus {results.baseline}’s"),
                "differences",
                f"Difference to {results.baseline}",
                f"Mean paired differences with their intervals. {told}.",
                "Mean over seeds and its 95 % interval; coloured where that leaves out 0.",
            )
        )
    shown = _table("Final quality", *tables.quality_table(results))
    return (
        f'<p class="quiet">{escape(tables.measure_note(results))}</p>\n{shown}\n'
        f'<p class="quiet" style="margin-top: 1rem">{escape(tables.difference_note(results))}</p>\n'
        + (pieces.grid(blocks) if blocks else "")
    )


def _curves(results: Results) -> str:
    blocks = []
    for name in dict.fromkeys((results.metric, "loss")):
        lines = _lines(results, lambda run, name=name: run.metrics.server.get(name))  # type: ignore[misc]
        if lines:
            blocks.append(
                _drawn(
                    lines,
                    f"curve-{name}",
                    pieces.title(name),
                    "Mean over seeds; the band is from the lowest to the highest.",
                )
            )
    by_bytes = [line for line in (_by_bytes(results, label) for label in results.labels) if line]
    if by_bytes:
        blocks.append(
            pieces.chart(
                charts.line_chart(by_bytes, xlabel="MB sent so far, up and down, all clients", legend=True),
                "bytes",
                f"{pieces.title(results.metric)} by bytes sent",
                "; ".join(
                    f"{line.label} reaches {tables.four(list(line.points.values())[-1])} with "
                    f"{max(line.points):.3g} MB"
                    for line in by_bytes
                ),
                "Mean over seeds. Farther left is cheaper.",
            )
        )
    return pieces.grid(blocks) if blocks else ""


def _by_bytes(results: Results, label: str) -> charts.Line | None:
    """The metric's mean over seeds by the mean of the bytes sent so far."""
    runs = [run for run in results.of(label) if run.metrics.server.get(results.metric)]
    if not runs:
        return None
    rounds = sorted(set.intersection(*(set(run.metrics.server[results.metric]) for run in runs)))
    points = {
        fmean(run.costs[k].bytes for run in runs) / 1e6: fmean(
            run.metrics.server[results.metric][k] for run in runs
        )
        for k in rounds
    }
    if not points or max(points) == 0:  # nothing is sent at all
        return None
    return charts.Line(tables.marked(results, label), points, *_look(results, label))  # type: ignore[arg-type]


def _look(results: Results, label: str) -> tuple[str, str]:
    """Colour and style, the same for a variant on the whole page."""
    place = list(results.labels).index(label)
    return _COLOURS[place % len(_COLOURS)], _STYLES[place // len(_COLOURS) % len(_STYLES)]


def _lines(results: Results, series: Callable[[RunResult], Series | None]) -> list[charts.Line]:
    """A curve a variant: the mean over its runs, and a band from the lowest to the highest."""
    lines = []
    for label in results.labels:
        found = [one for run in results.of(label) if (one := series(run))]
        spread, mean = over_seeds(found)
        if mean:
            band = spread if len(found) > 1 else None
            colour, style = _look(results, label)
            lines.append(charts.Line(tables.marked(results, label), mean, colour, style, band))
    return lines


def over_seeds(found: Sequence[Series]) -> tuple[Spread, Series]:
    """Lowest, mean and highest by round, over the runs that have a finite value there."""
    by_round: dict[int, list[float]] = {}
    for series in found:
        for round, value in series.items():
            if math.isfinite(value):
                by_round.setdefault(round, []).append(value)
    rounds = sorted(by_round)
    low, mean, high = ({k: over(by_round[k]) for k in rounds} for over in (min, fmean, max))
    return Spread(low, mean, high), mean


def _cost(results: Results) -> str:
    return f'<p class="quiet">{escape(tables.target_note(results))}</p>\n' + _table(
        "Cost to the target, and of a whole run", *tables.cost_table(results)
    )


def _clients(results: Results) -> str:
    if not any(results.clients(label) for label in results.labels):
        return ""
    return f'<p class="quiet">{escape(tables.clients_note(results))}</p>\n' + _table(
        "Spread over clients", *tables.clients_table(results)
    )


def _diagnostics(results: Results) -> str:
    wanted: list[tuple[str, tuple[str, str], Callable[[RunResult], Series | None]]] = [
        *(
            (name, words, lambda run, name=name: run.metrics.server.get(name))
            for name, words in _SERVER_DIAGNOSTICS.items()
        ),
        *(
            (name, words, lambda run, name=name: client_mean(run.metrics, name))
            for name, words in _CLIENT_DIAGNOSTICS.items()
        ),
        ("jump", _JUMP, lambda run: loss_jump(run.metrics)),
    ]
    blocks = []
    for name, (title, caption), series in wanted:
        lines = _lines(results, series)
        if name == "left_out" and not any(any(line.points.values()) for line in lines):
            continue
        if lines:
            blocks.append(_drawn(lines, f"diagnostic-{name}", title, caption))
    if not blocks:
        return ""
    return '<p class="quiet">Means over the clients of a round, and over seeds.</p>\n' + pieces.grid(blocks)


def client_mean(metrics: Metrics, name: str) -> Series:
    """The mean over the clients that have a figure in a round."""
    return _mean_by_round(metrics.clients.get(name, {}))


def loss_jump(metrics: Metrics) -> Series:
    """By round, the mean over clients of ``loss_at_start`` less the last ``loss_at_end`` before it."""
    jumps: dict[str, dict[int, float]] = {}
    ends = metrics.clients.get("loss_at_end", {})
    for client, starts in metrics.clients.get("loss_at_start", {}).items():
        for round, loss in starts.items():
            before = [k for k in ends.get(client, {}) if k < round]
            if before:
                jumps.setdefault(client, {})[round] = loss - ends[client][max(before)]
    return _mean_by_round(jumps)


def _mean_by_round(by_client: Mapping[str, Series]) -> Series:
    return over_seeds(list(by_client.values()))[1]


def _runs(results: Results) -> str:
    head = ["run", "state", "rounds", results.metric, "folder"]
    rows = []
    for run in results.runs.values():
        final = run.final(results.metric)
        folder = f"runs/{run.label}/{run.folder.name}"
        rows.append(
            [
                f"{run.label}, seed {run.seed}",
                run.state,
                f"{max(run.costs)} of {run.config.training.rounds}",
                tables.NOTHING if final is None else tables.four(final),
                folder,
            ]
        )
    told = "".join(f"<li>{escape(line)}</li>\n" for line in tables.unfinished_runs(results))
    return (f"<ul>\n{told}</ul>\n" if told else "") + _table("Every run", head, rows)


def _settings(results: Results) -> str:
    """What every variant sets that the first one does not, and what all have in common."""
    configs = {label: _flat_settings(results.of(label)[0]) for label in results.labels}
    first = configs[results.labels[0]]
    differing = {
        key
        for config in configs.values()
        for key in config.keys() | first.keys()
        if config.get(key) != first.get(key)
    }
    blocks = {"the same for all": {key: value for key, value in first.items() if key not in differing}}
    for label, config in configs.items():
        blocks[label] = {key: config[key] for key in sorted(differing & config.keys())}
    shown = "\n".join(f"<div>{pairs(name, values)}</div>" for name, values in blocks.items() if values)
    return f'<div class="pairs">\n{shown}\n</div>'


def _flat_settings(run: RunResult) -> dict[str, object]:
    settings = flat(tomllib.loads(to_toml(run.config)))
    return {key: value for key, value in settings.items() if key not in ("name", "description", "seed")}


def _drawn(lines: Sequence[charts.Line], name: str, title: str, caption: str) -> str:
    told = "; ".join(pieces.told(line.label, line.points) for line in lines)
    return pieces.chart(
        charts.line_chart(lines, legend=True), name, title, f"{title} by round. {told}.", caption
    )


def _table(caption: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return table(caption, head, [(row[0], [escape(cell) for cell in row[1:]]) for row in rows])
