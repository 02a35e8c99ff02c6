"""An attack suite as tables: CSV for programs, Markdown for documents, lines for the terminal."""

from __future__ import annotations

import math

from rich.table import Table

from fedsmoothlora.experiments.attack_suite.results import BASELINE, MARGIN, NONE, AttackResults
from fedsmoothlora.experiments.tables import (
    NOTHING,
    csv_text,
    failed_runs,
    interval,
    markdown_table,
    mean_and_std,
    runs_in_words,
    signed,
)
from fedsmoothlora.printable import counted

# Columns that the table for a console chooses.
INTERVAL, SUCCESS, REFUSED = "95 % interval", "attack success", "refused"


def pairs_csv(results: AttackResults) -> str:
    """One row for each attack and defence; missing values are empty."""
    head = [
        *("attack", "defence", "refused_reason", "runs", "finished", "diverged", "failed"),
        *("metric", "mean", "std", "difference", "low", "high", "pairs"),
        *("attack_success", "attack_success_without_attack", "movement", "uploads_refused"),
    ]
    rows: list[list[object]] = []
    for label, pair in results.pairs.items():
        names = [pair.attack_label, pair.defence]
        if label in results.refused:
            rows.append([*names, results.refused[label], 0, *[None] * (len(head) - 4)])
            continue
        states, final = results.runs.states(label), results.final(label)
        difference = results.difference(label)
        rows.append(
            [
                *(*names, None, len(results.runs.seeds)),
                *(states.get(state, 0) for state in ("finished", "diverged", "failed")),
                *(results.runs.metric, final.mean, final.std),
                *(difference.mean, difference.low, difference.high, difference.n),
                *(results.success(label), results.success_without(label)),
                *(results.movement(label), results.refusals(label)),
            ]
        )
    return csv_text(head, rows)


def runs_csv(results: AttackResults) -> str:
    """One row for each run."""
    head = ["attack", "defence", "seed", "state", "reason", results.runs.metric, "folder"]
    rows = [
        [
            *(results.pairs[run.label].attack_label, results.pairs[run.label].defence, run.seed),
            *(run.state, run.reason, run.final(results.runs.metric)),
            f"runs/{run.label}/{run.folder.name}",
        ]
        for run in results.runs.runs.values()
    ]
    return csv_text(head, rows)


def markdown(results: AttackResults) -> str:
    """The tables of the page as Markdown."""
    first = results.runs.of(BASELINE)[0].config
    parts = [
        f"# {results.runs.name}: attacks and defences",
        f"Model {first.model.source}, data {first.data.source}, method {first.method.name}, "
        f"{counted(first.training.rounds, 'round')}, {counted(len(results.runs.seeds), 'seed')}. "
        f"{clients_note(results)}",
        measure_note(results),
        markdown_table(*matrix(results)),
        "\n".join(f"- {line}" for line in best_defences(results)),
        difference_note(results),
    ]
    if reasons := refused_pairs(results):
        parts += ["## Pairs that do not fit", "\n".join(f"- {line}" for line in reasons)]
    if failures := failed_runs(results.runs):
        parts += ["## Runs without a usable model", "\n".join(f"- {line}" for line in failures)]
    return "\n\n".join(part for part in parts if part) + "\n"


def terminal(results: AttackResults) -> Table:
    """The main table, for a console: the most important columns, and means without their deviation."""
    head, rows = matrix(results)
    refused = any(row[head.index(REFUSED)] not in ("0", NOTHING) for row in rows)
    shown = [head.index(name) for name in (*head[:5], SUCCESS, *([REFUSED] if refused else []))]
    table = Table(box=None, pad_edge=False, collapse_padding=True)
    for place in shown:
        table.add_column(head[place], no_wrap=head[place] in ("attack", "defence", INTERVAL))
    for row in rows:
        table.add_row(*(row[place].partition(" ± ")[0] for place in shown))
    return table


def matrix(results: AttackResults) -> tuple[list[str], list[list[str]]]:
    """Every attack and defence with its metrics; the best defence against each attack has a star."""
    head = [
        *("attack", "defence", f"final {results.runs.metric}", "difference", INTERVAL),
        *(SUCCESS, "without attack", "movement", REFUSED, "runs"),
    ]
    best = {results.best(attack) for attack in results.attacks}
    rows = []
    for label, pair in results.pairs.items():
        if label in results.refused:
            rows.append([pair.attack_label, pair.defence, *[NOTHING] * 7, "does not fit"])
            continue
        difference = results.difference(label)
        compared = label != BASELINE
        rows.append(
            [
                pair.attack_label,
                f"{pair.defence}*" if label in best else pair.defence,
                mean_and_std(results.final(label)),
                signed(difference.mean) if compared else NOTHING,
                interval(difference) if compared else NOTHING,
                _three(results.success(label)),
                _three(results.success_without(label)),
                _three(results.movement(label)),
                str(results.refusals(label)),
                runs_in_words(results.runs, label),
            ]
        )
    return head, rows


def best_defences(results: AttackResults) -> list[str]:
    """A sentence for each attack: its best defence, and whether it is within the margin."""
    lines = []
    for attack in results.attacks:
        best = results.best(attack)
        if best is None:
            lines.append(f"{attack}: no run has finished")
            continue
        held = f"within {MARGIN:g}" if results.withstood(attack) else f"misses {MARGIN:g}"
        line = (
            f"{attack}: best is {results.pairs[best].defence}, {results.runs.metric} "
            f"{signed(results.difference(best).mean)} against the attack-free mean: {held}"
        )
        if unfinished := results.unfinished(best):
            line += f" ({unfinished} of {len(results.runs.seeds)} runs did not finish)"
        successes = {
            label: success
            for label in results.of_attack(attack)
            if label not in results.refused and (success := results.success(label)) is not None
        }
        if successes:
            least = min(successes, key=lambda label: successes[label])
            line += (
                f"; attack success {_three(successes.get(best))}, least with "
                f"{results.pairs[least].defence}, {_three(successes[least])}"
            )
        lines.append(line)
    return lines


def refused_pairs(results: AttackResults) -> list[str]:
    """Every pair that was not run, and why."""
    return [
        f"{results.pairs[label].attack_label}, {results.pairs[label].defence}: {reason}"
        for label, reason in results.refused.items()
    ]


def clients_note(results: AttackResults) -> str:
    """The number of malicious clients, and the meaning of the attack-free runs."""
    count = len(results.malicious)
    names = ", ".join(results.malicious)
    return (
        f"{count} of {results.clients} clients {'is' if count == 1 else 'are'} malicious ({names}). "
        f"Attack “{NONE}” is the same run without {'this client' if count == 1 else 'these clients'}."
    )


def measure_note(results: AttackResults) -> str:
    """The meaning of the columns."""
    rows = (
        "on the test set" if results.runs.on_test else "on the honest clients' validation rows (no test set)"
    )
    return (
        f"The {results.runs.metric} was measured {rows} after the last round. The attack success is the "
        "share of rows that are put into the attack's target class: rows of the source class for label_flip, "
        "rows of other classes with the trigger for backdoor. The next column has the same share in the "
        "attack-free run. The movement is the norm of the sum of all server updates, relative to the "
        "attack-free mean's. A star marks the best defence against an attack."
    )


def difference_note(results: AttackResults) -> str:
    """How to read the intervals."""
    if len(results.runs.seeds) == 1:
        return "One seed only: other seeds may give other results."
    return (
        "Differences to the attack-free run with the plain mean are paired by seed; the interval is "
        f"Student's t over {len(results.runs.seeds)} seeds. The best defence is chosen by the same runs, so "
        "its difference is somewhat optimistic."
    )


def _three(value: float | None) -> str:
    return NOTHING if value is None or math.isnan(value) else f"{value:.3f}"
