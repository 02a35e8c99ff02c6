"""The backbone for weights that must not be rewritten: quantised ones, and those in bfloat16."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from peft.utils.integrations import dequantize_bnb_weight, get_bnb_param_type
from torch import Tensor, nn
from torch.nn import functional

from fedsmoothlora.algebra.lowrank import LowRank
from fedsmoothlora.errors import PrecisionError
from fedsmoothlora.methods import Layer, Products
from fedsmoothlora.modeling.backbone import Merging, add_in_place

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


class UnmergedBackbone(Merging):
    """Weights left as they are, with merged sum and shift in a frozen float32 branch beside them.

    A layer computes ``y = W^0 x + s (merged x + shift x)``, each part through its factors,
    ``B (A x)``, or densely where the sum has become dense. Rounding the sum into a bfloat16 weight at every
    rewrite would move it by a share of what a round changes, and a quantised one has no room for it at all;
    a branch is exact. Gradients pass through it to the layer's input. Under autocast it computes as LoRA
    does, so that a start's LoRA and its shift cancel.

    Args:
        modules: the layers' own linear modules (without LoRA), by name: with weights in float32, bfloat16 or
            float16, or bitsandbytes' 4-bit and 8-bit ones.
        layers: their shapes and scales.

    Raises:
        ValueError: a module has another shape than its layer.
        PrecisionError: a module has weights of another kind.
    """

    def __init__(self, modules: Mapping[str, nn.Module], layers: Mapping[str, Layer]) -> None:
        super().__init__(modules, layers)
        self._parts: dict[str, list[LowRank | Tensor]] = {}
        for name, layer in self._layers.items():
            weight = self._modules[name].get_parameter("weight")
            if weight.dtype not in _FLOATS and not get_bnb_param_type(weight):
                raise PrecisionError(
                    f"layer {name}: its weights are {weight.dtype}; float32, bfloat16 and float16 work, and "
                    "so do bitsandbytes' 4-bit and 8-bit weights"
                )
            self._modules[name].register_forward_hook(self._hook(name, layer.scale))

    @torch.no_grad()
    def set_shift(self, shift: Products = MappingProxyType({})) -> None:
        """Let every layer's branch be the merged sum and this shift."""
        for name in self._layers:
            device = self._device(name)
            parts = (self._merged.get(name), shift.get(name))
            self._parts[name] = [
                part.to(device=device, dtype=torch.float32) for part in parts if part is not None
            ]

    @torch.no_grad()
    def weight(self, name: str, shift: LowRank | None = None) -> Tensor:
        """One layer's weight in float32, dequantised."""
        return add_in_place(
            self.pretrained(name).clone(), (self._merged.get(name), shift), self._layers[name].scale
        )

    def pretrained(self, name: str) -> Tensor:
        """One layer's pretrained weight in float32, dequantised anew at each call."""
        return dequantised(self._modules[name])

    def delta(self, name: str, shift: LowRank | None = None) -> Tensor:
        """Raises ``PrecisionError``: weights that are not rewritten are not trained either."""
        raise PrecisionError(
            f"layer {name}: its weights are quantised or of low precision, and are not trained themselves; "
            "take a method that trains LoRA, or load the model in float32"
        )

    def _hook(self, name: str, scale: float) -> Callable[..., Tensor]:
        def add(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
            total, x = output, inputs[0]  # (..., m), (..., n)
            for part in self._parts.get(name, ()):
                if isinstance(part, Tensor):
                    branch = functional.linear(x.to(part.dtype), part)
                else:
                    branch = functional.linear(functional.linear(x.to(part.A.dtype), part.A), part.B)
                total = total + branch * scale
            return total.to(output.dtype)  # the layers that follow expect their own

        return add


@torch.no_grad()
def dequantised(module: nn.Module) -> Tensor:
    """A linear layer's weight as float32 ``(m, n)``; not to be written to, it may be the layer's own."""
    weight = module.get_parameter("weight")
    if not weight.is_floating_point():
        # (m, n) also where it was made of a `Conv1D`.
        return dequantize_bnb_weight(weight, state=getattr(module, "state", None)).float()
    return (weight.data if isinstance(module, nn.Linear) else weight.data.mT).float()


def compute_alike(model: nn.Module) -> None:
    """Let bitsandbytes' layers compute the same in evaluation as in training.

    On a CPU, 4-bit layers may repack their weights for inference: their scales are rounded to bfloat16, for
    good, and no gradient passes any more. 8-bit layers quantise their inputs too. Both would make
    evaluation and calibration see another model than the one in training.

    Raises ``PrecisionError`` for 4-bit weights that bitsandbytes 0.50 computes wrongly on a CPU: with blocks
    that go over the end of a row.
    """
    for name, module in model.named_modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if state is not None and state.absmax.device.type == "cpu" and state.shape[-1] % state.blocksize:
            raise PrecisionError(
                f"layer {name} has 4-bit weights in blocks of {state.blocksize} and {state.shape[-1]} inputs"
                ", no multiple of that: bitsandbytes computes it wrongly on a CPU; leave it unquantised"
            )
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
        if get_bnb_param_type(getattr(module, "weight", None)) == "8bit":
            module.register_forward_pre_hook(_in_training_mode)


def _in_training_mode(module: nn.Module, inputs: tuple[Any, ...]) -> None:
    module.train()
