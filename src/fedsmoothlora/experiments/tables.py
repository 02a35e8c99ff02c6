"""A comparison as tables: CSV for programs, Markdown for documents, lines for the terminal."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Sequence

from rich.table import Table

from fedsmoothlora.experiments.intervals import Difference, Summary
from fedsmoothlora.experiments.results import ClientSpread, Cost, Results
from fedsmoothlora.printable import markdown as as_markdown
from fedsmoothlora.reports.formats import readable_bytes
from fedsmoothlora.reports.formats import seconds as readable_seconds

# What is nowhere a number.
NOTHING = "–"


def variants_csv(results: Results) -> str:
    """One row a variant; empty where nothing was measured."""
    head = [
        *("variant", "method", "global_model", "runs", "finished", "diverged", "failed", "uploads_left_out"),
        *("metric", "mean", "std", "baseline", "difference", "low", "high", "pairs", "verdict"),
        *("target", "reached", "rounds_to_target", "bytes_to_target", "seconds_to_target"),
        *("bytes", "seconds", "client_figure", "clients_worst", "clients_median", "clients_best"),
        "clients_std",
    ]
    rows = []
    for label in results.labels:
        states, final, difference = results.states(label), results.final(label), results.difference(label)
        to_target, reached = results.cost_to_target(label)
        cost, clients = results.cost(label), results.clients(label)
        rows.append(
            [
                *(label, results.of(label)[0].config.method.name, results.has_global_model(label)),
                *(
                    len(results.seeds),
                    *(states.get(state, 0) for state in ("finished", "diverged", "failed")),
                ),
                *(results.left_out(label), results.metric, final.mean, final.std, results.baseline),
                *(difference.mean, difference.low, difference.high, difference.n, results.verdict(label)),
                *(results.target, reached, *_parts(to_target)),
                *_parts(cost)[1:],
                *(
                    (clients.figure, clients.worst, clients.middle, clients.best, clients.std)
                    if clients
                    else (None,) * 5
                ),
            ]
        )
    return _csv(head, rows)


def runs_csv(results: Results) -> str:
    """One row a run."""
    head = [
        *("variant", "seed", "state", "reason", results.metric, "rounds_finished", "bytes", "seconds"),
        *("rounds_to_target", "bytes_to_target", "seconds_to_target", "folder"),
    ]
    rows = []
    for label in results.labels:
        for run in results.of(label):
            reached = None if results.target is None else run.cost_to(results.metric, results.target)
            spent = run.costs[max(run.costs)]
            rows.append(
                [
                    *(label, run.seed, run.state, run.reason, run.final(results.metric)),
                    *(int(spent.rounds), spent.bytes, spent.seconds, *_parts(reached)),
                    f"runs/{label}/{run.folder.name}",
                ]
            )
    return _csv(head, rows)


def markdown(results: Results) -> str:
    """The tables that the page has too."""
    first = results.of(results.labels[0])[0].config
    parts = [
        f"# {results.name}: a comparison",
        f"Model {first.model.source}, data {first.data.source}, {first.training.rounds} rounds, "
        f"{len(results.seeds)} seeds ({results.seeds[0]} to {results.seeds[-1]}). {measure_note(results)}",
        "## Final quality",
        _markdown(*quality_table(results)),
        difference_note(results),
        "## Cost",
        target_note(results),
        _markdown(*cost_table(results)),
        "## Clients",
        clients_note(results),
        _markdown(*clients_table(results)),
    ]
    unfinished = unfinished_runs(results)
    if unfinished:
        parts += ["## Runs that did not finish", "\n".join(f"- {line}" for line in unfinished)]
    return "\n\n".join(part for part in parts if part) + "\n"


def terminal(results: Results) -> Table:
    """What matters most, for a console."""
    head, rows = quality_table(results)
    table = Table(*head, box=None, pad_edge=False)
    for row in rows:
        table.add_row(*row)
    return table


def quality_table(results: Results) -> tuple[list[str], list[list[str]]]:
    """Final metric, and the difference to the baseline with what it says."""
    head = [
        "variant",
        f"final {results.metric}",
        f"minus {results.baseline}",
        "95 % interval",
        "verdict",
        "runs",
    ]
    rows = []
    for label in results.labels:
        difference = results.difference(label)
        compared = label != results.baseline
        rows.append(
            [
                marked(results, label),
                mean_and_std(results.final(label)),
                signed(difference.mean) if compared else NOTHING,
                interval(difference) if compared else NOTHING,
                results.verdict(label) if compared else "the baseline",
                runs_in_words(results, label),
            ]
        )
    return head, rows


def cost_table(results: Results) -> tuple[list[str], list[list[str]]]:
    """Rounds, bytes and seconds to the target, and of a whole run."""
    head = ["variant", "reached by", "rounds", "bytes", "seconds", "bytes of a run", "seconds of a run"]
    rows = []
    for label in results.labels:
        to_target, reached = results.cost_to_target(label)
        cost = results.cost(label)
        rows.append(
            [
                marked(results, label),
                f"{reached} of {len(results.seeds)}",
                *(_in_words(to_target) if to_target else (NOTHING,) * 3),
                *(_in_words(cost)[1:] if cost else (NOTHING,) * 2),
            ]
        )
    return head, rows


def clients_table(results: Results) -> tuple[list[str], list[list[str]]]:
    """Worst, middle and best client."""
    head = ["variant", "figure", "worst", "median", "best", "std over clients"]
    rows = []
    for label in results.labels:
        found = results.clients(label)
        cells = [NOTHING] * 5 if found is None else [client_figure(found), *map(four, _spread(found))]
        rows.append([marked(results, label), *cells])
    return head, rows


def client_figure(spread: ClientSpread) -> str:
    """What was measured of the clients, in words."""
    if spread.figure == "train_loss":
        return "training loss"
    own = spread.figure.startswith("own_")
    return f"{spread.figure.removeprefix('own_')}, {'own models' if own else 'global model'}"


def measure_note(results: Results) -> str:
    """What the metric was measured on, and whose model's it is."""
    note = f"Measured: {results.metric} after the last round, " + (
        "on the test set." if results.on_test else "on the clients' validation rows (there is no test set)."
    )
    if any(not results.has_global_model(label) for label in results.labels):
        note += " *: no global model; the mean of the clients' own models."
    return note


def difference_note(results: Results) -> str:
    """How the intervals are to be read."""
    if len(results.seeds) == 1:
        return "One seed: nothing can be said of what another would give."
    return (
        f"Differences to {results.baseline} are paired by seed; the interval is Student's t over "
        f"{len(results.seeds)} seeds. Where it holds 0, no difference was seen, which is not to say that "
        "there is none. Every interval stands for itself: of 20 methods without any difference, one would be "
        "expected to show one."
    )


def target_note(results: Results) -> str:
    """What the target is."""
    if results.target is None:
        return f"No target: {results.baseline} has no finished run."
    sign = "at least" if results.larger_is_better else "at most"
    whose = "" if results.target_given else f", the final mean of {results.baseline}"
    return (
        f"To the first round with {results.metric} {sign} {four(results.target)}{whose}: means over the runs "
        "that reached it. Bytes are up and down, of all clients; seconds are those of the rounds on the "
        "machine that ran them, clients one after the other, and runs side by side slow each other."
    )


def clients_note(results: Results) -> str:
    """What the spread is of."""
    found = [spread for label in results.labels if (spread := results.clients(label)) is not None]
    note = "Of each run's clients at its end; means over the seeds."
    if any(spread.figure == "train_loss" for spread in found):
        note += (
            " Where no rows of clients were kept for validation (data.validation), only their training loss "
            "is known."
        )
    return note


def unfinished_runs(results: Results) -> list[str]:
    """Every run that did not finish, and why."""
    return [
        f"{run.label}, seed {run.seed}: {run.state}, {max(run.costs)} of {run.config.training.rounds} rounds"
        + (f": {run.reason}" if run.reason else "")
        for run in results.runs.values()
        if run.state != "finished"
    ]


def marked(results: Results, label: str) -> str:
    """The label, with a star where there is no global model."""
    return label if results.has_global_model(label) else f"{label}*"


def runs_in_words(results: Results, label: str) -> str:
    """``3``, or ``2 of 3, 1 diverged``; and how many uploads were left out."""
    states = results.states(label)
    finished = states.pop("finished", 0)
    words = str(finished) if not states else f"{finished} of {len(results.seeds)}"
    words += "".join(f", {count} {state}" for state, count in states.items())
    left_out = results.left_out(label)
    return words + (f" ({left_out} uploads left out)" if left_out else "")


def mean_and_std(found: Summary) -> str:
    """``0.9120 ± 0.0031``."""
    if not found.n:
        return NOTHING
    return four(found.mean) + (f" ± {four(found.std)}" if math.isfinite(found.std) else "")


def interval(found: Difference) -> str:
    """``−0.0102 to +0.0210``."""
    return f"{signed(found.low)} to {signed(found.high)}" if math.isfinite(found.low) else NOTHING


def signed(value: float) -> str:
    """Four decimals with their sign; nothing is nothing."""
    if not math.isfinite(value):
        return NOTHING
    return f"{value:+.4f}".replace("-", "−")


def four(value: float) -> str:
    """Four decimals."""
    return f"{value:.4f}".replace("-", "−") if math.isfinite(value) else NOTHING


def _spread(found: ClientSpread) -> tuple[float, float, float, float]:
    return found.worst, found.middle, found.best, found.std


def _in_words(cost: Cost) -> tuple[str, str, str]:
    return f"{cost.rounds:.3g}", readable_bytes(cost.bytes), readable_seconds(cost.seconds)


def _parts(cost: Cost | None) -> tuple[float | None, float | None, float | None]:
    return (cost.rounds, cost.bytes, cost.seconds) if cost else (None, None, None)


def _csv(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(head)
    for row in rows:
        writer.writerow(["" if _is_nothing(cell) else spreadsheet_cell(cell) for cell in row])
    return text.getvalue()


def spreadsheet_cell(cell: object) -> object:
    """The cell of a CSV file; a text that spreadsheets would run as a formula begins with a quote."""
    return f"'{cell}" if isinstance(cell, str) and cell.startswith(("=", "+", "-", "@", "\t", "\r")) else cell


def _is_nothing(cell: object) -> bool:
    return cell is None or (isinstance(cell, float) and math.isnan(cell))


def _markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(as_markdown, line)) + " |" for line in lines)
