"""The keys of ``[data]``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge, Le


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """The keys of ``[data]``.

    Attributes:
        source: the training set: ``pkg:NAME`` (`fedsmoothlora list datasets`); the path of an image folder,
            of a table, or of a folder with one image folder or one table per client; or a data set's id on
            the Hugging Face hub. A table is a CSV, TSV, JSON, JSON Lines, CoNLL (``.conll``) or Parquet file,
            all but the last also with ``.gz``, or a folder written by ``save_to_disk`` of ``datasets``.
            Columns of text are named by keys of ``[task]``. If the tables of a folder have the names of
            splits on the hub, such as ``test-00000-of-00001.parquet``, only those of ``train_split`` are
            training data.
        path: folder with the files of a ``pkg:`` data set, if they are not in its default folder.
        subset: name of the subset of a data set on the hub that has several, such as ``cola`` of
            ``nyu-mll/glue``.
        revision: commit, tag or branch of a data set on the hub; the newest commit unless set.
        image_column: column of the image: its path relative to the file, or its bytes.
        audio_column: column of the recording: its path relative to the file, or its bytes.
        label_column: column of the row's class; ``label`` unless set. Texts and whole numbers are classes; in
            JSON and Parquet, ``1.0`` is the class ``1``. Decimal numbers are refused, unless ``classes``
            names them, and so are lists; ``text-regression`` takes numbers, ``multi-label`` and
            ``multi-label-image`` lists. A language model needs no labels, but partitions can deal rows by
            them.
        where_column: column of a table of texts by which its rows are filtered: rows are kept if their value
            is among ``where_values``.
        where_values: values of ``where_column`` whose rows are kept.
        train_split: split to train on, of a data set on the hub or of a folder with splits.
        test_split: split to test on; for a folder with splits, ``test`` unless set.
        test: path of the test set, in any form that ``source`` takes except a hub id. No file may belong to
            both sets.
        validation: fraction of each client's rows that is kept for validation, from 0 to 0.5.
        verify: read every image or recording once before training, to find broken files, test rows among the
            training rows, and equal ones of different classes.
        max_value: the value of white in images of more than 8 bits a pixel. Unless set, it is the smallest of
            255, 4095 and 65535 that no training image exceeds. Sites that hold such images must set it, since
            they must agree on the value.
        classes: names of the classes, in the order of their labels; the classes of the training set unless
            set. Sites that hold their own data must set it, since they must agree on the order even if a site
            has no row of some class.
        train_rows: number of training rows to use, drawn by the run's seed; all unless set.
        test_rows: number of test rows to use, drawn by the run's seed; all unless set.
    """

    source: str
    path: str | None = None
    subset: str | None = None
    revision: str | None = None
    image_column: str = "image"
    audio_column: str = "audio"
    label_column: str | None = None
    where_column: str | None = None
    where_values: tuple[str, ...] = ()
    train_split: str = "train"
    test_split: str | None = None
    test: str | None = None
    validation: Annotated[float, Ge(0), Le(0.5)] = 0.0
    verify: bool = True
    max_value: Annotated[int, Ge(1), Le(65535)] | None = None
    classes: tuple[str, ...] = ()
    train_rows: Annotated[int, Ge(1)] | None = None
    test_rows: Annotated[int, Ge(1)] | None = None
