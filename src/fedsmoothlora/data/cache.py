"""The contents of the cache folder, and their removal."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from fedsmoothlora.data.packages import cache_folder

# Folders that this program writes into the cache folder.
CONTENTS = {
    "packages": "files of PyPI packages",
    "models": "packaged models, converted",
    "features": "frozen features of users' rows",
    "references": "log-probabilities of users' rows by reference models",
    "datasets": "copies of users' rows, by early versions",
    "scratch": "images that a run reads, in files without names",
}


@dataclass(frozen=True, kw_only=True)
class Cached:
    """One folder of the cache.

    Attributes:
        folder: its path.
        about: its contents, in a few words.
        files: the number of files.
        size: the total size of the files in bytes.
    """

    folder: Path
    about: str
    files: int
    size: int


def contents() -> list[Cached]:
    """The folders of the cache that exist."""
    found = []
    for name, about in CONTENTS.items():
        folder = cache_folder() / name
        if folder.is_dir():
            sizes = [path.lstat().st_size for path in folder.rglob("*") if not path.is_dir()]
            found.append(Cached(folder=folder, about=about, files=len(sizes), size=sum(sizes)))
    return found


def clear() -> list[Cached]:
    """Remove the folders of the cache; other files in the cache folder stay.

    Returns:
        The removed folders.

    Raises:
        OSError: a file cannot be removed.
    """
    found = contents()
    for cached in found:
        shutil.rmtree(cached.folder)
    return found
