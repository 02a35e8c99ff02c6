"""A FedSmoothLoRA round, and its local training alone, compared with a PEFT loop over as many batches."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from torch.optim import SGD, AdamW, Optimizer

from benchmarks.rows import Row, seconds, timed
from fedsmoothlora.callbacks import Callback
from fedsmoothlora.config import read
from fedsmoothlora.data.examples import Batch, Examples, Subset
from fedsmoothlora.federation import client
from fedsmoothlora.federation.rounds import run_rounds
from fedsmoothlora.runs.planning import Plan, build, plan
from fedsmoothlora.training.loop import autocast

_REPETITIONS = 3
_TWO_CLIENTS = {"partition": {"kind": "iid", "clients": 2}, "training.epochs": None}

_NO_METRIC = {
    "task.metric": None,
    "task.metric_rows": None,
    "task.metric_every": None,
    "task.max_new_tokens": None,
}

# By benchmark and title: a recipe and its changes. Rounds as in the recipe, and shorter ones.
_ROUNDS: dict[str, dict[str, tuple[str, dict[str, Any]]]] = {
    "rounds": {
        "ViT-S, 28 pixels, 25 steps of 32": ("quickstart", {"training.steps": 25}),
        "ViT-S, 28 pixels, 8 steps of 32": ("quickstart", {"training.steps": 8}),
        "ViT-S, 56 pixels, 8 steps of 32": ("quickstart", {"training.steps": 8, "model.image_size": 56}),
    },
    "rounds-text": {
        "SmolLM2-135M, every linear, one client, 16 steps of 8, bfloat16": (
            "smollm2-asdiv",
            {**_NO_METRIC, "training.steps": 16, "partition": {"kind": "iid", "clients": 1}},
        ),
        "SmolLM2-135M, every linear, 4 steps of 8, bfloat16": (
            "smollm2-asdiv",
            {**_NO_METRIC, "training.steps": 4},
        ),
    },
}


def rows(benchmark: str) -> Iterator[Row]:
    """Rounds of recipes after the first; clients match from the second round on."""
    for title, (recipe, changes) in _ROUNDS[benchmark].items():
        yield from _rows_of(title, recipe, changes)


def _rows_of(title: str, recipe: str, changes: dict[str, Any]) -> Iterator[Row]:
    planned = plan(read(recipe, {**_TWO_CLIENTS, **changes, "training.rounds": _REPETITIONS + 1}))
    simulation = build(planned)
    assert simulation.test is not None
    simulation.test = Subset(simulation.test, np.arange(8))  # evaluations are not measured here
    steps, calibration = planned.config.training.steps, planned.config.method.calibration_batches
    assert steps is not None
    heard = {name: _Heard(rows) for name, rows in simulation.clients.items()}
    simulation.clients = heard
    train = bare_loop(planned)

    def bare(first: int) -> Callable[[], None]:
        """The batches of the round again, without those used for calibration."""
        return lambda: train([rows.batches[first:] for rows in heard.values()])

    spent = {"training": 0.0, "evaluation": 0.0}
    simulation.evaluate = timed(simulation.evaluate, spent, "evaluation")  # type: ignore[method-assign]
    found: dict[str, list[float]] = {"round": [], "training": [], "whole": [], "alone": []}
    with patch.object(client, "train", timed(client.train, spent, "training")):
        rounds = run_rounds(simulation, Callback())
        next(rounds), next(rounds), bare(0)()
        for _ in range(_REPETITIONS):
            spent |= {"training": 0.0, "evaluation": 0.0}
            for rows in heard.values():
                rows.batches.clear()
            found["round"].append(seconds(lambda: next(rounds)) - spent["evaluation"])
            assert all(len(rows.batches) == calibration + steps for rows in heard.values())
            found["training"].append(spent["training"])
            found["whole"].append(seconds(bare(0)))
            found["alone"].append(seconds(bare(calibration)))
    times = {name: statistics.median(values) for name, values in found.items()}
    yield Row(
        name=f"{title}: a round against PEFT training of as many batches",
        value=times["round"],
        unit="s",
        against=times["whole"],
        target="at most 1.05",
    )
    batches = len(simulation.clients) * steps
    yield Row(
        name=f"{title}: local training against a bare PEFT loop",
        value=batches / times["training"],
        unit="batches/s",
        against=batches / times["alone"],
        target="at least 0.97",
    )


class _Heard:
    """A client's rows, with a record of the batches that were taken."""

    def __init__(self, rows: Examples) -> None:
        self.batches: list[Batch] = []
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def batch(self, rows: Sequence[int]) -> Batch:
        self.batches.append(self._rows.batch(rows))
        return self.batches[-1]


def bare_loop(planned: Plan, *, mapped: bool = True) -> Callable[[Iterable[Iterable[Batch]]], None]:
    """Plain training with PEFT on the batches of every client in turn.

    The optimiser is the recipe's. The loss is the package's, which asks a language model for the logits of
    answers alone. ``mapped`` leaves the weights where transformers has them, mapped from their file.
    """
    config = planned.config
    loaded = planned.task_data.load()
    if not mapped:
        for parameter in loaded.model.parameters():
            parameter.data = parameter.data.clone()
    lora = config.lora
    targets = list(lora.target_modules)
    whole = list(loaded.head) if planned.head_is_trained_whole else None
    peft = get_peft_model(
        loaded.model,
        LoraConfig(
            r=lora.r,
            lora_alpha=lora.alpha,
            lora_dropout=lora.dropout,
            use_rslora=lora.use_rslora,
            target_modules="all-linear" if targets == ["all-linear"] else targets,
            modules_to_save=whole,
            task_type=None if whole else "CAUSAL_LM",  # PEFT's all-linear then leaves the logits out
        ),
    )
    model, task, settings = peft.get_base_model(), planned.task_data.objective(loaded), config.training

    def train(clients: Iterable[Iterable[Batch]]) -> None:
        model.train()
        for batches in clients:
            parameters = [p for p in model.parameters() if p.requires_grad]
            optimizer: Optimizer = (
                AdamW(parameters, lr=1e-4)
                if settings.optimizer == "adamw"
                else SGD(parameters, lr=1e-4, momentum=0.9)
            )
            for batch in batches:
                with autocast(settings, torch.device("cpu")):
                    loss = task.loss(model, batch)
                loss.backward()
                if settings.max_grad_norm is not None:
                    torch.nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad()

    return train
