"""The life of a warm process: when it starts and ends, and who may use it. Its answers need no model."""

import os
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from machines import wait_until

from fedsmoothlora.errors import SiteError
from fedsmoothlora.federation.payload import Payload
from fedsmoothlora.flower import warm
from fedsmoothlora.flower.questions import Answer, Question
from fedsmoothlora.flower.warm import WarmStart, end_warm_process, identity, warm_answer

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="warm processes are for Linux")
STAND_IN = Path(__file__).with_name("warm_stand_in.py")
LONG = 60.0


def gone(pid: int) -> bool:
    """Whether a process has ended; nobody may have waited for it yet."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def ask(start: WarmStart, **fields: str) -> Answer:
    found = warm_answer(start, Question(kind="train", payload=Payload(b"bytes", fields)))
    assert found is not None
    return found


def pid_of(start: WarmStart) -> int:
    return int(ask(start).tables["process"]["pid"])


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., WarmStart]]:
    """Makes sites; their warm processes are ended after the test."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(STAND_IN.parent), *sys.path]))
    made: list[WarmStart] = []

    def start(client: str = "a", timeout: float = LONG, state: Path = tmp_path / "state") -> WarmStart:
        config = tmp_path / "config.toml"
        config.write_text(f"[flower]\ntimeout = {timeout}\n")
        node = {"client-id": client, "state": str(state)}
        made.append(WarmStart(config=config, node=node, run=1, program="warm_stand_in"))
        return made[-1]

    yield start
    for one in made:
        end_warm_process(one)


def socket_of(start: WarmStart) -> Path:
    return start.state / "warm" / start.folder / "socket"


def test_one_process_answers_all_messages_of_a_client_and_only_its_user_can_reach_it(
    make: Callable[..., WarmStart],
) -> None:
    start = make()
    found = ask(start, round="0")
    assert (found.status, found.payload) == ("done", Payload(b"bytes", {"round": "0"}))
    assert pid_of(start) == found.tables["process"]["pid"]
    assert stat.S_IMODE(socket_of(start).stat().st_mode) == 0o600
    for folder in (socket_of(start).parent, socket_of(start).parents[1]):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_clients_have_processes_of_their_own_even_with_one_state_folder(
    make: Callable[..., WarmStart], tmp_path: Path
) -> None:
    starts = [make("a"), make("b"), make("a", state=tmp_path / "other")]
    pids = [pid_of(start) for start in starts]
    assert len(set(pids)) == 3
    assert [pid_of(start) for start in starts] == pids


def test_a_killed_process_is_started_again(make: Callable[..., WarmStart]) -> None:
    start = make()
    first = pid_of(start)
    os.kill(first, signal.SIGKILL)
    wait_until("it has ended", lambda: gone(first), LONG)
    assert pid_of(start) != first


def test_a_process_that_dies_while_it_answers_is_an_error_and_the_next_message_starts_another(
    make: Callable[..., WarmStart],
) -> None:
    start = make()
    first = pid_of(start)
    with pytest.raises(SiteError):
        ask(start, do="die")
    assert pid_of(start) != first


def test_a_process_ends_after_an_answer_that_is_not_complete(make: Callable[..., WarmStart]) -> None:
    start = make()
    first = pid_of(start)
    assert ask(start, do="fail").status == "failed"
    assert pid_of(start) != first
    wait_until("the first one has ended", lambda: gone(first), LONG)


@pytest.mark.parametrize("change", ["run", "config"])
def test_a_process_of_another_run_or_configuration_ends_and_is_replaced(
    make: Callable[..., WarmStart], change: str
) -> None:
    start = make()
    first = pid_of(start)
    other = replace(start, run=2)
    if change == "config":
        start.config.write_text(start.config.read_text() + "wait = 1.0\n")
        other = start
    assert pid_of(other) != first
    wait_until("the first one has ended", lambda: gone(first), LONG)


def test_everything_that_an_answer_depends_on_is_in_the_identity(
    make: Callable[..., WarmStart], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, package = tmp_path / "data", tmp_path / "package"
    data.mkdir()
    package.mkdir()
    (package / "a.py").write_text("")
    monkeypatch.setattr(warm, "_PACKAGE", package)
    start = make()
    start = replace(start, node={**start.node, "data": str(data)})
    config = start.config.read_bytes()
    found = [identity(start, config)]
    assert identity(start, config) == found[0]
    found.append(identity(replace(start, run=2), config))
    found.append(identity(replace(start, node={**start.node, "histogram": True}), config))
    found.append(identity(start, config + b"\nwait = 1.0"))
    (data / "rows.csv").write_text("x")
    found.append(identity(start, config))
    (data / "rows.csv").write_text("xy")
    found.append(identity(start, config))
    for key in ("path", "test"):
        named = config + f'\n[data]\nsource = "pkg:a"\n{key} = "{tmp_path / key}"\n'.encode()
        found.append(identity(start, named))
        (tmp_path / key).write_text("x")
        found.append(identity(start, named))
    (package / "a.py").write_text("pass")
    found.append(identity(start, config))
    monkeypatch.setattr(warm, "version", lambda name: "0.0.0")
    found.append(identity(start, config))
    assert len(set(found)) == len(found)


def test_the_end_of_the_federation_ends_the_process_and_removes_its_folder(
    make: Callable[..., WarmStart],
) -> None:
    start = make()
    first = pid_of(start)
    end_warm_process(replace(start, run=7))  # whichever run asks
    wait_until("it has ended", lambda: gone(first), LONG)
    assert list(start.state.iterdir()) == []
    end_warm_process(start)


def test_a_process_ends_by_itself_after_the_time_limit(make: Callable[..., WarmStart]) -> None:
    start = make(timeout=0.1)
    first = pid_of(start)
    wait_until("it has ended", lambda: gone(first), LONG)
    assert pid_of(start) != first


def test_a_process_ends_in_the_middle_of_its_work_with_the_app_that_waits_for_it(
    make: Callable[..., WarmStart], tmp_path: Path
) -> None:
    start, mark = make(), tmp_path / "mark"
    arguments = ["app", str(start.config), str(start.state), "do", "train for long", "mark", str(mark)]
    with subprocess.Popen([sys.executable, str(STAND_IN), *arguments]) as app:
        wait_until("it trains", lambda: mark.exists() and mark.read_text(), LONG)
        with pytest.raises(SiteError, match="another message of this client"):
            ask(start)
        app.kill()
    wait_until("it has ended", lambda: gone(int(mark.read_text())), LONG)


def test_a_process_ends_with_the_process_that_starts_the_apps(
    make: Callable[..., WarmStart], tmp_path: Path
) -> None:
    start, answered = make(), tmp_path / "answered"
    command = [sys.executable, str(STAND_IN), "supernode", str(start.config), str(start.state)]
    with subprocess.Popen(command) as supernode:
        wait_until("it has answered", lambda: answered.exists() and answered.read_text(), LONG)
        process = int(answered.read_text())
        assert not gone(process)
        supernode.kill()
    wait_until("it has ended", lambda: gone(process), LONG)


def test_a_state_folder_may_have_a_long_path(make: Callable[..., WarmStart], tmp_path: Path) -> None:
    assert pid_of(make(state=tmp_path / ("d" * 100) / ("e" * 100)))


def test_a_folder_that_others_can_open_is_refused(make: Callable[..., WarmStart]) -> None:
    start = make()
    socket_of(start).parent.mkdir(parents=True)
    socket_of(start).parents[1].chmod(0o750)
    with pytest.raises(SiteError, match="mode 700"):
        ask(start)


def test_a_symlink_is_no_folder(make: Callable[..., WarmStart], tmp_path: Path) -> None:
    start = make()
    start.state.mkdir()
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    (start.state / "warm").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(SiteError):
        ask(start)
    assert list((tmp_path / "elsewhere").iterdir()) == []


@pytest.mark.parametrize("kind", ["file", "symlink"])
def test_a_file_in_place_of_the_socket_is_refused(
    make: Callable[..., WarmStart], tmp_path: Path, kind: str
) -> None:
    start = make()
    with socket.socket(socket.AF_UNIX) as elsewhere:
        elsewhere.bind(str(tmp_path / "s"))
        for folder in (socket_of(start).parents[2], socket_of(start).parents[1], socket_of(start).parent):
            folder.mkdir(mode=0o700)
        if kind == "file":
            socket_of(start).write_text("")
        else:
            socket_of(start).symlink_to(tmp_path / "s")
        with pytest.raises(SiteError, match="no socket of this user"):
            ask(start)


def test_a_process_of_another_user_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = socket.socketpair()
    with one, other:
        warm.check_peer(one)
        user = os.geteuid() + 1
        monkeypatch.setattr(os, "geteuid", lambda: user)
        with pytest.raises(SiteError, match="belongs to user"):
            warm.check_peer(one)


def test_a_process_that_cannot_start_is_an_error(make: Callable[..., WarmStart]) -> None:
    with pytest.raises(SiteError):
        ask(replace(make(), program="no_such_module"))


def test_there_is_none_if_it_is_switched_off_and_none_in_a_simulation(
    make: Callable[..., WarmStart],
) -> None:
    start = make()
    question = Question(kind="agree")
    assert warm_answer(replace(start, node={"partition-id": 0, "num-partitions": 2}), question) is None
    start.config.write_text("[flower]\nwarm = false\n")
    assert warm_answer(start, question) is None
    assert not start.state.exists()


def test_the_app_and_the_protocol_import_no_torch() -> None:
    modules = "fedsmoothlora.flower.client_app", "fedsmoothlora.flower.warm_process"
    code = f"import sys, {', '.join(modules)}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
