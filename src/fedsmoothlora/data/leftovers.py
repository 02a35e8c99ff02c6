"""Files and folders that operating systems and file servers create among the data."""

from __future__ import annotations

from pathlib import Path

# In lower case. Synology, QNAP, NetApp, Windows, Linux.
_NAMES = {
    "@eadir",
    "@recycle",
    "@recently-snapshot",
    "#recycle",
    "#snapshot",
    "~snapshot",
    "$recycle.bin",
    "recycler",
    "system volume information",
    "lost+found",
}


def is_leftover(path: Path) -> bool:
    """Whether a file or folder is never part of a data set, by its name.

    These are names that begin with ``.`` or ``__`` (``.DS_Store``, ``._image.png``, ``__MACOSX``), lock files
    of office programs (``~$table.csv``), and the folders of file servers (``@eaDir``, ``#recycle``).
    """
    return path.name.startswith((".", "__", "~$")) or path.name.lower() in _NAMES


def entries_in(folder: Path) -> list[Path]:
    """The files and folders in a folder, sorted, without leftovers."""
    return sorted(entry for entry in folder.iterdir() if not is_leftover(entry))


def folders_in(folder: Path) -> list[Path]:
    """The folders in a folder, sorted, without leftovers."""
    return [entry for entry in entries_in(folder) if entry.is_dir()]
