"""Multi-label classification of images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from fedsmoothlora.tasks.base import ReadRequest, check_label_columns
from fedsmoothlora.tasks.image_classification import ImageClassification, ImageData

if TYPE_CHECKING:
    from torch import Tensor

    from fedsmoothlora.data.media_sources import ImageData as Images
    from fedsmoothlora.tasks.objectives import MultiLabel


@dataclass(frozen=True, kw_only=True)
class MultiLabelImage(ImageClassification):
    """Find all labels of an image; an image may have none, one or several.

    The data are a table, or a folder of images with a ``metadata.csv``. The label column
    (``data.label_column``) holds a list of labels in each row. The labels are ``data.classes``, those that
    the data set declares, or those of the training rows.

    Attributes:
        kind: ``multi-label-image``.
        label_columns: several columns in place of the one with lists: a column for each label, 1 in rows that
            have it and 0 in others.
    """

    defaults: ClassVar[Mapping[str, Any]] = MappingProxyType(
        {**ImageClassification.defaults, "checkpoint.best": "micro_f1"}
    )
    metrics: ClassVar[tuple[str, ...]] = ("micro_f1", "macro_f1", "mean_average_precision", "loss")
    classifies: ClassVar[bool] = False
    weighs_labels: ClassVar[bool] = True
    problem_type: ClassVar[str | None] = "multi_label_classification"

    kind: Literal["multi-label-image"] = "multi-label-image"  # type: ignore[assignment]
    label_columns: tuple[str, ...] | None = None

    def check(self) -> None:
        """Raise ``ConfigError`` for label columns that are named twice."""
        check_label_columns(self.label_columns)

    def read(self, request: ReadRequest) -> MultiLabelImageData:
        """The data of a run: images with their labels."""
        return MultiLabelImageData(self, request)


class MultiLabelImageData(ImageData):
    """Images with any number of labels each. Raises as `ImageData`, and for labels that cannot be read."""

    _task: MultiLabelImage

    def objective(self, loaded: Any) -> MultiLabel:
        """Binary cross-entropy, with F1 and mean average precision."""
        from fedsmoothlora.tasks.objectives import MultiLabel

        return MultiLabel(loaded.arguments, names=self.data.outputs)

    def facts(self) -> list[str]:
        """The number of training rows with each label."""
        from fedsmoothlora.data.label_sets import label_counts

        return label_counts(self._targets(self.data.train).numpy(), self.data.outputs)

    def _read(self, request: ReadRequest) -> Images:
        from fedsmoothlora.data.duplicates import similar_class_notes
        from fedsmoothlora.data.label_sets import label_sets
        from fedsmoothlora.data.media_sources import load_images

        self._sets = label_sets(request.data, self._task.label_columns)
        data = load_images(
            request.data,
            request.seed,
            request.client_column,
            label_sets=self._sets,
            elsewhere=request.elsewhere,
        )
        train: Any = data.train  # with the columns of labels, which other images do not have
        names = self._sets.names(train, request.data, data.declared, elsewhere=request.elsewhere)
        parts: tuple[Any, ...] = (train, data.test)
        for rows in parts:
            if rows is not None:
                self._sets.targets(rows, names)  # wrong labels are refused before the images are processed
        return replace(data, label_names=names, notes=[*data.notes, *similar_class_notes(names)])

    def _targets(self, rows: Any) -> Tensor:
        """1 for the labels of a row and 0 for others, ``(rows, labels)``, float32."""
        import torch

        return torch.from_numpy(self._sets.targets(rows, self.data.outputs))
