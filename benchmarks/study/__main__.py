"""`python -m benchmarks.study`: run what is left of the study, and write docs/results.md's tables."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console

from benchmarks.study.driver import BusyError, Study
from benchmarks.study.page import write_page
from benchmarks.study.setting import ORDER, read_setting
from fedsmoothlora.config import parse_override
from fedsmoothlora.errors import ConfigError, PackageError

# Where data are. All else is the setting's, or a record would not be of what the setting says.
_OF_THIS_MACHINE = ("data.path",)


def main() -> int:
    """Run, forecast or write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.study", description=__doc__)
    parser.add_argument("--setting", action="append", choices=ORDER, help="one; may be repeated")
    parser.add_argument("--scenario", action="append", help="of that setting; may be repeated")
    parser.add_argument("--variant", action="append", default=[], help="a label; may be repeated")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help=f"what belongs to this machine: {', '.join(_OF_THIS_MACHINE)}",
    )
    parser.add_argument("--dry-run", action="store_true", help="say how many hours are left, and run nothing")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--work", type=Path, default=Path("runs/study"), help="where runs in hand are kept")
    parser.add_argument(
        "--tables", action="store_true", help="only write the tables and figures, of what is recorded"
    )
    parser.add_argument("--page", type=Path, default=Path("docs/results.md"), help="whose tables to write")
    arguments = parser.parse_args()
    if arguments.tables:
        write_page(arguments.page)
        return 0
    console = Console()
    failed: list[str] = []
    hours = 0.0
    for study in _studies(arguments, console):
        console.rule(f"{study.setting.name}: {study.scenario}")
        if arguments.dry_run:
            hours += study.dry_run()
            continue
        try:
            failed += study.run()
        except BusyError as error:
            console.print(f"{error}: left to it", style="yellow")
    if arguments.dry_run:
        console.print(f"about {hours:.3g} hours are left of all these")
    else:
        write_page(arguments.page)
    for reason in failed:
        console.print(f"failed: {reason}", style="red", highlight=False, markup=False, soft_wrap=True)
    return 1 if failed else 0


def _studies(arguments: argparse.Namespace, console: Console) -> list[Study]:
    """The scenarios that are wanted, all looked up before the first is run.

    Raises ``ConfigError`` for a scenario or a variant that a setting does not have, and for values that are
    not this machine's to set.
    """
    here = dict(map(parse_override, arguments.set))
    for key in here:
        if key not in _OF_THIS_MACHINE:
            raise ConfigError(
                f"--set {key}: the setting decides that; to set is {', '.join(_OF_THIS_MACHINE)}"
            )
    studies = []
    for setting in map(read_setting, arguments.setting or ORDER):
        known = {"scenario": setting.scenarios, "variant": [one.label for one in setting.variants]}
        for option, names in known.items():
            for name in getattr(arguments, option) or ():
                if name not in names:
                    raise ConfigError(f"--{option} {name}: {setting.name} has {', '.join(names)}")
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
            for scenario in arguments.scenario or setting.scenarios
        ]
    return studies


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ConfigError, PackageError) as error:
        sys.exit(f"error: {error}")
