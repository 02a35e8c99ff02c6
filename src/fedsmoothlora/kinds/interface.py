"""The interface of a kind of task, as a run's planning uses it."""

from __future__ import annotations

from typing import Any, Protocol

from torch import nn

from fedsmoothlora.data.examples import Batch, Examples
from fedsmoothlora.data.sources import Data
from fedsmoothlora.tasks import Measurement, Task


class Loaded(Protocol):
    """A model, the names of its head's modules, and of the parameters that its checkpoint lacks."""

    @property
    def model(self) -> nn.Module: ...
    @property
    def head(self) -> tuple[str, ...]: ...
    @property
    def drawn(self) -> frozenset[str]: ...


class Kind(Protocol):
    """All that one kind of task does its own way, made of a run's settings; the data is read and checked.

    Attributes:
        data: training and test rows.
        train: the training rows as the model's inputs.
        test: the test rows, if there are any.
    """

    @property
    def data(self) -> Data[Any]: ...
    @property
    def train(self) -> Examples: ...
    @property
    def test(self) -> Examples | None: ...

    def load(self, *, empty: bool = False) -> Loaded:
        """The pretrained model; ``empty``: on the meta device, without weights."""
        ...

    def task(self, loaded: Loaded) -> Task:
        """Loss and evaluation."""
        ...

    def measurement(self, rows: Any, batch_size: int) -> Measurement | None:
        """The costly metric on some of these rows of the data, if one is wanted."""
        ...

    def notes(self) -> list[str]:
        """What people should know before training."""
        ...

    def facts(self) -> list[str]:
        """What `check` tells of the data beside numbers of rows."""
        ...

    def widest_batch(self, rows: int) -> Batch:
        """A batch of that many rows as large as one can be, on the meta device."""
        ...
