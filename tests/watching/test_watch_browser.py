"""``fedsmoothlora watch`` in a real browser, against a run in progress."""

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from devtools import opened
from rich.console import Console

from fedsmoothlora.callbacks import Callback
from fedsmoothlora.federation.records import RoundRecord
from fedsmoothlora.runs.session import run

pytestmark = pytest.mark.slow

TEXT = "(document.body?.innerText ?? '')"  # there is no body before the page begins
STATE = "document.querySelector('.facts dd')?.innerText"


class Gate(Callback):
    """Holds a run after each round, and within each client, until the test lets it go on."""

    def __init__(self) -> None:
        self._allowed = threading.Semaphore(0)

    def go_on(self) -> None:
        self._allowed.release()

    def on_client_begin(self, client: str, steps: int) -> None:
        if client == "0":
            assert self._allowed.acquire(timeout=120)

    def on_round_end(self, record: RoundRecord) -> None:
        assert self._allowed.acquire(timeout=120)


@pytest.fixture
def gate(toy_table: dict[str, Any], tmp_path: Path) -> Iterator[Gate]:
    """A run of three clients and two rounds in ``runs/live``, which is held before round 1."""
    gate = Gate()
    toy_table["training"] |= {"rounds": 2, "steps": 2}
    options: dict[str, Any] = {"console": Console(quiet=True), "outputs": False, "callbacks": [gate]}
    thread = threading.Thread(
        target=run, args=(toy_table,), kwargs={"out": tmp_path / "runs/live", **options}
    )
    thread.start()
    yield gate
    for _ in range(20):
        gate.go_on()
    thread.join(120)


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """The address of ``fedsmoothlora watch runs``, and its process."""
    (tmp_path / "runs").mkdir(exist_ok=True)
    command = [sys.executable, "-m", "fedsmoothlora", "watch", str(tmp_path / "runs"), "--port", "0"]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "NO_COLOR": "1"},
    ) as process:
        try:
            assert process.stdout is not None
            found = re.search(r"http://127\.0\.0\.1:\d+/", process.stdout.readline())
            assert found is not None
            yield found[0], process
        finally:
            process.kill()


def test_a_page_follows_a_run_and_a_list_its_runs(
    browser: str, served: tuple[str, subprocess.Popen[str]], gate: Gate, tmp_path: Path
) -> None:
    address, process = served
    with opened(browser, tmp_path, address) as page:
        page.wait_for(f"{TEXT}.includes('live')")
        page.wait_for(f"{TEXT}.includes('This page follows the run')")
        page.wait_for("document.querySelector('a[href=\"run?id=live\"]') !== null")
        page.call("Page.navigate", url=f"{address}run?id=live")
        page.wait_for(f"{STATE} === 'between rounds'")
        page.value("window.stays = 'the same document'")
        gate.go_on()  # round 1 begins, and its first client waits
        page.wait_for(f"{STATE} === 'round 1 of 2' && {TEXT}.includes('Clients in hand')")
        gate.go_on()
        page.wait_for(f"{STATE} === 'between rounds'")
        page.wait_for("document.querySelectorAll('#bytes svg').length === 2")
        page.value("document.querySelector('details').open = true")
        gate.go_on()
        page.wait_for(f"{STATE} === 'round 2 of 2'")
        gate.go_on()
        page.wait_for("document.querySelector('#clients') !== null")
        for _ in range(9):
            gate.go_on()
        page.wait_for(f"{STATE} === 'finished'")
        assert page.value("window.stays") == "the same document"
        assert page.value("document.querySelector('details').open") is True
        sources = page.value("performance.getEntriesByType('resource').map(one => one.name)")
        assert all(source.startswith(address) for source in sources)
        for width in (400, 1200):
            page.resize(width)
            assert page.value("document.documentElement.scrollWidth") <= width
        if "WATCH_PICTURE" in os.environ:
            Path(os.environ["WATCH_PICTURE"]).write_bytes(page.picture())
        # The text of a client's name is text: the policy stops scripts that are no file of the server.
        page.value("document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=\"window.bad = 1\">')")
        assert page.value("new Promise(done => setTimeout(done, 50)) && window.bad") is None
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=60)
        assert (output, errors, process.returncode) == ("stopped watching\n", "", 0)
        page.wait_for(f"{TEXT}.includes('The connection is lost')")
