"""Carry out planned runs, one after another or several at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from rich.console import Console

from fedsmoothlora.errors import ConfigError
from fedsmoothlora.experiments.display import Display
from fedsmoothlora.experiments.planned_runs import PlannedRun, carry_out
from fedsmoothlora.experiments.worker_pool import carry_out_in_processes
from fedsmoothlora.federation.engines.processes import processors, too_many_threads
from fedsmoothlora.federation.settings import MachineSettings


def run_all(planned_runs: Sequence[PlannedRun], jobs: int, console: Console) -> None:
    """`carry_out_all` with progress on a console."""
    threads = planned_runs[0].config.machine.threads
    with Display(console) as display:
        if (warning := too_many_threads(threads, jobs, processors())) is not None:
            display.warn(warning)
        carry_out_all(planned_runs, jobs, display)


def carry_out_all(planned_runs: Sequence[PlannedRun], jobs: int, display: Display) -> None:
    """Carry out every planned run that has not begun, was interrupted or failed, ``jobs`` at a time.

    One job runs in this process, several in processes of their own. Each run has the number of threads that
    its configuration says, so the number of jobs changes no result.

    Raises:
        ConfigError: a folder holds another run. Nothing was run.
        InterruptedRunError: Ctrl-C. The current runs stopped after their current client and can be resumed.
    """
    for planned_run in planned_runs:
        planned_run.check()
    waiting = [planned_run for planned_run in planned_runs if planned_run.state in ("waiting", "failed")]
    display.begin(planned_runs, waiting)
    if jobs == 1 or len(waiting) <= 1:
        for planned_run in waiting:
            with display.planned_run(planned_run) as callback:
                callback.ended(carry_out(planned_run, callback), planned_run.outcome())
    else:
        carry_out_in_processes(waiting, jobs, display)


def side_by_side(machine: MachineSettings, jobs: int) -> MachineSettings:
    """The machine settings of each of ``jobs`` runs, which share ``machine.threads``; each has at least one.

    Raises ``ConfigError`` if the clients of a run should train in parallel too.
    """
    if machine.jobs > 1:
        raise ConfigError(
            f"machine.jobs = {machine.jobs}: a comparison runs whole runs in parallel (--jobs) and the "
            "clients of each run one after another; set machine.jobs = 1"
        )
    return replace(machine, threads=max(1, machine.threads // jobs))
