"""Sample-level differential privacy at a client: its batches, its noise and the privacy that it has spent.

Two federations are neighbours if one has all rows of the other but one, at one client. Whatever leaves the
client, or stays in its state, follows from parameters that were trained by DP-SGD
(`fedsmoothlora.training.private`), from messages and from public values.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from fedsmoothlora.algebra.seeds import generator_for
from fedsmoothlora.errors import LostStateError, SpentBudgetError
from fedsmoothlora.federation.accounting import Budget, Ledger
from fedsmoothlora.federation.messages import Message
from fedsmoothlora.federation.noise import Noise, secure_uniforms
from fedsmoothlora.federation.settings import PrivacySettings
from fedsmoothlora.training.private import Mechanism
from fedsmoothlora.training.settings import TrainingSettings


@dataclass(frozen=True, kw_only=True)
class SamplePrivacy:
    """DP-SGD of one client.

    Without ``privacy.public_counts`` nothing here depends on the number of rows but the batches, which are
    drawn in secret: the probability of a row, the number of steps and the denominator are public.

    Attributes:
        settings: ``[privacy]``, with ``unit = "sample"``.
        training: ``[training]``.
        client: the client's id.
        rows: the number of its training rows.
        steps: the number of optimiser steps in a round.
        ledger: what the client has released so far.
    """

    settings: PrivacySettings
    training: TrainingSettings
    client: str
    rows: int
    steps: int
    ledger: Ledger

    @cached_property
    def budget(self) -> Budget:
        """How much noise the client adds, and what it has spent."""
        return budget_of_rows(self.settings, self.training, self.rows, self.steps, self.ledger)

    @property
    def denominator(self) -> float:
        """The divisor of a sum of clipped gradients: the expected number of rows in a batch, if public."""
        if self.settings.public_counts:
            return self.budget.sample_rate * self.rows
        return float(self.training.batch_size)

    def spend(self, message: Message) -> float:
        """Record this round's training before it begins; epsilon with it.

        Raises:
            LostStateError: an upload of the client was accepted that its ledger does not have.
            SpentBudgetError: the training would pass ``privacy.target_epsilon``; nothing is recorded.
        """
        known = {one.round for one in self.ledger.releases}
        if message.accepted_round >= 0 and message.accepted_round not in known:
            raise LostStateError(
                f"the record of what it has released lacks round {message.accepted_round + 1}, so its "
                "epsilon is not known; put the file of a backup in its place"
            )
        if reason := self.budget.stop_reason:
            raise SpentBudgetError(reason)
        return self.budget.spend(message.round)

    def batches(self, message: Message) -> Iterator[list[int]]:
        """The rows of every step, each drawn by itself."""
        for step in range(self.steps):
            if self.settings.seed is None:
                drawn = torch.from_numpy(secure_uniforms(self.rows))
            else:
                purpose = ("private batches", self.client, message.round, message.attempt, step)
                generator = generator_for(self.settings.seed, *purpose)
                drawn = torch.rand(self.rows, generator=generator, dtype=torch.float64)
            yield (drawn < self.budget.sample_rate).nonzero().flatten().tolist()

    def mechanism(self, message: Message) -> Mechanism:
        """Clipping and noise of every step."""
        source = Noise(self.settings.seed)

        def noise(shape: Sequence[int], std: float, step: int, name: str) -> Tensor:
            place = f"{self.client}:{message.attempt}:{step}:{name}"
            return source.draw(shape, std, message.round, place)

        return Mechanism(
            clip_norm=self.settings.first_clip_norm,
            noise_multiplier=self.budget.noise_multiplier,
            denominator=self.denominator,
            noise=noise,
        )

    def metrics(self, epsilon: float) -> dict[str, float]:
        """The only metrics that leave the client."""
        return {"epsilon": epsilon, **({} if self.settings.seed is None else {"seeded_noise": 1.0})}


def budget_of_rows(
    settings: PrivacySettings, training: TrainingSettings, rows: int, steps: int, ledger: Ledger
) -> Budget:
    """The privacy budget of a client with so many rows and steps in a round."""
    rate = settings.sample_rate
    if rate is None:  # public counts
        rate = min(1.0, training.batch_size / rows)
    return Budget(
        settings=settings, sample_rate=float(rate), rounds=training.rounds, steps=steps, ledger=ledger
    )


def no_gradients(*_: object) -> Mapping[str, Tensor]:
    """In place of a client's calibration gradient and its sketches, which would leave it without noise."""
    raise RuntimeError("privacy.unit = 'sample': a start may not use a gradient of the client's rows")
