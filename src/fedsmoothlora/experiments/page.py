"""The page of a comparison. A section without any measured value is left out."""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Mapping, Sequence

from fedsmoothlora.config import flat, to_toml
from fedsmoothlora.experiments import tables
from fedsmoothlora.experiments.budget_tables import budget_notes
from fedsmoothlora.experiments.curves import drawn, lines, over_seeds, quality_by_bytes
from fedsmoothlora.experiments.results import Results, RunResult
from fedsmoothlora.reports import charts
from fedsmoothlora.reports.blocks import (
    Block,
    Bullets,
    Chart,
    Columns,
    Grid,
    Highlight,
    Note,
    Page,
    Pairs,
    Section,
    Table,
    chart,
)
from fedsmoothlora.reports.formats import flat_texts
from fedsmoothlora.reports.metrics import METRICS, metric
from fedsmoothlora.reports.reading import Metrics, Series
from fedsmoothlora.reports.rendering import render

# Metrics of the server, and of clients, whose mean is drawn.
_SERVER_DIAGNOSTICS = ("start_distance", "update_norm", "update_cosine", "merged_effective_rank", "left_out")
_CLIENT_DIAGNOSTICS = ("start_error", "ga_kept", "start_gradient_cosine")
_JUMP = (
    "Jump of the loss at a round’s boundary",
    "A client’s loss as its round begins, less its loss as its last one ended; below 0, aggregation helped.",
)


def page(results: Results) -> str:
    """The whole page as HTML."""
    sections = [
        Section(key, title, blocks)
        for key, title, write in (
            ("quality", "Final quality", _quality),
            ("curves", "Learning curves", _curves),
            ("cost", "Cost", _cost),
            ("clients", "Clients", _clients),
            ("diagnostics", "Diagnostics", _diagnostics),
            ("runs", "Runs", _runs),
            ("settings", "Settings", _settings),
        )
        if (blocks := write(results))
    ]
    title = f"{results.name}: a comparison"
    return render(
        Page(
            title=title,
            heading=title,
            description=results.of(results.labels[0])[0].config.description,
            facts=_facts(results),
            highlights=_highlights(results),
            sections=sections,
            footer="Every number is from the runs’ own files; a dash was not measured.",
        )
    )


def _facts(results: Results) -> dict[str, object]:
    first = results.of(results.labels[0])[0].config
    options = (f"{key} {value}" for key, value in first.partition.options().items())
    return {
        "Model": first.model.source,
        "Data": first.data.source,
        "Partition": ", ".join([first.partition.kind, *options]),
        "Rounds": first.training.rounds,
        "Seeds": f"{results.seeds[0]}" + (f" to {results.seeds[-1]}" if len(results.seeds) > 1 else ""),
        "Baseline": results.baseline,
    }


def _highlights(results: Results) -> list[Highlight]:
    states = [run.state for run in results.runs.values()]
    unfinished = "".join(
        f", {states.count(state)} {state}" for state in ("diverged", "failed", "waiting") if state in states
    )
    best = _best(results)
    return [
        Highlight(
            f"{'Highest' if results.larger_is_better else 'Lowest'} mean {results.metric}",
            tables.four(results.final(best).mean) if best else tables.NOTHING,
            _against_baseline(results, best) if best else "no run has finished",
        ),
        Highlight("Compared", str(len(results.labels)), f"over {len(results.seeds)} seeds"),
        Highlight("Runs finished", str(states.count("finished")), f"of {len(states)}{unfinished}"),
    ]


def _against_baseline(results: Results, label: str) -> str:
    if label == results.baseline:
        return f"{label}, the baseline"
    verdict = results.verdict(label)
    than = f" than {results.baseline}" if verdict == "better" else ""
    said = "not tuned, so no verdict" if verdict == "untuned" else f"{verdict}{than}"
    return f"{tables.marked(results, label)}: {said}"


def _best(results: Results) -> str | None:
    counts = {label: results.final(label).n for label in results.labels}
    # The mean over fewer seeds would favour a variant that diverges with the others.
    most = max(counts.values())
    means = {label: results.final(label).mean for label, n in counts.items() if n and n == most}
    choose = max if results.larger_is_better else min
    return choose(means, key=lambda label: means[label]) if means else None


def _quality(results: Results) -> list[Block]:
    compared = {
        label: (found.mean, found.low, found.high)
        for label in results.labels
        if label != results.baseline and (found := results.difference(label)).n
    }
    blocks: list[Block] = [
        Note(tables.measure_note(results)),
        _table("Final quality", *tables.quality_table(results)),
        Note(tables.difference_note(results)),
    ]
    if compared:
        told = "; ".join(
            f"{label} {tables.signed(middle)}, {results.verdict(label)}"
            for label, (middle, _, _) in compared.items()
        )
        differences = chart(
            charts.interval_chart(compared, xlabel=f"{results.metric} minus {results.baseline}’s"),
            "differences",
            f"Difference to {results.baseline}",
            f"Mean paired differences with their intervals. {told}.",
            "Mean over seeds and its 95 % interval; coloured where that leaves out 0.",
        )
        blocks.append(Grid([differences]))
    blocks.append(_table("Tuning", *tables.tuning_table(results)))
    if notes := tables.tuning_notes(results):
        blocks.append(Bullets(notes))
    return blocks


def _curves(results: Results) -> list[Block]:
    band = "Mean over seeds; the band is from the lowest to the highest."
    curves = [
        drawn(lines(results, _of_server(name)), f"curve-{name}", metric(name).title, band)
        for name in dict.fromkeys((results.metric, "loss"))
    ]
    blocks = [one for one in curves if one is not None]
    if (by_bytes := quality_by_bytes(results)) is not None:
        blocks.append(by_bytes)
    return [Grid(blocks)] if blocks else []


def _cost(results: Results) -> list[Block]:
    blocks: list[Block] = [
        Note(tables.target_note(results)),
        _table("Cost to the target, and of a whole run", *tables.cost_table(results)),
        Note(tables.bytes_note(results)),
        _table("Bytes", *tables.bytes_table(results)),
    ]
    if notes := budget_notes(results.budget):
        blocks.append(Bullets(notes))
    return blocks


def _clients(results: Results) -> list[Block]:
    if not any(results.clients(label) for label in results.labels):
        return []
    table = _table("Spread over clients", *tables.clients_table(results))
    return [Note(tables.clients_note(results)), table]


def _diagnostics(results: Results) -> list[Block]:
    names = [name for name in _SERVER_DIAGNOSTICS if name != "left_out" or _left_out_any(results)]
    charts_of_metrics = [
        *(_diagnostic(name, lines(results, _of_server(name))) for name in names),
        *(_diagnostic(name, lines(results, _of_clients(name))) for name in _CLIENT_DIAGNOSTICS),
        drawn(lines(results, lambda run: loss_jump(run.metrics)), "diagnostic-jump", *_JUMP),
    ]
    blocks = [one for one in charts_of_metrics if one is not None]
    if not blocks:
        return []
    return [Note("Means over the clients of a round, and over seeds."), Grid(blocks)]


def _left_out_any(results: Results) -> bool:
    return any(results.left_out(label) for label in results.labels)


def _of_server(name: str) -> Callable[[RunResult], Series | None]:
    """A function that reads a metric of the global model or the server from a run."""
    return lambda run: run.metrics.server.get(name)


def _of_clients(name: str) -> Callable[[RunResult], Series | None]:
    """A function that reads the mean over clients of a metric from a run."""
    return lambda run: client_mean(run.metrics, name)


def _diagnostic(name: str, lines: Sequence[charts.Line]) -> Chart | None:
    return drawn(lines, f"diagnostic-{name}", METRICS[name].title, METRICS[name].explanation)


def client_mean(metrics: Metrics, name: str) -> Series:
    """By round, the mean over the clients that have the metric."""
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


def _runs(results: Results) -> list[Block]:
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
    failures = tables.failed_runs(results)
    return [*([Bullets(failures)] if failures else []), _table("Every run", head, rows)]


def _settings(results: Results) -> list[Block]:
    """The settings that all variants share, and those in which they differ."""
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
    return [Columns([Pairs(name, flat_texts(values)) for name, values in blocks.items() if values])]


def _flat_settings(run: RunResult) -> dict[str, object]:
    settings = flat(tomllib.loads(to_toml(run.config)))
    return {key: value for key, value in settings.items() if key not in ("name", "description", "seed")}


def _table(caption: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    return Table(caption, columns, [(name, cells) for name, *cells in rows])
