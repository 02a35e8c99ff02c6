"""Differences between the releases of transformers and PEFT that the package supports, in one place.

Each is found by what the installed release has, never by its number. Names of layers differ too; for those,
`fedsmoothlora.modeling.roles` finds layers by their role.
"""

from __future__ import annotations

from typing import Any

import transformers

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
