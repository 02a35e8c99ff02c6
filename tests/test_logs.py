import io
import logging
import re
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import datasets
import pytest
from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from transformers.utils import logging as transformers_logging

from fedsmoothlora.logs import run_logging

LIBRARIES = ("transformers", "datasets", "huggingface_hub", "peft", "accelerate", "py.warnings", "urllib3")
log = logging.getLogger("fedsmoothlora.somewhere")


def state() -> dict[str, Any]:
    """Everything that a run may change for its process."""
    names = ("", "fedsmoothlora", "absl", "flwr", "matplotlib", "PIL", "tensorboard", "torch", *LIBRARIES)
    loggers = [logging.getLogger(name) for name in names]
    return {
        "loggers": [(one.name, list(one.handlers), one.level, one.propagate) for one in loggers],
        "filters": list(warnings.filters),
        "showwarning": warnings.showwarning,
        "bars": bars(),
    }


def bars() -> dict[str, bool]:
    return {
        "transformers": transformers_logging.is_progress_bar_enabled(),
        "hub": not are_progress_bars_disabled(),
        "datasets": not datasets.are_progress_bars_disabled(),
    }


def text(folder: Path) -> str:
    return (folder / "run.log").read_text(encoding="utf-8")


@pytest.fixture(autouse=True)
def with_bars() -> Iterator[None]:
    """All bars on before a test, whatever ran before it; as they were after it."""
    before = bars()
    transformers_logging.enable_progress_bar()
    datasets.enable_progress_bars()
    yield
    (enable_progress_bars if before["hub"] else disable_progress_bars)()
    (datasets.enable_progress_bars if before["datasets"] else datasets.disable_progress_bars)()
    if not before["transformers"]:
        transformers_logging.disable_progress_bar()


def test_the_file_has_info_with_time_zone_and_level(tmp_path: Path) -> None:
    with run_logging(tmp_path):
        log.info("Grüße, ζ = %g", 0.5)
        log.debug("too much")
    line = (
        r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}[+-]\d\d:\d\d INFO fedsmoothlora\.somewhere: Grüße, ζ = 0\.5\n"
    )
    assert re.fullmatch(line, text(tmp_path))


def test_a_resumed_run_appends(tmp_path: Path) -> None:
    for word in ("first", "second"):
        with run_logging(tmp_path):
            log.info(word)
    assert [line.split()[-1] for line in text(tmp_path).splitlines()] == ["first", "second"]


@pytest.mark.parametrize(
    ("verbosity", "shown", "filed"),
    [
        (-1, ["ERROR"], ["INFO", "WARNING", "ERROR"]),
        (0, ["WARNING", "ERROR"], ["INFO", "WARNING", "ERROR"]),
        (1, ["DEBUG", "INFO", "WARNING", "ERROR"], ["DEBUG", "INFO", "WARNING", "ERROR"]),
    ],
)
def test_verbosity_decides_what_standard_error_shows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], verbosity: int, shown: list[str], filed: list[str]
) -> None:
    with run_logging(tmp_path, verbosity):
        for level in (logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR):
            log.log(level, "message")
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [f"{level}: message" for level in shown]
    assert [line.split()[1] for line in text(tmp_path).splitlines()] == filed


def test_messages_shown_by_a_callback_are_not_shown_twice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with run_logging(tmp_path, 1):
        logging.getLogger("fedsmoothlora.run").warning("client 3 diverged")
    assert capsys.readouterr().err == ""
    assert "client 3 diverged" in text(tmp_path)


def test_messages_go_to_the_current_standard_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with run_logging(tmp_path):
        bar = io.StringIO()
        monkeypatch.setattr(sys, "stderr", bar)
        log.warning("above the bar")
    assert bar.getvalue() == "WARNING: above the bar\n"


@pytest.mark.parametrize("verbosity", [-1, 0, 1])
@pytest.mark.parametrize("library", LIBRARIES)
def test_libraries_warnings_are_in_the_file_and_nowhere_else(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], library: str, verbosity: int
) -> None:
    with run_logging(tmp_path, verbosity):
        logging.getLogger(f"{library}.models").warning("weights are missing")
        logging.getLogger(f"{library}.models").info("chatter")
    assert capfd.readouterr() == ("", "")
    assert text(tmp_path).count("weights are missing") == 1
    assert f"WARNING {library}.models: weights are missing" in text(tmp_path)
    assert "chatter" not in text(tmp_path)


def test_python_warnings_are_in_the_file(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings(), run_logging(tmp_path):
        warnings.simplefilter("always")
        warnings.warn("an old spelling", UserWarning, stacklevel=1)
    assert capfd.readouterr() == ("", "")
    assert "WARNING py.warnings: " in text(tmp_path)
    assert "UserWarning: an old spelling" in text(tmp_path)


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_all_settings_are_restored_after_the_run(tmp_path: Path, error: type[BaseException] | None) -> None:
    package = logging.getLogger("fedsmoothlora")
    before = state()
    with suppress(RuntimeError, KeyboardInterrupt), run_logging(tmp_path, 1):
        assert state() != before
        assert bars() == {"transformers": False, "hub": False, "datasets": False}
        file = next(one for one in package.handlers if isinstance(one, logging.FileHandler))
        if error:
            raise error
    assert state() == before
    assert file.stream is None, "the file is closed"


LATE = """
import logging, sys
from pathlib import Path
from fedsmoothlora.logs import quiet_libraries, run_logging

logger = logging.getLogger("datasets")
with quiet_libraries(), run_logging(Path(sys.argv[1])):
    assert "datasets" not in sys.modules
    from fedsmoothlora.data.datasets_library import datasets
    assert datasets.are_progress_bars_disabled()
    logger.warning("a late message")
own = list(logger.handlers)
assert not datasets.are_progress_bars_disabled()
with run_logging(Path(sys.argv[1])):
    assert datasets.are_progress_bars_disabled()
    assert logger.handlers != own
assert logger.handlers == own
assert not datasets.are_progress_bars_disabled()
"""


@pytest.mark.slow
def test_datasets_is_imported_late_and_silenced_then(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", LATE, str(tmp_path)], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert text(tmp_path).count("a late message") == 1


def test_bars_that_were_off_stay_off(tmp_path: Path) -> None:
    disable_progress_bars()
    before = bars()
    assert before == {"transformers": True, "hub": False, "datasets": True}
    with run_logging(tmp_path):
        pass
    assert bars() == before


def test_warnings_that_were_captured_before_stay_captured(tmp_path: Path) -> None:
    logging.captureWarnings(True)
    try:
        before = state()
        with run_logging(tmp_path):
            pass
        assert state() == before
    finally:
        logging.captureWarnings(False)


def test_a_folder_that_cannot_be_written_changes_nothing(tmp_path: Path) -> None:
    before = state()
    with pytest.raises(FileNotFoundError), run_logging(tmp_path / "nowhere"):
        pass
    assert state() == before


def test_runs_after_each_other_have_their_own_files(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        with run_logging(tmp_path / name):
            log.info("this is %s", name)
            logging.getLogger("transformers").warning("that is %s", name)
    for name, other in (("one", "two"), ("two", "one")):
        assert text(tmp_path / name).count(name) == 2
        assert other not in text(tmp_path / name)


def test_runs_in_two_threads_have_their_own_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = state()
    both_run, first_ended = threading.Barrier(2, timeout=10), threading.Event()

    def run(name: str, verbosity: int) -> None:
        (tmp_path / name).mkdir()
        with run_logging(tmp_path / name, verbosity):
            both_run.wait()
            log.warning("this is %s", name)
            log.debug("detail of %s", name)
            logging.getLogger("peft").warning("that is %s", name)
            both_run.wait()
            if name == "two":
                assert first_ended.wait(10)
                logging.getLogger("peft").warning("still %s", name)
        first_ended.set()

    with ThreadPoolExecutor(2) as pool:
        for future in [pool.submit(run, "one", 1), pool.submit(run, "two", 0)]:
            future.result()
    assert [line.split(": ", 1)[1] for line in text(tmp_path / "one").splitlines()] == [
        "this is one",
        "detail of one",
        "that is one",
    ]
    assert [line.split(": ", 1)[1] for line in text(tmp_path / "two").splitlines()] == [
        "this is two",
        "that is two",
        "still two",
    ]
    assert sorted(capsys.readouterr().err.splitlines()) == [
        "DEBUG: detail of one",
        "WARNING: this is one",
        "WARNING: this is two",
    ]
    assert state() == before
