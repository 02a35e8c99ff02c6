"""The records as Markdown tables. Every number of docs/results.md and docs/results/ is computed here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from statistics import fmean
from textwrap import fill

from benchmarks.study.driver import best_trial
from benchmarks.study.records import Record, Records
from benchmarks.study.setting import Setting
from fedsmoothlora.experiments.intervals import Difference, paired_difference, summary
from fedsmoothlora.experiments.tables import NOTHING, interval, mean_and_std, signed
from fedsmoothlora.reports.formats import readable_bytes
from fedsmoothlora.reports.metrics import larger_is_better

# Beyond the paper: the variant that did best on the screen.
BEYOND = "zeta0-feedback"
_VERDICTS = ("better", "no difference seen", "worse")


class Findings:
    """The records of one scenario, and comparisons of its variants.

    Args:
        setting: the setting.
        scenario: its name.
        records: its records.
    """

    def __init__(self, setting: Setting, scenario: str, records: Records) -> None:
        self.setting, self.scenario = setting, scenario
        self.trials, self.runs = records.trials(), records.runs()
        self.paper = setting.ours[scenario][0]
        self.sign = 1 if larger_is_better(setting.metric) else -1
        wanted = [one.label for one in setting.variants_of(scenario)]
        # A variant is reported once all its seeds are finished, so that nobody chooses among seeds.
        self.labels = [label for label in wanted if all((label, seed) in self.runs for seed in setting.seeds)]
        self.left = [label for label in wanted if label not in self.labels]

    def of(self, label: str) -> list[Record]:
        """Its runs by seed."""
        return [self.runs[label, seed] for seed in self.setting.seeds]

    def finals(self, label: str) -> list[float | None]:
        """The metric after the last round, by seed; None for a run that did not finish."""
        return [_final(run, self.setting.metric) for run in self.of(label)]

    def difference(self, label: str, other: str, of: Callable[[Record], float | None]) -> Difference:
        """The paired difference of a metric of the runs, over the seeds in which both have it."""
        pairs = [(of(a), of(b)) for a, b in zip(self.of(label), self.of(other), strict=True)]
        both = [(a, b) for a, b in pairs if a is not None and b is not None]
        return paired_difference([a for a, _ in both], [b for _, b in both])

    def final_difference(self, label: str, other: str) -> Difference:
        """The paired difference of the final metric."""
        return self.difference(label, other, lambda run: _final(run, self.setting.metric))

    def verdict(self, label: str, other: str) -> str:
        """The verdict of the interval of `final_difference`."""
        return self.final_difference(label, other).verdict(larger_is_better=self.sign > 0)

    def smoothness_verdict(self, label: str) -> str:
        """The verdict on the jump of the clients' loss, compared with FedIT."""
        return self.difference(label, "fedit", loss_jump).verdict(larger_is_better=False)

    @property
    def is_counted(self) -> bool:
        """Whether the summary over all scenarios includes this one."""
        return self.scenario not in self.setting.not_counted

    def ours(self) -> list[str]:
        """The finished variants of FedSmoothLoRA that are compared with every baseline."""
        return [label for label in self.setting.ours[self.scenario] if label in self.labels]

    def baselines(self) -> list[str]:
        """The finished variants of other methods."""
        return [label for label in self.setting.baselines if label in self.labels]


def summary_table(all_findings: Sequence[Findings]) -> str:
    """By scenario, the baselines that FedSmoothLoRA is ahead of and behind."""
    rows = []
    for found in all_findings:
        for label in found.ours():
            by_verdict: dict[str, list[str]] = {verdict: [] for verdict in _VERDICTS}
            for other in found.baselines():
                by_verdict.setdefault(found.verdict(label, other), []).append(other)
            name = f"{found.setting.name}: {found.scenario}"
            rows.append([name, label, *(", ".join(by_verdict[v]) or NOTHING for v in _VERDICTS)])
    return markdown(["setting", "FedSmoothLoRA as", "ahead of", "no difference seen", "behind"], rows)


def balance(all_findings: Sequence[Findings]) -> str:
    """In how many scenarios FedSmoothLoRA ends ahead of each baseline, and its loss jumps less than FedIT's.

    With the paper's settings, the first of a scenario's labels of ours, and as ``BEYOND``.
    """
    counted = _counted(all_findings)
    head = ["baseline"]
    for name in ("the paper's", BEYOND):
        head += [f"{name}: ahead", "no difference seen", "behind"]
    rows = []
    for other in dict.fromkeys(other for found in counted for other in found.baselines()):
        held = [found for found in counted if other in found.baselines()]
        rows.append([other, *_counts(held, lambda found, label, other=other: found.verdict(label, other))])
    rows.append(["fedit, by its loss jump", *_counts(counted, Findings.smoothness_verdict)])
    return markdown(head, rows)


def verdict(all_findings: Sequence[Findings]) -> str:
    """The summary of all counted scenarios as sentences."""
    counted = _counted(all_findings)
    lines = [
        f"**With the paper's settings**, FedSmoothLoRA ends {_ahead_of(counted, 'fedit', None)}, and "
        f"{_ahead_of(counted, 'flora', None)}.",
        f"**With round matching off and server feedback on** (`{BEYOND}`, beyond the paper, for the bytes of "
        f"FedIT), it ends {_ahead_of(counted, 'fedit', BEYOND)}, and {_ahead_of(counted, 'flora', BEYOND)}. "
        f"It is behind {_behind_any_lora(counted)}.",
        f"**Faster**: {_faster(counted)}",
        f"**Smoother**: with the paper's settings, its loss jumps less than FedIT's at round boundaries in "
        f"{_smoother(counted)}.",
        f"**Full fine-tuning**: FedSmoothLoRA with the paper's settings ends "
        f"{_ahead_of(counted, 'full', None)}; full fine-tuning sends {_times_the_bytes(counted)} times the "
        "bytes of FedIT.",
    ]
    return "\n".join(fill(f"- {line}", 120, subsequent_indent="  ") for line in lines)


def scenarios(all_findings: Sequence[Findings]) -> str:
    """The counted scenarios with links, and the baselines that FedSmoothLoRA is ahead of and behind."""
    head = ["scenario", "paper's settings: ahead of", "behind", f"{BEYOND}: ahead of", "behind"]
    rows = []
    for found in _counted(all_findings):
        row = [f"[{found.setting.name}](results/{found.setting.name}.md): {found.scenario}"]
        for label in (found.paper, BEYOND):
            others = found.baselines() if label in found.labels else []
            for wanted in ("better", "worse"):
                names = [other for other in others if found.verdict(label, other) == wanted]
                row.append(", ".join(names) or NOTHING)
        rows.append(row)
    return markdown(head, rows)


def _counted(all_findings: Sequence[Findings]) -> list[Findings]:
    return [one for one in all_findings if one.is_counted and {one.paper, "fedit"} <= set(one.labels)]


def _ahead_of(counted: Sequence[Findings], baseline: str, label: str | None) -> str:
    """``ahead of FedIT in 3 of 5 scenarios and behind in 1``; None stands for the paper's settings."""
    verdicts = Counter(
        found.verdict(label or found.paper, baseline)
        for found in counted
        if {label or found.paper, baseline} <= set(found.labels)
    )
    return (
        f"ahead of {_NAMES[baseline]} in {verdicts['better'] or 'none'} of {verdicts.total()} scenarios "
        f"and behind in {verdicts['worse'] or 'none'}"
    )


def _behind_any_lora(counted: Sequence[Findings]) -> str:
    """``no other LoRA method in any scenario``, or the methods."""
    behind = [
        f"{other} ({found.setting.name}: {found.scenario})"
        for found in counted
        if BEYOND in found.labels
        for other in found.baselines()
        if other != "full" and found.verdict(BEYOND, other) == "worse"
    ]
    return ", ".join(behind) or "no other LoRA method in any scenario"


def _faster(counted: Sequence[Findings]) -> str:
    """How often a variant that ends ahead reaches the baseline's final value sooner, and with fewer bytes."""
    sooner = cheaper = total = 0
    for found in counted:
        for label in dict.fromkeys((found.paper, BEYOND)):
            for other in ("fedit", "flora"):
                if {label, other} <= set(found.labels) and found.verdict(label, other) == "better":
                    targets = found.finals(other)
                    mine, reached = cost_to_reach(found, label, targets)
                    theirs, _ = cost_to_reach(found, other, targets)
                    total += 1
                    if mine and theirs and reached == len(targets):
                        sooner += mine[0] < theirs[0]
                        cheaper += mine[1] < theirs[1]
    return (
        f"in the {total} comparisons of these two in which it ends ahead of FedIT or FLoRA, it reaches their "
        f"final value with every seed and in fewer rounds in {sooner}, and with fewer bytes in {cheaper}."
    )


def _smoother(counted: Sequence[Findings]) -> str:
    verdicts = Counter(found.smoothness_verdict(found.paper) for found in counted)
    return f"{verdicts['better']} of {verdicts.total()} scenarios, and more in {verdicts['worse']}"


def _times_the_bytes(counted: Sequence[Findings]) -> str:
    """The bytes of full fine-tuning by those of FedIT: the smallest and the largest ratio."""
    ratios = [
        _bytes_of(found, "full") / _bytes_of(found, "fedit") for found in counted if "full" in found.labels
    ]
    return f"{min(ratios):.0f} to {max(ratios):.0f}"


def _bytes_of(found: Findings, label: str) -> float:
    """The mean bytes of a run, up and down."""
    return fmean(
        sum(value or 0.0 for name in _SPENT[:2] for value in run["rounds"].get(name, ()))
        for run in found.of(label)
        if run["state"] == "finished"
    )


_NAMES = {"fedit": "FedIT", "flora": "FLoRA", "full": "full fine-tuning"}


def quality(found: Findings) -> str:
    """The final metric of every variant, and its chosen settings."""
    first = found.labels[0]
    head = [
        *("variant", "chosen", f"final {found.setting.metric}", f"minus {first}", "95 % interval", "verdict"),
        "diverged",
    ]
    rows = []
    for label in found.labels:
        finals = [value for value in found.finals(label) if value is not None]
        difference = found.final_difference(label, first)
        compared = label != first
        trials = [one for (variant, _, _), one in found.trials.items() if variant == label]
        lost = sum(run["state"] == "diverged" for run in [*trials, *found.of(label)])
        rows.append(
            [
                label,
                _chosen(trials, found.setting.metric),
                mean_and_std(summary(finals)),
                signed(difference.mean) if compared else NOTHING,
                interval(difference) if compared else NOTHING,
                found.verdict(label, first) if compared else "–",
                f"{lost} of {len(trials) + len(found.setting.seeds)}",
            ]
        )
    return markdown(head, rows)


def ablations(found: Findings) -> str:
    """Every other variant of FedSmoothLoRA against the paper's."""
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
        cells = [_reached(found, label, targets) for label in (other, *ours)]
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
        jumps = [jump for run in found.of(label) if (jump := loss_jump(run)) is not None]
        difference = found.difference(label, first, loss_jump)
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


def _counts(held: Sequence[Findings], verdict: Callable[[Findings, str], str]) -> list[str]:
    """Counts of better, no difference and worse: for the paper's settings, then for ``BEYOND``."""
    paper = Counter(verdict(found, found.paper) for found in held)
    beyond = Counter(verdict(found, BEYOND) for found in held if BEYOND in found.labels)
    return [str(count[word]) for count in (paper, beyond) for word in _VERDICTS]


_STARTS = ("start_error", "ga_kept", "start_gradient_cosine")


def loss_jump(run: Record) -> float | None:
    """The clients' loss at the start of a round minus their loss at the end of the round before.

    The mean over clients and over the rounds after the first, on the same batch of each client.
    """
    starts, ends = (run["rounds"].get(name, []) for name in ("loss_at_start", "loss_at_end"))
    pairs = list(zip(starts[2:], ends[1:], strict=False))
    jumps = [start - end for start, end in pairs if start is not None and end is not None]
    return fmean(jumps) if jumps else None


def left(all_findings: Sequence[Findings]) -> str:
    """The variants that still have runs left."""
    rows = [[f"{one.setting.name}: {one.scenario}", ", ".join(one.left)] for one in all_findings if one.left]
    return markdown(["setting", "variants without all their runs"], rows) if rows else "Everything was run."


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _final(run: Record, metric: str) -> float | None:
    values = run["rounds"].get(metric) or [None]
    return float(values[-1]) if run["state"] == "finished" and values[-1] is not None else None


def _chosen(trials: Sequence[Record], metric: str) -> str:
    best = best_trial(trials, metric)
    if best is None:
        return NOTHING
    tried = {"lr": "training.lr", "gamma": "method.gamma"}
    words = []
    for name, key in tried.items():
        values = {one["settings"].get(key) for one in trials}
        if len(values) > 1:
            value = best[key]
            words.append(f"{name} {value:g}" + ("!" if value in (min(values), max(values)) else ""))
    return ", ".join(words)


def cost_to_reach(
    found: Findings, label: str, targets: Sequence[float | None]
) -> tuple[tuple[float, float, float] | None, int]:
    """Mean rounds, bytes and seconds of the runs that reached the target of their seed, and how many did."""
    costs = []
    for run, target in zip(found.of(label), targets, strict=True):
        values = run["rounds"].get(found.setting.metric, [])
        hits = (
            k
            for k, value in enumerate(values)
            if target is not None and value is not None and found.sign * value >= found.sign * target
        )
        if (k := next(hits, None)) is not None:
            # A round with client-level privacy has no bytes: they would tell how many clients were drawn.
            spent = [sum(x or 0.0 for x in run["rounds"].get(name, ())[: k + 1]) for name in _SPENT]
            costs.append((k, spent[0] + spent[1], spent[2]))
    if not costs:
        return None, 0
    rounds, sent, seconds = (fmean(part) for part in zip(*costs, strict=True))
    return (rounds, sent, seconds), len(costs)


def _reached(found: Findings, label: str, targets: Sequence[float | None]) -> str:
    cost, count = cost_to_reach(found, label, targets)
    if cost is None:
        return "never"
    rounds, sent, seconds = cost
    sent_too = f"{readable_bytes(sent)}, " if sent else ""
    words = f"{rounds:.1f} rounds, {sent_too}{seconds:.1f} s"
    return words if count == len(targets) else f"{words} ({count} of {len(targets)} seeds)"


_SPENT = ("bytes_up", "bytes_down", "seconds_round")


def _mean_of_runs(runs: Sequence[Record], name: str) -> float | None:
    values = [value for run in runs for value in run["rounds"].get(name, []) if value is not None]
    return fmean(values) if values else None
