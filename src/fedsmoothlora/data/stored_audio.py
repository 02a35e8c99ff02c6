"""Labelled recordings that are stored in files or as bytes in a table, and decoded when they are needed."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Collection
from dataclasses import dataclass
from math import gcd
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from fedsmoothlora.data.stored_files import StoredFiles
from fedsmoothlora.errors import DataError


@dataclass(frozen=True, kw_only=True)
class Format:
    """The format of a recording.

    Attributes:
        frames: number of samples of each channel.
        rate: sampling rate in Hz.
    """

    frames: int
    rate: int

    def frames_at(self, rate: int) -> int:
        """The number of samples after resampling to ``rate``."""
        return -(-self.frames * rate // self.rate)


@dataclass(frozen=True, eq=False)
class StoredAudio(StoredFiles):
    """Labelled recordings of any length, decoded row by row with soundfile; channels are averaged."""

    item: ClassVar[str] = "audio"
    plural: ClassVar[str] = "recordings"

    @staticmethod
    def suffixes() -> Collection[str]:
        """The suffixes of formats that soundfile reads on all systems."""
        return (".wav", ".flac", ".ogg", ".mp3", ".aiff", ".aif")

    @staticmethod
    def feature() -> Any:
        """Recordings that are not decoded."""
        from fedsmoothlora.data.datasets_library import datasets

        return datasets.Audio(decode=False)

    @classmethod
    def none(cls, classes: tuple[str, ...]) -> StoredAudio:
        """No rows, for a coordinator whose sites hold the data."""
        from fedsmoothlora.data.datasets_library import datasets

        stored = datasets.Dataset.from_dict({cls.item: []})
        return cls(stored, Path(), np.zeros(0, dtype=np.int64), classes, ())

    def format(self, row: int) -> Format:
        """The length and the sampling rate of a row, read from its header.

        Raises ``DataError`` with the place of a recording that cannot be used.
        """
        import soundfile

        try:
            found = soundfile.info(io.BytesIO(self._content(row)))
        except (DataError, soundfile.SoundFileError, TypeError) as error:
            raise DataError(f"{self.where(row)}: {_reason(error)}") from None
        if not found.frames:
            raise DataError(f"{self.where(row)}: the recording has no samples")
        return Format(frames=found.frames, rate=found.samplerate)

    def samples(self, row: int, rate: int) -> NDArray[np.float32]:
        """The mean of a row's channels at a sampling rate, ``(samples,)``.

        Another rate is converted by ``scipy.signal.resample_poly``.

        Raises ``DataError`` with the place of a recording that cannot be used.
        """
        import soundfile

        try:
            channels, own = soundfile.read(io.BytesIO(self._content(row)), dtype="float32", always_2d=True)
        except (DataError, soundfile.SoundFileError, TypeError) as error:
            raise DataError(f"{self.where(row)}: {_reason(error)}") from None
        if not len(channels):
            raise DataError(f"{self.where(row)}: the recording has no samples")
        if not np.isfinite(channels).all():
            raise DataError(f"{self.where(row)}: a sample is not a finite number")
        found: NDArray[np.float32] = channels.mean(axis=1)
        if own == rate:
            return found
        from scipy.signal import resample_poly

        common = gcd(own, rate)
        return np.asarray(resample_poly(found, rate // common, own // common), dtype=np.float32)

    def digest(self, row: int) -> bytes:
        """A hash of a recording's sampling rate and samples."""
        rate = self.format(row).rate
        return hashlib.sha256(f"{rate} ".encode() + self.samples(row, rate).tobytes()).digest()


def _reason(error: Exception) -> str:
    if isinstance(error, DataError):
        return str(error)
    # The whole text of an error of libsndfile names the stream by its address in memory.
    return f"soundfile cannot read the recording: {getattr(error, 'error_string', error)}"
