"""The keys of ``[data]``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge, Le


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """The keys of ``[data]``.

    Attributes:
        source: ``pkg:NAME`` (`fedsmoothlora list datasets`); the path of an image folder, of a CSV, JSONL or
            Parquet file, or of a folder with one image folder or one such file a client; or a data set's id
            on the Hugging Face hub. Columns of text are named by ``task.prompt`` and ``task.answer``.
        path: the folder of a ``pkg:`` set's files, where they are not where it looks for them.
        revision: commit, tag or branch of a hub data set; its newest unless set.
        image_column: the column with the image: its path, relative to the file, or its bytes.
        label_column: the column with the row's class; ``label`` unless set. A language model needs none, but
            partitions can deal rows by it.
        where_column: of a table with texts, keep only rows whose value in this column is among
            ``where_values``.
        where_values: see ``where_column``.
        train_split: the part of a hub data set to train on.
        test_split: the part of a hub data set to test on.
        test: the path of the test set, of any kind that ``source`` may have but the hub's.
        validation: share of each client's rows that is kept for validation, from 0 to 0.5.
        verify: open every image once before training, so that a broken one is found then.
        classes: the classes' names, in the labels' order; those of the training set unless set. Sites with
            data of their own need one order for all, also where a class is missing at one of them.
        train_rows: take that many training rows only, drawn by the run's seed; all unless set.
        test_rows: the same of the test set.
    """

    source: str
    path: str | None = None
    revision: str | None = None
    image_column: str = "image"
    label_column: str | None = None
    where_column: str | None = None
    where_values: tuple[str, ...] = ()
    train_split: str = "train"
    test_split: str | None = None
    test: str | None = None
    validation: Annotated[float, Ge(0), Le(0.5)] = 0.0
    verify: bool = True
    classes: tuple[str, ...] = ()
    train_rows: Annotated[int, Ge(1)] | None = None
    test_rows: Annotated[int, Ge(1)] | None = None
