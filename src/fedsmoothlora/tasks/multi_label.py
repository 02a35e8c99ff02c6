"""Multi-label classification of texts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from fedsmoothlora.errors import ConfigError, DataError
from fedsmoothlora.tasks.base import ReadRequest
from fedsmoothlora.tasks.text_classification import TextClassification, TextData

if TYPE_CHECKING:
    from torch import Tensor

    from fedsmoothlora.data.sources import Data
    from fedsmoothlora.data.texts import Texts
    from fedsmoothlora.tasks.objectives import MultiLabel as Objective

# Texts of a label's column, as files and libraries write them.
_HAS, _HAS_NOT = ("1", "1.0", "true"), ("0", "0.0", "false")


@dataclass(frozen=True, kw_only=True)
class MultiLabel(TextClassification):
    """Find all labels of a text or a pair of texts; a text may have none, one or several.

    The label column (``data.label_column``) holds a list of labels in each row. The labels are those of the
    training rows, or ``data.classes``.

    Attributes:
        kind: ``multi-label``.
        label_columns: several columns in place of the one with lists: a column for each label, 1 in rows that
            have it and 0 in others.
    """

    defaults: ClassVar[Mapping[str, Any]] = MappingProxyType(
        {**TextClassification.defaults, "checkpoint.best": "micro_f1"}
    )
    metrics: ClassVar[tuple[str, ...]] = ("micro_f1", "macro_f1", "mean_average_precision", "loss")
    classifies: ClassVar[bool] = False
    weighs_labels: ClassVar[bool] = True
    problem_type: ClassVar[str | None] = "multi_label_classification"

    kind: Literal["multi-label"] = "multi-label"  # type: ignore[assignment]
    label_columns: tuple[str, ...] | None = None

    def check(self) -> None:
        """Raise ``ConfigError`` as for text classification, and for label columns that are named twice."""
        super().check()
        if self.label_columns is not None and len(set(self.label_columns)) != max(len(self.label_columns), 2):
            raise ConfigError(
                f"label_columns = {list(self.label_columns)} should name two or more different columns"
            )

    def read(self, request: ReadRequest) -> MultiLabelData:
        """The data of a run: texts with their labels."""
        return MultiLabelData(self, request)


class MultiLabelData(TextData):
    """Texts with any number of labels each. Raises as `TextData`, and for labels that cannot be read."""

    _task: MultiLabel

    def objective(self, loaded: Any) -> Objective:
        """Binary cross-entropy, with F1 and mean average precision."""
        from fedsmoothlora.tasks.objectives import MultiLabel

        return MultiLabel(head=self._called_head(loaded), names=self.data.outputs)

    def facts(self) -> list[str]:
        """The number of training rows with each label, and the numbers of tokens of the rows."""
        from fedsmoothlora.printable import printable

        targets = self._documents.labels
        if not len(targets):
            return []
        counts = zip(self.data.outputs, targets.sum(dim=0).int().tolist(), strict=True)
        found = ", ".join(f"{printable(name)} ({rows})" for name, rows in counts)
        return [f"{targets.shape[1]} labels and their rows: {found}", *super().facts()]

    def _read(self, request: ReadRequest) -> Data[Texts]:
        from fedsmoothlora.data.sources import load_texts
        from fedsmoothlora.data.texts import sorted_names

        settings, columns = request.data, self._task.label_columns
        if columns is not None and (settings.label_column or settings.classes):
            raise ConfigError(
                "task.label_columns names the labels: leave data.label_column and data.classes out"
            )
        self._column = settings.label_column or "label"
        data = load_texts(
            settings,
            request.seed,
            {**self._input.wanted, **dict.fromkeys(columns or (), "task.label_columns")},
            None,
            request.client_column,
            lists={} if columns else {self._column: "data.label_column"},
            elsewhere=request.elsewhere,
        )
        names = columns or settings.classes
        if not names and request.elsewhere:
            raise ConfigError(
                "data.classes is missing: if sites hold the data, it must name the labels in their order"
            )
        names = names or sorted_names(
            name for row in data.train.lists[self._column] for name in row if name.strip()
        )
        if len(names) < 2:
            raise ConfigError(
                f"data.source = {settings.source!r}, column {self._column!r} has {len(names)} different "
                "labels; should be two or more"
            )
        return replace(data, label_names=tuple(names))

    @cached_property
    def _number(self) -> dict[str, int]:
        return {name: number for number, name in enumerate(self.data.outputs)}

    def _targets(self, texts: Texts) -> Tensor:
        """1 for the labels of a row and 0 for others, ``(rows, labels)``, float32."""
        import torch

        found = torch.zeros(len(texts), len(self._number))
        for row in range(len(texts)):
            for name in self._labels(texts, row):
                found[row, self._number[name]] = 1.0
        return found

    def _labels(self, texts: Texts, row: int) -> list[str]:
        """The labels of a row. Raises ``DataError`` with its place for a label that does not exist."""
        if self._task.label_columns is None:
            names = list(texts.lists[self._column][row])
            if unknown := [name for name in names if name not in self._number]:
                raise DataError(
                    f"{texts.place(row)}, column {self._column!r}: there is no label {unknown[0]!r}; the "
                    f"labels are {', '.join(self._number)}"
                )
            return names
        values = {name: texts.columns[name][row].strip().lower() for name in self._task.label_columns}
        for name, value in values.items():
            if value not in (*_HAS, *_HAS_NOT):
                raise DataError(f"{texts.place(row)}, column {name!r}: {value!r} should be 0 or 1")
        return [name for name, value in values.items() if value in _HAS]
