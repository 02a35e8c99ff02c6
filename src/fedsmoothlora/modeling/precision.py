"""How a pretrained model's weights are held: in float32, in bfloat16, or quantised by bitsandbytes."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.quantizers_utils import should_convert_module

from fedsmoothlora.errors import PrecisionError
from fedsmoothlora.modeling.backbone import shape_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from fedsmoothlora.modeling.settings import ModelSettings

BLOCK = 64  # weights that share a scale in NF4
_FLOAT = 4
_READABLE = {"nf4": "4-bit (NF4)", "int8": "8-bit (int8)"}


def check(settings: ModelSettings, config: Any) -> None:
    """Refuse a model that cannot be loaded in the wanted precision, before loading it.

    Args:
        settings: ``[model]``.
        config: the model's configuration.

    Raises:
        PrecisionError: bitsandbytes is needed but not installed, or the checkpoint itself is quantised.
    """
    if settings.quantization is not None and find_spec("bitsandbytes") is None:
        raise PrecisionError(
            f"model.quantization = {settings.quantization!r} needs bitsandbytes: "
            "pip install 'fedsmoothlora[quantized]'"
        )
    if getattr(config, "quantization_config", None) is not None:
        raise PrecisionError(
            f"model.source = {settings.source!r} has weights that are already quantised, but a run exports "
            "LoRA for the unquantised model: set model.source to that model, and set model.quantization"
        )


def loading(settings: ModelSettings, left_out: Sequence[str]) -> dict[str, Any]:
    """The arguments of ``from_pretrained`` that concern precision.

    Weights are always quantised on the CPU, so that they are the same on every device.

    Args:
        settings: ``[model]``.
        left_out: names of the modules that are not quantised.
    """
    found: dict[str, Any] = {"dtype": dtype_of(settings)}
    if settings.quantization is None:
        return found
    from transformers import BitsAndBytesConfig

    how: dict[str, Any] = {"load_in_8bit": True}
    if settings.quantization == "nf4":
        how = {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_compute_dtype": found["dtype"],
        }
    quantised = BitsAndBytesConfig(**how, llm_int8_skip_modules=list(left_out))
    return {**found, "quantization_config": quantised, "device_map": {"": "cpu"}}


def left_out(model: nn.Module, settings: ModelSettings, head: Sequence[str]) -> list[str]:
    """Names of the modules that are not quantised.

    These are the head's modules and, for NF4, linear layers whose number of inputs is not a multiple of
    `BLOCK`, the number of weights that share a scale: bitsandbytes 0.50 computes these wrongly on a CPU.

    Args:
        model: the unquantised model; it may be on the meta device.
        settings: ``[model]``.
        head: names of the head's modules.

    Raises ``PrecisionError`` if no linear layer remains.
    """
    if settings.quantization is None:
        return []
    found = list(head)
    if settings.quantization == "nf4":
        found += [name for name, module in _linear(model, head) if shape_of(module)[1] % BLOCK]
    if not any(True for _ in _linear(model, found)):
        raise PrecisionError(
            f"model.quantization = {settings.quantization!r}: {settings.source!r} has no layer to quantise; "
            f"4 bits need a multiple of {BLOCK} inputs, and the head is never quantised"
        )
    return found


def _linear(model: nn.Module, left_out: Sequence[str]) -> Iterator[tuple[str, nn.Module]]:
    """The layers that transformers would quantise, with their names."""
    for name, module in model.named_modules():
        if type(module) in (nn.Linear, Conv1D) and should_convert_module(name, list(left_out)):
            yield name, module


def dtype_of(settings: ModelSettings) -> torch.dtype:
    """The dtype of the layers' computations and of weights that are not quantised."""
    return torch.bfloat16 if settings.dtype == "bfloat16" else torch.float32


def described(settings: ModelSettings) -> str | None:
    """The precision of the weights in words, such as "4-bit (NF4)"; None for float32."""
    words = [_READABLE[settings.quantization]] if settings.quantization else []
    words += ["bfloat16"] if settings.dtype == "bfloat16" else []
    return ", the rest ".join(words) or None


def stored_bytes(model: nn.Module, settings: ModelSettings, head: Sequence[str]) -> int:
    """The size of a model's weights in bytes, in the precision of ``settings``.

    Args:
        model: the unquantised model in its dtype; it may be on the meta device.
        settings: ``[model]``.
        head: names of the head's modules.
    """
    total = sum(parameter.nbytes for parameter in model.parameters())
    if settings.quantization is None:
        return total
    for _, module in _linear(model, left_out(model, settings, head)):
        weight, (m, n) = module.get_parameter("weight"), shape_of(module)
        scales = m * n // BLOCK if settings.quantization == "nf4" else m
        total += m * n // (2 if settings.quantization == "nf4" else 1) + scales * _FLOAT - weight.nbytes
    return total
