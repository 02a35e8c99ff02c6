"""The page of an attack suite."""

from __future__ import annotations

from collections.abc import Sequence

from fedsmoothlora.experiments import tables as comparison
from fedsmoothlora.experiments.attack_suite import tables
from fedsmoothlora.experiments.attack_suite.results import BASELINE, MARGIN, NONE, AttackResults
from fedsmoothlora.reports import charts
from fedsmoothlora.reports.blocks import (
    Block,
    Bullets,
    Chart,
    Grid,
    Highlight,
    Note,
    Page,
    Section,
    Table,
    chart,
)
from fedsmoothlora.reports.rendering import render


def page(results: AttackResults) -> str:
    """The whole page as HTML."""
    sections = [
        Section(key, title, blocks)
        for key, title, blocks in (
            ("matrix", "Attacks and defences", _matrix(results)),
            ("differences", "Differences", _differences(results)),
            ("refused", "Pairs that do not fit", _bullets(tables.refused_pairs(results))),
            ("runs", "Runs without a usable model", _bullets(comparison.failed_runs(results.runs))),
        )
        if blocks
    ]
    title = f"{results.runs.name}: attacks and defences"
    return render(
        Page(
            title=title,
            heading=title,
            description=tables.clients_note(results),
            facts=_facts(results),
            highlights=_highlights(results),
            sections=sections,
            footer="Every number is from the runs’ own files; a dash was not measured.",
        )
    )


def _facts(results: AttackResults) -> dict[str, object]:
    first, seeds = results.runs.of(BASELINE)[0].config, results.runs.seeds
    options = (f"{key} {value}" for key, value in first.partition.options().items())
    return {
        "Model": first.model.source,
        "Data": first.data.source,
        "Method": first.method.name,
        "Partition": ", ".join([first.partition.kind, *options]),
        "Rounds": first.training.rounds,
        "Seeds": f"{seeds[0]}" + (f" to {seeds[-1]}" if len(seeds) > 1 else ""),
    }


def _highlights(results: AttackResults) -> list[Highlight]:
    held = [attack for attack in results.attacks if results.withstood(attack)]
    states = [run.state for run in results.runs.runs.values()]
    return [
        Highlight(
            f"Attack-free {results.runs.metric}",
            comparison.four(results.final(BASELINE).mean),
            "the plain mean of the honest clients",
        ),
        Highlight(
            "Attacks withstood",
            str(len(held)),
            f"of {len(results.attacks)}, by the best defence within {MARGIN:g}",
        ),
        Highlight("Runs finished", str(states.count("finished")), f"of {len(states)}"),
    ]


def _matrix(results: AttackResults) -> list[Block]:
    return [
        Note(tables.measure_note(results)),
        *(_table(results, attack) for attack in (NONE, *results.attacks)),
        Bullets(tables.best_defences(results)),
        Note(tables.difference_note(results)),
    ]


def _table(results: AttackResults, attack: str) -> Table:
    """The defences against an attack, without the columns that have no value."""
    head, rows = tables.matrix(results)
    found = [row for row in rows if row[0] == attack]
    shown = [place for place in range(2, len(head)) if any(row[place] != comparison.NOTHING for row in found)]
    return Table(
        "no attack" if attack == NONE else attack,
        ["defence", *(head[place] for place in shown)],
        [(row[1], [row[place] for place in shown]) for row in found],
    )


def _differences(results: AttackResults) -> list[Block]:
    """A chart for each attack: every defence's difference to the attack-free run."""
    drawn = [one for attack in results.attacks if (one := _chart(results, attack)) is not None]
    return [Grid(drawn)] if drawn else []


def _chart(results: AttackResults, attack: str) -> Chart | None:
    compared = {
        results.pairs[label].defence: (found.mean, found.low, found.high)
        for label in results.of_attack(attack)
        if label not in results.refused and (found := results.difference(label)).n
    }
    if not compared:
        return None
    told = "; ".join(f"{name} {comparison.signed(middle)}" for name, (middle, _, _) in compared.items())
    return chart(
        charts.interval_chart(compared, xlabel=f"{results.runs.metric} minus attack-free"),
        f"attack-{attack}",
        attack,
        f"Mean paired differences with their intervals. {told}.",
        "Mean over seeds and its 95 % interval; coloured where that leaves out 0.",
    )


def _bullets(lines: Sequence[str]) -> list[Block]:
    return [Bullets(lines)] if lines else []
