"""Rows with any number of labels each: lists of labels, or one column of 0 and 1 for each label."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from fedsmoothlora.data.settings import DataSettings
from fedsmoothlora.data.texts import sorted_names
from fedsmoothlora.errors import ConfigError, DataError

# Texts of a label's column, as files and libraries write them.
_HAS, _HAS_NOT = ("1", "1.0", "true"), ("0", "0.0", "false")


class RowsWithColumns(Protocol):
    """Rows with columns of texts and of lists of texts."""

    @property
    def columns(self) -> Mapping[str, Sequence[str]]: ...
    @property
    def lists(self) -> Mapping[str, Sequence[Sequence[str]]]: ...
    def __len__(self) -> int: ...
    def place(self, row: int) -> str:
        """The place of a row, for messages."""
        ...


@dataclass(frozen=True)
class LabelSets:
    """The columns that hold the labels of a row.

    Attributes:
        column: the column of lists of labels; not read if there are label columns.
        label_columns: a column for each label, 1 in rows that have it and 0 in others; None for lists.
    """

    column: str
    label_columns: tuple[str, ...] | None

    @property
    def texts(self) -> dict[str, str]:
        """The columns of text, each with the configuration key that names it."""
        return dict.fromkeys(self.label_columns or (), "task.label_columns")

    @property
    def lists(self) -> dict[str, str]:
        """The column of lists with the configuration key that names it, unless there are label columns."""
        return {} if self.label_columns else {self.column: "data.label_column"}

    def names(
        self,
        rows: RowsWithColumns,
        settings: DataSettings,
        declared: Mapping[str, tuple[str, ...]],
        *,
        elsewhere: bool,
    ) -> tuple[str, ...]:
        """The names of the labels.

        These are ``label_columns``, ``data.classes``, those that the data set declares, or those of the rows,
        sorted.

        Args:
            rows: the training rows.
            settings: ``[data]``.
            declared: the labels that the training set declares, by column.
            elsewhere: whether sites hold the training rows.

        Raises:
            ConfigError: there is one label or none, ``data.classes`` is needed and missing, or the lists hold
                a 0 or 1 for every label instead of names.
        """
        names = self.label_columns or settings.classes
        if not names and elsewhere:
            raise ConfigError(
                "data.classes is missing: if sites hold the data, it must name the labels in their order"
            )
        if not names:
            lists = rows.lists[self.column]
            names = declared.get(self.column, ())
            names = names or sorted_names(name for row in lists for name in row if name.strip())
            flags = {name.lower() for name in names} <= {*_HAS, *_HAS_NOT}
            if flags and len(widths := set(map(len, lists))) == 1 and max(widths) > 1:
                raise ConfigError(
                    f"data.source = {settings.source!r}, column {self.column!r}: every list holds "
                    f"{max(widths)} zeros and ones; should hold the names of a row's labels. For a column of "
                    "0 and 1 for each label, set task.label_columns"
                )
        if len(names) < 2:
            raise ConfigError(
                f"data.source = {settings.source!r}, column {self.column!r} has {len(names)} different "
                "labels; should be two or more"
            )
        return tuple(names)

    def targets(self, rows: RowsWithColumns, names: Sequence[str]) -> NDArray[np.float32]:
        """1 for the labels of a row and 0 for others, ``(rows, labels)``.

        Raises ``DataError`` with its place for a label that does not exist.
        """
        number = {name: label for label, name in enumerate(names)}
        found = np.zeros((len(rows), len(number)), dtype=np.float32)
        for row in range(len(rows)):
            for name in self._labels(rows, row, number):
                found[row, number[name]] = 1.0
        return found

    def _labels(self, rows: RowsWithColumns, row: int, number: Mapping[str, int]) -> list[str]:
        if self.label_columns is None:
            names = list(rows.lists[self.column][row])
            if unknown := [name for name in names if name not in number]:
                raise DataError(
                    f"{rows.place(row)}, column {self.column!r}: there is no label {unknown[0]!r}; the "
                    f"labels are {', '.join(number)}"
                )
            return names
        values = {name: rows.columns[name][row].strip().lower() for name in self.label_columns}
        for name, value in values.items():
            if value not in (*_HAS, *_HAS_NOT):
                raise DataError(f"{rows.place(row)}, column {name!r}: {value!r} should be 0 or 1")
        return [name for name, value in values.items() if value in _HAS]


def label_sets(settings: DataSettings, label_columns: tuple[str, ...] | None) -> LabelSets:
    """The columns of labels of ``[data]`` and ``task.label_columns``.

    Raises ``ConfigError`` if both name them.
    """
    if label_columns is not None and (settings.label_column or settings.classes):
        raise ConfigError("task.label_columns names the labels: leave data.label_column and data.classes out")
    return LabelSets(settings.label_column or "label", label_columns)


def label_counts(targets: NDArray[np.float32], names: Sequence[str]) -> list[str]:
    """A line with the number of rows that have each label; no line without rows.

    Args:
        targets: ``(rows, labels)``.
        names: names of the labels.
    """
    from fedsmoothlora.printable import printable

    if not len(targets):
        return []
    counts = zip(names, targets.sum(axis=0).astype(int).tolist(), strict=True)
    found = ", ".join(f"{printable(name)} ({rows})" for name, rows in counts)
    return [f"{len(names)} labels and their rows: {found}"]
