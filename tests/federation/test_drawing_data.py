"""Data sets that draw at random, as augmentation does, make a round no less repeatable."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from fedsmoothlora.callbacks import Callback
from fedsmoothlora.data.examples import Batch, Examples
from fedsmoothlora.federation.client_state import ClientState
from fedsmoothlora.federation.serialization import flatten
from fedsmoothlora.federation.simulation import Simulation

SOURCES: dict[str, Callable[[], float]] = {
    "torch": lambda: float(torch.rand(())),
    "numpy": lambda: float(np.random.rand()),  # noqa: NPY002
    "python": random.random,
}


class Drawing:
    """Rows whose values are multiplied by a random number in every batch."""

    def __init__(self, rows: Examples, draw: Callable[[], float]) -> None:
        self._rows, self._draw = rows, draw
        self.drawn: list[float] = []

    def __len__(self) -> int:
        return len(self._rows)

    def batch(self, rows: Sequence[int]) -> Batch:
        self.drawn.append(self._draw())
        batch = self._rows.batch(rows)
        return {**batch, "pixel_values": batch["pixel_values"] * self.drawn[-1]}


@pytest.mark.parametrize("source", SOURCES)
def test_the_draws_of_a_round_do_not_depend_on_earlier_ones(
    toy_federation: Callable[..., Simulation], source: str
) -> None:
    sketch = {"method.gradient": "sketch", "method.sketch_width": 4, "training.steps": 2}
    simulation = toy_federation(sketch)
    client = next(iter(simulation.clients))
    data = Drawing(simulation.clients[client], SOURCES[source])
    message = simulation.server.message(client)
    found: list[dict[str, Any]] = []
    for _ in range(2):
        before = SOURCES[source]()
        visit = simulation.learner.visit(client, data, message, ClientState(), Callback())
        found.append(flatten(visit.reply.sent))
        assert SOURCES[source]() != before
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())
    # Two batches in each of two passes of the sketch, and two steps.
    first, again, training = data.drawn[0:2], data.drawn[2:4], data.drawn[4:6]
    assert first == again
    assert first != training
    assert data.drawn[6:] == data.drawn[:6]
