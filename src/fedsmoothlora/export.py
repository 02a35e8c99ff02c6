"""A federation's result as files that other tools load."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch
from torch import Tensor, nn

from fedsmoothlora.planning import Plan
from fedsmoothlora.rounds import Simulation


@torch.no_grad()
def write_merged(simulation: Simulation, model: nn.Module) -> None:
    """Write the global weights and head into another copy of the pretrained model; the one in use stays."""
    backbone, server = simulation.learner.model.backbone, simulation.server
    for name, module in simulation.learner.model.modules.items():
        weight = model.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        merged = backbone.weight(name, server.model.get(name))  # (m, n)
        weight.copy_(merged if isinstance(module, nn.Linear) else merged.mT)
    for name, value in server.head.items():
        model.get_parameter(name).copy_(value)


def save_merged(simulation: Simulation, planned: Plan, folder: Path) -> None:
    """Write the global model as a plain transformers folder: every update merged, no adapter.

    The task's ``AutoModelFor...`` loads it, and ``AutoImageProcessor`` or ``AutoTokenizer`` prepares inputs
    as the run did.

    Args:
        simulation: after its last round.
        planned: what it was built from.
        folder: must not exist; it appears whole or not at all.
    """
    fresh = planned.kind.load()
    write_merged(simulation, fresh.model)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    try:
        planned.kind.save(fresh, temporary)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
