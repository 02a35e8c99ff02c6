"""A client, its rows, its state and the server's message in one round."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from fedsmoothlora.algebra.seeds import generator_for, seed_for
from fedsmoothlora.callbacks import Callback
from fedsmoothlora.data.examples import Batch, BatchOrder, Examples
from fedsmoothlora.federation.client_state import ClientState
from fedsmoothlora.federation.messages import Message


@dataclass(frozen=True, kw_only=True)
class ClientRound:
    """One client in one round, before its work.

    Attributes:
        client: the client's id.
        data: the client's training rows.
        message: the server's message.
        state: the client's state after that message.
        callback: notified of the client's steps and notes.
        run_seed: the run's seed, from which the client's draws of this round are derived.
    """

    client: str
    data: Examples
    message: Message
    state: ClientState
    callback: Callback
    run_seed: int

    def note(self, text: str) -> None:
        """Report a note on this client."""
        self.callback.on_note(f"client {self.client}: {text}")

    def batches(self, count: int, purpose: str, batch_size: int) -> Iterator[Batch]:
        """Batches of the client's rows; the order is drawn anew for each round and purpose."""
        generator = torch.Generator().manual_seed(self.seed(purpose))
        for rows in BatchOrder(len(self.data), batch_size, generator).take(count):
            yield self.data.batch(rows)

    def seed(self, purpose: str) -> int:
        """The seed of the client's draws for a purpose."""
        message = self.message
        return seed_for(self.run_seed, purpose, message.round, message.attempt, self.client)

    def generator(self, layer: str) -> torch.Generator:
        """A generator for the random rows of a layer's LoRA."""
        message = self.message
        return generator_for(self.run_seed, "lora rows", message.round, message.attempt, self.client, layer)
