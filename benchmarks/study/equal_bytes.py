"""The summary of the second study: few bits at higher rank, against all methods at the bytes of FedIT."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from textwrap import fill

from scipy import stats

from benchmarks.study.findings import Findings, bytes_of
from benchmarks.study.tables import markdown, reached
from fedsmoothlora.experiments.intervals import Difference, Summary, summary
from fedsmoothlora.experiments.tables import NOTHING, interval, mean_and_std, signed

# The presets `weights` and `low_bit`, by their labels in every setting of this study.
OURS = ("weights", "low-bit")
FEDIT, FULL = "fedit", "full"
EQUAL = 1.03  # messages in 4 bits carry scales, too
LEVEL = 0.01  # an interval within this distance of 0 means "level"
_NOT_LORA = ("full", "local")
_FALSE_DISCOVERIES = 0.05


def of_this_study(all_findings: Sequence[Findings]) -> list[Findings]:
    """The scenarios of this study in which FedIT and one of ours have all their runs."""
    return [
        found
        for found in all_findings
        if found.setting.equal_bytes and FEDIT in found.labels and set(OURS) & set(found.labels)
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
    """The final metric by scenario: ours, the best LoRA methods, and full fine-tuning with its bytes."""
    head = ["scenario", "`fedit`", "best LoRA method with its uploads", "best LoRA method of all"]
    head += [*(f"`{label}`" for label in OURS), "`full`, and its bytes by FedIT's"]
    rows = []
    for found in of_this_study(all_findings):
        row = [found.link, _mean(found, FEDIT)]
        for at_its_bytes in (True, False):
            label = _best(found, lora_baselines(found, at_its_bytes=at_its_bytes))
            row.append(f"{_mean(found, label)} `{label}`")
        row += [_mean(found, label) if label in found.labels else NOTHING for label in OURS]
        if FULL in found.labels:
            ratio = bytes_of(found, FULL) / bytes_of(found, FEDIT)
            row.append(f"{_mean(found, FULL)} ({ratio:.0f} times)")
        else:
            row.append(NOTHING)
        rows.append(row)
    return markdown(head, rows)


def differences(all_findings: Sequence[Findings]) -> str:
    """Ours minus the best LoRA method at FedIT's bytes, and minus full fine-tuning."""
    head = ["scenario", "preset", "minus the best LoRA method with FedIT's uploads", "minus `full`"]
    head += ["ahead of", "not ahead of"]
    rows = []
    for found in of_this_study(all_findings):
        others = lora_baselines(found)
        for label in (one for one in OURS if one in found.labels):
            best = _best(found, lora_baselines(found, at_its_bytes=True))
            against_full = NOTHING
            if FULL in found.labels:
                against_full = _difference(found.final_difference(label, FULL), _against_full(found, label))
            not_ahead = [other for other in others if found.verdict(label, other) != "better"]
            rows.append(
                [
                    found.link,
                    f"`{label}`",
                    _difference(found.final_difference(label, best), found.verdict(label, best)),
                    against_full,
                    f"{len(others) - len(not_ahead)} of {len(others)} LoRA methods",
                    ", ".join(f"`{other}`" for other in not_ahead) or NOTHING,
                ]
            )
    return markdown(head, rows)


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
    ahead = {
        at_its_bytes: sum(
            all(found.verdict(label, other) == "better" for other in others)
            for found in held
            if (others := lora_baselines(found, at_its_bytes=at_its_bytes))
        )
        for at_its_bytes in (True, False)
    }
    against = Counter(_against_full(found, label) for found in held if FULL in found.labels)
    words = {"level": f"level (within {LEVEL})", "worse": "behind", "better": "ahead"}
    counts = [f"{words.get(one, one)} in {count}" for one, count in sorted(against.items())]
    return (
        f"**{name}** (`{label}`): ahead of every LoRA method with uploads of FedIT's size in {ahead[True]} "
        f"of {len(held)} scenarios, and of all LoRA methods, some of which send more, in {ahead[False]}. "
        f"Against full fine-tuning: {', '.join(counts) or 'not measured'}."
    )


def _after_correction(held: Sequence[Findings]) -> str:
    """How many of the differences remain when the false discovery rate of all of them is held at 5 %."""
    compared = [
        (found, label, other)
        for found in held
        for label in OURS
        if label in found.labels
        for other in (*lora_baselines(found), *({FULL} & set(found.labels)))
    ]
    seen = [found.verdict(label, other) != "no difference seen" for found, label, other in compared]
    adjusted = stats.false_discovery_control([p_value(*one) for one in compared])
    remain = sum(bool(one and p <= _FALSE_DISCOVERIES) for one, p in zip(seen, adjusted, strict=True))
    return (
        f"**Many comparisons**: in {sum(seen)} of {len(compared)} comparisons of these two with the other "
        f"methods, the 95 % interval does not include zero. Of these, {remain} remain if the expected share "
        "of false ones is held at 5 % (Benjamini and Hochberg)."
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


def _mean(found: Findings, label: str) -> str:
    return mean_and_std(_summary(found, label))


def _summary(found: Findings, label: str) -> Summary:
    return summary([value for value in found.finals(label) if value is not None])


def _difference(difference: Difference, said: str) -> str:
    return f"{signed(difference.mean)} ({interval(difference)}): {said}"
