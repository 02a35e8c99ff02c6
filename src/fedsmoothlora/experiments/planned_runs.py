"""One planned run of a comparison or a tuning: its state, and how it is carried out."""

from __future__ import annotations

import json
import shutil
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from fedsmoothlora.config import Config, ConfigError, first_difference, read, to_toml
from fedsmoothlora.errors import FederationStoppedError, InterruptedRunError
from fedsmoothlora.experiments.attack_suite.threat import Threat, run_threatened
from fedsmoothlora.experiments.display import PlannedRunCallback
from fedsmoothlora.reports.reading import read_metrics
from fedsmoothlora.runs.session import run
from fedsmoothlora.storage.files import write_text

State = Literal["waiting", "finished", "diverged", "failed"]


@dataclass(frozen=True)
class PlannedRun:
    """One run of many.

    Attributes:
        name: the name that is displayed, such as ``fedit, seed 2``.
        config: the run's whole configuration.
        folder: the run's folder. It is an ordinary run folder: `run --resume` and `report` take it. With
            a threat, only `report` does.
        threat: the malicious clients of a run of `fedsmoothlora attack`; None elsewhere.
    """

    name: str
    config: Config
    folder: Path
    threat: Threat | None = None

    @property
    def outcome_file(self) -> Path:
        """The file beside the folder that says why a run did not finish."""
        return self.folder.with_name(f"{self.folder.name}.json")

    @property
    def state(self) -> State:
        """The state of the run.

        A run has diverged if too few uploads of a round could be used; the same would happen again. A failed
        run may be tried again. A run that was interrupted while personal models were measured at its end is
        waiting.
        """
        if self._has_all_rounds and self._has_personal_metrics:
            return "finished"
        state = self.outcome().get("state")
        return state if state in ("diverged", "failed") else "waiting"  # type: ignore[return-value]

    @property
    def _has_all_rounds(self) -> bool:
        rounds = self.config.training.rounds
        # A round writes its checkpoint last; a run that ends early writes the reason after it.
        last = self.folder / "checkpoints" / f"{rounds:04d}.json", self.folder / "stopped.json"
        if any(file.is_file() for file in last):
            return True
        if not self.folder.is_dir() or (self.folder / "checkpoints").exists():
            return False
        # A finished run that was reduced to its records has no checkpoints (docs/operations.md).
        return (read_metrics(self.folder).rounds or 0) >= rounds

    @property
    def _has_personal_metrics(self) -> bool:
        """Whether nothing is left to measure at the end of the run (`personal_at_end`)."""
        measured = self.config.personal.on or self.config.evaluation.personal_steps is not None
        return not measured or "seconds_at_end" in read_metrics(self.folder).server

    def outcome(self) -> dict[str, str]:
        """``state`` and ``reason`` of a run that diverged or failed; empty for any other run."""
        try:
            found = json.loads(self.outcome_file.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return {}
        return dict(found) if isinstance(found, dict) else {}

    def check(self) -> None:
        """Raise ``ConfigError`` if the folder holds another run."""
        file = self.folder / "config.toml"
        if not file.is_file():
            return
        text = file.read_text(encoding="utf-8")
        key = first_difference(to_toml(self.config), text, before_planning=True)
        if key is not None:
            raise ConfigError(
                f"{self.folder} holds a run with another {key}: choose another --out, or remove that folder"
            )


def carry_out(planned_run: PlannedRun, callback: PlannedRunCallback) -> State:
    """Start or resume a planned run. If it diverges or fails, write the reason beside its folder.

    Raises ``InterruptedRunError`` on Ctrl-C. Any other error only marks this run as failed.
    """
    planned_run.folder.parent.mkdir(parents=True, exist_ok=True)
    begun = (planned_run.folder / "config.toml").is_file()
    if not begun and planned_run.folder.exists():
        # The run was killed before its configuration was written, so nothing was trained.
        shutil.rmtree(planned_run.folder)
    state: State = "finished"
    reason = ""
    try:
        _run(planned_run, callback, begun=begun)
    except (InterruptedRunError, KeyboardInterrupt):
        raise
    except FederationStoppedError as error:
        state, reason = "diverged", str(error)
    except Exception as error:  # of any kind: the other runs must go on
        state, reason = "failed", f"{type(error).__name__}: {error}"
    if state == "finished":
        planned_run.outcome_file.unlink(missing_ok=True)
    else:
        write_outcome(planned_run, state, reason)
    return state


def _run(planned_run: PlannedRun, callback: PlannedRunCallback, *, begun: bool) -> None:
    """Run or resume the federation."""
    out, resume = (None, planned_run.folder) if begun else (planned_run.folder, None)
    console = Console(quiet=True)
    if planned_run.threat is None:
        run(
            planned_run.config,
            out=out,
            resume=resume,
            console=console,
            verbosity=-1,
            callbacks=[callback],
            outputs=False,
        )
    else:
        run_threatened(
            planned_run.config,
            planned_run.threat,
            out=out,
            resume=resume,
            console=console,
            callbacks=[callback],
        )


def write_outcome(planned_run: PlannedRun, state: State, reason: str) -> None:
    """Write why a run did not finish."""
    planned_run.outcome_file.parent.mkdir(parents=True, exist_ok=True)
    write_text(planned_run.outcome_file, json.dumps({"state": state, "reason": reason}, indent=2) + "\n")


def to_message(planned_run: PlannedRun) -> str:
    """A planned run as one line of JSON, for a worker process."""
    return json.dumps(
        {
            "name": planned_run.name,
            "folder": str(planned_run.folder.absolute()),
            "config": to_toml(planned_run.config),
            "threat": None if planned_run.threat is None else planned_run.threat.table(),
        }
    )


def from_message(line: str) -> PlannedRun:
    """The opposite of `to_message`."""
    message: Mapping[str, Any] = json.loads(line)
    threat = message["threat"]
    return PlannedRun(
        message["name"],
        read(tomllib.loads(message["config"])),
        Path(message["folder"]),
        None if threat is None else Threat.from_table(threat),
    )
