"""The ranks of a budget of bytes, for a console, and warnings about variants that are over it."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from fedsmoothlora.experiments.budget import NO_RANK, TOLERANCE, Budget
from fedsmoothlora.reports.formats import readable_bytes


def print_budget(budget: Budget | None, console: Console) -> None:
    """Print the rank and the bytes of every variant, and the warnings; nothing without a budget."""
    if budget is None:
        return
    table = Table("variant", "rank", "up", "down", f"of {budget.like}’s", "", box=None, pad_edge=False)
    for label, share in budget.shares.items():
        rank = "–" if share.note == NO_RANK else str(share.r)
        over = "over the budget" if budget.is_over(label) else ""
        note = "; ".join(filter(None, (over, share.note)))
        sent = map(readable_bytes, (share.up, share.down))
        table.add_row(label, rank, *sent, f"× {factor(budget, label)}", note)
    console.print(
        f"bytes of a client in a round, up to {TOLERANCE:.0%} above those of {budget.like}:",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
    console.print(table)
    for note in budget_notes(budget):
        console.print(note, style="yellow", highlight=False, markup=False, soft_wrap=True)


def factor_in_words(budget: Budget, label: str) -> str:
    """``× 0.98``, or ``× 12.1, over the budget``."""
    over = ", over the budget" if budget.is_over(label) else ""
    return f"× {factor(budget, label)}{over}"


def factor(budget: Budget, label: str) -> str:
    """The bytes of a variant as a multiple of the budget, with three digits and at least two decimals."""
    value = budget.factor(label)
    return f"{value:.2f}" if value < 10 else f"{value:.3g}" if value < 1000 else f"{value:,.0f}"


def budget_notes(budget: Budget | None) -> list[str]:
    """A warning that names the variants that are over the budget, and why; empty if there are none."""
    if budget is None:
        return []
    over = [
        f"{label} sends {factor(budget, label)} times as many bytes"
        + (f" (it {share.note})" if not share.chosen else "")
        for label, share in budget.shares.items()
        if budget.is_over(label)
    ]
    return [f"Over the budget of {budget.like}: {'; '.join(over)}."] if over else []
