"""The configuration and the folder that a run begins or resumes with."""

from __future__ import annotations

import re
import uuid
from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime
from itertools import count, zip_longest
from pathlib import Path
from typing import Any

from fedsmoothlora.config import (
    Config,
    ConfigError,
    Sections,
    first_difference,
    read,
    read_run_config,
    to_toml,
)
from fedsmoothlora.errors import StateError
from fedsmoothlora.runs.environment import environment
from fedsmoothlora.storage.files import make_folder, read_text, storage_errors
from fedsmoothlora.storage.inputs import ATTACK, Entry, check_config, check_inputs
from fedsmoothlora.storage.run_folder import RunFolder

_RUNS = Path("runs")
_LONGEST_NAME = 100  # bytes


def resolved(
    config: str | Path | Mapping[str, Any] | Config | None,
    overrides: Mapping[str, Any] | None,
    resume: str | Path | None,
) -> Config:
    """The configuration to run, or that of the run to resume unless one is given. Raises ``ConfigError``."""
    if config is None and resume is not None:
        return read_run_config(_opened(Path(resume)).config, overrides)
    if config is None:
        raise ConfigError("say what to run: a TOML file or a recipe, or resume=DIR")
    if not isinstance(config, Config):
        return read(config, overrides)
    if overrides:
        raise ConfigError(
            "overrides go with a file, a recipe or a table, not with a Config that was read before"
        )
    return config


def default_folder(name: str) -> Path:
    """A new, empty folder ``runs/NAME-TIME``; runs that begin in the same second get different ones.

    Characters of the name that could lead out of ``runs`` are replaced. Raises ``StorageError`` if the folder
    cannot be made.
    """
    plain = re.sub(r"[/\\\0-\x1f]+", "-", name).strip(".- ").encode()[:_LONGEST_NAME]
    stem = f"{plain.decode(errors='ignore') or 'run'}-{datetime.now().strftime('%Y%m%d-%H%M%S')}"
    make_folder(_RUNS)
    for number in count(1):
        folder = _RUNS / (stem if number == 1 else f"{stem}-{number}")
        with storage_errors(folder), suppress(FileExistsError):
            folder.mkdir()
            break
    return folder


def new_folder(
    settings: Sections,
    name: str,
    tables: Mapping[str, Mapping[str, Any]],
    inputs: Mapping[str, Entry],
    out: str | Path | None,
) -> RunFolder:
    """Make the folder of a new run.

    Args:
        settings: the settings of the run.
        name: its name.
        tables: further JSON files, by name.
        inputs: hashes of its data files and base weights.
        out: the folder; ``runs/NAME-TIME`` unless given.

    Raises:
        ConfigError: ``out`` is in use.
        StorageError: it cannot be written.
    """
    try:
        folder = RunFolder.create(Path(out) if out is not None else default_folder(name))
    except FileExistsError as error:
        raise ConfigError(str(error)) from None
    for file, table in tables.items():
        folder.write_json(file, table)
    toml = to_toml(settings)
    recorded = {**environment(settings.machine.device), "experiment": uuid.uuid4().hex}
    folder.begin(toml, {"config": toml, **inputs}, recorded)
    return folder


def existing_folder(settings: Sections, inputs: Mapping[str, Entry], out: str | Path | None) -> RunFolder:
    """Open the folder of a run to resume.

    Args:
        settings: the settings of the resumed run.
        inputs: hashes of its data files and base weights as they are now.
        out: the folder.

    Raises:
        ConfigError: it is no run's folder, or the settings would change the run's results.
        StateError: its configuration was edited, or an input has changed since the run began.
    """
    if out is None:
        raise ConfigError("say which run to go on with: out=DIR")
    folder = _opened(Path(out))
    check_config(folder)
    recorded = folder.inputs() or {}
    if ATTACK in recorded and ATTACK not in inputs:
        raise ConfigError(
            f"--resume {folder.path}: the run belongs to fedsmoothlora attack and would continue without its "
            "attack: repeat that command"
        )
    # Recorded inputs are compared by their content, so their paths may differ.
    moved = [key for key, entry in inputs.items() if "files" in entry and key in recorded]
    key = first_difference(to_toml(settings), read_text(folder.config), ignoring=moved)
    if isinstance(settings, Config):
        check_clients(settings, folder.path)
    if key is not None:
        raise ConfigError(
            f"--resume {folder.path}: {key} differs from the run's own configuration ({folder.config}), and "
            "would change its results: leave it as it was, or begin a new run"
        )
    check_inputs(folder, inputs)
    return folder


def check_outputs(folder: RunFolder, partition: Mapping[str, Any]) -> None:
    """Raise ``StateError`` if the outputs of a resumed run's model would have other names than it began with.

    Data, configuration and weights can be the same, and an older version read other names or another order.
    A file that is lost or damaged is not compared: it must not cost the final model.

    Args:
        folder: the folder of the run.
        partition: the content of ``partition.json`` as it would be written now.
    """
    try:
        before = folder.read_json("partition.json", "classes")
    except StateError:
        return
    was, now = (table.get("outputs", table["classes"]) for table in (before, partition))
    if not isinstance(was, list) or was == list(now):
        return
    pairs = enumerate(zip_longest(was, now))  # None where the shorter list has ended
    number, (name, other) = next((number, pair) for number, pair in pairs if len(set(pair)) > 1)
    raise StateError(
        f"--resume {folder.path}: output {number} of the run's model is {name!r}, and the same data now give "
        f"{other!r}: resume with the version of fedsmoothlora that began the run, or begin a new run"
    )


def check_clients(config: Config, path: Path) -> None:
    """Raise ``ConfigError`` if a resumed run would have other sites than it began with.

    Their number and order are part of its mathematics: of the scale with ``lora.scale = "clients"``, of draws
    of clients, and of epsilon.

    Args:
        config: the configuration of the resumed run.
        path: the folder of the run.
    """
    before = read_run_config(_opened(path).config).flower.clients
    now = config.flower.clients
    if not before or not now or before == now:
        return
    changed = [f"without {client}" for client in before if client not in now]
    changed += [f"with {client}" for client in now if client not in before]
    raise ConfigError(
        f"--resume {path}: flower.clients differs from the run's own configuration "
        f"({', '.join(changed) or 'in another order'}), and would change its results. A site joins or leaves "
        f"between runs: write the model (fedsmoothlora export {path} --as merged --out MODEL), and begin a "
        "new run from it with the new list of clients (model.source = 'MODEL'); see docs/operations.md"
    )


def _opened(folder: Path) -> RunFolder:
    try:
        return RunFolder.open(folder)
    except FileNotFoundError as error:
        raise ConfigError(f"--resume: {error}") from None
