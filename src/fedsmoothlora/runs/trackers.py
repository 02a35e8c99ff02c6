"""Record a run's metrics with TensorBoard and Weights & Biases. Both are off by default.

``metrics.jsonl`` always has all metrics. If a tracker fails, this is logged and the run continues without it.
"""

from __future__ import annotations

import json
import logging
import os
import tomllib
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import Any

from fedsmoothlora.callbacks import Callback
from fedsmoothlora.config.settings import TrackingSettings
from fedsmoothlora.errors import TrackingError
from fedsmoothlora.federation.records import RoundRecord
from fedsmoothlora.storage.files import write_text

_log = logging.getLogger(__name__)

# After this time, metrics that are not uploaded yet stay in the run's folder.
_FINISH_SECONDS = 60.0
# The modules that each key needs.
_MODULES = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb"}


def check_extras(settings: TrackingSettings) -> None:
    """Raise ``TrackingError`` if a package that the settings need is missing."""
    for key in _MODULES:
        if getattr(settings, key):
            _require(key)


def trackers(settings: TrackingSettings, folder: Path, config_toml: str, name: str) -> list[Callback]:
    """The trackers of a run. Their callbacks never raise.

    A resumed run continues in the same event folder, where metrics of rounds that are run again replace the
    old ones, and with the same Weights & Biases id, which is kept in ``tracking.json``.

    Args:
        settings: ``[tracking]``.
        folder: the run's folder.
        config_toml: the resolved configuration, recorded with the metrics.
        name: the name of the run.

    Raises:
        TrackingError: a package is missing, or Weights & Biases cannot be started.
    """
    check_extras(settings)
    found: list[Callback] = []
    if settings.tensorboard:
        found.append(_Guarded("TensorBoard", _TensorBoard(folder / "tensorboard", config_toml)))
    if settings.wandb:
        found.append(_Guarded("Weights & Biases", _WeightsAndBiases(settings, folder, config_toml, name)))
    return found


class _Guarded(Callback):
    """A tracker whose failure is logged once and ends the tracker, not the run."""

    def __init__(self, name: str, tracker: Callback) -> None:
        self._name = name
        self._tracker: Callback | None = tracker

    def on_round_end(self, record: RoundRecord) -> None:
        if self._tracker is None:
            return
        try:
            self._tracker.on_round_end(record)
        except Exception as error:
            self._leave(f"round {record.round}", error)

    def on_run_end(self) -> None:
        if self._tracker is None:
            return
        try:
            self._tracker.on_run_end()
        except Exception as error:
            self._leave("at the end of the run", error)
        self._tracker = None

    def _leave(self, when: str, error: Exception) -> None:
        tracker, self._tracker = self._tracker, None
        _log.warning(
            "%s failed (%s) and gets no more metrics of this run; all of them are in metrics.jsonl: %s: %s",
            self._name,
            when,
            type(error).__name__,
            error,
        )
        _log.debug("its traceback:", exc_info=error)
        if tracker is not None:
            with suppress(Exception):
                tracker.on_run_end()


class _TensorBoard(Callback):
    """Event files in ``folder``; the file is begun with the first record, which says what it replaces."""

    def __init__(self, folder: Path, config_toml: str) -> None:
        self._folder = folder
        self._config_toml = config_toml
        self._writer: Any = None

    def on_round_end(self, record: RoundRecord) -> None:
        if self._writer is None:
            is_new = not any(self._folder.glob("events.*"))
            # Purge the events of a killed run from this round on, since these rounds are run again.
            self._writer = import_module(_MODULES["tensorboard"]).SummaryWriter(
                str(self._folder), purge_step=record.round
            )
            if is_new:
                self._writer.add_text("config", f"```toml\n{self._config_toml}\n```", record.round)
        for tag, value in _metrics(record).items():
            self._writer.add_scalar(tag, value, record.round)
        self._writer.flush()

    def on_run_end(self) -> None:
        if self._writer is not None:
            self._writer.close()


class _WeightsAndBiases(Callback):
    """A Weights & Biases run whose files lie in ``wandb/`` of the run's folder."""

    def __init__(self, settings: TrackingSettings, folder: Path, config_toml: str, name: str) -> None:
        wandb = import_module(_MODULES["wandb"])
        identity = _wandb_id(folder / "tracking.json")
        (folder / "wandb").mkdir(exist_ok=True)
        try:
            with _environment(_wandb_environment(settings, folder)):
                if settings.wandb_mode == "online" and not wandb.login(prompt=False):
                    raise TrackingError("nobody is logged in: run `wandb login`, or set WANDB_API_KEY")
                self._run = wandb.init(
                    project=settings.wandb_project,
                    name=name,
                    id=identity,
                    resume="allow",
                    # A run beside the caller's own, if there is one.
                    reinit="create_new",
                    dir=str(folder),
                    mode=settings.wandb_mode,
                    config=tomllib.loads(config_toml),
                    allow_val_change=True,
                    settings=wandb.Settings(**_SILENT_AND_DISCREET),
                )
        except Exception as error:
            raise TrackingError(
                f"tracking.wandb = true: Weights & Biases cannot be started in mode {settings.wandb_mode!r}: "
                f"{str(error).rstrip('.')}. Without a network or an account, set "
                "tracking.wandb_mode = 'offline'; without Weights & Biases, tracking.wandb = false"
            ) from error

    def on_round_end(self, record: RoundRecord) -> None:
        self._run.log(_metrics(record), step=record.round, commit=True)

    def on_run_end(self) -> None:
        self._run.finish()


# No banners, and nothing about code, machine or installed packages.
_SILENT_AND_DISCREET: dict[str, Any] = {
    "silent": True,
    "console": "off",
    "disable_code": True,
    "disable_git": True,
    "disable_job_creation": True,
    "save_code": False,
    "host": "",
    "finish_timeout": _FINISH_SECONDS,
    "finish_timeout_raises": True,
    "x_disable_machine_info": True,
    "x_disable_meta": True,
    "x_disable_stats": True,
    "x_save_requirements": False,
}


def _wandb_environment(settings: TrackingSettings, folder: Path) -> dict[str, str]:
    """Environment variables for the background process of Weights & Biases, which reads them at its start."""
    return {
        # Its reports of its own errors go over the network, also in an offline run.
        "WANDB_ERROR_REPORTING": "false",
        "WANDB_SILENT": "true",
        "WANDB_MODE": settings.wandb_mode,
        # Its own log would lie in the home folder.
        "WANDB_CACHE_DIR": str((folder / "wandb" / "cache").resolve()),
    }


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """Environment variables for as long as the block lasts."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _wandb_id(path: Path) -> str:
    """The run's Weights & Biases id: kept in ``path``, drawn where there is none yet."""
    if not path.is_file():
        identity = uuid.uuid4().hex[:12]
        write_text(path, json.dumps({"wandb_id": identity}, indent=2) + "\n")
        return identity
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))["wandb_id"]
    except (ValueError, KeyError, TypeError) as error:
        raise TrackingError(
            f"{path}: cannot be read as the run's wandb_id ({error!r}); "
            "remove the file to go on under a new one"
        ) from None
    return str(stored)


def _metrics(record: RoundRecord) -> dict[str, float]:
    """All metrics of a round by the name that trackers show."""
    return {f.name if f.client is None else f"client/{f.client}/{f.name}": f.value for f in record.metrics}


def _require(key: str) -> None:
    """Raise ``TrackingError`` unless what ``tracking.KEY = true`` needs can be imported."""
    try:
        import_module(_MODULES[key])
    except ImportError as error:
        raise TrackingError(
            f"tracking.{key} = true needs a package that is not installed ({error}): "
            f"pip install 'fedsmoothlora[{key}]', or set tracking.{key} = false"
        ) from error
