"""The records as Markdown tables: those of each scenario's page, and those of all scenarios."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from benchmarks.study.findings import VERDICTS, Findings, best_trial, cost_to_reach, exploded
from benchmarks.study.records import Record
from fedsmoothlora.experiments.intervals import NOT_ALL_SEEDS, summary
from fedsmoothlora.experiments.tables import NOTHING, interval, mean_and_std, signed
from fedsmoothlora.reports.formats import readable_bytes

_STARTS = ("start_error", "ga_kept", "start_gradient_cosine")


def summary_table(all_findings: Sequence[Findings]) -> str:
    """By scenario, the baselines that FedSmoothLoRA is ahead of and behind."""
    columns = {
        **dict(zip(VERDICTS, ("ahead of", "no difference seen", "behind"), strict=True)),
        **dict.fromkeys((NOT_ALL_SEEDS, "one seed only", "no pair"), "not compared: runs diverged"),
    }
    heads = list(dict.fromkeys(columns.values()))
    rows = []
    for found in all_findings:
        for label in found.ours():
            cells: dict[str, list[str]] = {head: [] for head in heads}
            for other in found.baselines():
                cells[columns[found.verdict(label, other)]].append(other)
            rows.append([found.name, label, *(", ".join(labels) or NOTHING for labels in cells.values())])
    return markdown(["setting", "FedSmoothLoRA as", *heads], rows)


def left(all_findings: Sequence[Findings]) -> str:
    """The variants that still have runs left."""
    rows = [[one.name, ", ".join(one.left)] for one in all_findings if one.left]
    return markdown(["setting", "variants without all their runs"], rows) if rows else "Everything was run."


def quality(found: Findings) -> str:
    """The final metric of every variant, and its chosen settings."""
    first = found.labels[0]
    head = [
        *("variant", "chosen", f"final {found.setting.metric}", f"minus {first}", "95 % interval", "verdict"),
        *("diverged trials", "diverged runs"),
    ]
    rows = []
    for label in found.labels:
        finals = [value for value in found.finals(label) if value is not None]
        difference = found.final_difference(label, first)
        compared = label != first
        trials = found.trials_of(label)
        lost_trials = sum(one["state"] in ("diverged", "exploded") for one in trials)
        lost_runs = sum(run["state"] == "diverged" or exploded(run) for run in found.of(label))
        rows.append(
            [
                label,
                _chosen(trials, found.setting.metric),
                mean_and_std(summary(finals)),
                signed(difference.mean) if compared else NOTHING,
                interval(difference) if compared else NOTHING,
                found.verdict(label, first) if compared else "–",
                f"{lost_trials} of {len(trials)}",
                f"{lost_runs} of {len(found.setting.seeds)}",
            ]
        )
    return markdown(head, rows)


def ablations(found: Findings) -> str:
    """Every other variant of FedSmoothLoRA against the first one that is compared with the baselines."""
    paper = found.ours()[0]
    others = [label for label in found.labels if label not in (*found.setting.baselines, paper)]
    if not others:
        return "None is finished."
    head = ["variant", f"minus {paper}", "95 % interval", "verdict"]
    rows = []
    for label in others:
        difference = found.final_difference(label, paper)
        rows.append([label, signed(difference.mean), interval(difference), found.verdict(label, paper)])
    return markdown(head, rows)


def parts(found: Findings) -> str:
    """Pairs of variants that differ in one part of the method; empty if no such pair is finished."""
    head = ["variant", "minus", "difference", "95 % interval", "verdict"]
    rows = []
    for label, other in found.setting.pairs:
        if label in found.labels and other in found.labels:
            difference = found.final_difference(label, other)
            rows.append(
                [label, other, signed(difference.mean), interval(difference), found.verdict(label, other)]
            )
    return markdown(head, rows) if rows else ""


def ahead(found: Findings) -> str:
    """FedSmoothLoRA minus every baseline: final metric, paired by seed."""
    ours = found.ours()
    rows = []
    for other in found.baselines():
        cells = []
        for label in ours:
            difference = found.final_difference(label, other)
            cells.append(f"{signed(difference.mean)} ({interval(difference)}): {found.verdict(label, other)}")
        rows.append([other, *cells])
    return markdown(["baseline", *(f"{label} minus it" for label in ours)], rows)


def speed(found: Findings) -> str:
    """The cost of reaching, for every seed, the baseline's value after its last round."""
    ours = found.ours()
    rows = []
    for other in found.baselines():
        targets = found.finals(other)
        cells = [reached(found, label, targets) for label in (other, *ours)]
        rows.append([other, *cells])
    return markdown(["final value of", "takes itself", *(f"{label} takes" for label in ours)], rows)


def smoothness(found: Findings) -> str:
    """Jumps of the clients' loss between rounds, and diagnostics of their initial states."""
    first = found.labels[0]
    head = [
        "variant",
        "loss jump",
        f"minus {first}",
        "95 % interval",
        "start error",
        "GA kept",
        "start cosine",
    ]
    rows = []
    for label in found.labels:
        jumps = [jump for run in found.of(label) if (jump := found.loss_jump(run)) is not None]
        difference = found.difference(label, first, found.loss_jump)
        starts = [_mean_of_runs(found.of(label), name) for name in _STARTS]
        compared = label != first
        rows.append(
            [
                label,
                mean_and_std(summary(jumps)),
                signed(difference.mean) if compared else NOTHING,
                interval(difference) if compared else NOTHING,
                *(NOTHING if value is None else f"{value:.3f}" for value in starts),
            ]
        )
    return markdown(head, rows)


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _chosen(trials: Sequence[Record], metric: str) -> str:
    """The tuned keys of the best trial; ``!`` marks a value at an edge of those that were tried."""
    best = best_trial(trials, metric)
    if best is None:
        return NOTHING
    words = []
    for key, value in best.items():
        values = [one["settings"].get(key) for one in trials]
        if any(other != value for other in values):  # a variant's own values may be lists
            edge = "!" if _is_number(value) and value in (min(values), max(values)) else ""
            said = f"{value:g}" if _is_number(value) else str(value)
            words.append(f"{key.rpartition('.')[2]} {said}{edge}")
    return ", ".join(words)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def reached(found: Findings, label: str, targets: Sequence[float | None]) -> str:
    """The cost of reaching each seed's target in words: rounds, bytes and seconds."""
    cost, count = cost_to_reach(found, label, targets)
    if cost is None:
        return "never"
    rounds, sent, time = cost
    parts = [f"{rounds:.1f} rounds"]
    parts += [readable_bytes(sent)] if sent else []
    words = ", ".join([*parts, f"{time:.1f} s"])
    seeds = sum(target is not None for target in targets)
    return words if count == seeds else f"{words} ({count} of {seeds} seeds)"


def _mean_of_runs(runs: Sequence[Record], name: str) -> float | None:
    values = [value for run in runs for value in run["rounds"].get(name, []) if value is not None]
    return fmean(values) if values else None
