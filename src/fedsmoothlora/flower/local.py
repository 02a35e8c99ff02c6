"""A whole federation on this machine: coordinator and sites are processes that end with the run."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from fedsmoothlora.config import Config
from fedsmoothlora.errors import ConfigError, FederationStoppedError
from fedsmoothlora.flower.app_folder import CONNECTION, node_config, write_app_folder
from fedsmoothlora.flower.keys import write_certificates, write_node_key
from fedsmoothlora.flower.submission import app_environment, binaries, flwr, run_app
from fedsmoothlora.flower.trusted import TrustedSites
from fedsmoothlora.runs.folders import default_folder
from fedsmoothlora.runs.planning import plan
from fedsmoothlora.secure_aggregation.identities import fingerprint

_LOOPBACK = "127.0.0.1"
_START = 60.0
_END = 10.0


def run_locally(config: Config, *, out: Path | None = None, resume: Path | None = None) -> Path:
    """Run a federation with a coordinator and every client in processes of their own, on this machine.

    They communicate over TLS, and every node proves its identity with a key, as on separate machines. Every
    client reads ``data.source`` and takes its rows.

    Args:
        config: the configuration; ``flower.clients`` must be empty.
        out: the run's folder, new or empty; ``runs/NAME-TIME`` unless given.
        resume: the folder of a run to resume, in place of ``out``.

    Returns:
        The run's folder.

    Raises:
        ConfigError: the configuration cannot be run.
        FederationStoppedError: the run failed.
        InterruptedRunError: Ctrl-C; the run can be resumed.
    """
    if config.flower.clients:
        raise ConfigError(
            f"{config.name}: flower.clients names sites with data of their own: follow docs/deploy.md, or "
            "leave it empty to run all clients on this machine"
        )
    planned = plan(config)
    config, clients = planned.config, list(planned.partition.clients)
    folder = resume or out or default_folder(config.name)
    with on_loopback(config, clients, folder / "clients") as app:
        how_to_resume = f"stopped; to go on: fedsmoothlora run --resume {folder} --engine flower"
        run_app(app, out=folder, resume=resume, hint=how_to_resume)
    return folder


@contextmanager
def on_loopback(config: Config, clients: Sequence[str], state: Path) -> Iterator[Path]:
    """The folder of a federation whose coordinator and sites run on this machine until the block ends.

    Args:
        config: the configuration.
        clients: the clients' ids.
        state: the folder of the clients' states.
    """
    with tempfile.TemporaryDirectory(prefix="fedsmoothlora-flower-") as temporary, ExitStack() as stack:
        work = Path(temporary)
        ports = free_ports(1 + len(clients))
        certificates, app = work / "certificates", work / "federation"
        write_certificates(certificates, [_LOOPBACK, "localhost"])
        write_app_folder(
            app, config, host=_LOOPBACK, port=ports[0], certificates=certificates, binary=binaries()
        )
        environment = app_environment(app)
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
        keys = {client: work / f"site-{place}.key" for place, client in enumerate(clients)}
        public = {client: write_node_key(key) for client, key in keys.items()}
        secure = _secure_values(config, public, work)
        for place, (client, port) in enumerate(zip(clients, ports[1:], strict=True)):
            key = keys[client]
            flwr(["supernode", "register", str(public[client]), CONNECTION], environment)
            # The run's folder, in which the state is, must be empty before the first round.
            node = {"client-id": client, "state": str(state.absolute()), "warm": str(work)}
            node |= {"key": str(key), **secure} if secure else {}
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
        yield app


def _secure_values(config: Config, public: Mapping[str, Path], work: Path) -> dict[str, str]:
    """The value of ``--node-config`` that all sites share with secure aggregation; none without it."""
    if not config.privacy.secure_aggregation:
        return {}
    trusted = TrustedSites(
        fewest=config.privacy.threshold_of(config.participation.count(len(public))),
        fingerprints={client: fingerprint(file.read_bytes()) for client, file in public.items()},
    )
    trusted.write(work / "sites.toml")
    return {"sites": str(work / "sites.toml")}


def free_ports(count: int) -> list[int]:
    """Ports on loopback that are free at the moment."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind((_LOOPBACK, 0))
        return [one.getsockname()[1] for one in sockets]


def wait_for_port(port: int, seconds: float) -> None:
    """Wait until a process listens on a port of loopback. Raises ``FederationStoppedError`` if none does."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with socket.socket() as one:
            one.settimeout(1.0)
            if one.connect_ex((_LOOPBACK, port)) == 0:
                return
        time.sleep(0.1)
    raise FederationStoppedError(f"nothing listens on {_LOOPBACK}:{port} after {seconds:g} s")


@contextmanager
def running(command: Sequence[str], environment: Mapping[str, str], log: Path) -> Iterator[int]:
    """Run a process; when the block ends, the process and all that it started are ended."""
    with log.open("ab") as output:
        process = subprocess.Popen(
            [str(binaries() / command[0]), *command[1:]],
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C reaches this process only; its group is all that it starts
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
