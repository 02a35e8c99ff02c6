"""The keys of ``[training]``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Interval


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """The keys of ``[training]``.

    Attributes:
        rounds: number of rounds of the federation.
        epochs: passes over a client's training rows in a round; 1 unless set. Excludes ``steps``.
        steps: optimiser steps of a client in a round, in place of ``epochs``.
        count_calibration: subtract a client's calibration batches from its optimiser steps (at least one step
            is left), so that all methods read the same number of batches in a round.
        batch_size: rows in each optimiser step.
        accumulation: number of parts that each batch is cut into, with one forward and one backward pass
            each. Their gradients add up to the gradient of the whole batch, so the step is the same and needs
            less memory. Texts of similar length are put into one part.
        tokens_per_batch: largest number of tokens in one forward and backward pass, with padding. Each batch
            is cut into as few parts as that allows, with rows of similar length in one part. Their gradients
            add up to the gradient of the whole batch. A row with more tokens is a part of its own. The tokens
            of answers do not count for models with an encoder and a decoder. For tasks whose model gets
            tokens; excludes ``accumulation``. Batches are not cut unless it is set.
        gradient_checkpointing: recompute activations in the backward pass instead of keeping them, in
            training and in calibration. Needs a model of transformers.
        precision: number format of computations. ``bf16`` trains and calibrates under bfloat16 autocast;
            weights, LoRA factors, gradients, uploads and evaluations stay float32.
        optimizer: the clients' optimiser, ``sgd`` or ``adamw``; its state is new in each round.
        lr: learning rate of the first round. It decreases over the rounds along a cosine to ``lr_min``.
        lr_min: learning rate at the end of the cosine.
        head_lr: learning rate of the head in the first round, where the head is trained whole; ``lr`` unless
            set. In every round it is the same multiple of the learning rate of the other weights.
        momentum: momentum of SGD; 0.9 unless set.
        weight_decay: weight decay of the optimiser.
        max_grad_norm: gradients with a larger norm are clipped to this norm; no clipping unless set.
        proximal_mu: weight ``mu`` of FedProx, which adds ``mu/2 ||theta - theta_start||^2`` to a client's
            loss; 0 switches it off.
        patience: end the run after that many rounds in a row without a better value of the metric
            ``checkpoint.best``; all rounds unless set. If there is a test set, the metric is computed on it
            and is then no longer an unbiased estimate, so prefer validation rows (``data.validation`` with
            ``evaluation.test = false``). The learning rate still follows its schedule over all ``rounds``.
        class_weights: weights of classes in the training loss of classification tasks, which is then the
            weighted mean of the rows' cross-entropies. ``balanced`` weighs class ``k`` by ``n / (K n_k)``,
            where the client has ``n`` training rows of ``K`` classes, ``n_k`` of them of class ``k``. A table
            has a weight for every class, by its name (by its number for data sets from Python). Metrics on
            test and validation rows are not weighted. No weights unless set.
        scaffold: correct the clients' gradients by SCAFFOLD's control variates. Needs plain SGD and the
            method ``fedit``, ``ffa`` or ``full``.
    """

    rounds: Annotated[int, Ge(1)] = 10
    epochs: Annotated[int, Ge(1)] | None = None
    steps: Annotated[int, Ge(1)] | None = None
    count_calibration: bool = False
    batch_size: Annotated[int, Ge(1)] = 64
    accumulation: Annotated[int, Ge(1)] = 1
    tokens_per_batch: Annotated[int, Ge(1)] | None = None
    gradient_checkpointing: bool = False
    precision: Literal["fp32", "bf16"] = "fp32"
    optimizer: Literal["sgd", "adamw"] = "sgd"
    lr: Annotated[float, Gt(0)] = 0.003
    lr_min: Annotated[float, Ge(0)] = 0.0
    head_lr: Annotated[float, Gt(0)] | None = None
    momentum: Annotated[float, Interval(ge=0, lt=1)] | None = None
    weight_decay: Annotated[float, Ge(0)] = 0.0
    max_grad_norm: Annotated[float, Gt(0)] | None = None
    patience: Annotated[int, Ge(1)] | None = None
    proximal_mu: Annotated[float, Ge(0)] = 0.0
    class_weights: Literal["balanced"] | Mapping[str, Annotated[float, Gt(0)]] | None = None
    scaffold: bool = False

    def steps_for(self, rows: int, calibration: int = 0) -> int:
        """A client's number of optimiser steps in a round.

        Args:
            rows: number of the client's training rows.
            calibration: number of calibration batches that the method reads in a round.
        """
        steps = self.steps
        if steps is None:
            steps = (self.epochs or 1) * math.ceil(rows / self.batch_size)
        return max(1, steps - calibration) if self.count_calibration else steps
