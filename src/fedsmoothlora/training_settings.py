"""The keys of ``[training]``."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Interval


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """The keys of ``[training]``.

    Attributes:
        rounds: rounds of the federation.
        epochs: passes over a client's training rows in a round (unless ``steps``); 1 unless set.
        steps: optimiser steps of a client in a round, in place of ``epochs``.
        count_calibration: take a client's calibration batches off its optimiser steps (one is left at
            least), so that all methods read as many batches in a round.
        batch_size: rows a step.
        accumulation: cut each step's batch into so many parts, one forward and backward pass each, whose
            gradients add up to the whole batch's: less memory, the same step. Texts of like length go
            together.
        gradient_checkpointing: compute activations again in the backward pass instead of keeping them, in
            training and calibration; for models of transformers.
        precision: ``bf16`` computes training and calibration under bfloat16 autocast; weights, LoRA factors,
            gradients, uploads and evaluations stay float32.
        optimizer: ``sgd`` or ``adamw``; fresh in each round.
        lr: learning rate of the first round; a cosine over the rounds takes it to ``lr_min``.
        lr_min: where the cosine ends.
        momentum: of SGD; 0.9 unless set.
        weight_decay: of the optimiser.
        max_grad_norm: clips the norm of the gradient; off unless set.
        proximal_mu: FedProx: ``mu/2 ||theta - theta_start||^2`` is added to a client's loss; 0 is off.
        scaffold: SCAFFOLD's control variates; for ``fedit``, ``ffa`` and ``full`` with plain SGD.
    """

    rounds: Annotated[int, Ge(1)] = 10
    epochs: Annotated[int, Ge(1)] | None = None
    steps: Annotated[int, Ge(1)] | None = None
    count_calibration: bool = False
    batch_size: Annotated[int, Ge(1)] = 64
    accumulation: Annotated[int, Ge(1)] = 1
    gradient_checkpointing: bool = False
    precision: Literal["fp32", "bf16"] = "fp32"
    optimizer: Literal["sgd", "adamw"] = "sgd"
    lr: Annotated[float, Gt(0)] = 0.003
    lr_min: Annotated[float, Ge(0)] = 0.0
    momentum: Annotated[float, Interval(ge=0, lt=1)] | None = None
    weight_decay: Annotated[float, Ge(0)] = 0.0
    max_grad_norm: Annotated[float, Gt(0)] | None = None
    proximal_mu: Annotated[float, Ge(0)] = 0.0
    scaffold: bool = False

    def steps_for(self, rows: int, calibration: int = 0) -> int:
        """Optimiser steps in a round for a client with that many training rows.

        Args:
            rows: the client's.
            calibration: batches that its method reads beside them.
        """
        steps = self.steps
        if steps is None:
            steps = (self.epochs or 1) * math.ceil(rows / self.batch_size)
        return max(1, steps - calibration) if self.count_calibration else steps
