"""A browser with one page that stays open, and its answers to JavaScript (Chrome DevTools Protocol)."""

import base64
import contextlib
import json
import os
import re
import signal
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from websockets.sync.client import ClientConnection, connect

from browsing import FLAGS

_TIMEOUT = 60.0
# Errors of a browser that has left one document and not yet begun the next.
_NO_DOCUMENT = (
    "Cannot find default execution context",
    "Execution context was destroyed.",
    "Inspected target navigated or closed",
)


class NoDocumentError(Exception):
    """The page has no document in which JavaScript could run."""


class OpenPage:
    """A page in a browser."""

    def __init__(self, connection: ClientConnection) -> None:
        self._connection = connection
        self._number = 0

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """The browser's answer to a command."""
        self._number += 1
        self._connection.send(json.dumps({"id": self._number, "method": method, "params": parameters}))
        while True:
            answer = json.loads(self._connection.recv(timeout=_TIMEOUT))
            if answer.get("id") == self._number:
                if answer.get("error", {}).get("message") in _NO_DOCUMENT:
                    raise NoDocumentError(answer["error"]["message"])
                assert "error" not in answer, answer
                return dict(answer["result"])

    def value(self, expression: str) -> Any:
        """The value of a JavaScript expression."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def wait_for(self, expression: str) -> None:
        """Wait until an expression is true."""
        end = time.monotonic() + _TIMEOUT
        while not self._is_true(expression):
            assert time.monotonic() < end, f"{expression}: {self.value('document.body?.innerText')}"
            time.sleep(0.05)

    def _is_true(self, expression: str) -> bool:
        """Whether an expression is true; it is not while the browser is between two documents."""
        try:
            return bool(self.value(expression))
        except NoDocumentError:
            return False

    def resize(self, width: int) -> None:
        """Make the page as wide as this."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False
        )

    def picture(self) -> bytes:
        """The whole page as PNG."""
        answer = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        return base64.b64decode(answer["data"])


@contextlib.contextmanager
def opened(browser: str, folder: Path, address: str) -> Iterator[OpenPage]:
    """A browser that shows an address. It and all its processes are ended in any case."""
    command = [browser, *FLAGS, "--remote-debugging-port=0", f"--user-data-dir={folder / 'profile'}", address]
    errors = folder / "browser.txt"
    with (
        errors.open("wb") as file,
        subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=file, start_new_session=True) as process,
    ):
        try:
            port = _port(errors)
            with connect(_page(port), max_size=None, proxy=None, open_timeout=_TIMEOUT) as connection:
                yield OpenPage(connection)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def _port(errors: Path) -> int:
    end = time.monotonic() + _TIMEOUT
    while True:
        found = re.search(r"ws://127\.0\.0\.1:(\d+)/", errors.read_text(errors="replace"))
        if found is not None:
            return int(found[1])
        assert time.monotonic() < end, errors.read_text(errors="replace")[-2_000:]
        time.sleep(0.05)


def _page(port: int) -> str:
    end = time.monotonic() + _TIMEOUT
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    while True:
        with direct.open(f"http://127.0.0.1:{port}/json/list", timeout=_TIMEOUT) as answer:
            pages = [one for one in json.load(answer) if one["type"] == "page"]
        if pages:
            return str(pages[0]["webSocketDebuggerUrl"])
        assert time.monotonic() < end
        time.sleep(0.05)
