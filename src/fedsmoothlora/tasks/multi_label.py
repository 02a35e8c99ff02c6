"""Multi-label classification of texts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from fedsmoothlora.tasks.base import ReadRequest, check_label_columns
from fedsmoothlora.tasks.text_classification import TextClassification, TextData

if TYPE_CHECKING:
    from torch import Tensor

    from fedsmoothlora.data.loading import Data
    from fedsmoothlora.data.texts import Texts
    from fedsmoothlora.tasks.objectives import MultiLabel as Objective


@dataclass(frozen=True, kw_only=True)
class MultiLabel(TextClassification):
    """Find all labels of a text or a pair of texts; a text may have none, one or several.

    The label column (``data.label_column``) holds a list of labels in each row. The labels are
    ``data.classes``, those that the data set declares, or those of the training rows.

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
        check_label_columns(self.label_columns)

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
        from fedsmoothlora.data.label_sets import label_counts

        if not len(self._documents):
            return []
        return [*label_counts(self._documents.labels.numpy(), self.data.outputs), *super().facts()]

    def _read(self, request: ReadRequest) -> Data[Texts]:
        from fedsmoothlora.data.duplicates import similar_class_notes
        from fedsmoothlora.data.label_sets import label_sets
        from fedsmoothlora.data.text_sources import load_texts

        self._sets = label_sets(request.data, self._task.label_columns)
        data = load_texts(
            request.data,
            request.seed,
            {**self._input.wanted, **self._sets.texts},
            None,
            request.client_column,
            lists=self._sets.lists,
            targets=[*self._sets.texts, *self._sets.lists],
            elsewhere=request.elsewhere,
        )
        names = self._sets.names(data.train, request.data, data.declared, elsewhere=request.elsewhere)
        return replace(data, label_names=names, notes=[*data.notes, *similar_class_notes(names)])

    def _targets(self, texts: Texts) -> Tensor:
        """1 for the labels of a row and 0 for others, ``(rows, labels)``, float32."""
        import torch

        return torch.from_numpy(self._sets.targets(texts, self.data.outputs))
