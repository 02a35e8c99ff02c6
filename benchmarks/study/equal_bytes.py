"""The summary of the second study: few bits at higher rank, with uploads of FedIT's size."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from textwrap import fill

from scipy import stats

from benchmarks.study.findings import VERDICTS, Findings, bytes_of
from benchmarks.study.tables import markdown, reached
from fedsmoothlora.experiments.intervals import Summary, summary
from fedsmoothlora.experiments.tables import NOTHING, interval, mean_and_std, signed

# The presets `weights` and `low_bit`, by their labels in every setting of this study.
OURS = ("weights", "low-bit")
FEDIT, FULL = "fedit", "full"
EQUAL = 1.03  # messages in 4 bits carry scales, too
LEVEL = 0.01  # an interval within this distance of 0 means "level"
FROZEN_FEATURES = "frozen-features"  # the recipe of all settings without a backbone
_NOT_LORA = ("full", "local")
_NEGATIVE_FIRST = ("worse", "no difference seen", "level", "better")
_FALSE_DISCOVERIES = 0.05


def of_this_study(all_findings: Sequence[Findings]) -> list[Findings]:
    """The scenarios in which one of ours and FedIT have all their runs, and a run of FedIT finished."""
    return [
        found
        for found in all_findings
        if found.setting.equal_bytes
        and FEDIT in found.labels
        and not math.isnan(_summary(found, FEDIT).mean)
        and set(OURS) & set(found.labels)
    ]


def lora_baselines(found: Findings, *, at_its_bytes: bool = False) -> list[str]:
    """The finished LoRA methods; ``at_its_bytes``: those with no longer uploads than FedIT, within 3 %."""
    methods = {one.label: one.method for one in found.setting.variants}
    labels = [label for label in found.baselines() if methods[label] not in _NOT_LORA]
    if not at_its_bytes:
        return labels
    most = EQUAL * bytes_of(found, FEDIT, down=False)
    return [label for label in labels if bytes_of(found, label, down=False) <= most]


def shown(found: Findings) -> list[str]:
    """The methods of the picture by round: ours, FedIT, the best with its uploads, and full fine-tuning."""
    best = _best(found, lora_baselines(found, at_its_bytes=True))
    wanted = dict.fromkeys((*OURS, FEDIT, best, FULL))
    return [label for label in wanted if label in found.labels]


def quality(all_findings: Sequence[Findings]) -> str:
    """The final metric by scenario: ours, the best LoRA methods, and full fine-tuning.

    In brackets, the bytes of a run, up and down, by those of FedIT.
    """
    head = ["scenario", "`fedit`", "best LoRA method with its uploads", "best LoRA method of all"]
    head += [f"`{label}`" for label in (*OURS, FULL)]
    rows = []
    for found in of_this_study(all_findings):
        row = [found.link, _mean(found, FEDIT)]
        for at_its_bytes in (True, False):
            label = _best(found, lora_baselines(found, at_its_bytes=at_its_bytes))
            row.append(f"{_mean(found, label)} `{label}` ({_times(found, label)})")
        for label in (*OURS, FULL):
            known = label in found.labels
            row.append(f"{_mean(found, label)} ({_times(found, label)})" if known else NOTHING)
        rows.append(row)
    return markdown(head, rows)


def differences(all_findings: Sequence[Findings]) -> str:
    """Ours minus the best LoRA method at FedIT's bytes and minus full fine-tuning, by scenario."""
    head = ["scenario"]
    for label in OURS:
        head += [f"`{label}` minus the best LoRA method with FedIT's uploads", f"`{label}` minus `full`"]
    rows = []
    for found in of_this_study(all_findings):
        best = _best(found, lora_baselines(found, at_its_bytes=True))
        row = [found.link]
        for label in OURS:
            row += [_difference(found, label, best), _difference(found, label, FULL)]
        rows.append([*row, "; ".join(_not_ahead_of(found, label) for label in OURS if label in found.labels)])
    return markdown([*head, "LoRA methods that it is not ahead of"], rows)


def cost(all_findings: Sequence[Findings]) -> str:
    """The rounds, bytes and seconds until the final value of FedIT is reached, by scenario."""
    labels = (FEDIT, *OURS, FULL)
    rows = []
    for found in of_this_study(all_findings):
        targets = found.finals(FEDIT)
        cells = [reached(found, label, targets) if label in found.labels else NOTHING for label in labels]
        rows.append([found.link, *cells])
    return markdown(["scenario", *(f"`{label}` takes" for label in labels)], rows)


def verdict(all_findings: Sequence[Findings]) -> str:
    """The answers to the question of the study as sentences."""
    held = of_this_study(all_findings)
    names = {"weights": "Trained weights", "low-bit": "Trained LoRA"}
    lines = [_sentence(names[label], label, [one for one in held if label in one.labels]) for label in OURS]
    lines.append(_after_correction(held))
    return "\n".join(fill(f"- {line}", 120, subsequent_indent="  ") for line in lines)


def _sentence(name: str, label: str, held: Sequence[Findings]) -> str:
    against = Counter(_against_full(found, label) for found in held if FULL in found.labels)
    words = {"level": f"level (within {LEVEL})", "worse": "behind", "better": "ahead"}
    counts = [f"{words.get(one, one)} in {against[one]}" for one in _NEGATIVE_FIRST if against[one]]
    at_its_bytes, of_all = (_ahead_of_all(label, held, at_its_bytes=one) for one in (True, False))
    more = (
        "including those that send more"
        if of_all == at_its_bytes
        else f"and of those that send more in {of_all}"
    )
    return (
        f"**{name}** (`{label}`): ahead of every LoRA method with uploads of FedIT's size in {at_its_bytes}, "
        f"{more}. Against full fine-tuning: {', '.join(counts) or 'not measured'}."
    )


def _ahead_of_all(label: str, held: Sequence[Findings], *, at_its_bytes: bool) -> str:
    """``1 of 4 scenarios on whole models and 6 of 6 on frozen features``."""
    counts = []
    for where, on_features in (("on whole models", False), ("on frozen features", True)):
        some = [one for one in held if (one.setting.config == FROZEN_FEATURES) is on_features]
        ahead = sum(
            all(found.verdict(label, other) == "better" for other in others)
            for found in some
            if (others := lora_baselines(found, at_its_bytes=at_its_bytes))
        )
        counts += [f"{ahead} of {len(some)} scenarios {where}"] if some else []
    return " and ".join(counts)


def _after_correction(held: Sequence[Findings]) -> str:
    """How many of the differences remain when the false discovery rate of all of them is held at 5 %."""
    compared = [
        (found, label, other)
        for found in held
        for label in OURS
        if label in found.labels
        for other in (*lora_baselines(found), *({FULL} & set(found.labels)))
    ]
    compared = [one for one in compared if one[0].verdict(*one[1:]) in VERDICTS]
    verdicts = Counter(found.verdict(label, other) for found, label, other in compared)
    seen = [found.verdict(label, other) != "no difference seen" for found, label, other in compared]
    adjusted = stats.false_discovery_control([p_value(*one) for one in compared])
    remain = sum(bool(one and p <= _FALSE_DISCOVERIES) for one, p in zip(seen, adjusted, strict=True))
    return (
        f"**Many comparisons**: in {sum(seen)} of {len(compared)} comparisons of these two with the other "
        f"methods, the 95 % interval does not include zero: they are behind in {verdicts['worse']} and ahead "
        f"in {verdicts['better']}. Of these, {remain} remain if the expected share of false ones is held at "
        "5 % (Benjamini and Hochberg)."
    )


def p_value(found: Findings, label: str, other: str) -> float:
    """The two-sided p-value of Student's paired test of the final metrics."""
    pairs = found.final_pairs(label, other)
    if len(pairs) < 2:
        return 1.0
    p = float(stats.ttest_rel(*zip(*pairs, strict=True)).pvalue)
    if math.isnan(p):  # all differences are equal
        return float(pairs[0][0] == pairs[0][1])
    return p


def _against_full(found: Findings, label: str) -> str:
    """The verdict, or ``level`` if the interval lies within 0.01 of zero."""
    difference = found.final_difference(label, FULL)
    if max(abs(difference.low), abs(difference.high)) <= LEVEL:
        return "level"
    return found.verdict(label, FULL)


def _best(found: Findings, labels: Sequence[str]) -> str:
    """The label with the best mean, of those with a finished run."""
    means = {label: found.sign * _summary(found, label).mean for label in labels}
    return max((label for label in labels if not math.isnan(means[label])), key=means.__getitem__)


def _times(found: Findings, label: str) -> str:
    """The bytes of a run, up and down, by those of FedIT."""
    return f"{bytes_of(found, label) / bytes_of(found, FEDIT):.2g}"


def _mean(found: Findings, label: str) -> str:
    return mean_and_std(_summary(found, label))


def _summary(found: Findings, label: str) -> Summary:
    return summary([value for value in found.finals(label) if value is not None])


def _difference(found: Findings, label: str, other: str) -> str:
    if not {label, other} <= set(found.labels):
        return NOTHING
    difference = found.final_difference(label, other)
    said = _against_full(found, label) if other == FULL else found.verdict(label, other)
    return f"{signed(difference.mean)} ({interval(difference)}): {said}"


def _not_ahead_of(found: Findings, label: str) -> str:
    """How many of the LoRA methods, and which."""
    others = lora_baselines(found)
    not_ahead = [other for other in others if found.verdict(label, other) != "better"]
    names = f" ({', '.join(f'`{other}`' for other in not_ahead)})" if not_ahead else ""
    return f"`{label}`: {len(not_ahead)} of {len(others)}{names}"
