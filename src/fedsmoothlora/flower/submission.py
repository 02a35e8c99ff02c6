"""Submit a federation's app to its coordinator, show the log of the run, and check how the run ended."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedsmoothlora.errors import ConfigError, FederationStoppedError, InterruptedRunError
from fedsmoothlora.flower.app_folder import CONNECTION, QUIET, node_config

_SHORT = 120.0


def run_app(
    app: Path,
    *,
    out: Path | None = None,
    resume: Path | None = None,
    federation_config: str | None = None,
    hint: str = "",
    command: Path | None = None,
) -> None:
    """Run the app of a federation, show the coordinator's log, and wait for the end of the run.

    ``flwr run --stream`` succeeds even if the run failed, so the run's status is read afterwards.

    Args:
        app: the folder of the federation; its coordinator is running.
        out: the run's folder, on the coordinator's machine; ``runs/NAME-TIME`` where the coordinator was
            started unless given.
        resume: the folder of a run to resume, in place of ``out``.
        federation_config: Flower's ``--federation-config``, for its simulation.
        hint: the message if the user presses Ctrl-C; unless given, it says how to end the run.
        command: Flower's command ``flwr``; the one that was installed with this Python unless given.

    Raises:
        ConfigError: ``app`` is no folder of a federation.
        FederationStoppedError: the run could not be started, or it failed.
        InterruptedRunError: Ctrl-C. The run goes on at the coordinator.
    """
    if not (app / "home" / "config.toml").is_file():
        raise ConfigError(f"{app} is no folder of a federation: `fedsmoothlora flower init` writes one")
    key, folder = ("resume", resume) if resume is not None else ("out", out)
    options = [] if folder is None else ["--run-config", node_config({key: str(folder.absolute())})]
    options += ["--federation-config", federation_config] if federation_config else []
    environment, command = app_environment(app), command or binaries() / "flwr"
    started = _json(command, ["run", str(app), CONNECTION, "--format", "json", *options], environment)
    run = str(started["run-id"])
    try:
        subprocess.run([command, "log", run, CONNECTION, "--stream"], env=environment, check=False)
        listed = _json(command, ["ls", CONNECTION, "--run-id", run, "--format", "json"], environment)
    except KeyboardInterrupt:
        raise InterruptedRunError(
            hint or f"the run goes on at the coordinator; to end it: flwr stop {run}"
        ) from None
    status = str(listed["runs"][0]["status"])
    if status != "finished:completed":
        raise FederationStoppedError(f"run {run} ended as {status}; its log says why")


def app_environment(app: Path) -> dict[str, str]:
    """The environment of Flower's commands for a federation, as ``flower.env`` sets it."""
    return with_path({**os.environ, **QUIET, "FLWR_HOME": str((app / "home").absolute())})


def with_path(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment with the commands of this Python on the path, which Flower starts by name."""
    return {**environment, "PATH": f"{binaries()}{os.pathsep}{environment.get('PATH', '')}"}


def binaries() -> Path:
    """The folder of the commands that were installed with this Python."""
    return Path(sys.executable).parent


def flwr(arguments: Sequence[str], environment: Mapping[str, str], command: Path | None = None) -> str:
    """The output of a ``flwr`` command. Raises ``FederationStoppedError`` if it fails."""
    done = subprocess.run(
        [command or binaries() / "flwr", *arguments],
        env=dict(environment),
        capture_output=True,
        text=True,
        timeout=_SHORT,
    )
    if done.returncode:
        raise FederationStoppedError(
            f"flwr {arguments[0]} failed: {(done.stdout + done.stderr).strip()[-2000:]}"
        )
    return done.stdout


def _json(command: Path, arguments: Sequence[str], environment: Mapping[str, str]) -> dict[str, Any]:
    """The JSON output of a ``flwr`` command, which reports some failures in it."""
    output = flwr(arguments, environment, command)
    try:
        found = json.loads(output)
    except json.JSONDecodeError:
        found = {}
    if not isinstance(found, dict) or not found.get("success"):
        raise FederationStoppedError(f"flwr {arguments[0]} failed: {output.strip()[-2000:]}")
    return found
