"""`python -m benchmarks.recipes RECIPE`: a recipe's main metric before and after training, over seeds.

For tasks that classify, the last line compares the result with the share of the most frequent class of the
test rows: the mean difference over seeds with its 95 % interval, by Student's t.
"""

from __future__ import annotations

import argparse
import io
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from fedsmoothlora.config import Config, read
from fedsmoothlora.config.overrides import parse_override
from fedsmoothlora.experiments.intervals import paired_difference
from fedsmoothlora.runs.planning import plan
from fedsmoothlora.runs.session import run


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One seed.

    Attributes:
        metric: the first of the task's metrics that the run has.
        before: its value before training.
        after: its value after the last round.
        majority: share of the most frequent class of the test rows; None if the task does not classify.
    """

    metric: str
    before: float
    after: float
    majority: float | None


def measured(config: Config) -> Measured:
    """Run a configuration."""
    with tempfile.TemporaryDirectory() as folder:
        result = run(config, out=Path(folder) / "run", console=Console(file=io.StringIO()), outputs=False)
        name = next(name for name in (*config.task.metrics, "loss") if name in result.names)
        values = result.values(name)
    test = plan(config).task_data.data.test
    share = None
    if config.task.classifies and test is not None:
        share = float(np.bincount(test.labels).max() / len(test))
    return Measured(metric=name, before=values[0], after=values[-1], majority=share)


def comparison(found: Sequence[Measured]) -> str:
    """The difference to the share of the most frequent class, and whether its interval is above 0."""
    shares = [one.majority for one in found if one.majority is not None]
    difference = paired_difference([one.after for one in found], shares)
    verdict = difference.verdict(larger_is_better=True)
    return (
        f"minus the share of the most frequent class: {difference.mean:+.4f}, 95 % interval "
        f"{difference.low:+.4f} to {difference.high:+.4f} over {difference.n} seeds: {verdict}"
    )


def lines(recipe: str, seeds: Sequence[int], changes: Mapping[str, Any]) -> Iterator[str]:
    """The row of every seed as soon as it is measured, and the comparison."""
    yield "| recipe | seed | metric | before training | after | most frequent class |"
    yield "|---|---|---|---|---|---|"
    found = []
    for seed in seeds:
        one = measured(read(recipe, {"machine.threads": 1, **changes, "seed": seed}))
        found.append(one)
        share = "" if one.majority is None else f"{one.majority:.4f}"
        yield f"| `{recipe}` | {seed} | {one.metric} | {one.before:.4f} | {one.after:.4f} | {share} |"
    if all(one.majority is not None for one in found):
        yield ""
        yield comparison(found)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.recipes", description=__doc__)
    parser.add_argument("recipe")
    parser.add_argument("--seeds", type=int, default=3, help="the number of seeds, from 0")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="as fedsmoothlora run"
    )
    arguments = parser.parse_args()
    for line in lines(arguments.recipe, range(arguments.seeds), dict(map(parse_override, arguments.set))):
        print(line, flush=True)


if __name__ == "__main__":
    main()
