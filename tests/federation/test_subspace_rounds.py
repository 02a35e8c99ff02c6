"""Whole federations in a shared subspace: both exchanges, bytes, feedback, lost clients, resumption."""

from collections.abc import Callable
from typing import Any

import torch

from fedsmoothlora.algebra.lowrank import LowRank
from fedsmoothlora.callbacks import Callback
from fedsmoothlora.federation.rounds import run_rounds
from fedsmoothlora.federation.simulation import Simulation

Federation = Callable[..., Simulation]
SUBSPACE: dict[str, Any] = {"method.exchange": "subspace", "method.zeta": 0.0}


def test_runs(toy_federation: Federation) -> None:
    simulation = toy_federation(SUBSPACE)
    for record in run_rounds(simulation, Callback()):
        print({m.name: m.value for m in record.metrics if m.client is None})
