"""Differences between the releases of transformers and PEFT that the package supports, in one place.

Each is found by what the installed release has, never by its number. Names of layers differ too: the query of
a DINOv2 is ``query`` in 5.0 and ``q_proj`` in 5.23. `fedsmoothlora.modeling.roles` finds layers by their
role, and `saved_names` has their names in a checkpoint, which are the same in all releases.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import generic

from fedsmoothlora.data.examples import Batch

# The keys of ``adapter_config.json`` that PEFT 0.18 knows, so that exported adapters load there too.
KEYS_OF_LORA = frozenset(
    {
        *("alora_invocation_tokens", "alpha_pattern", "arrow_config", "auto_mapping"),
        *("base_model_name_or_path", "bias", "corda_config", "ensure_weight_tying", "eva_config"),
        *("exclude_modules", "fan_in_fan_out", "inference_mode", "init_lora_weights", "layer_replication"),
        *("layers_pattern", "layers_to_transform", "loftq_config", "lora_alpha", "lora_bias", "lora_dropout"),
        *("megatron_config", "megatron_core", "modules_to_save", "peft_type", "peft_version"),
        *("qalora_group_size", "r", "rank_pattern", "revision", "runtime_config", "target_modules"),
        *("target_parameters", "task_type", "trainable_token_indices", "use_dora", "use_qalora"),
        "use_rslora",
    }
)


def image_processor_class(family: str) -> type[Any]:
    """The image processor of a family that needs NumPy and Pillow alone, such as that of ``Bit``.

    Newer releases call it ``BitImageProcessorPil``, where ``BitImageProcessor`` needs torchvision; in older
    ones ``BitImageProcessor`` is the one that needs none.
    """
    found = getattr(transformers, f"{family}ImageProcessorPil", None)
    return found if found is not None else getattr(transformers, f"{family}ImageProcessor")


def with_pillow() -> dict[str, Any]:
    """The argument of ``AutoImageProcessor.from_pretrained`` for processors of NumPy and Pillow alone."""
    newer = getattr(transformers, "BitImageProcessorPil", None) is not None
    return {"backend": "pil"} if newer else {"use_fast": False}


def checkpointing_switches(model: nn.Module) -> tuple[Callable[..., None], Callable[[], None]] | None:
    """The methods of a model that switch gradient checkpointing on and off; None if it does not support it.

    Newer releases call them ``activation_checkpointing_...``, and warn of the older name.
    """
    if getattr(model, "supports_gradient_checkpointing", False):
        for kind in ("activation", "gradient"):
            enable = getattr(model, f"{kind}_checkpointing_enable", None)
            if enable is not None:
                return enable, getattr(model, f"{kind}_checkpointing_disable")
    return None


@contextmanager
def computing_without_memory(model: nn.Module, batch: Batch) -> Iterator[Batch]:
    """Let a model on the meta device compute the shapes of a batch; yields the batch for it.

    Older releases cannot compute rotary positions on the meta device. There, such a model and batch become
    fake tensors of the CPU, which take no memory either, and the model remains so.
    """
    rotary = any("Rotary" in type(module).__name__ for module in model.modules())
    if not rotary or _computes_on_meta():
        yield batch
        return
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        model.to_empty(device="cpu")
        yield {name: torch.empty_like(value, device="cpu") for name, value in batch.items()}


def has_values(tensor: Tensor) -> bool:
    """Whether a tensor has memory for its values; one of `computing_without_memory` has none."""
    return not (tensor.is_meta or isinstance(tensor, FakeTensor))


def _computes_on_meta() -> bool:
    try:
        generic.maybe_autocast("meta", enabled=False)
    except RuntimeError:  # torch knows no autocast for the meta device
        return False
    return True


def saved_weights(model: nn.Module) -> dict[str, Tensor]:
    """The floating-point weights and buffers of a model by the names, and in the form, of a checkpoint.

    Names and forms are the same in all releases, since all of them read the same checkpoints.
    """
    tensors = _tensors_of(model)
    weights = {name: value for name, value in tensors.items() if value.is_floating_point()}
    return _as_saved(model, weights)


def saved_names(model: nn.Module, layers: Iterable[str]) -> dict[str, str]:
    """The name of each layer in a checkpoint; its own if a checkpoint holds its weight in another form."""
    marks = {name: torch.empty_like(value, device="meta") for name, value in _tensors_of(model).items()}
    saved = {id(mark): name for name, mark in _as_saved(model, dict(marks)).items()}
    weights = {name: f"{name}.weight" for name in layers}
    return {n: saved.get(id(marks[weight]), weight).removesuffix(".weight") for n, weight in weights.items()}


def _tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Weights and buffers, without extra state of modules, which may be of any type."""
    return {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}


def _as_saved(model: nn.Module, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    if not isinstance(model, PreTrainedModel):
        return weights
    saved: Mapping[str, Tensor] = revert_weight_conversion(model, weights)
    # 5.0 goes back to names of the first checkpoints of BERT.
    older = {"gamma": "weight", "beta": "bias"}
    return {
        re.sub(r"(?<=LayerNorm\.)(gamma|beta)$", lambda found: older[found[0]], name): value
        for name, value in saved.items()
    }
