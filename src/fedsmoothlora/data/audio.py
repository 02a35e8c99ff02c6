"""Recordings as a model's input, prepared by the model's own feature extractor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedsmoothlora.data.examples import Batch
from fedsmoothlora.data.stored_audio import StoredAudio
from fedsmoothlora.errors import DataError

_MEMORY = 1_000_000_000  # bytes


class AudioExamples:
    """Recordings prepared for a model and padded on the right; samples are kept in memory if they fit.

    Args:
        audio: the recordings.
        rate: the sampling rate of the model in Hz.
        longest: largest number of samples; a longer recording loses its end.
        shortest: smallest number of samples that the model can take.
        name: name of the model's input.
        extract: the model's feature extractor: from the samples of a recording, ``(samples,)``, to its input,
            ``(time, ...)``, which does not depend on other recordings.
        memory: largest size in bytes of all samples together that is kept in memory.

    Attributes:
        labels: ``(rows,)``, int64.
        resampled: number of rows with another sampling rate.
        cut: number of rows that lose their end.

    Raises:
        DataError: a recording cannot be used, or is too short for the model.
    """

    def __init__(
        self,
        audio: StoredAudio,
        *,
        rate: int,
        longest: int,
        shortest: int,
        name: str,
        extract: Callable[[NDArray[np.float32]], NDArray[np.float32]],
        memory: int = _MEMORY,
    ) -> None:
        self.labels = torch.from_numpy(audio.labels.copy())
        self._audio, self._rate, self._longest, self._name = audio, rate, longest, name
        self._extract = extract
        formats = [audio.format(row) for row in range(len(audio))]
        whole = [found.frames_at(rate) for found in formats]
        for row, samples in enumerate(whole):
            if samples < shortest:
                raise DataError(
                    f"{audio.where(row)}: the recording has {samples} samples at {rate} Hz; the model takes "
                    f"{shortest} or more"
                )
        self.resampled = sum(found.rate != rate for found in formats)
        self.cut = sum(samples > longest for samples in whole)
        self._lengths = [min(samples, longest) for samples in whole]
        if self._lengths:
            self._check_extraction(int(np.argmin(self._lengths)))
        self._fits = 4 * sum(self._lengths) <= memory

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def lengths(self) -> list[int]:
        """Number of samples of each row."""
        return self._lengths

    def batch(self, rows: Sequence[int]) -> Batch:
        """The model's input, ``attention_mask`` and ``labels (rows,)``.

        The input is ``(rows, longest, ...)``, float32. The mask, ``(rows, longest)``, is 0 in the padding.
        """
        found = [torch.from_numpy(self._extract(self._samples(int(row)))) for row in rows]
        masks = [torch.ones(len(one), dtype=torch.int64) for one in found]
        return {
            self._name: _padded(found),
            "attention_mask": _padded(masks),
            "labels": self.labels[torch.as_tensor(rows, dtype=torch.int64)],
        }

    def _check_extraction(self, row: int) -> None:
        """Raise ``DataError`` if the feature extractor cannot use a recording of this row's length."""
        try:
            self._extract(np.zeros(self._lengths[row], dtype=np.float32))
        except Exception as error:  # the error's class depends on the extractor
            raise DataError(
                f"{self._audio.where(row)}: the model's feature extractor cannot use {self._lengths[row]} "
                f"samples at {self._rate} Hz, perhaps because they are too few: {error}"
            ) from None

    @cached_property
    def _kept(self) -> list[NDArray[np.float32]]:
        return [self._read(row) for row in range(len(self))]

    def _samples(self, row: int) -> NDArray[np.float32]:
        return self._kept[row] if self._fits else self._read(row)

    def _read(self, row: int) -> NDArray[np.float32]:
        return self._audio.samples(row, self._rate)[: self._longest]


def _padded(rows: Sequence[Tensor]) -> Tensor:
    """``(rows, longest, ...)``."""
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
