"""The pages of ``fedsmoothlora watch``: one run, several runs side by side, the list of runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from fedsmoothlora.reports import charts
from fedsmoothlora.reports.blocks import (
    Block,
    Bullets,
    Cell,
    Chart,
    Grid,
    ListedRun,
    LivePage,
    Log,
    Note,
    Runs,
    Section,
    Table,
    chart,
)
from fedsmoothlora.reports.cells import cell, finite_sum, last_value
from fedsmoothlora.reports.formats import curve_in_words
from fedsmoothlora.reports.metrics import HIGHLIGHTS, metric
from fedsmoothlora.reports.reading import Metrics, RecordedRun
from fedsmoothlora.reports.sections.clients import latest_clients
from fedsmoothlora.reports.sections.costs import communication
from fedsmoothlora.reports.sections.curves import curves
from fedsmoothlora.reports.sections.header import facts, highlights, not_private
from fedsmoothlora.storage.progress import Progress

_FOOTER = "Every number is from the runs’ own files; a dash was not measured."
_SILENT = 120  # seconds without news after which the page says so
_MOST_REFUSALS = 20
_COMPARED = (*HIGHLIGHTS, "loss")


@dataclass(frozen=True, kw_only=True)
class LiveRun:
    """A run as it is now.

    Attributes:
        id: its path below the folder that is watched; empty for that folder itself.
        recorded: the files of its folder.
        progress: the round in progress; None if the run is not in progress.
        now: seconds since 1970.
    """

    id: str
    recorded: RecordedRun
    progress: Progress | None
    now: float

    @property
    def name(self) -> str:
        """The configuration's name, or else the folder's."""
        return str(self.recorded.config.get("name") or self.recorded.folder.name)


def run_page(run: LiveRun, measured: Sequence[Section], *, events: str, is_below_list: bool) -> LivePage:
    """The page of a run.

    Args:
        run: the run.
        measured: `measured_sections` of it.
        events: the address of the page's events.
        is_below_list: whether the page links to the list of runs.
    """
    recorded = run.recorded
    return LivePage(
        title=f"{run.name}: live",
        heading=run.name,
        description=" ".join(str(recorded.config.get("description") or "").split()),
        warning=" ".join(filter(None, [not_private(recorded), _trouble(run)])),
        facts={"State": state(run), **facts(recorded)},
        highlights=highlights(recorded),
        sections=[
            Section("progress", "In progress", _progress(run)),
            *measured,
            Section("log", "Log", _log(recorded)),
        ],
        footer=_FOOTER,
        events=events,
        is_below_list=is_below_list,
    )


def measured_sections(run: RecordedRun) -> list[Section]:
    """The sections that follow from the metrics, which take a while to draw."""
    # The clients' metrics are those of their last round, so that they have no curve.
    of_server = replace(run, metrics=Metrics(server=run.metrics.server))
    return [
        Section("curves", "Learning curves", curves(of_server)),
        Section("privacy", "Privacy", _epsilon(run.metrics)),
        Section("bytes", "Bytes", communication(run)),
        Section("clients", "Clients", latest_clients(run)),
        Section("refusals", "Refusals", _refusals(run)),
    ]


def comparison_page(runs: Sequence[LiveRun], *, events: str) -> LivePage:
    """Several runs side by side."""
    return LivePage(
        title=f"{len(runs)} runs: live",
        heading=f"{len(runs)} runs side by side",
        sections=[
            Section("runs", "Runs", [_comparison(runs)] if runs else []),
            Section("curves", "Learning curves", _curves_of(runs)),
        ],
        footer=_FOOTER,
        events=events,
        is_below_list=True,
    )


LIST_COLUMNS = ("state", "rounds", "quality", "epsilon", "sent")


def listed_run(run: LiveRun) -> ListedRun:
    """A row of the list. The metrics may be those of the newest round only."""
    server = run.recorded.metrics.server
    quality = next((name for name in _COMPARED if server.get(name)), None)
    values: list[Cell] = [state(run), _rounds(run)]
    values.append(
        None if quality is None else cell(last_value(server[quality]), quality, metric(quality).label)
    )
    values.append(cell(last_value(server.get("epsilon", {})), "epsilon"))
    values.append(cell(last_value(server.get("bytes_up", {})), "bytes_up", "in the last round"))
    return ListedRun(id=run.id, cells=values)


def unreadable_run(id: str) -> ListedRun:
    """A row of the list for a run with a damaged file, or one that was deleted a moment ago."""
    return ListedRun(id=id, cells=["cannot be read", *([None] * (len(LIST_COLUMNS) - 1))])


def list_page(
    name: str, rows: Sequence[ListedRun], *, total: int, page: int, pages: int, events: str
) -> LivePage:
    """The runs of a folder."""
    listed: list[Block] = [Runs(columns=LIST_COLUMNS, rows=rows, page=page, pages=pages)]
    if not rows:
        listed = [Note("There is no run in this folder yet.")]
    return LivePage(
        title=f"{name}: runs",
        heading=name,
        facts={"Runs": f"{total:,}", "Page": f"{page} of {pages}"},
        sections=[Section("runs", "Runs", listed)],
        footer=_FOOTER,
        events=events,
    )


def problem_page(
    heading: str, problem: str, *, events: str, ids: Sequence[str], is_below_list: bool
) -> LivePage:
    """A page that says why there is nothing to show.

    Args:
        heading: the heading.
        problem: a sentence.
        events: the address of the page's events.
        ids: ids of the sections that the page may have later.
        is_below_list: whether the page links to the list of runs.
    """
    return LivePage(
        title=f"{heading}: live",
        heading=heading,
        warning=problem,
        sections=[Section(id, id, []) for id in ids],
        footer=_FOOTER,
        events=events,
        is_below_list=is_below_list,
    )


def state(run: LiveRun) -> str:
    """The run's current work, in a few words."""
    recorded, progress = run.recorded, run.progress
    if progress is not None:
        silent = run.now - progress.written
        if silent > _SILENT:
            return f"no news for {silent // 60:.0f} minutes"
        if recorded.is_finished:
            return "writing its report"
        return f"round {progress.round} of {progress.rounds}" if progress.round else "between rounds"
    if recorded.stopped is not None:
        return "ended early"
    if recorded.metrics.rounds is None:
        return "before round 0"
    return "finished" if recorded.is_finished else "not in progress"


def _trouble(run: LiveRun) -> str:
    """A sentence on a run that needs its user; empty for all others."""
    recorded, rounds = run.recorded, run.recorded.metrics.rounds
    if recorded.stopped is not None:
        return f"This run ended after {rounds} of {recorded.planned_rounds} rounds: {recorded.stopped}"
    if run.progress is not None:
        silent = run.now - run.progress.written
        if silent <= _SILENT:
            return ""
        return (
            f"The run has written nothing for {silent // 60:.0f} minutes: it was killed, or its machine "
            "does not answer."
        )
    if rounds is None:
        return "No round is recorded: the run loads its model and data, or it ended before round 0."
    if recorded.is_finished:
        return ""
    return (
        f"This run is not in progress, and {rounds} of its {recorded.planned_rounds} rounds are recorded. "
        "It was interrupted, or it failed; its log says more. To go on: fedsmoothlora run --resume, with its "
        "folder."
    )


def _progress(run: LiveRun) -> list[Block]:
    """The round in progress and the clients in hand."""
    progress = run.progress
    if progress is None or progress.round is None:
        return []
    sentence = f"Round {progress.round:,} of {progress.rounds:,}"
    if progress.clients is None:
        return [Note(f"{sentence}. The run is private: who takes part is not shown.")]
    blocks: list[Block] = [
        Note(
            f"{sentence}: {progress.done:,} of {progress.clients:,} clients are done, "
            f"{progress.training:,} train."
        )
    ]
    if progress.in_hand:
        rows: list[tuple[str, list[Cell]]] = [
            (
                client,
                [
                    f"{one.step:,} of {one.steps:,}" if one.step else "starting",
                    cell(one.loss, "train_loss"),
                ],
            )
            for client, one in progress.in_hand.items()
        ]
        blocks.append(Table("Clients in hand", ["client", "step", "loss"], rows))
    return blocks


def _epsilon(metrics: Metrics) -> list[Block]:
    series = metrics.server.get("epsilon")
    if not series:
        return []
    title = metric("epsilon").title
    figure = charts.line_chart([charts.Line("epsilon", series)], from_zero=True)
    told = curve_in_words("epsilon", series)
    drawn = chart(figure, "epsilon", title, f"{title} by round. {told}.", metric("epsilon").explanation)
    return [Grid([drawn])]


def _refusals(run: RecordedRun) -> list[Block]:
    """How many uploads were refused and left out, the last rounds in which, and the reasons in the log."""
    found = {name: run.metrics.server[name] for name in ("refused", "left_out") if name in run.metrics.server}
    if not found:
        return []
    totals = "; ".join(
        f"{metric(name).label}: {finite_sum(series) or 0:,.0f}" for name, series in found.items()
    )
    blocks: list[Block] = [Note(f"Over all rounds, {totals}.")]
    rounds = sorted({round for series in found.values() for round, value in series.items() if value})
    if rounds:
        rows = [
            (str(round), [cell(series.get(round), name) for name, series in found.items()])
            for round in rounds[-_MOST_REFUSALS:][::-1]
        ]
        blocks.append(
            Table("The last rounds with refusals", ["round", *(metric(n).label for n in found)], rows)
        )
    reasons = [line for line in (run.log or "").splitlines() if "upload refused" in line]
    if reasons:
        blocks.append(Bullets(reasons[-_MOST_REFUSALS:][::-1]))
    return blocks


def _log(run: RecordedRun) -> list[Block]:
    return [] if run.log is None else [Log("The end of run.log", run.log)]


def _rounds(run: LiveRun) -> str:
    rounds, planned = run.recorded.metrics.rounds, run.recorded.planned_rounds
    return f"{'–' if rounds is None else rounds} of {'–' if planned is None else planned}"


def _comparison(runs: Sequence[LiveRun]) -> Table:
    names = [name for name in _COMPARED if any(run.recorded.metrics.server.get(name) for run in runs)]
    columns = ["run", "state", "method", "rounds", *(metric(name).label for name in names)]
    columns += ["epsilon", "sent up", "sent down", "refused"]
    rows = [(label, _row(run, names)) for label, run in _labels(runs).items()]
    return Table("The newest values of each run", columns, rows)


def _row(run: LiveRun, names: Sequence[str]) -> list[Cell]:
    server = run.recorded.metrics.server
    method = run.recorded.setting("method", "name")
    return [
        state(run),
        None if method is None else str(method),
        _rounds(run),
        *(cell(last_value(server.get(name, {})), name) for name in (*names, "epsilon")),
        *(cell(finite_sum(server.get(name)), name) for name in ("bytes_up", "bytes_down", "refused")),
    ]


def _curves_of(runs: Sequence[LiveRun]) -> list[Block]:
    """A chart of each metric, with a curve for each run."""
    drawn: list[Chart | Table] = []
    for name in (*_COMPARED, "epsilon"):
        lines = [
            charts.Line(label, series, *charts.look(place))
            for place, (label, run) in enumerate(_labels(runs).items())
            if (series := run.recorded.metrics.server.get(name))
        ]
        if lines:
            told = "; ".join(curve_in_words(line.label, line.points) for line in lines)
            title = metric(name).title
            figure = charts.line_chart(lines, legend=True)
            drawn.append(chart(figure, f"compared-{name}", title, f"{title} by round. {told}."))
    return [Grid(drawn)] if drawn else []


def _labels(runs: Sequence[LiveRun]) -> Mapping[str, LiveRun]:
    """The runs by their id, which is different for each."""
    return {run.id or run.name: run for run in runs}
