"""A comparison as tables: CSV for programs, Markdown for documents, lines for the terminal."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Sequence

from rich.table import Table

from fedsmoothlora.experiments.budget import TOLERANCE
from fedsmoothlora.experiments.budget_tables import budget_notes, factor_in_words
from fedsmoothlora.experiments.intervals import Difference, Summary
from fedsmoothlora.experiments.results import ClientSpread, Cost, Results
from fedsmoothlora.federation.records import OWN, PERSONAL, TUNED
from fedsmoothlora.printable import counted
from fedsmoothlora.printable import markdown as as_markdown
from fedsmoothlora.reports.classes import majority
from fedsmoothlora.reports.formats import readable_bytes
from fedsmoothlora.reports.formats import seconds as readable_seconds
from fedsmoothlora.reports.reading import read_confusion

# Stands for a missing value.
NOTHING = "–"

# Personal models, by the beginning of their columns, with the prefix of their metrics.
_PERSONAL_KINDS = {"personal": PERSONAL, "fine_tuned": TUNED}
_PERSONAL_PARTS = ("mean", "worst_tenth", "std")


def variants_csv(results: Results) -> str:
    """One row for each variant; missing values are empty."""
    head = [
        *("variant", "method", "global_model", "runs", "finished", "diverged", "failed", "uploads_left_out"),
        *("metric", "mean", "std", "baseline", "difference", "low", "high", "pairs", "verdict"),
        *("target", "reached", "rounds_to_target", "bytes_to_target", "seconds_to_target"),
        *("bytes", "seconds", "client_metric", "clients_worst", "clients_median", "clients_best"),
        *("clients_std", "clients_mean", "clients_worst_tenth"),
        *(f"{kind}_{part}" for kind in _PERSONAL_KINDS for part in _PERSONAL_PARTS),
        *("tuned", "tuning_trials", "tuning_seeds", "at_edge_of_grid", "untuned_reason"),
        *("rank", "bits", "bytes_up_of_client", "bytes_down_of_client"),
        *("bytes_like", "times_bytes_like", "over_budget"),
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
                    (clients.metric, clients.worst, clients.middle, clients.best, clients.std)
                    if clients
                    else (None,) * 5
                ),
                *((clients.mean, clients.worst_tenth) if clients else (None,) * 2),
                *_personal_values(results, label),
                *_tuning_values(results, label),
                *(_rank(results, label), results.of(label)[0].config.transport.bits),
                *(results.bytes_per_client(label, name) for name in ("bytes_up", "bytes_down")),
                *_budget_values(results, label),
            ]
        )
    return csv_text(head, rows)


def runs_csv(results: Results) -> str:
    """One row for each run."""
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
    return csv_text(head, rows)


def markdown(results: Results) -> str:
    """The tables of the page as Markdown."""
    first = results.of(results.labels[0])[0].config
    parts = [
        f"# {results.name}: a comparison",
        f"Model {first.model.source}, data {first.data.source}, {counted(first.training.rounds, 'round')}, "
        f"{len(results.seeds)} seeds ({results.seeds[0]} to {results.seeds[-1]}). {measure_note(results)}",
        "## Final quality",
        markdown_table(*quality_table(results)),
        difference_note(results),
        "## Tuning",
        markdown_table(*tuning_table(results)),
        "\n".join(f"- {note}" for note in tuning_notes(results)),
        "## Cost",
        target_note(results),
        markdown_table(*cost_table(results)),
        bytes_note(results),
        markdown_table(*bytes_table(results)),
        "\n".join(f"- {note}" for note in budget_notes(results.budget)),
        "## Clients",
        clients_note(results),
        markdown_table(*clients_table(results)),
    ]
    failures = failed_runs(results)
    if failures:
        parts += ["## Runs without a usable model", "\n".join(f"- {line}" for line in failures)]
    return "\n\n".join(part for part in parts if part) + "\n"


def terminal(head: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """A table for a console."""
    table = Table(*head, box=None, pad_edge=False)
    for row in rows:
        table.add_row(*row)
    return table


def quality_table(results: Results) -> tuple[list[str], list[list[str]]]:
    """Final metric, difference to the baseline with its interval, and verdict."""
    head = [
        "variant",
        f"final {results.metric}",
        f"minus {results.baseline}",
        "95 % interval",
        "verdict",
        "tuned",
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
                _tuned_in_words(results, label),
                runs_in_words(results, label),
            ]
        )
    return head, rows


def tuning_table(results: Results) -> tuple[list[str], list[list[str]]]:
    """Whether each variant was tuned, on how many trials, and which choices are at an edge of the grid."""
    head = ["variant", "tuned", "trials", "seeds", "values tried", "at an edge of the grid"]
    rows = []
    for label in results.labels:
        record = results.record(label)
        if record is None:
            rows.append([marked(results, label), f"no: {untuned_reason(results, label)}", *(NOTHING,) * 4])
            continue
        tried = "; ".join(f"{key}: {', '.join(map(str, values))}" for key, values in record.grid.items())
        seeds = f"{record.seeds[0]}" + (f" to {record.seeds[-1]}" if len(record.seeds) > 1 else "")
        edge = ", ".join(record.at_edge) or "no"
        rows.append([marked(results, label), "yes", str(record.trials), seeds, tried, edge])
    return head, rows


def tuning_notes(results: Results) -> list[str]:
    """Warnings about tuning: untuned variants, unequal budgets, choices at an edge of the grid."""
    notes = []
    records = {label: record for label in results.labels if (record := results.record(label))}
    untuned = [label for label in results.labels if label not in records]
    if untuned:
        reasons = "; ".join(f"{label} ({untuned_reason(results, label)})" for label in untuned)
        notes.append(
            f"Not tuned: {reasons}. Tuning may reverse a difference to an untuned variant, so its verdict is "
            '"untuned". Choose settings with `fedsmoothlora tune` and compare its chosen.toml.'
        )
    if len({record.budget for record in records.values()}) > 1:
        budgets = "; ".join(f"{label} {record.budget}" for label, record in records.items())
        notes.append(
            f"Tuned on different numbers of trials: {budgets}. More trials favour a variant; tune all with "
            "the same number."
        )
    at_edge = [f"{label} ({', '.join(one.at_edge)})" for label, one in records.items() if one.at_edge]
    if at_edge:
        notes.append(
            f"The chosen value is at an edge of the grid: {'; '.join(at_edge)}. Values beyond may be better."
        )
    return notes


def untuned_reason(results: Results, label: str) -> str:
    """Why a variant counts as untuned."""
    status = results.tuning.get(label)
    return status.reason if status else "no tuning is recorded"


def cost_table(results: Results) -> tuple[list[str], list[list[str]]]:
    """Rounds and seconds to the target, and seconds of a whole run."""
    head = ["variant", "reached by", "rounds", "seconds", "seconds of a run"]
    rows = []
    for label in results.labels:
        to_target, reached = results.cost_to_target(label)
        cost = results.cost(label)
        rows.append(
            [
                marked(results, label),
                f"{reached} of {len(results.seeds)}",
                *(
                    (f"{to_target.rounds:.3g}", readable_seconds(to_target.seconds))
                    if to_target
                    else (NOTHING,) * 2
                ),
                readable_seconds(cost.seconds) if cost else NOTHING,
            ]
        )
    return head, rows


def bytes_table(results: Results) -> tuple[list[str], list[list[str]]]:
    """Rank, bytes of a client in a round, and bytes of all clients to the target and of a whole run."""
    budget = results.budget
    head = ["variant", "rank", "up", "down", "to target", "in all"]
    head += [f"of {budget.like}’s"] if budget else []
    rows = []
    for label in results.labels:
        to_target, _ = results.cost_to_target(label)
        cost, rank = results.cost(label), _rank(results, label)
        rows.append(
            [
                marked(results, label),
                NOTHING if rank is None else str(rank),
                *(_bytes(results.bytes_per_client(label, name)) for name in ("bytes_up", "bytes_down")),
                *(_bytes(spent.bytes if spent else None) for spent in (to_target, cost)),
                *([factor_in_words(budget, label)] if budget else []),
            ]
        )
    return head, rows


def clients_table(results: Results) -> tuple[list[str], list[list[str]]]:
    """Worst, median and best client."""
    head = ["variant", "metric", "mean", "worst 10 %", "worst", "median", "best", "std over clients"]
    rows = []
    for label in results.labels:
        personal = [results.personal(label, prefix) for prefix in _PERSONAL_KINDS.values()]
        spreads = [spread for spread in (results.clients(label), *personal) if spread is not None]
        rows += [[marked(results, label), client_metric(one), *map(four, _spread(one))] for one in spreads]
        if not spreads:
            rows.append([marked(results, label), *[NOTHING] * 7])
    return head, rows


def _personal_values(results: Results, label: str) -> list[float | None]:
    """The cells of personal models in the table of variants."""
    spreads = [results.personal(label, prefix) for prefix in _PERSONAL_KINDS.values()]
    return [
        None if spread is None else getattr(spread, part) for spread in spreads for part in _PERSONAL_PARTS
    ]


def client_metric(spread: ClientSpread) -> str:
    """The metric of the clients, in words."""
    if spread.metric == "train_loss":
        return "training loss"
    models = {OWN: "own models", PERSONAL: "personal models", TUNED: "fine-tuned final model"}
    for prefix, words in models.items():
        if spread.metric.startswith(prefix):
            return f"{spread.metric.removeprefix(prefix)}, {words}"
    return f"{spread.metric}, global model"


def measure_note(results: Results) -> str:
    """The rows and the model that the metric was measured with."""
    note = f"Measured: {results.metric} after the last round, " + (
        "on the test set." if results.on_test else "on the clients' validation rows (there is no test set)."
    )
    note += _majority_note(results)
    if any(not results.has_global_model(label) for label in results.labels):
        note += " *: no global model; the mean of the clients' own models."
    return note


def _majority_note(results: Results) -> str:
    """The share of the most frequent class, beside accuracies; empty for other metrics."""
    if results.metric != "accuracy":
        return ""
    confusions = [read_confusion(run.folder) for run in results.runs.values()]
    found = [majority(one) for one in confusions if one is not None]
    shares = sorted({round(one.share, 4) for one in found if one is not None})
    if not shares:
        return ""
    share = four(shares[0]) if len(shares) == 1 else f"{four(shares[0])} to {four(shares[-1])}"
    return f" A model that always predicts the most frequent class has the accuracy {share}."


def difference_note(results: Results) -> str:
    """How to read the intervals."""
    if len(results.seeds) == 1:
        return "One seed only: other seeds may give other results."
    compared = [results.difference(label).n for label in results.labels if label != results.baseline]
    lacking = any(n < len(results.seeds) for n in compared)
    seeds = "the seeds that both finished" if lacking else f"{len(results.seeds)} seeds"
    return (
        f"Differences to {results.baseline} are paired by seed; the interval is Student's t over "
        f"{seeds}. If it includes 0, no difference was seen, which does not mean that "
        "there is none. Intervals are not corrected for multiple comparisons: of 20 methods without any "
        "difference, one is expected to show one."
    )


def target_note(results: Results) -> str:
    """The target, and how its cost was measured."""
    if results.target is None:
        return f"No target: {results.baseline} has no finished run."
    sign = "at least" if results.larger_is_better else "at most"
    whose = "" if results.target_given else f", the final mean of {results.baseline}"
    return (
        f"Up to the first round with {results.metric} {sign} {four(results.target)}{whose}: means over the "
        "runs that reached it. Seconds are those of the rounds on "
        "the machine that ran them, clients one after another; parallel runs slow each other down."
    )


def bytes_note(results: Results) -> str:
    """How bytes were counted, and how the ranks were chosen."""
    note = (
        "Bytes up and down are the mean of one client in one round. Bytes to the target and in all are up "
        "and down, of all clients."
    )
    if results.budget is None:
        return note
    like = results.budget.like
    return (
        f"{note} LoRA ranks were chosen by bytes: each variant has the largest rank that sends at most "
        f"{1 + TOLERANCE:.2f} times what {like} sends in a round, unless it sets its rank itself or has none "
        f"to choose. The last column holds the bytes of a round as multiples of those of {like}, computed "
        "before training."
    )


def clients_note(results: Results) -> str:
    """How the spread over clients was measured."""
    found = [spread for label in results.labels if (spread := results.clients(label)) is not None]
    note = (
        "Of each run's clients at its end; means over the seeds. The worst 10 % is the mean over the worst "
        "⌈C/10⌉ of C clients."
    )
    if any(spread.metric == "train_loss" for spread in found):
        note += (
            " If no rows of clients are kept for validation (data.validation), only their training loss is "
            "known."
        )
    return note


def failed_runs(results: Results) -> list[str]:
    """Every run that did not finish or whose loss exploded, and why."""
    found = []
    for run in results.runs.values():
        reason = run.reason or run.loss_explosion
        if reason or run.state != "finished":
            rounds = f"{max(run.costs)} of {run.config.training.rounds} rounds"
            text = f"{run.label}, seed {run.seed}: {run.state}, {rounds}"
            found.append(f"{text}: {reason}" if reason else text)
    return found


def marked(results: Results, label: str) -> str:
    """The label, with a star where there is no global model."""
    return label if results.has_global_model(label) else f"{label}*"


def runs_in_words(results: Results, label: str) -> str:
    """``3``, or ``2 of 3, 1 diverged``, with the numbers of exploded losses and of uploads left out."""
    states = results.states(label)
    finished = states.pop("finished", 0)
    words = str(finished) if not states else f"{finished} of {len(results.seeds)}"
    words += "".join(f", {count} {state}" for state, count in states.items())
    exploded = sum(bool(run.loss_explosion) for run in results.of(label))
    words += f", {exploded} with exploded loss" if exploded else ""
    left_out = results.left_out(label)
    return words + (f" ({left_out} uploads left out)" if left_out else "")


def mean_and_std(found: Summary) -> str:
    """``0.9120 ± 0.0031``."""
    if not found.n:
        return NOTHING
    return four(found.mean) + (f" ± {four(found.std)}" if math.isfinite(found.std) else "")


def interval(found: Difference) -> str:
    """``−0.0102 to +0.0210``; a dash if there is no interval."""
    return f"{signed(found.low)} to {signed(found.high)}" if math.isfinite(found.low) else NOTHING


def signed(value: float) -> str:
    """Four decimals with their sign; a dash for NaN."""
    if not math.isfinite(value):
        return NOTHING
    return f"{value:+.4f}".replace("-", "−")


def four(value: float) -> str:
    """Four decimals; a dash for NaN."""
    return f"{value:.4f}".replace("-", "−") if math.isfinite(value) else NOTHING


def _tuned_in_words(results: Results, label: str) -> str:
    record = results.record(label)
    if record is None:
        return "no"
    return record.budget + (", at an edge" if record.at_edge else "")


def _tuning_values(results: Results, label: str) -> tuple[object, ...]:
    record = results.record(label)
    if record is None:
        return False, None, None, None, untuned_reason(results, label)
    return True, record.trials, len(record.seeds), " ".join(record.at_edge), None


def _spread(found: ClientSpread) -> tuple[float, ...]:
    return found.mean, found.worst_tenth, found.worst, found.middle, found.best, found.std


def _rank(results: Results, label: str) -> int | None:
    """The LoRA rank of a variant; None if its layers have no LoRA."""
    config = results.of(label)[0].config
    trains_lora = config.method.sends(0) != "W" and config.lora.target_modules
    return config.lora.r if trains_lora else None


def _budget_values(results: Results, label: str) -> tuple[object, ...]:
    budget = results.budget
    return (budget.like, budget.factor(label), budget.is_over(label)) if budget else (None,) * 3


def _bytes(count: float | None) -> str:
    return NOTHING if count is None else readable_bytes(count)


def _parts(cost: Cost | None) -> tuple[float | None, float | None, float | None]:
    return (cost.rounds, cost.bytes, cost.seconds) if cost else (None, None, None)


def csv_text(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table as CSV; None and NaN are empty."""
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


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table as Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(as_markdown, line)) + " |" for line in lines)
