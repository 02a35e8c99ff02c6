"""Record a run's metrics with TensorBoard, Weights & Biases, MLflow and trackio. All are off by default.

``metrics.jsonl`` always has all metrics. If a tracker fails, this is logged and the run continues without it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import time
import tomllib
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from contextvars import Context
from importlib import import_module
from io import StringIO
from pathlib import Path
from typing import Any

from fedsmoothlora.callbacks import Callback
from fedsmoothlora.config import flat
from fedsmoothlora.config.settings import TrackingSettings
from fedsmoothlora.errors import TrackingError
from fedsmoothlora.federation.records import RoundRecord
from fedsmoothlora.storage.files import write_text

_log = logging.getLogger(__name__)

# After this time, metrics that are not uploaded yet stay in the run's folder.
_FINISH_SECONDS = 60.0
# The modules that each key needs.
_MODULES = {
    "tensorboard": "torch.utils.tensorboard",
    "wandb": "wandb",
    "mlflow": "mlflow",
    "trackio": "trackio",
}


def check_extras(settings: TrackingSettings) -> None:
    """Raise ``TrackingError`` if a package that the settings need is missing."""
    for key in _MODULES:
        if getattr(settings, key):
            _require(key)
    if settings.mlflow and settings.mlflow_uri is None:
        _require("mlflow", "sqlalchemy", "alembic")


def trackers(settings: TrackingSettings, folder: Path, config_toml: str, name: str) -> list[Callback]:
    """The trackers of a run. Their callbacks never raise.

    A resumed run continues in the same event folder, where metrics of rounds that are run again replace the
    old ones, and with the same ids of the other trackers, which are kept in ``tracking.json``. MLflow and
    trackio keep both values of a round that is run again.

    Args:
        settings: ``[tracking]``.
        folder: the run's folder.
        config_toml: the resolved configuration, recorded with the metrics.
        name: the name of the run.

    Raises:
        TrackingError: a package is missing, or a tracker cannot be started.
    """
    check_extras(settings)
    found: list[Callback] = []
    if settings.tensorboard:
        found.append(_Guarded("TensorBoard", _TensorBoard(folder / "tensorboard", config_toml)))
    if settings.wandb:
        found.append(_Guarded("Weights & Biases", _WeightsAndBiases(settings, folder, config_toml, name)))
    if settings.mlflow:
        found.append(_Guarded("MLflow", _MLflow(settings, folder, config_toml, name)))
    if settings.trackio:
        found.append(_Guarded("trackio", _Trackio(settings, folder, config_toml, name)))
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
        identity = _kept_ids(folder / "tracking.json").get("wandb_id")
        if identity is None:
            identity = uuid.uuid4().hex[:12]
            _keep_id(folder / "tracking.json", "wandb_id", identity)
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


class _MLflow(Callback):
    """A run of MLflow; by default in a database of the run's folder, which no server is needed for."""

    def __init__(self, settings: TrackingSettings, folder: Path, config_toml: str, name: str) -> None:
        ids = folder / "tracking.json"
        identity = _kept_ids(ids).get("mlflow_run_id")
        config = tomllib.loads(config_toml)
        self._rounds = config.get("training", {}).get("rounds")
        self._round = -1
        uri = settings.mlflow_uri
        try:
            with _environment(_MLFLOW_ENVIRONMENT):
                mlflow = import_module(_MODULES["mlflow"])
                self._entities = import_module("mlflow.entities")
                if uri is None:
                    (folder / "mlruns").mkdir(exist_ok=True)
                    uri = f"sqlite:///{(folder / 'mlruns' / 'mlflow.db').resolve()}"
                self._client = mlflow.MlflowClient(tracking_uri=uri)
                if identity is None:
                    identity = self._begin(settings.mlflow_experiment, config, name)
                    _keep_id(ids, "mlflow_run_id", identity)
                else:
                    self._client.update_run(identity, status="RUNNING")
                self._run = identity
        except Exception as error:
            reason = " ".join(str(error).split()).rstrip(".")
            raise TrackingError(
                f"tracking.mlflow = true: MLflow cannot be started with tracking.mlflow_uri = "
                f"{settings.mlflow_uri!r}: {reason}. Without a server, leave it out; without "
                "MLflow, set tracking.mlflow = false"
            ) from error

    def _begin(self, experiment: str, config: Mapping[str, Any], name: str) -> str:
        """A new run with the configuration as its parameters; its id."""
        known = self._client.get_experiment_by_name(experiment)
        where = self._client.create_experiment(experiment) if known is None else known.experiment_id
        identity: str = self._client.create_run(where, run_name=name).info.run_id
        params = [
            self._entities.Param(_mlflow_key(key), str(value)[:_LONGEST_PARAM])
            for key, value in flat(config).items()
        ]
        for some in _batches(params, _MOST_PARAMS):
            self._client.log_batch(identity, params=some)
        return identity

    def on_round_end(self, record: RoundRecord) -> None:
        now = round(time.time() * 1000)
        metrics = [
            self._entities.Metric(_mlflow_key(tag), value, now, record.round)
            for tag, value in _metrics(record).items()
        ]
        for some in _batches(metrics, _MOST_METRICS):
            self._client.log_batch(self._run, metrics=some)
        self._round = record.round

    def on_run_end(self) -> None:
        is_whole = self._rounds is None or self._round == self._rounds
        self._client.set_terminated(self._run, "FINISHED" if is_whole else "KILLED")


# Nothing is reported to MLflow's makers, and nothing is printed.
_MLFLOW_ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "MLFLOW_CONFIGURE_LOGGING": "false",
    "GIT_PYTHON_REFRESH": "quiet",
}
# Limits of MLflow: of one call, of a value, of a name.
_MOST_PARAMS, _MOST_METRICS, _LONGEST_PARAM, _LONGEST_KEY = 100, 1000, 6000, 250


def _batches(values: Sequence[Any], most: int) -> Iterator[Sequence[Any]]:
    for begin in range(0, len(values), most):
        yield values[begin : begin + most]


def _mlflow_key(tag: str) -> str:
    """The tag with the characters that MLflow takes; different tags stay different.

    Each other character becomes ``_x``, its code in hexadecimal digits, and ``_``. So do the dots of a part
    between slashes that has nothing else, since MLflow takes names for paths.
    """
    parts = [
        _REFUSED.sub(_escaped, part) if part.strip(".") else re.sub(r"\.", _escaped, part) or "_x_"
        for part in tag.split("/")
    ]
    key = "/".join(parts)
    if len(key) <= _LONGEST_KEY:
        return key
    return f"{key[: _LONGEST_KEY - 17]}_{hashlib.sha256(tag.encode()).hexdigest()[:16]}"


# An underscore before an x is escaped too, so that no tag looks like an escaped one.
_REFUSED = re.compile(r"[^\w.\- :]|_(?=x)", re.ASCII)


def _escaped(match: re.Match[str]) -> str:
    return f"_x{ord(match[0]):x}_"


class _Trackio(Callback):
    """A run of trackio, in the folder where trackio keeps all runs (``TRACKIO_DIR``), or in a Space."""

    def __init__(self, settings: TrackingSettings, folder: Path, config_toml: str, name: str) -> None:
        ids = folder / "tracking.json"
        # trackio resumes a run by its name.
        identity = _kept_ids(ids).get("trackio_run") or f"{name}-{uuid.uuid4().hex[:8]}"
        try:
            with redirect_stdout(StringIO()):
                # In a context of its own, since trackio ends the run that the caller has begun in this one.
                self._run = Context().run(
                    import_module(_MODULES["trackio"]).init,
                    project=settings.trackio_project,
                    name=identity,
                    space_id=settings.trackio_space,
                    config=tomllib.loads(config_toml),
                    resume="allow",
                    embed=False,
                    auto_log_gpu=False,
                    auto_log_cpu=False,
                )
        except Exception as error:
            reason = " ".join(str(error).split()).rstrip(".")
            raise TrackingError(
                f"tracking.trackio = true: trackio cannot be started with tracking.trackio_space = "
                f"{settings.trackio_space!r}: {reason}. Without a Space, leave it out; without trackio, set "
                "tracking.trackio = false"
            ) from error
        _keep_id(ids, "trackio_run", identity)

    def on_round_end(self, record: RoundRecord) -> None:
        self._run.log(_metrics(record), step=record.round)

    def on_run_end(self) -> None:
        with redirect_stdout(StringIO()):
            self._run.finish()


def _kept_ids(path: Path) -> dict[str, str]:
    """The ids of the run at its trackers, by name; none where the file is not there yet."""
    if not path.is_file():
        return {}
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        return {key: str(value) for key, value in stored.items()}
    except (ValueError, AttributeError, RecursionError) as error:
        raise TrackingError(
            f"{path}: cannot be read as the run's ids at its trackers ({error!r}); "
            "remove the file to go on under new ones"
        ) from None


def _keep_id(path: Path, key: str, identity: str) -> None:
    write_text(path, json.dumps({**_kept_ids(path), key: identity}, indent=2) + "\n")


def _metrics(record: RoundRecord) -> dict[str, float]:
    """All metrics of a round by the name that trackers show."""
    return {f.name if f.client is None else f"client/{f.client}/{f.name}": f.value for f in record.metrics}


def _require(key: str, *more: str) -> None:
    """Raise ``TrackingError`` unless what ``tracking.KEY = true`` needs can be imported."""
    try:
        with _environment(_MLFLOW_ENVIRONMENT):
            for module in (_MODULES[key], *more):
                import_module(module)
    except ImportError as error:
        raise TrackingError(
            f"tracking.{key} = true needs a package that is not installed ({error}): "
            f"pip install 'fedsmoothlora[{key}]', or set tracking.{key} = false"
        ) from error
