"""`python -m benchmarks.study`: carry out the planned runs that are left, and write the results."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from benchmarks.study.driver import BusyError, Study
from benchmarks.study.page import DOCS, FIRST, SECOND, write_pages
from benchmarks.study.repeat import repeat
from benchmarks.study.setting import ORDER, read_setting
from fedsmoothlora.config import parse_override
from fedsmoothlora.errors import ConfigError, FedSmoothLoRAError
from fedsmoothlora.reports.formats import seconds

# Where data lie. The setting decides all other keys, or its records would not belong to it.
_OF_THIS_MACHINE = ("data.path",)


def main() -> int:
    """Run the study, forecast its time, or write its pages."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.study", description=__doc__)
    parser.add_argument("--setting", action="append", choices=ORDER, help="one setting; may be repeated")
    parser.add_argument("--scenario", action="append", help="one of its scenarios; may be repeated")
    parser.add_argument("--variant", action="append", default=[], help="a label; may be repeated")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help=f"a key that belongs to this machine: {', '.join(_OF_THIS_MACHINE)}",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print how long the runs that are left will take"
    )
    parser.add_argument("--jobs", type=_count, default=1, help="runs at a time")
    parser.add_argument("--work", type=Path, default=Path("runs/study"), help="folder of unfinished runs")
    parser.add_argument(
        "--repeat",
        type=_count,
        metavar="COUNT",
        help="carry out COUNT recorded runs of every scenario again and print how they differ",
    )
    parser.add_argument(
        "--tables",
        action="store_true",
        help="only write page, tables and figures from the records, and print the summary",
    )
    parser.add_argument(
        "--docs",
        type=Path,
        default=DOCS,
        help=f"the folder of the pages: {SECOND} and {FIRST}, with marked places for the tables",
    )
    arguments = parser.parse_args()
    for name in (SECOND, FIRST):
        if not (arguments.docs / name).is_file():
            parser.error(f"--docs {arguments.docs}: there is no {name}; copy it from {DOCS} there")
    if arguments.tables:
        for page, blocks in write_pages(arguments.docs).items():
            print("\n\n".join((page, *blocks.values())), end="\n\n")
        return 0
    console = Console()
    if arguments.repeat is not None:
        return _ended(_repeat(arguments, console), console)
    studies = _studies(arguments, console)
    if arguments.dry_run:
        console.print(f"about {seconds(sum(study.dry_run() for study in studies))} are left in all")
        return 0
    failed: list[str] = []
    try:
        for study in studies:
            console.rule(f"{study.setting.name}: {study.scenario}")
            try:
                failed += study.run()
            except BusyError as error:
                failed.append(f"{error}; skipped")
    finally:
        status = _ended(failed, console)
    write_pages(arguments.docs)
    return status


def _count(text: str) -> int:
    if (count := int(text)) < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return count


def _ended(failed: Sequence[str], console: Console) -> int:
    """Print the failures; returns the exit status."""
    for reason in failed:
        console.print(f"failed: {reason}", style="red", highlight=False, markup=False, soft_wrap=True)
    return 1 if failed else 0


def _repeat(arguments: argparse.Namespace, console: Console) -> list[str]:
    """Repeat recorded runs and print how they differ; returns the failures."""
    failed = []
    for study in _studies(arguments, console):
        with tempfile.TemporaryDirectory() as scratch:
            found, reasons = repeat(
                study.setting,
                study.scenario,
                arguments.repeat,
                scratch=Path(scratch),
                here=study.here,
                only=arguments.variant,
                console=console,
            )
        failed += reasons
        for one in found:
            print(f"{study.setting.name}: {study.scenario}: {one}", flush=True)
    return failed


def _studies(arguments: argparse.Namespace, console: Console) -> list[Study]:
    """The chosen scenarios, all looked up before the first one runs.

    Raises ``ConfigError`` for a scenario or a variant that a setting does not have, and for keys that do not
    belong to this machine.
    """
    here = dict(map(parse_override, arguments.set))
    for key in here:
        if key not in _OF_THIS_MACHINE:
            raise ConfigError(
                f"--set {key}: the setting decides that; only {', '.join(_OF_THIS_MACHINE)} can be set"
            )
    studies = []
    for setting in map(read_setting, arguments.setting or ORDER):
        for scenario in arguments.scenario or ():
            if scenario not in setting.scenarios:
                raise ConfigError(f"--scenario {scenario}: {setting.name} has {', '.join(setting.scenarios)}")
        scenarios = arguments.scenario or setting.scenarios
        labels = [one.label for scenario in scenarios for one in setting.variants_of(scenario)]
        for label in arguments.variant:
            if label not in labels:
                where = ": ".join([setting.name, *(arguments.scenario or ())])
                raise ConfigError(f"--variant {label}: {where} has {', '.join(dict.fromkeys(labels))}")
        studies += [
            Study(
                setting,
                scenario,
                work=arguments.work,
                jobs=arguments.jobs,
                only=arguments.variant,
                here=here,
                console=console,
            )
            for scenario in scenarios
        ]
    return studies


if __name__ == "__main__":
    try:
        sys.exit(main())
    except FedSmoothLoRAError as error:
        sys.exit(f"error: {error}")
