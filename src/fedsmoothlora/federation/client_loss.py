"""The loss that clients minimise, on their device and in the precision of training."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from accelerate import Accelerator
from torch import Tensor, nn

from fedsmoothlora.data.examples import Batch
from fedsmoothlora.data.tokens import TokenBudget
from fedsmoothlora.tasks.objectives import Objective
from fedsmoothlora.tasks.objectives.base import RowLosses
from fedsmoothlora.training.loop import autocast, to_device, whole
from fedsmoothlora.training.settings import TrainingSettings


@dataclass(frozen=True, kw_only=True)
class ClientLoss:
    """An objective's loss with one model.

    Attributes:
        model: the model.
        objective: the loss of a batch.
        training: ``[training]``: the precision, and how batches are cut into parts.
        accelerator: the device.
    """

    model: nn.Module
    objective: Objective
    training: TrainingSettings
    accelerator: Accelerator

    def __call__(self, batch: Batch) -> Tensor:
        """The mean loss of a batch."""
        return self.of(self.model, batch)

    def of(self, model: nn.Module, batch: Batch) -> Tensor:
        """The mean loss of a batch with another model."""
        with autocast(self.training, self.accelerator.device):
            return self.objective.loss(model, to_device(batch, self.accelerator))

    def of_rows(self, batch: Batch) -> Tensor:
        """The loss of every row, ``(rows,)``, for sample-level privacy."""
        assert isinstance(self.objective, RowLosses)  # checked when the federation was assembled
        with autocast(self.training, self.accelerator.device):
            return self.objective.losses(self.model, to_device(batch, self.accelerator))

    def split(self, batch: Batch) -> Iterable[tuple[Batch, float]]:
        """The parts of a batch, and the share of each in the batch's loss."""
        if self.training.tokens_per_batch is not None:
            return self.objective.parts(batch, TokenBudget(self.training.tokens_per_batch))
        parts = self.training.accumulation
        return whole(batch) if parts == 1 else self.objective.parts(batch, parts)
