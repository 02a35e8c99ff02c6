"""The summary of the first study: the paper's settings, and round matching off with server feedback on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from textwrap import fill

from benchmarks.study.findings import VERDICTS, Findings, bytes_of, cost_to_reach
from benchmarks.study.tables import markdown
from fedsmoothlora.experiments.tables import NOTHING

# Beyond the paper: the variant that did best on the first screen.
BEYOND = "zeta0-feedback"
_NAMES = {"fedit": "FedIT", "flora": "FLoRA", "full": "full fine-tuning"}


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


def scenarios(all_findings: Sequence[Findings]) -> str:
    """The counted scenarios with links, and the baselines that FedSmoothLoRA is ahead of and behind."""
    head = ["scenario", "paper's settings: ahead of", "behind", f"{BEYOND}: ahead of", "behind"]
    rows = []
    for found in _counted(all_findings):
        row = [found.link]
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
        f"{other} ({found.name})"
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
                    if mine and theirs and reached == sum(target is not None for target in targets):
                        sooner += mine[0] < theirs[0]
                        cheaper += mine[1] < theirs[1]
    return (
        f"in the {total} comparisons of these two in which it ends ahead of FedIT or FLoRA, it reaches their "
        f"final value with every seed and in fewer rounds in {sooner}, and with fewer bytes in {cheaper}."
    )


def _smoother(counted: Sequence[Findings]) -> str:
    verdicts = Counter(found.smoothness_verdict(found.paper) for found in counted)
    compared = sum(verdicts[one] for one in VERDICTS)
    return f"{verdicts['better']} of {compared} scenarios, and more in {verdicts['worse']}"


def _times_the_bytes(counted: Sequence[Findings]) -> str:
    """The bytes of full fine-tuning by those of FedIT: the smallest and the largest ratio."""
    ratios = [
        bytes_of(found, "full") / bytes_of(found, "fedit") for found in counted if "full" in found.labels
    ]
    return f"{min(ratios):.0f} to {max(ratios):.0f}"


def _counts(held: Sequence[Findings], verdict: Callable[[Findings, str], str]) -> list[str]:
    """Counts of better, no difference and worse: for the paper's settings, then for ``BEYOND``."""
    paper = Counter(verdict(found, found.paper) for found in held)
    beyond = Counter(verdict(found, BEYOND) for found in held if BEYOND in found.labels)
    return [str(count[word]) for count in (paper, beyond) for word in VERDICTS]
