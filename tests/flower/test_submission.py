"""The outcome of a run at a coordinator, whose ``flwr`` command is stood in for by a script."""

import stat
from pathlib import Path

import pytest

pytest.importorskip("flwr")
from fedsmoothlora.errors import ConfigError, FederationStoppedError
from fedsmoothlora.flower.submission import run_app

FLWR = """#!/bin/sh
printf '%s\\n' "$FLWR_HOME" "$@" >> "{calls}"
case "$1" in
  run) echo '{run}' ;;
  log) echo 'a line of the log' ;;
  ls) echo '{{"success": true, "runs": [{{"run-id": "7", "status": "{status}"}}]}}' ;;
esac
"""


def flwr(folder: Path, status: str, run: str = '{"success": true, "run-id": "7"}') -> Path:
    command = folder / "flwr"
    command.write_text(FLWR.format(calls=folder / "calls", status=status, run=run))
    command.chmod(command.stat().st_mode | stat.S_IXUSR)
    return command


@pytest.fixture
def app(tmp_path: Path) -> Path:
    (tmp_path / "federation" / "home").mkdir(parents=True)
    (tmp_path / "federation" / "home" / "config.toml").touch()
    return tmp_path / "federation"


def test_a_completed_run_succeeds(app: Path, tmp_path: Path) -> None:
    run_app(app, out=tmp_path / 'a "run"', command=flwr(tmp_path, "finished:completed"))
    calls = (tmp_path / "calls").read_text().splitlines()
    assert calls[:3] == [str(app / "home"), "run", str(app)]
    assert f'out="{tmp_path}/a \\"run\\""' in calls
    assert calls[calls.index("log") : calls.index("log") + 2] == ["log", "7"]


@pytest.mark.parametrize("status", ["finished:failed", "finished:stopped", "running"])
def test_any_other_outcome_is_an_error(app: Path, tmp_path: Path, status: str) -> None:
    with pytest.raises(FederationStoppedError, match=f"run 7 ended as {status}"):
        run_app(app, command=flwr(tmp_path, status))


@pytest.mark.parametrize("output", ['{"success": false, "error-message": "no SuperLink"}', "no JSON", "[]"])
def test_a_run_that_does_not_start_is_an_error(app: Path, tmp_path: Path, output: str) -> None:
    with pytest.raises(FederationStoppedError, match="flwr run failed"):
        run_app(app, command=flwr(tmp_path, "finished:completed", output))


def test_another_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no folder of a federation"):
        run_app(tmp_path)
