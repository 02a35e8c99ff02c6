"""Data by its source: the training and test sets, and their classes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import numpy as np
from annotated_types import Ge

from fedsmoothlora import sources
from fedsmoothlora.data.raw import RawImages
from fedsmoothlora.seeds import seed_for

PACKAGED = "fedsmoothlora.data.packaged"


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """The keys of ``[data]``.

    Attributes:
        source: ``pkg:NAME``; see `fedsmoothlora list datasets`.
        train_rows: take that many training rows only, drawn by the run's seed; all unless set.
        test_rows: the same of the test set.
    """

    source: str
    train_rows: Annotated[int, Ge(1)] | None = None
    test_rows: Annotated[int, Ge(1)] | None = None


def load_images(settings: DataSettings, seed: int) -> tuple[RawImages, RawImages]:
    """Training and test images; ``seed`` draws the rows where fewer than all are wanted.

    Raises ``ValueError`` for an unknown source or more rows than there are, ``PackageError`` if the
    package cannot be had.
    """
    train, test = sources.find_packaged(settings.source, PACKAGED).load()
    return (
        _some("train_rows", train, settings.train_rows, seed),
        _some("test_rows", test, settings.test_rows, seed),
    )


def _some(key: str, images: RawImages, rows: int | None, seed: int) -> RawImages:
    if rows is None:
        return images
    if rows > len(images.labels):
        raise ValueError(f"data.{key} = {rows}: there are {len(images.labels)}")
    chosen = np.random.default_rng(seed_for(seed, key)).permutation(len(images.labels))[:rows]
    chosen.sort()
    return RawImages(images.pixels[chosen], images.labels[chosen], images.classes)
