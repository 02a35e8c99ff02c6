"""Data sets that draw at random, as augmentation does, make a round no less repeatable."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from itertools import chain, pairwise
from typing import Any

import numpy as np
import torch

from fedsmoothlora.callbacks import Callback
from fedsmoothlora.data.examples import Batch, Examples
from fedsmoothlora.federation.client_state import ClientState
from fedsmoothlora.federation.serialization import flatten
from fedsmoothlora.federation.simulation import Simulation


def draw() -> tuple[float, float, float]:
    """A number of every global generator."""
    return float(torch.rand(())), float(np.random.rand()), random.random()  # noqa: NPY002


class Drawing:
    """Rows whose values are multiplied by random numbers in every batch."""

    def __init__(self, rows: Examples) -> None:
        self._rows = rows
        self.drawn: list[tuple[float, float, float]] = []

    def __len__(self) -> int:
        return len(self._rows)

    def batch(self, rows: Sequence[int]) -> Batch:
        self.drawn.append(draw())
        batch = self._rows.batch(rows)
        return {**batch, "pixel_values": batch["pixel_values"] * math.prod(self.drawn[-1])}


def test_the_draws_of_a_round_do_not_depend_on_earlier_ones(
    toy_federation: Callable[..., Simulation],
) -> None:
    sketch = {"method.gradient": "sketch", "method.sketch_width": 4, "training.steps": 2}
    simulation = toy_federation({**sketch, "evaluation.diagnostics": True})
    client = next(iter(simulation.clients))
    data = Drawing(simulation.clients[client])
    message = simulation.server.message(client)
    found: list[dict[str, Any]] = []
    for _ in range(2):
        before = draw()
        visit = simulation.learner.visit(client, data, message, ClientState(), Callback())
        found.append(flatten(visit.reply.sent))
        assert not set(draw()) & set(before)
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())
    # Two batches in each of two passes of the sketch, a diagnosis, two steps, and a diagnosis again.
    first, again, start, training, end = (data.drawn[a:b] for a, b in pairwise((0, 2, 4, 5, 7, 8)))
    assert first == again
    assert start == end
    assert not set(chain(*first)) & set(chain(*training))
    assert data.drawn[8:] == data.drawn[:8]
