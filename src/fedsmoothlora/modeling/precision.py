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
    """Refuse what cannot be loaded, before it is tried.

    Args:
        settings: ``[model]``.
        config: the model's configuration.

    Raises ``PrecisionError``: bitsandbytes is wanted and missing, or the checkpoint is quantised itself.
    """
    if settings.quantization is not None and find_spec("bitsandbytes") is None:
        raise PrecisionError(
            f"model.quantization = {settings.quantization!r} needs bitsandbytes: "
            "pip install 'fedsmoothlora[quantized]'"
        )
    if getattr(config, "quantization_config", None) is not None:
        raise PrecisionError(
            f"model.source = {settings.source!r} holds weights that are quantised already, and what a run "
            "exports belongs to the unquantised model: name that one, and set model.quantization"
        )


def loading(settings: ModelSettings, left_out: Sequence[str]) -> dict[str, Any]:
    """What transformers' ``from_pretrained`` is told of precision.

    Weights are quantised on the CPU whatever the device, so that the same ones come of it everywhere.

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
    """Names of the modules that quantisation passes by.

    These are the head's, and for NF4 the linear layers whose inputs are not a multiple of the `BLOCK` of
    weights that share a scale: bitsandbytes 0.50 computes these wrongly on a CPU.

    Args:
        model: unquantised; it may be on the meta device.
        settings: ``[model]``.
        head: names of the head's modules.

    Raises ``PrecisionError`` if that is every linear layer.
    """
    if settings.quantization is None:
        return []
    found = list(head)
    if settings.quantization == "nf4":
        found += [name for name, module in _linear(model, head) if shape_of(module)[1] % BLOCK]
    if not any(True for _ in _linear(model, found)):
        raise PrecisionError(
            f"model.quantization = {settings.quantization!r}: {settings.source!r} has no layer to quantise; "
            f"4 bits need a multiple of {BLOCK} inputs, and a head is left out"
        )
    return found


def _linear(model: nn.Module, left_out: Sequence[str]) -> Iterator[tuple[str, nn.Module]]:
    """The layers that transformers replaces, by name."""
    for name, module in model.named_modules():
        if type(module) in (nn.Linear, Conv1D) and should_convert_module(name, list(left_out)):
            yield name, module


def dtype_of(settings: ModelSettings) -> torch.dtype:
    """Of the weights that are not quantised, and of what layers compute."""
    return torch.bfloat16 if settings.dtype == "bfloat16" else torch.float32


def described(settings: ModelSettings) -> str | None:
    """The weights as people call them; None for float32."""
    words = [_READABLE[settings.quantization]] if settings.quantization else []
    words += ["bfloat16"] if settings.dtype == "bfloat16" else []
    return ", the rest ".join(words) or None


def stored_bytes(model: nn.Module, settings: ModelSettings, head: Sequence[str]) -> int:
    """Bytes of a model's weights, held as ``settings`` say.

    Args:
        model: unquantised, in its dtype; it may be on the meta device.
        settings: ``[model]``.
        head: names of its head's modules.
    """
    total = sum(parameter.nbytes for parameter in model.parameters())
    if settings.quantization is None:
        return total
    for _, module in _linear(model, left_out(model, settings, head)):
        weight, (m, n) = module.get_parameter("weight"), shape_of(module)
        scales = m * n // BLOCK if settings.quantization == "nf4" else m
        total += m * n // (2 if settings.quantization == "nf4" else 1) + scales * _FLOAT - weight.nbytes
    return total
