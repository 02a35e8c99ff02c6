"""Runs that are killed at any moment and resumed end as if they had never been killed."""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import resource
import shutil
import signal
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from conftest import FinishedRuns
from families import OF_A_FAMILY, level
from fedsmoothlora import export, methods
from fedsmoothlora.errors import ConfigError, InterruptedRunError, ReportError, StateError, StorageError
from fedsmoothlora.federation.client import Learner
from fedsmoothlora.runs.session import run
from fedsmoothlora.storage import files

ROUNDS = 4


@pytest.fixture
def settings(toy_table: dict[str, Any]) -> Callable[..., dict[str, Any]]:
    """The toy configuration with four clients, three a round; ``settings(training__rounds=1)``."""

    def make(**changes: Any) -> dict[str, Any]:
        table = {
            **toy_table,
            "partition": {"kind": "iid", "clients": 4},
            "participation": {"clients": 3},
            "training": {"rounds": ROUNDS, "steps": 2, "batch_size": 8, "lr": 0.02},
        }
        for key, value in changes.items():
            section, _, name = key.partition("__")
            table[section] = {**table.get(section, {}), name: value}
        return table

    return make


Settings = Callable[..., dict[str, Any]]


def quiet() -> Console:
    return Console(file=io.StringIO())


def traces(folder: Path) -> dict[str, Any]:
    """All that a run must have in common with one that was never killed: metrics, updates, model."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    model = folder / "model" / "model.safetensors"
    return {
        "metrics": [line for line in lines if not line["name"].startswith("seconds")],
        "updates": [path.read_bytes() for path in sorted((folder / "updates").glob("*"))],
        "model": model.read_bytes() if model.exists() else None,  # methods without a global model write none
        "checkpoints": [path.read_bytes() for path in sorted((folder / "checkpoints").glob("*.safetensors"))],
        "names": sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if "clients" not in p.parts),
    }


def in_child(work: Callable[[], object], kill_after: float | None = None) -> int:
    """Run ``work`` in a forked child; its exit status, or minus the signal that ended it."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        except BaseException:
            traceback.print_exc()
            raise
        finally:
            os._exit(status)
    if kill_after is not None:
        time.sleep(kill_after)
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


def run_or_resume(config: dict[str, Any], folder: Path) -> None:
    if (folder / "config.toml").is_file():
        run(resume=folder, console=quiet())
    else:
        run(config, out=folder, console=quiet())


@pytest.fixture
def finished(settings: Settings, finished_runs: FinishedRuns, tmp_path: Path) -> Path:
    """The folder of a run that was never killed."""
    return finished_runs.copy(settings(), None, tmp_path / "finished")


@pytest.fixture
def unharmed(finished: Path) -> dict[str, Any]:
    return traces(finished)


@pytest.mark.release
def test_a_run_killed_at_many_random_moments_ends_like_an_uninterrupted_one(
    settings: Settings, unharmed: dict[str, Any], tmp_path: Path
) -> None:
    began = time.monotonic()
    assert in_child(lambda: run_or_resume(settings(), tmp_path / "whole")) == 0
    duration = time.monotonic() - began
    moments, attempts, kills = random.Random(0), 0, 0
    while attempts < 4 or kills < 10:  # a machine that is less busy than at first is not so easily hit
        assert attempts < 20
        folder = tmp_path / str(attempts)
        longest = duration / 2
        while in_child(lambda f=folder: run_or_resume(settings(), f), moments.uniform(0, longest)):
            kills += 1
            longest *= 1.2  # later and later, so that the run ends at last
            assert kills < 100
        assert traces(folder) == unharmed
        attempts += 1


@pytest.mark.slow
def test_a_run_killed_in_every_write_ends_like_an_uninterrupted_one(
    settings: Settings, unharmed: dict[str, Any], tmp_path: Path
) -> None:
    """The n-th file is left half written, or written and not renamed, and the process is gone."""

    def run_until_write(folder: Path, number: int, half: bool) -> None:
        writes = 0

        def deadly_write(path: Path, data: bytes) -> None:
            nonlocal writes
            writes += 1
            with files.write_whole(path) as temporary:
                if writes == number:
                    temporary.write_bytes(data[: len(data) // 2] if half else data)
                    os.kill(os.getpid(), signal.SIGKILL)
                temporary.write_bytes(data)

        import fedsmoothlora.storage.hashed_files

        fedsmoothlora.storage.hashed_files.write_bytes = deadly_write  # in the forked child only
        run_or_resume(settings(), folder)

    number, killed = 1, 0
    while True:
        folder = tmp_path / str(number)
        status = in_child(lambda f=folder, n=number: run_until_write(f, n, half=n % 2 == 0))
        if status == 0:
            break
        assert status == -signal.SIGKILL
        killed += 1
        assert in_child(lambda f=folder: run_or_resume(settings(), f)) == 0
        assert traces(folder) == unharmed, f"killed in write {number}"
        number += 5
    assert killed >= 6


@pytest.mark.parametrize("keep", [1, 3])
def test_old_checkpoints_are_pruned_and_the_best_stays_beside_the_last(
    settings: Settings, tmp_path: Path, keep: int
) -> None:
    result = run(settings(checkpoint__keep=keep), out=tmp_path / "run", console=quiet())
    accuracies = result.values("accuracy")
    best = accuracies.index(max(accuracies))
    kept = {int(path.stem) for path in (tmp_path / "run" / "checkpoints").glob("*.json")}
    assert kept == set(range(ROUNDS + 1 - keep, ROUNDS + 1)) | {best}


@pytest.mark.parametrize("damage", ["truncate", "flip"])
@pytest.mark.parametrize("ending", ["json", "safetensors"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_gives_the_same_result(
    unharmed: dict[str, Any], finished: Path, damage: str, ending: str
) -> None:
    folder = finished
    file = folder / "checkpoints" / f"{ROUNDS:04d}.{ending}"
    data = bytearray(file.read_bytes())
    if damage == "truncate":
        del data[len(data) // 2 :]
    else:
        data[len(data) // 2] ^= 1
    file.write_bytes(data)
    said = io.StringIO()
    run(resume=folder, console=Console(file=said))
    assert str(file) in said.getvalue()
    assert f"resumed after round {ROUNDS - 1}" in said.getvalue()
    assert traces(folder) == unharmed


def test_without_any_whole_checkpoint_the_error_names_them(finished: Path) -> None:
    for file in (finished / "checkpoints").glob("*.json"):
        file.write_text("{}")
    with pytest.raises(StateError, match=f"{ROUNDS:04d}.json"):
        run(resume=finished, console=quiet())


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("training.rounds", 9),
        ("training.lr", 0.5),
        ("seed", 4),
        ("machine.threads", 2),
        ("method.gamma", 1.0),
    ],
)
def test_a_resume_that_would_change_the_mathematics_is_refused_by_name(
    settings: Settings, finished_runs: FinishedRuns, tmp_path: Path, key: str, value: object
) -> None:
    folder = finished_runs.copy(settings(training__rounds=1), None, tmp_path / "run")
    with pytest.raises(ConfigError, match=key):
        run(None, {key: value}, resume=folder, console=quiet())
    run(None, {"checkpoint.keep": 5}, resume=folder, console=quiet())


# The others store nothing of another kind.
QUICK = ("fedsmoothlora", "rolora", "local")


@pytest.mark.parametrize(
    "method",
    [pytest.param(m, marks=level(m, QUICK, slow=OF_A_FAMILY)) for m in methods.names()],
)
def test_ctrl_c_stops_after_the_current_client_and_the_run_is_resumed_unchanged(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    config = settings()
    if method != config["method"]["name"]:
        config["method"] = {"name": method}
    assert_interruption_changes_nothing(config, tmp_path, monkeypatch)


FEDIT, PLAIN = {"name": "fedit"}, {"momentum": 0.0, "rounds": ROUNDS, "steps": 2, "batch_size": 8, "lr": 0.02}
KEEPS_MORE = {
    "momentum on products": {"server": {"optimizer": "momentum"}},
    "adam on factors": {"method": FEDIT, "server": {"optimizer": "adam", "lr": 0.01}},
    "scaffold": {"method": FEDIT, "training": {**PLAIN, "scaffold": True}},
    "ranks, diagnosed": {
        "lora": {"r": 4, "client_ranks": [4, 2, 1, 1]},
        "evaluation": {"batch_size": 64, "diagnostics": True},
    },
    "factors, diagnosed": {"method": FEDIT, "evaluation": {"batch_size": 64, "diagnostics": True}},
    "shuffled gradients": {"method": {"name": "fedsmoothlora", "gradient_aligned": "shuffled"}},
    "sketches": {"method": {"name": "fedsmoothlora", "gradient": "sketch", "sketch_width": 3}},
    "feedback": {"method": {"name": "fedsmoothlora", "zeta": 0.0, "server_feedback": True}},
    "packed products": {
        "method": {"name": "fedsmoothlora", "preset": "low_bit", "client_feedback": True},
        "transport": {"bits": 4},
    },
    "trained weights": {
        "method": {"name": "fedsmoothlora", "preset": "weights", "client_feedback": True},
    },
    "packed factors": {"method": FEDIT, "transport": {"bits": 4}},
}


@pytest.mark.parametrize("what", KEEPS_MORE)
def test_state_that_options_keep_between_rounds_survives_a_stop(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    assert_interruption_changes_nothing({**settings(), **KEEPS_MORE[what]}, tmp_path, monkeypatch)


def assert_interruption_changes_nothing(
    config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C in the middle of the second round."""
    run(config, out=tmp_path / "unharmed", console=quiet())
    visits = 0
    visit = Learner.visit

    def interrupted_visit(self: Learner, *arguments: Any) -> Any:
        nonlocal visits
        visits += 1
        if visits == 5:
            os.kill(os.getpid(), signal.SIGINT)
        reply = visit(self, *arguments)
        return reply

    monkeypatch.setattr(Learner, "visit", interrupted_visit)
    folder = tmp_path / "run"
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(InterruptedRunError):
        run(config, out=folder, console=quiet())
    assert visits == 5
    assert signal.getsignal(signal.SIGINT) is before
    run(resume=folder, console=quiet())
    # Clients that had replied before the stop are not trained again.
    assert visits == ROUNDS * config["participation"]["clients"]
    assert traces(folder) == traces(tmp_path / "unharmed")


def stopped_in_round_2(
    config: dict[str, Any], folder: Path, monkeypatch: pytest.MonkeyPatch, number: int = signal.SIGINT
) -> str:
    """Stop a run by a signal while its fifth client trains; returns its output."""
    visits, visit = 0, Learner.visit

    def interrupted_visit(self: Learner, *arguments: Any) -> Any:
        nonlocal visits
        visits += 1
        if visits == 5:
            os.kill(os.getpid(), number)
        return visit(self, *arguments)

    said = io.StringIO()
    with monkeypatch.context() as patch:
        patch.setattr(Learner, "visit", interrupted_visit)
        with pytest.raises(InterruptedRunError):
            run(config, out=folder, console=Console(file=said, width=300))
    return said.getvalue()


def test_sigterm_ends_a_run_as_ctrl_c_does_and_tells_how_to_resume(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    said = stopped_in_round_2(settings(), tmp_path / "run", monkeypatch, signal.SIGTERM)
    assert f"to go on: fedsmoothlora run --resume {tmp_path / 'run'}" in said
    assert signal.getsignal(signal.SIGTERM) is before
    assert len(list((tmp_path / "run" / "replies").iterdir())) == 2


def test_a_damaged_reply_is_named_and_its_client_trained_again(
    settings: Settings, unharmed: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped_in_round_2(settings(), tmp_path / "run", monkeypatch)
    first, *_ = sorted((tmp_path / "run" / "replies").iterdir())
    first.write_bytes(first.read_bytes()[:-9])
    said = io.StringIO()
    run(resume=tmp_path / "run", console=Console(file=said, width=300))
    assert f"{first} is truncated or was altered" in said.getvalue()
    assert "1 of 3 clients had replied" in said.getvalue()
    assert traces(tmp_path / "run") == unharmed


@pytest.mark.parametrize("what", ["model", "config.toml"])
def test_a_run_whose_base_or_configuration_has_changed_is_not_resumed(
    settings: Settings, tiny_folder: Path, tmp_path: Path, what: str
) -> None:
    base = Path(shutil.copytree(tiny_folder, tmp_path / "base"))
    config = settings(model__source=str(base), training__rounds=1)
    run(config, out=tmp_path / "run", console=quiet(), outputs=False)
    file = base / "model.safetensors" if what == "model" else tmp_path / "run" / "config.toml"
    text = file.read_bytes()
    file.write_bytes(text[:-1] + bytes([text[-1] ^ 1]) if what == "model" else text.replace(b"0.02", b"0.2"))
    with pytest.raises(StateError, match=r"model\.safetensors|training\.lr"):
        run(resume=tmp_path / "run", console=quiet())
    with pytest.raises(StateError, match=r"model\.safetensors|training\.lr"):
        export(tmp_path / "run", out=tmp_path / "adapter", console=quiet())
    file.write_bytes(text)
    run(resume=tmp_path / "run", console=quiet())
    assert (tmp_path / "run" / "model").is_dir()


@pytest.mark.parametrize("megabytes", [0.02, 0.1])
def test_a_full_disk_is_one_line_and_the_run_is_resumed_once_there_is_room(
    settings: Settings, unharmed: dict[str, Any], tmp_path: Path, megabytes: float
) -> None:
    """No file may be larger, as on a disk that is full: it is a limit of the process."""
    folder, said = tmp_path / "run", tmp_path / "said"

    def full() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(megabytes * 1e6),) * 2)
        try:
            run(settings(), out=folder, console=quiet())
        except StorageError as error:
            os.write(os.open(said, os.O_WRONLY | os.O_CREAT), str(error).encode())
            os._exit(7)

    assert in_child(full) == 7
    assert "\n" not in said.read_text()
    assert "File too large" in said.read_text()
    run_or_resume(settings(), folder)
    assert traces(folder) == unharmed


@pytest.mark.parametrize("name", ["metrics.jsonl", "partition.json"])
def test_a_damaged_file_does_not_cost_the_final_model(
    settings: Settings, finished: Path, unharmed: dict[str, Any], name: str
) -> None:
    model = finished / "model" / "model.safetensors"
    shutil.rmtree(finished / "model")
    data = (finished / name).read_bytes()
    (finished / name).write_bytes(b"?" + data[1:])
    said = io.StringIO()
    with contextlib.suppress(StateError, ReportError):  # of the result and the report, after the model
        run(resume=finished, console=Console(file=said, width=300))
    assert model.read_bytes() == unharmed["model"]
    assert name == "partition.json" or f"{finished / name}, line 1" in said.getvalue()


def test_a_folder_that_is_not_a_run_cannot_be_resumed(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.toml"):
        run(resume=tmp_path, console=quiet())
