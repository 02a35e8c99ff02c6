"""The backbone for weights that must not be rewritten: quantised weights, and weights in bfloat16."""

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
    """Unchanged pretrained weights, with merged sum and shift in a frozen float32 branch beside them.

    A layer computes ``y = W^0 x + s (merged x + shift x)``. Each part is applied through its factors,
    ``B (A x)``, or as a matrix once the sum is dense. The branch is exact. Adding the sum to a bfloat16
    weight would round away a part of every round's update, and a quantised weight cannot hold it at all.
    Gradients pass through the branch to the layer's input. Under autocast the branch computes as LoRA does,
    so that a start's LoRA and its shift cancel.

    Args:
        modules: the layers' own linear modules (without LoRA), by name. Weights are float32, bfloat16 or
            float16, or bitsandbytes' 4-bit or 8-bit weights.
        layers: their shapes and scales.

    Raises:
        ValueError: the shape of a module differs from that of its layer.
        PrecisionError: a module has weights of another type.
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
        """Set every layer's branch to the merged sum and this shift."""
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
        """One layer's pretrained weight in float32, dequantised at each call."""
        return dequantised(self._modules[name])

    def delta(self, name: str, shift: LowRank | None = None) -> Tensor:
        """Raise ``PrecisionError``, because weights that are not rewritten are not trained either."""
        raise PrecisionError(
            f"layer {name}: its weights are quantised or of low precision, so they cannot be trained; "
            "use a method that trains LoRA, or load the model in float32"
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
            return total.to(output.dtype)  # the next layers expect the layer's own dtype

        return add


@torch.no_grad()
def dequantised(module: nn.Module) -> Tensor:
    """A linear layer's weight as float32 ``(m, n)``; not to be written to, as it may be the layer's own."""
    weight = module.get_parameter("weight")
    if not weight.is_floating_point():
        # The shape is (m, n), even if the layer replaces a `Conv1D`.
        return dequantize_bnb_weight(weight, state=getattr(module, "state", None)).float()
    return (weight.data if isinstance(module, nn.Linear) else weight.data.mT).float()


def compute_alike(model: nn.Module) -> None:
    """Make bitsandbytes' layers compute the same in evaluation as in training.

    In evaluation mode on a CPU, 4-bit layers may repack their weights for inference, which rounds their
    scales to bfloat16 permanently and lets no gradient pass. 8-bit layers also quantise their inputs. In both
    cases evaluation and calibration would use another model than training.

    Raises ``PrecisionError`` for 4-bit weights whose blocks extend over the end of a row, because
    bitsandbytes 0.50 computes them wrongly on a CPU.
    """
    for name, module in model.named_modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if state is not None and state.absmax.device.type == "cpu" and state.shape[-1] % state.blocksize:
            raise PrecisionError(
                f"layer {name} has 4-bit weights in blocks of {state.blocksize}, but {state.shape[-1]} inputs"
                ", which is no multiple: bitsandbytes computes it wrongly on a CPU; leave it unquantised"
            )
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
        if get_bnb_param_type(getattr(module, "weight", None)) == "8bit":
            module.register_forward_pre_hook(_in_training_mode)


def _in_training_mode(module: nn.Module, inputs: tuple[Any, ...]) -> None:
    module.train()
