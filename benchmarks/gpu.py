"""`python -m benchmarks.gpu`: a round on a GPU compared with a bare PEFT loop, in under 10 minutes.

It measures a round's time, its peak memory, tokens (for images: patches) per second, and the share of the
GPU's peak performance. Models are made from their configurations with random weights, and so are the data, so
nothing is downloaded. Each result is printed as one line of JSON.

``--dry-run`` runs the same code with tiny models on the CPU, to find faults before a GPU is at hand; its
numbers mean nothing.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from torch.optim import AdamW

from benchmarks.rows import Row
from fedsmoothlora.callbacks import Callback
from fedsmoothlora.config import from_table
from fedsmoothlora.data.examples import Batch, BatchOrder, Examples
from fedsmoothlora.data.tokens import Completions
from fedsmoothlora.federation.assembly import Participants, assemble
from fedsmoothlora.federation.rounds import run_rounds
from fedsmoothlora.federation.simulation import Simulation
from fedsmoothlora.modeling.adapters import AdaptedModel, on_device
from fedsmoothlora.runs.federation import FederationSettings
from fedsmoothlora.tasks.objectives import CausalLanguageModel, Classification, Objective
from fedsmoothlora.training.devices import accelerator_for
from fedsmoothlora.training.loop import autocast, to_device

_CLIENTS = 3
_ROUNDS = 3  # the first is not measured: kernels are chosen and memory is reserved
# Dense bfloat16 operations per second, by a part of the GPU's name, from the vendor's data sheets.
_PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12}


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model with random weights and random rows.

    Attributes:
        title: its name.
        model: makes the model.
        rows: makes one client's rows.
        objective: its loss.
        tokens: tokens of a row that the model computes.
        r: LoRA's rank on every linear layer but a language model's logits.
        steps: optimiser steps of a client in a round.
        batch_size: rows of a step.
    """

    title: str
    model: Callable[[], nn.Module]
    rows: Callable[[], Examples]
    objective: Objective
    tokens: int
    r: int
    steps: int
    batch_size: int


@dataclass(frozen=True)
class Images:
    """Normalised pixels with classes."""

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, rows: Sequence[int]) -> Batch:
        """``pixel_values`` and ``labels`` of the rows."""
        chosen = torch.as_tensor(rows)
        return {"pixel_values": self.pixels[chosen], "labels": self.labels[chosen]}


def cases(*, dry_run: bool) -> Iterator[Case]:
    """ViT-S, SmolLM2-135M and Llama-3.2-1B; models of two small layers in a dry run."""
    steps, images, texts = (2, 4, 2) if dry_run else (20, 32, 8)
    yield Case(
        title="ViT-S, 224 pixels" if not dry_run else "tiny ViT",
        model=lambda: _vit(384, 12, 6, 224, 16) if not dry_run else _vit(16, 2, 2, 16, 8),
        rows=lambda: _images(steps * images, 16 if dry_run else 224),
        objective=Classification(),
        tokens=197 if not dry_run else 5,
        r=2 if dry_run else 8,
        steps=steps,
        batch_size=images,
    )
    sizes = {
        "SmolLM2-135M": (49152, 576, 1536, 30, 9, 3, 16),
        "Llama-3.2-1B": (128256, 2048, 8192, 16, 32, 8, 32),
    }
    tokens = 512
    if dry_run:
        sizes, tokens = {"tiny Llama": (64, 16, 32, 2, 4, 2, 2)}, 16
    for title, (*shape, r) in sizes.items():
        yield Case(
            title=f"{title}, {texts} x {tokens} tokens",
            model=lambda shape=tuple(shape): _llama(*shape),  # type: ignore[misc]
            rows=lambda vocabulary=shape[0]: _texts(steps * texts, tokens, vocabulary),  # type: ignore[misc]
            objective=CausalLanguageModel(),
            tokens=tokens,
            r=r,
            steps=steps,
            batch_size=texts,
        )


def _vit(width: int, layers: int, heads: int, size: int, patch: int) -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(
        ViTConfig(
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            image_size=size,
            patch_size=patch,
            num_labels=10,
        )
    )


def _llama(vocabulary: int, width: int, inner: int, layers: int, heads: int, key_heads: int) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=width,
            intermediate_size=inner,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=key_heads,
            max_position_embeddings=2048,
            tie_word_embeddings=True,
        )
    )


def _images(rows: int, size: int) -> Images:
    draw = torch.Generator().manual_seed(0)
    pixels = torch.randn(rows, 3, size, size, generator=draw)
    return Images(pixels, torch.randint(10, (rows,), generator=draw))


def _texts(rows: int, tokens: int, vocabulary: int) -> Completions:
    """Rows of equal length; the first half of each is the prompt."""
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(1, vocabulary, (rows, tokens), generator=draw).tolist()
    half = tokens // 2
    return Completions([row[:half] for row in ids], [row[half:] for row in ids], pad=0)


def settings_of(case: Case, device: str) -> FederationSettings:
    """FedSmoothLoRA with its defaults, in bfloat16 with float32 weights."""
    table = {
        "model": "random",
        "clients": {str(client): case.steps * case.batch_size for client in range(_CLIENTS)},
        "lora": {"r": case.r, "alpha": 2 * case.r, "target_modules": ["all-linear"]},
        "method": {"name": "fedsmoothlora"},
        "training": {
            "rounds": _ROUNDS,
            "steps": case.steps,
            "batch_size": case.batch_size,
            "optimizer": "adamw",
            "lr": 1e-4,
            "max_grad_norm": 1.0,
            "precision": "bf16",
        },
        "evaluation": {"batch_size": case.batch_size},
        "machine": {"device": device},
    }
    return from_table(FederationSettings, table, "benchmark")


def rows(case: Case, device: str) -> Iterator[Row]:
    """The measured values of a case, each beside the bare loop's on the same device."""
    settings = settings_of(case, device)
    calibration = settings.method.calibration.batches
    bare, bare_peak = _measured(_bare_rounds(case, settings), device)
    ours, our_peak = _measured(_our_rounds(case, settings), device)
    # The bare loop trains on as many batches as a round reads, with those for calibration.
    batches = _CLIENTS * (case.steps + calibration)
    yield Row(
        name=f"{case.title}: a round against PEFT training of as many batches",
        value=ours,
        unit="s",
        against=bare,
        target="at most 1.05",
    )
    tokens = batches * case.batch_size * case.tokens
    yield Row(
        name=f"{case.title}: tokens per second", value=tokens / ours, unit="tokens/s", against=tokens / bare
    )
    if torch.device(device).type != "cuda":
        return
    yield Row(
        name=f"{case.title}: peak memory of the GPU",
        value=our_peak / 1e9,
        unit="GB",
        against=bare_peak / 1e9,
        target="at most 1.10",
    )
    name = torch.cuda.get_device_name()
    peak = next((value for part, value in _PEAKS.items() if part in name), None)
    if peak is None:
        print(f"{name}: its peak performance is not in this script, so shares are left out", file=sys.stderr)
        return
    # Two operations a weight forwards and two for the gradient of the layer's input: weights are frozen.
    operations = 4 * _weights_computed(case) * tokens
    yield Row(
        name=f"{case.title}: share of {peak / 1e12:.0f} bfloat16 TFLOP/s",
        value=operations / ours / peak,
        unit="of peak",
        against=operations / bare / peak,
    )


def _weights_computed(case: Case) -> int:
    """Weights of the layers that every token passes; the logits, which answers alone pass, are left out."""
    with torch.device("meta"):
        model: Any = case.model()
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    logits = getattr(model, "get_output_embeddings", lambda: None)()
    return sum(module.weight.numel() for module in linear.values() if module is not logits)


def _measured(rounds: Iterator[None], device: str) -> tuple[float, int]:
    """Median seconds of the rounds after the first, and the peak bytes of the GPU in all of them."""
    on_gpu = torch.device(device).type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(_ROUNDS):
        began = time.perf_counter()
        next(rounds)
        if on_gpu:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    peak = torch.cuda.max_memory_allocated() if on_gpu else 0
    rounds.close()  # type: ignore[attr-defined]
    gc.collect()
    if on_gpu:
        torch.cuda.empty_cache()
    return sorted(times[1:])[(_ROUNDS - 1) // 2], peak


def _our_rounds(case: Case, settings: FederationSettings) -> Iterator[None]:
    simulation = simulation_of(case, settings)
    records = run_rounds(simulation, Callback())
    next(records)  # the evaluation before the first round
    for _ in records:
        yield


def simulation_of(case: Case, settings: FederationSettings) -> Simulation:
    """The federation of a case before its first round; one row is evaluated."""
    accelerator = accelerator_for(settings.machine.device)
    torch.manual_seed(0)
    adapted = AdaptedModel(
        on_device(case.model(), accelerator.device),
        settings.lora,
        head=(),
        head_is_trained_whole=False,
        keep_weights=settings.machine.keep_weights,
    )
    data = case.rows()
    return assemble(
        settings,
        adapted,
        case.objective,
        Participants(clients=dict.fromkeys(settings.clients, data), test=_First(data)),
        accelerator=accelerator,
    )


@dataclass(frozen=True)
class _First:
    """The first row of other examples."""

    rows: Examples

    def __len__(self) -> int:
        return 1

    def batch(self, rows: Sequence[int]) -> Batch:
        return self.rows.batch(rows)


def _bare_rounds(case: Case, settings: FederationSettings) -> Iterator[None]:
    """Rounds of plain PEFT training on as many batches, with nothing else."""
    accelerator = accelerator_for(settings.machine.device)
    device = accelerator.device
    torch.manual_seed(0)
    lora = LoraConfig(r=settings.lora.r, lora_alpha=int(settings.lora.alpha), target_modules="all-linear")
    model = inject_adapter_in_model(lora, on_device(case.model(), device))
    data, training = case.rows(), settings.training
    batches = case.steps + settings.method.calibration.batches
    model.train()
    while True:
        for client in range(_CLIENTS):
            parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
            optimizer = AdamW(parameters, lr=training.lr, fused=True if device.type == "cuda" else None)
            order = BatchOrder(len(data), case.batch_size, torch.Generator().manual_seed(client))
            for chosen in order.take(batches):
                with autocast(training, device):
                    loss = case.objective.loss(model, to_device(data.batch(chosen), accelerator))
                loss.backward()
                torch.nn.utils.clip_grad_norm_(parameters, 1.0)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
        yield


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure all cases."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--dry-run", action="store_true", help="tiny models on the CPU")
    dry_run = parser.parse_args(arguments).dry_run
    if not dry_run and not torch.cuda.is_available():
        parser.error("torch finds no GPU; --dry-run tries the script on the CPU")
    device = "cpu" if dry_run else "cuda"
    for case in cases(dry_run=dry_run):
        for row in rows(case, device):
            print(row.json(), flush=True)


if __name__ == "__main__":
    main()
