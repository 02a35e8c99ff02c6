"""Diagnostics of a client's round on one batch of its training rows (``evaluation.diagnostics``)."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from fedsmoothlora.algebra.diagnostics import gradient_cosine
from fedsmoothlora.algebra.seeds import generator_for, seed_for
from fedsmoothlora.data.examples import Batch, BatchOrder, Examples
from fedsmoothlora.methods import Start
from fedsmoothlora.modeling.adapters import AdaptedModel
from fedsmoothlora.training.calibration import calibration_gradients
from fedsmoothlora.training.loop import checkpointing, seeded
from fedsmoothlora.training.settings import TrainingSettings


@dataclass(frozen=True, kw_only=True)
class Probe:
    """A batch of a client's training rows that fits in memory at once, the same in all rounds.

    Attributes:
        model: the model with LoRA.
        loss: the mean loss of a batch.
        training: the settings of local training.
        seed: the run's seed.
    """

    model: AdaptedModel
    loss: Callable[[Batch], Tensor]
    training: TrainingSettings
    seed: int

    def at_start(self, start: Start, client: str, data: Examples) -> dict[str, float]:
        """The loss at the start, and the cosine of the LoRA's gradient with the start, where it has one.

        The model must be ready for training.
        """
        if not start.lora:
            return {"loss_at_start": self.mean_loss(client, data, with_lora=False)}
        losses: list[float] = []

        def loss(batch: Batch) -> Tensor:
            value = self.loss(batch)
            losses.append(float(value.detach()))
            return value

        model = self.model
        with checkpointing(model.model, self.training):
            gradients = calibration_gradients(model.model, model.modules, [self._batch(client, data)], loss)
        cosine = gradient_cosine(gradients, start.lora, start.trains, start.cores)
        return {
            "loss_at_start": losses[0],
            **({} if cosine is None else {"start_gradient_cosine": cosine}),
        }

    def mean_loss(self, client: str, data: Examples, *, with_lora: bool) -> float:
        """The loss on the batch, in evaluation mode."""
        with torch.inference_mode(), nullcontext() if with_lora else self.model.without_lora():
            return float(self.loss(self._batch(client, data)))

    def _batch(self, client: str, data: Examples) -> Batch:
        generator = generator_for(self.seed, "probe", client)
        size = max(1, self.training.batch_size // self.training.accumulation)
        [rows] = BatchOrder(len(data), size, generator).take(1)
        most = self.training.tokens_per_batch
        with seeded(seed_for(self.seed, "probe draws", client), torch.device("cpu")):  # the data set may draw
            while most is not None and len(rows) > 1 and data.batch(rows)["input_ids"].numel() > most:
                rows = rows[: len(rows) // 2]
            return data.batch(rows)
