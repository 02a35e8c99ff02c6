"""Regression from texts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from fedsmoothlora.errors import ConfigError, DataError
from fedsmoothlora.tasks.base import ReadRequest
from fedsmoothlora.tasks.text_classification import TextClassification, TextData

if TYPE_CHECKING:
    from torch import Tensor

    from fedsmoothlora.data.loading import Data
    from fedsmoothlora.data.texts import Texts
    from fedsmoothlora.tasks.objectives import Regression


_LARGEST = 3.4028234663852886e38  # of float32, in which labels are kept
_SHOWN = 40  # characters of a wrong label


@dataclass(frozen=True, kw_only=True)
class TextRegression(TextClassification):
    """Predict a number from a text or a pair of texts.

    The label column (``data.label_column``) holds the numbers, and the loss is the mean squared error. Scale
    the numbers to a few units, because the model starts at predictions near 0.

    Attributes:
        kind: ``text-regression``.
    """

    defaults: ClassVar[Mapping[str, Any]] = MappingProxyType(
        {**TextClassification.defaults, "checkpoint.best": "pearson"}
    )
    metrics: ClassVar[tuple[str, ...]] = ("pearson", "spearman", "mse", "loss")
    classifies: ClassVar[bool] = False
    problem_type: ClassVar[str | None] = "regression"

    kind: Literal["text-regression"] = "text-regression"  # type: ignore[assignment]

    def read(self, request: ReadRequest) -> RegressionData:
        """The data of a run: texts with a number each."""
        return RegressionData(self, request)


class RegressionData(TextData):
    """Texts with a number each.

    Raises as `TextData`, and for numbers that are not finite in float32 or that a test split hides.
    """

    def __init__(self, task: TextRegression, request: ReadRequest) -> None:
        super().__init__(task, request)
        if self._test_documents is not None:
            _check_not_hidden(self._documents.labels, self._test_documents.labels)

    def objective(self, loaded: Any) -> Regression:
        """Mean squared error, with correlations."""
        from fedsmoothlora.tasks.objectives import Regression

        return Regression(head=self._called_head(loaded))

    def facts(self) -> list[str]:
        """The range of the numbers, and the numbers of tokens of the rows."""
        numbers = self._documents.labels.double()
        if not len(numbers):
            return []
        least, most = float(numbers.min()), float(numbers.max())
        mean, deviation = float(numbers.mean()), float(numbers.std(unbiased=False))
        found = f"numbers: {least:.4g} to {most:.4g}, mean {mean:.4g}, standard deviation {deviation:.4g}"
        return [found, *super().facts()]

    def _read(self, request: ReadRequest) -> Data[Texts]:
        from fedsmoothlora.data.text_sources import load_texts

        settings = request.data
        if settings.classes:
            raise ConfigError("data.classes belongs to tasks with classes, and a regression has none")
        column = settings.label_column or "label"
        data = load_texts(
            settings,
            request.seed,
            {**self._input.wanted, column: "data.label_column"},
            None,
            request.client_column,
            targets=[column],
            elsewhere=request.elsewhere,
        )
        return replace(data, label_names=(column,))

    def _targets(self, texts: Texts) -> Tensor:
        """The number of every row, float32."""
        import torch

        (column,) = self.data.outputs
        values = [_number(texts, row, column) for row in range(len(texts))]
        return torch.tensor(values, dtype=torch.float32)


def _check_not_hidden(train: Tensor, test: Tensor) -> None:
    """Raise ``ConfigError`` if all test rows have one number that no training row has.

    Some benchmarks keep the numbers of a test split secret in this way: GLUE's STS-B has -1 in every row.
    """
    if len(test) > 1 and bool((test == test[0]).all()) and not bool((train == test[0]).any()):
        raise ConfigError(
            f"all {len(test):,} test rows have the number {float(test[0]):g}, and no training row has it, so "
            "the test set seems to hide its numbers: choose one that has them, such as data.test_split = "
            "'validation'"
        )


def _number(texts: Texts, row: int, column: str) -> float:
    """The number in a row. Raises ``DataError`` with its place if there is none."""
    from fedsmoothlora.data.numbers import number_in

    text = texts.columns[column][row].strip()
    value = number_in(text)
    if value is None or abs(value) > _LARGEST:
        shown = text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
        how = "is no finite number in float32; write one with digits, such as -2.5 or 1e3"
        what = f"{shown!r} {how}" if text else "the number is missing"
        raise DataError(f"{texts.place(row)}, column {column!r}: {what}")
    return value
