"""A run's ``run.log``, and what libraries say: into the file, not into the user's face."""

from __future__ import annotations

import logging
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from contextvars import ContextVar
from datetime import datetime
from pathlib import Path
from typing import Any, TextIO

PACKAGE = "fedsmoothlora"
# What is logged here was shown to the user by the callback already.
WATCHED = f"{PACKAGE}.run"
# Loggers that have handlers of their own, or that speak to the user; all others reach the root logger.
_LIBRARIES = (
    "absl",
    "accelerate",
    "flwr",
    "huggingface_hub",
    "matplotlib",
    "peft",
    "PIL",
    "py.warnings",
    "tensorboard",
    "torch",
    "transformers",
)

_run: ContextVar[object | None] = ContextVar("fedsmoothlora_run", default=None)
_lock = threading.Lock()
_files: list[logging.Handler] = []
_restore = ExitStack()
# For every hold on the libraries: what undoes it, and the handler of their loggers.
_holds: list[tuple[ExitStack, logging.Handler]] = []


@contextmanager
def run_logging(folder: Path, verbosity: int = 0) -> Iterator[None]:
    """Log to ``folder/run.log`` while the block lasts; after it, everything is as it was.

    The file gets the package's messages from INFO on, and libraries' from WARNING on, Python's warnings
    among them. Standard error gets the package's warnings; nothing of libraries, and nothing logged to
    ``fedsmoothlora.run``, which the callback shows. Progress bars of libraries are off.

    Runs may follow or overlap each other in one process, each in a thread of its own: a message goes to the
    file of the run that it was logged in. From a thread that a run started it cannot be told which run that
    was, and all that go on get it.

    Args:
        folder: the run's folder; it exists.
        verbosity: 0; more for the package's DEBUG messages, on standard error and in the file; less for
            nothing but errors on standard error.

    Raises:
        OSError: the file cannot be written.
    """
    run = object()
    level = logging.DEBUG if verbosity > 0 else logging.INFO
    file = _RunFile(folder / "run.log", mode="a", encoding="utf-8")
    file.setLevel(level)
    file.setFormatter(_FileFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    console = _StandardError()
    console.setLevel(logging.DEBUG if verbosity > 0 else logging.WARNING if verbosity == 0 else logging.ERROR)
    console.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
    console.addFilter(lambda record: record.name != WATCHED)
    for handler in (file, console):
        handler.addFilter(lambda record: _run.get() in (None, run))
    outer = _run.get()
    with ExitStack() as stack:
        stack.callback(file.close)
        _begin(file, console, level)
        stack.callback(_end, file, console)
        _run.set(run)
        stack.callback(_run.set, outer)
        yield


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Libraries log nothing and show no progress bars while the block lasts; after it, all is as it was.

    Inside a run they go on writing to its file.
    """
    with ExitStack() as stack:
        with _lock:
            if not _files:
                _take_hold(stack)
        # PEFT asks transformers by a name that transformers has deprecated, in every adapter it makes.
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)
        yield


class _RunFile(logging.FileHandler):
    """The log file, which is left incomplete when the disk is full: the next checkpoint reports that."""

    def flush(self) -> None:
        with suppress(OSError):
            super().flush()

    def close(self) -> None:
        with suppress(OSError):
            super().close()


class _FileFormatter(logging.Formatter):
    """Times in ISO 8601 with the zone."""

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:
        return datetime.fromtimestamp(record.created).astimezone().isoformat(timespec="milliseconds")


class _StandardError(logging.StreamHandler[TextIO]):
    """Writes to what ``sys.stderr`` is at the time: a live progress bar puts its own in that place."""

    def __init__(self) -> None:
        super().__init__(sys.stderr)

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


class _ToFiles(logging.Handler):
    """Hands libraries' messages to the files of the runs that go on."""

    def emit(self, record: logging.LogRecord) -> None:
        # The package's own reach the root logger too, and are in the file already.
        if record.name.partition(".")[0] != PACKAGE:
            for file in _files:
                file.handle(record)


def _begin(file: logging.Handler, console: logging.Handler, level: int) -> None:
    """Attach a run's handlers. The first of overlapping runs takes hold of the libraries."""
    global _restore
    package = logging.getLogger(PACKAGE)
    with _lock:
        if not _files:
            with ExitStack() as stack:
                _take_hold(stack)
                stack.callback(package.setLevel, package.level)
                package.setLevel(level)
                _restore = stack.pop_all()
        package.setLevel(min(level, package.level))
        _files.append(file)
        for handler in (file, console):
            package.addHandler(handler)


def _end(file: logging.Handler, console: logging.Handler) -> None:
    """Detach a run's handlers. The last of overlapping runs lets go of the libraries."""
    package = logging.getLogger(PACKAGE)
    with _lock:
        for handler in (file, console):
            package.removeHandler(handler)
        _files.remove(file)
        if not _files:
            _restore.close()


def take_hold_of_datasets() -> None:
    """Silence ``datasets`` where the libraries are silenced already. It is called after a first import.

    ``datasets`` takes a second to import, and many runs never need it.
    """
    with _lock:
        if _holds:
            _take_hold_of_datasets(*_holds[0])


def _take_hold(stack: ExitStack) -> None:
    """Lead what libraries say to the runs' files; ``stack`` undoes it."""
    # Imported first: these libraries set up their loggers as they are imported.
    import transformers.utils.logging as transformers
    from huggingface_hub.utils.tqdm import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    to_files = _ToFiles(level=logging.WARNING)
    _holds.append((stack, to_files))
    stack.callback(_holds.remove, (stack, to_files))
    for name in _LIBRARIES:
        _lead(logging.getLogger(name), to_files, stack)
    root = logging.getLogger()
    root.addHandler(to_files)
    stack.callback(root.removeHandler, to_files)

    show = warnings.showwarning
    logging.captureWarnings(True)
    if warnings.showwarning is not show:  # otherwise someone captures them already
        stack.callback(setattr, warnings, "showwarning", show)
        stack.callback(logging.captureWarnings, False)

    if not are_progress_bars_disabled():
        stack.callback(enable_progress_bars)
    if transformers.is_progress_bar_enabled():
        # This switches the hub's on as well: where those were off, they are switched off again.
        if are_progress_bars_disabled():
            stack.callback(disable_progress_bars)
        stack.callback(transformers.enable_progress_bar)
    disable_progress_bars()
    transformers.disable_progress_bar()
    if "datasets" in sys.modules:
        _take_hold_of_datasets(stack, to_files)


def _take_hold_of_datasets(stack: ExitStack, to_files: logging.Handler) -> None:
    """The same for ``datasets``, which is imported."""
    import datasets

    _lead(logging.getLogger("datasets"), to_files, stack)
    if not datasets.are_progress_bars_disabled():
        stack.callback(datasets.enable_progress_bars)
    datasets.disable_progress_bars()


def _lead(logger: logging.Logger, to_files: logging.Handler, stack: ExitStack) -> None:
    """Lead a logger's messages to ``to_files`` alone; ``stack`` undoes it."""
    stack.callback(_set, logger, list(logger.handlers), logger.propagate, logger.level)
    _set(logger, [to_files], False, logging.WARNING)


def _set(logger: logging.Logger, handlers: list[Any], propagate: bool, level: int) -> None:
    logger.handlers[:] = handlers
    logger.propagate = propagate
    logger.setLevel(level)
