"""A FedSmoothLoRA round, and its local training alone, against a bare PEFT loop over as many batches."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional

from benchmarks.rows import Row, seconds
from fedsmoothlora import client
from fedsmoothlora.config import read
from fedsmoothlora.data.examples import Examples, Subset
from fedsmoothlora.models import load_image_classifier
from fedsmoothlora.planning import Plan, build, plan
from fedsmoothlora.rounds import run_rounds
from fedsmoothlora.watching import Watcher

_CLIENTS, _STEPS, _CALIBRATION = 2, 8, 2
_REPETITIONS = 3


def rows(image_size: int, batch_size: int) -> Iterator[Row]:
    """Rounds of the recipe quickstart with two clients, eight steps each and two calibration batches.

    The first round, which has nothing to match yet, is not counted.
    """
    planned = plan(
        read(
            "quickstart",
            {
                "model.image_size": image_size,
                "training.batch_size": batch_size,
                "partition": {"kind": "iid", "clients": _CLIENTS},
                "training.epochs": None,
                "training.steps": _STEPS,
                "training.rounds": _REPETITIONS + 1,
                "method.calibration_batches": _CALIBRATION,
            },
        )
    )
    simulation = build(planned)
    assert simulation.test is not None
    simulation.test = Subset(simulation.test, np.arange(32))  # evaluations are not measured here
    whole, alone = (
        bare_loop(planned, simulation.clients, batches) for batches in (_STEPS + _CALIBRATION, _STEPS)
    )
    spent = {"training": 0.0, "evaluation": 0.0}
    simulation.evaluate = _timed(simulation.evaluate, spent, "evaluation")  # type: ignore[method-assign]
    found: dict[str, list[float]] = {"round": [], "training": [], "whole": [], "alone": []}
    with patch.object(client, "train", _timed(client.train, spent, "training")):
        rounds = run_rounds(simulation, Watcher())
        next(rounds), next(rounds), whole()
        for _ in range(_REPETITIONS):
            spent |= {"training": 0.0, "evaluation": 0.0}
            found["round"].append(seconds(lambda: next(rounds)) - spent["evaluation"])
            found["training"].append(spent["training"])
            found["whole"].append(seconds(whole))
            found["alone"].append(seconds(alone))
    title = f"ViT-S, {image_size} pixels, batches of {batch_size}"
    times = {name: statistics.median(values) for name, values in found.items()}
    yield Row(
        name=f"{title}: a round against PEFT training of as many batches",
        value=times["round"],
        unit="s",
        against=times["whole"],
        target="at most 1.05",
    )
    batches = _CLIENTS * _STEPS
    yield Row(
        name=f"{title}: local training against a bare PEFT loop",
        value=batches / times["training"],
        unit="batches/s",
        against=batches / times["alone"],
        target="at least 0.97",
    )


def _timed(function: Callable[..., Any], spent: dict[str, float], name: str) -> Callable[..., Any]:
    def call(*arguments: Any, **named: Any) -> Any:
        began = time.process_time()
        try:
            return function(*arguments, **named)
        finally:
            spent[name] += time.process_time() - began

    return call


def bare_loop(
    planned: Plan, clients: Mapping[str, Examples], batches: int, *, mapped: bool = True
) -> Callable[[], None]:
    """Every client's training as one would write it with PEFT alone: the same data, batches and optimiser.

    ``mapped`` leaves the weights where transformers has them, mapped from their file.
    """
    config = planned.config
    loaded = load_image_classifier(config.model, planned.classes, config.seed)
    if not mapped:
        for parameter in loaded.model.parameters():
            parameter.data = parameter.data.clone()
    lora = config.lora
    model = get_peft_model(
        loaded.model,
        LoraConfig(
            r=lora.r,
            lora_alpha=lora.alpha,
            lora_dropout=lora.dropout,
            use_rslora=lora.use_rslora,
            target_modules=list(lora.target_modules),
            modules_to_save=list(loaded.head),
        ),
    )
    size = config.training.batch_size

    def train() -> None:
        model.train()
        for data in clients.values():
            parameters = [p for p in model.parameters() if p.requires_grad]
            optimizer = torch.optim.SGD(parameters, lr=1e-4, momentum=0.9)
            for step in range(batches):
                batch = data.batch([(step * size + k) % len(data) for k in range(size)])
                logits = model(pixel_values=batch["pixel_values"], **loaded.arguments).logits
                functional.cross_entropy(logits, batch["labels"]).backward()
                optimizer.step()
                optimizer.zero_grad()

    return train
