"""Training and evaluation compared with alternatives that might use a machine better."""

from __future__ import annotations

import io
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from benchmarks.rows import Row, interleaved
from fedsmoothlora.config import read
from fedsmoothlora.data.examples import Batch
from fedsmoothlora.data.images import ImageExamples
from fedsmoothlora.data.media_sources import load_images
from fedsmoothlora.data.settings import DataSettings
from fedsmoothlora.data.texts import Texts
from fedsmoothlora.modeling.image_processors import plain_image_processor
from fedsmoothlora.runs.planning import build, plan

_REPETITIONS = 5


class _Training:
    """Steps of a recipe's first client, in one of several ways."""

    def __init__(self, recipe: str, changes: Mapping[str, Any]) -> None:
        simulation = build(plan(read(recipe, {"training.rounds": 1, **changes})))
        learner = simulation.learner
        self.model, self.objective = learner.model.model, learner.objective
        self.batch = next(iter(simulation.clients.values())).batch(range(learner.training.batch_size))
        self.parameters = list(learner.model.trained_parameters().values())

    def step(
        self,
        optimizer: Optimizer,
        *,
        model: nn.Module | None = None,
        batch: Batch | None = None,
        context: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> Callable[[], None]:
        """One forward and backward pass and a step of the optimiser; optionally of another model or batch."""
        model = self.model if model is None else model  # a compiled model has no truth value
        batch = batch or self.batch

        def call() -> None:
            with context():
                loss = self.objective.loss(model, batch)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        return call


def rows() -> Iterator[Row]:
    """Steps of the recipes quickstart and smollm2-asdiv, an evaluation, and images that are read."""
    yield from _vit()
    yield from _smollm2()
    yield from _evaluation()
    yield from _decoding()


def _bfloat16() -> torch.autocast:
    return torch.autocast("cpu", dtype=torch.bfloat16)


def _vit() -> Iterator[Row]:
    training = _Training("quickstart", {})
    plain = SGD(training.parameters, lr=1e-6, momentum=0.9)
    fused = SGD(training.parameters, lr=1e-6, momentum=0.9, fused=True)
    pixels = training.batch["pixel_values"].contiguous(memory_format=torch.channels_last)
    compiled: Any = torch.compile(training.model)
    began = time.perf_counter()
    training.step(plain, model=compiled)()
    compiling = time.perf_counter() - began
    times = interleaved(
        {
            "": training.step(plain),
            "fused optimiser": training.step(fused),
            "channels last": training.step(plain, batch={**training.batch, "pixel_values": pixels}),
            "bfloat16 autocast": training.step(plain, context=_bfloat16),
            "torch.compile": training.step(plain, model=compiled),
        },
        _REPETITIONS,
    )
    yield from _against("ViT-S, 28 pixels, a step of 32", times)
    yield Row(
        name="ViT-S, 28 pixels: compiling, in steps that it takes as long as",
        value=compiling,
        unit="s",
        against=times[""],
    )


def _smollm2() -> Iterator[Row]:
    training = _Training("smollm2-asdiv", {"data.test_rows": 8, "task.metric_rows": 8})
    plain = AdamW(training.parameters, lr=1e-6)
    fused = AdamW(training.parameters, lr=1e-6, fused=True)
    times = interleaved(
        {
            "": training.step(plain, context=_bfloat16),
            "fused optimiser": training.step(fused, context=_bfloat16),
            "float32": training.step(plain),
        },
        3,
    )
    yield from _against("SmolLM2, bfloat16, a step of 8", times)


def _evaluation() -> Iterator[Row]:
    simulation = build(plan(read("quickstart", {"data.test_rows": 250})))
    learner, test = simulation.learner, simulation.test
    assert test is not None
    batch = test.batch(range(len(test)))
    model = learner.model.model.eval()

    def forward(context: Callable[[], AbstractContextManager[Any]], size: int) -> Callable[[], None]:
        def call() -> None:
            with context(), learner.model.without_lora():
                for first in range(0, len(test), size):
                    learner.objective.loss(model, {k: v[first : first + size] for k, v in batch.items()})

        return call

    times = interleaved(
        {
            "": forward(torch.inference_mode, 250),
            "without gradients": forward(torch.no_grad, 250),
            "with gradients": forward(nullcontext, 250),
            "batches of 32": forward(torch.inference_mode, 32),
        },
        _REPETITIONS,
    )
    yield from _against("ViT-S, 28 pixels, 250 rows evaluated at once in inference mode", times)


def _decoding() -> Iterator[Row]:
    random = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        for label in ("a", "b"):
            (Path(folder) / label).mkdir()
            for k in range(32):
                content = io.BytesIO()
                coarse = Image.fromarray(random.integers(0, 256, (30, 40, 3), dtype=np.uint8))
                coarse.resize((400, 300), Image.Resampling.BICUBIC).save(content, "JPEG")
                (Path(folder) / label / f"{k}.jpg").write_bytes(content.getvalue())
        images = load_images(DataSettings(source=folder), seed=0).train
        assert not isinstance(images, Texts)
        processor = plain_image_processor(28)
        kept = ImageExamples(images, processor)
        read_anew = ImageExamples(images, processor, memory=0)
        times = interleaved(
            {"": _batch(kept, range(32)), "decoded for every batch": _batch(read_anew, range(32))},
            _REPETITIONS,
        )
    yield from _against("32 JPEGs of 400 x 300, decoded once and kept at 28 pixels", times)


def _batch(examples: ImageExamples, rows: Sequence[int]) -> Callable[[], Batch]:
    return lambda: examples.batch(rows)


def _against(what: str, times: Mapping[str, float]) -> Iterator[Row]:
    """Every alternative compared with the first, the package's own."""
    for way, seconds in times.items():
        if way:
            yield Row(name=f"{what}: {way}", value=seconds, unit="s", against=times[""])
