"""The calibration gradient and its subspaces compared with LoRA's forward and backward passes."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.rows import Row, interleaved
from fedsmoothlora.algebra.alignment import gradient_aligned
from fedsmoothlora.modeling.adapters import AdaptedModel
from fedsmoothlora.modeling.loading import load_image_classifier
from fedsmoothlora.modeling.settings import LoraSettings, ModelSettings
from fedsmoothlora.training.calibration import calibration_gradients

_BATCHES = 4
_REPETITIONS = 3
Loss = Callable[[Tensor], Tensor]


def vit() -> tuple[nn.Module, list[Tensor], Loss]:
    """The packaged ViT-S with batches of 16 images of 112 pixels (65 tokens each)."""
    loaded = load_image_classifier(
        ModelSettings(source="pkg:dinov2-small", image_size=112), [str(k) for k in range(10)], seed=0
    )
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(16, 3, 112, 112, generator=generator) for _ in range(_BATCHES)]
    labels = torch.arange(16) % 10
    model = loaded.model

    def loss(pixels: Tensor) -> Tensor:
        return functional.cross_entropy(model(pixels, **loaded.arguments).logits, labels)

    return model, batches, loss


MODELS: dict[str, tuple[str, Callable[[], tuple[nn.Module, list[Tensor], Loss]], dict[str, tuple[str, ...]]]]
MODELS = {
    "vit": (
        "ViT-S",
        vit,
        {
            "attention": ("q_proj", "k_proj", "v_proj"),
            "every linear": ("q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"),
        },
    ),
}
_TARGETS = {"attention": "at most 1.10", "every linear": "at most 1.25"}


def rows(which: str) -> Iterator[Row]:
    """Gradients of four batches and the GA factors of every layer, at rank 8, by choice of layers."""
    title, make, targets = MODELS[which]
    for kind, names in targets.items():
        model, batches, loss = make()
        adapted = AdaptedModel(model, LoraSettings(r=8, target_modules=names))

        def calibrate(
            adapted: AdaptedModel = adapted, batches: list[Tensor] = batches, loss: Loss = loss
        ) -> None:
            with adapted.without_lora():
                found = calibration_gradients(adapted.model, adapted.modules, batches, loss)
            for gradient in found.values():
                gradient_aligned(gradient, 8, 256.0)

        def lora(adapted: AdaptedModel = adapted, batches: list[Tensor] = batches, loss: Loss = loss) -> None:
            adapted.train_only(("B", "A"))
            adapted.model.train()
            for batch in batches:
                loss(batch).backward()
                adapted.model.zero_grad(set_to_none=True)

        times = interleaved({"calibrate": calibrate, "lora": lora}, _REPETITIONS)
        yield Row(
            name=f"{title}, {kind}: calibration and subspaces against LoRA forward and backward",
            value=times["calibrate"],
            unit="s",
            against=times["lora"],
            target=_TARGETS[kind],
        )
