"""A federation's result as files that other tools load."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import torch
from torch import Tensor, nn

from fedsmoothlora.models import load_image_classifier
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

    ``AutoModelForImageClassification.from_pretrained(folder)`` loads it, and
    ``AutoImageProcessor.from_pretrained(folder)`` prepares images as the run did.

    Args:
        simulation: after its last round.
        planned: what it was built from.
        folder: must not exist; it appears whole or not at all.
    """
    config = planned.config
    fresh = load_image_classifier(config.model, planned.classes, config.seed)
    write_merged(simulation, fresh.model)
    size, statistics = config.model.image_size, fresh.statistics
    processor = {
        "image_processor_type": "ViTImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"height": size, "width": size},
        "resample": 3,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(statistics.mean),
        "image_std": list(statistics.std),
    }
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    try:
        fresh.save(temporary)
        (temporary / "preprocessor_config.json").write_text(json.dumps(processor, indent=2) + "\n")
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
