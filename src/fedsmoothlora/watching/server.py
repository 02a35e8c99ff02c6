"""Serve the live page until Ctrl-C."""

from __future__ import annotations

import ipaddress
import socket
from contextlib import suppress
from pathlib import Path
from typing import Any

import uvicorn
from rich.console import Console

from fedsmoothlora.errors import ConfigError
from fedsmoothlora.watching.access import Access, checked_token
from fedsmoothlora.watching.confined import WatchedFolder
from fedsmoothlora.watching.pages import Pages

LOCAL = "127.0.0.1"
# The plain parts of uvicorn, without its messages, and without trust in headers of proxies.
_OPTIONS: dict[str, Any] = {
    "loop": "asyncio",
    "http": "h11",
    "ws": "none",
    "lifespan": "off",
    "log_config": None,
    "log_level": "critical",
    "access_log": False,
    "proxy_headers": False,
    "server_header": False,
    "limit_concurrency": 128,
    "timeout_graceful_shutdown": 3,
}


def watch(
    path: Path,
    *,
    host: str = LOCAL,
    port: int = 8090,
    token: str | None = None,
    console: Console | None = None,
    every: float = 1.0,
) -> None:
    """Serve the pages of a folder until Ctrl-C or SIGTERM.

    Args:
        path: the folder of a run, or a folder with runs below it.
        host: the address to serve; every address but those of this machine itself asks for a token.
        port: the port; 0 takes a free one.
        token: the token; one is made where one is needed.
        console: where the address is printed; standard output unless given.
        every: seconds between two looks at the files.

    Raises:
        ConfigError: ``path`` is not a folder, the address cannot be served, or the token is too short.
    """
    console, folder = console or Console(), WatchedFolder(path)
    listening, is_local = _listen(host, port)
    with listening:
        port = listening.getsockname()[1]
        asked = checked_token(token, is_local=is_local)
        access = Access(host=host, is_local=is_local, token=asked, cookie=f"fedsmoothlora-watch-{port}")
        pages = Pages(folder, every=every, is_over=lambda: server.should_exit)
        server = uvicorn.Server(uvicorn.Config(pages.app(access), **_OPTIONS))
        shown = f"[{host}]" if ":" in host else host
        query = "" if asked is None else f"?token={asked}"
        lines = [f"watching {folder.path}: http://{shown}:{port}/{query} (Ctrl-C ends it)"]
        if not is_local:
            lines.append(
                "others on the network can read along: the connection is not encrypted (docs/watch.md)"
            )
        for line in lines:
            console.print(line, highlight=False, markup=False, soft_wrap=True)
        with suppress(KeyboardInterrupt):  # uvicorn has handled it, and raises it again
            server.run(sockets=[listening])
    console.print("stopped watching", highlight=False)


def _listen(host: str, port: int) -> tuple[socket.socket, bool]:
    """A socket that listens, and whether it can be reached from this machine only."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.create_server(address[:2], family=family)
    except OSError as error:
        raise ConfigError(
            f"--host {host} --port {port}: cannot be served: {error.strerror or error}"
        ) from None
    return listening, ipaddress.ip_address(listening.getsockname()[0]).is_loopback
