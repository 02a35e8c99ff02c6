"""Record the inputs of a run outside its folder, data files and base weights, by their SHA-256.

``inputs.json`` has an entry for each key of the configuration that names an input:

- ``{"files": {NAME: SHA-256}}`` for a local file or folder, with names relative to it;
- ``{"package": "NAME==VERSION"}`` for a packaged model or data set;
- ``{"hub": ID, "revision": COMMIT}`` for an id on the Hugging Face hub.

``attack`` holds the attack of a run of `fedsmoothlora attack`.
``config`` holds the configuration as it was when the run began.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from fedsmoothlora.config import Config, first_difference
from fedsmoothlora.config.paths import PATHS, local_path
from fedsmoothlora.data import registry
from fedsmoothlora.data.leftovers import is_leftover
from fedsmoothlora.data.loading import PACKAGED as PACKAGED_DATA
from fedsmoothlora.data.raw import LabelledRows
from fedsmoothlora.data.stored_files import StoredFiles
from fedsmoothlora.errors import StateError
from fedsmoothlora.modeling.loading import PACKAGED as PACKAGED_MODELS
from fedsmoothlora.modeling.loading import model_config
from fedsmoothlora.storage.files import file_sha256, read_text
from fedsmoothlora.storage.run_folder import RunFolder

MODEL = "model.source"
ATTACK = "attack"
_IMAGES = "images of data.source"
# The files of a model's folder that transformers reads.
_MODEL_FILES = (".safetensors", ".bin", ".json", ".txt", ".model", ".jinja")

Entry = dict[str, Any]
Inputs = dict[str, Entry]


def recorded_inputs(config: Config, rows: Iterable[LabelledRows | None] = ()) -> Inputs:
    """The current inputs of a run. Files are read in blocks, so memory does not grow with their size.

    Args:
        config: the configuration.
        rows: the rows that were read; their tables may name images in other folders.

    Raises ``StateError`` if a file cannot be read.
    """
    data = config.data
    found = {
        MODEL: base_model(config),
        "data.source": _entry(data.source, PACKAGED_DATA, data.revision),
        "data.path": _entry(data.path, PACKAGED_DATA),
        "data.test": _entry(data.test, PACKAGED_DATA),
        _IMAGES: _images(rows, [local_path(data.source), local_path(data.test)]),
    }
    return {key: entry for key, entry in found.items() if entry}


def base_model(config: Config) -> Entry:
    """The entry of the base model.

    Raises ``StateError`` if a file cannot be read, and ``ConfigError`` as `model_config` does.
    """
    source, folder = config.model.source, local_path(config.model.source)
    if folder is None and not source.startswith(registry.PREFIX):
        commit = getattr(model_config(config.model), "_commit_hash", None)
        return {"hub": source, "revision": commit or config.model.revision}
    return _entry(source, PACKAGED_MODELS, kinds=_MODEL_FILES)


def check_inputs(folder: RunFolder, now: Mapping[str, Entry]) -> None:
    """Compare inputs with the record in a run's folder; entries that were not recorded are not compared.

    Raises ``StateError`` if a file was changed, added or removed.
    """
    before = folder.inputs() or {}
    for key, entry in now.items():
        if key in before and before[key] != entry:
            raise StateError(
                f"{folder.path}: {_difference(key, before[key], entry)} since the run began: restore it, or "
                "begin a new run"
            )


def check_config(folder: RunFolder) -> None:
    """Compare ``config.toml`` with its record. Paths, and keys that change no result, may be edited.

    Raises ``StateError`` with the first edited key that would change results.
    """
    before = (folder.inputs() or {}).get("config")
    if not isinstance(before, str):
        return  # not recorded
    try:
        key = first_difference(read_text(folder.config), before, ignoring=PATHS)
    except ValueError as error:
        if isinstance(error, StateError):
            raise
        raise StateError(f"{folder.config} is not valid TOML: {error}") from None
    if key is not None:
        raise StateError(
            f"{folder.config}: {key} was edited since the run began, and would change its results: restore "
            f"it (inputs.json has the original under 'config'), or begin a new run"
        )


def _entry(source: str | None, packaged: str, revision: str | None = None, kinds: Any = None) -> Entry:
    if source is None:
        return {}
    if source.startswith(registry.PREFIX):
        package = getattr(registry.find_packaged(source, packaged), "PACKAGE", None)
        return {"package": package.requirement} if package else {}
    path = local_path(source)
    if path is None:
        return {"hub": source, "revision": revision}
    return {"files": {name: file_sha256(file) for name, file in _files(path, kinds)}}


def _files(path: Path, kinds: tuple[str, ...] | None) -> Iterator[tuple[str, Path]]:
    """A file, or the files of a folder in the order of names, without leftovers and run folders."""
    if path.is_file():
        yield path.name, path
        return
    if kinds:  # a model, whose subfolders have training checkpoints and other formats
        found = [file for file in path.iterdir() if file.suffix in kinds]
        if any(file.suffix == ".safetensors" for file in found):
            found = [file for file in found if file.suffix != ".bin"]
    else:
        found = list(path.rglob("*"))
    runs = {file.parent for file in found if file.name == "inputs.json" and _is_run(file.parent)}
    for file in sorted(found):
        name = file.relative_to(path)
        leftover = any(is_leftover(Path(part)) for part in name.parts)
        if not leftover and runs.isdisjoint(file.parents) and file.is_file():
            yield name.as_posix(), file


def _is_run(folder: Path) -> bool:
    """Whether a folder is that of a run, rather than one of data with a file of this name."""
    return all((folder / name).is_file() for name in ("config.toml", "environment.json"))


def _images(rows: Iterable[LabelledRows | None], sources: Iterable[Path | None]) -> Entry:
    """The images that tables name, except those in folders that are recorded already."""
    folders = [path for path in sources if path is not None and path.is_dir()]
    files = {
        name: path
        for part in rows
        if isinstance(part, StoredFiles)
        for name, path in part.files()
        if not any(path.is_relative_to(folder) for folder in folders)
    }
    return {"files": {name: file_sha256(path) for name, path in sorted(files.items())}} if files else {}


def _difference(key: str, before: Any, now: Entry) -> str:
    """The first difference of two entries, as the beginning of a sentence."""
    old, new = (entry.get("files") if isinstance(entry, dict) else None for entry in (before, now))
    if not isinstance(old, dict) or not isinstance(new, dict):
        return f"{key} was changed from {_shown(before)} to {_shown(now)}"
    for name in sorted(old.keys() | new.keys()):
        if old.get(name) != new.get(name):
            how = "added" if name not in old else "removed" if name not in new else "changed"
            return f"the file {name} ({key}) was {how}"
    return f"{key} was changed"


def _shown(entry: Any) -> str:
    if not isinstance(entry, dict):
        return "an unreadable record"
    return ", ".join(str(value) for value in entry.values() if isinstance(value, str)) or "local files"
