"""A whole federation on this machine: coordinator and sites as processes on loopback, ended with the run."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from fedsmoothlora.config import Config
from fedsmoothlora.errors import ConfigError, FederationStoppedError, InterruptedRunError
from fedsmoothlora.flower.app_folder import CONNECTION, QUIET, write_app_folder
from fedsmoothlora.flower.keys import write_certificates, write_node_key
from fedsmoothlora.runs.folders import default_folder
from fedsmoothlora.runs.planning import plan

_LOOPBACK = "127.0.0.1"
_START = 60.0
_END = 10.0
_SHORT = 120.0


def run_locally(config: Config, *, out: Path | None = None, resume: Path | None = None) -> Path:
    """Run a federation with a coordinator and every client in processes of their own, on this machine.

    They talk over TLS, and each node proves itself by a key, as on machines of their own. Every client
    reads ``data.source`` and takes its part.

    Args:
        config: the configuration; ``flower.clients`` must be empty.
        out: the run's folder, new or empty; ``runs/NAME-TIME`` unless given.
        resume: the folder of a run to go on with, in place of ``out``.

    Returns:
        The run's folder.

    Raises:
        ConfigError: something cannot be right.
        FederationStoppedError: the run failed; the message names the logs.
        InterruptedRunError: Ctrl-C; the folder can be resumed.
    """
    if config.flower.clients:
        raise ConfigError(
            f"{config.name}: flower.clients names sites with data of their own: follow docs/deploy.md, or "
            "leave it empty to run all clients on this machine"
        )
    planned = plan(config)
    config, clients = planned.config, list(planned.partition.clients)
    folder = resume or out or default_folder(config.name)
    with tempfile.TemporaryDirectory(prefix="fedsmoothlora-flower-") as temporary, ExitStack() as stack:
        work = Path(temporary)
        ports = free_ports(1 + len(clients))
        certificates, app = work / "certificates", work / "federation"
        write_certificates(certificates, [_LOOPBACK, "localhost"])
        write_app_folder(
            app, config, host=_LOOPBACK, port=ports[0], certificates=certificates, binary=binaries()
        )
        environment = {**os.environ, **QUIET, "FLWR_HOME": str(app / "home")}
        stack.enter_context(
            running(
                [
                    *("flower-superlink", "--host", _LOOPBACK, "--port", str(ports[0])),
                    *("--ssl-ca-certfile", str(certificates / "ca.crt")),
                    *("--ssl-certfile", str(certificates / "server.crt")),
                    *("--ssl-keyfile", str(certificates / "server.key")),
                    *("--enable-supernode-auth", "--disable-runtime-dependency-installation"),
                ],
                environment,
                work / "superlink.log",
            )
        )
        wait_for_port(ports[0], _START)
        for place, (client, port) in enumerate(zip(clients, ports[1:], strict=True)):
            key = work / f"site-{place}.key"
            _flwr(["supernode", "register", str(write_node_key(key)), CONNECTION], environment)
            node = {"client-id": client, "state": str((folder / "clients").absolute())}
            stack.enter_context(
                running(
                    [
                        *("flower-supernode", "--superlink", f"{_LOOPBACK}:{ports[0]}"),
                        *("--root-certificates", str(certificates / "ca.crt")),
                        *("--auth-supernode-private-key", str(key)),
                        *("--host", _LOOPBACK, "--port", str(port)),
                        *("--node-config", node_config(node)),
                    ],
                    environment,
                    work / f"site-{place}.log",
                )
            )
        where = "resume" if resume is not None else "out"
        _stream(app, {where: str(folder.absolute())}, environment, folder)
    return folder


def node_config(values: Mapping[str, str]) -> str:
    """Values as ``--node-config`` wants them: ``key="text"``, separated by spaces."""
    return " ".join(f"{key}={json.dumps(value)}" for key, value in values.items())


def free_ports(count: int) -> list[int]:
    """Ports on loopback that nobody uses right now."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind((_LOOPBACK, 0))
        return [one.getsockname()[1] for one in sockets]


def wait_for_port(port: int, seconds: float) -> None:
    """Wait until something listens on a port of loopback; ``FederationStoppedError`` if nothing does."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with socket.socket() as one:
            one.settimeout(1.0)
            if one.connect_ex((_LOOPBACK, port)) == 0:
                return
        time.sleep(0.1)
    raise FederationStoppedError(f"nothing listens on {_LOOPBACK}:{port} after {seconds:g} s")


def binaries() -> Path:
    """The folder of the commands that were installed with this Python."""
    return Path(sys.executable).parent


@contextmanager
def running(command: Sequence[str], environment: Mapping[str, str], log: Path) -> Iterator[int]:
    """A process, by its id, and all that it started; they are ended when the block ends."""
    with log.open("ab") as output:
        process = subprocess.Popen(
            [str(binaries() / command[0]), *command[1:]],
            env=_with_path(environment),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C is ours; and its group is all that it starts
        )
    try:
        yield process.pid
    finally:
        _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            return
        try:
            process.wait(_END)
        except subprocess.TimeoutExpired:
            continue


def _with_path(environment: Mapping[str, str]) -> dict[str, str]:
    """Flower starts its own commands by name."""
    return {**environment, "PATH": f"{binaries()}{os.pathsep}{environment.get('PATH', '')}"}


def _flwr(arguments: Sequence[str], environment: Mapping[str, str]) -> str:
    done = subprocess.run(
        [str(binaries() / "flwr"), *arguments],
        env=_with_path(environment),
        capture_output=True,
        text=True,
        timeout=_SHORT,
    )
    if done.returncode:
        raise FederationStoppedError(
            f"flwr {arguments[0]} failed: {(done.stdout + done.stderr).strip()[-2000:]}"
        )
    return done.stdout


def _stream(app: Path, run_config: Mapping[str, str], environment: Mapping[str, str], folder: Path) -> None:
    """Start the run, show what its coordinator says, and wait for its end."""
    command = [str(binaries() / "flwr"), "run", str(app), CONNECTION, "--stream"]
    command += ["--run-config", node_config(run_config)]
    try:
        started = subprocess.run(command, env=_with_path(environment), check=False)
    except KeyboardInterrupt:
        raise InterruptedRunError(
            f"stopped; to go on: fedsmoothlora run --resume {folder} --engine flower"
        ) from None
    if started.returncode:
        raise FederationStoppedError("flwr run failed; what it says is above")
    runs = json.loads(_flwr(["ls", CONNECTION, "--format", "json"], environment))
    status = runs["runs"][0]["status"]
    if status != "finished:completed":
        raise FederationStoppedError(f"the run ended as {status}")
