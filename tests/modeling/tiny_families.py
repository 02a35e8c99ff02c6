"""Tiny random models of many architectures, built from their configurations alone."""

from functools import cache
from typing import Any

import torch
import transformers
from torch import nn

VOCABULARY = 40
PAD = 3  # ``config.pad_token_id``

_BERT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
_LLAMA = {**_BERT, "num_key_value_heads": 1, "head_dim": 8}
_SEEN = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 24}
_VISION = {**_SEEN, "image_size": 16, "patch_size": 8}
_PAIR = {"vision_config": _VISION, "text_config": {**_SEEN, "vocab_size": VOCABULARY}}
# By the first part of its classes' names, the sizes of each architecture.
ENCODERS: dict[str, dict[str, Any]] = {
    "Bert": _BERT,
    "Roberta": _BERT,
    "DistilBert": {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24},
    "Deberta": {**_BERT, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
    "XLNet": {"d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 24},
    "DebertaV2": {**_BERT, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
}
DECODERS: dict[str, dict[str, Any]] = {
    "GPT2": {"n_embd": 16, "n_layer": 2, "n_head": 2},
    "Llama": _LLAMA,
    "Qwen2": _LLAMA,
    "Qwen3": _LLAMA,
    "Gemma": _LLAMA,
    "Mistral": _LLAMA,
    "OPT": {
        "hidden_size": 16,
        "word_embed_proj_dim": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "ffn_dim": 24,
    },
    "GPTNeoX": _BERT,
    "Bloom": {"hidden_size": 16, "n_layer": 2, "n_head": 2},
}
SEQ2SEQ: dict[str, dict[str, Any]] = {
    "T5": {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2},
    "Bart": {
        **{"d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 24},
        **{"decoder_ffn_dim": 24, "encoder_attention_heads": 2, "decoder_attention_heads": 2},
    },
}
SEQ2SEQ |= {"MBart": SEQ2SEQ["Bart"], "M2M100": SEQ2SEQ["Bart"]}
VISION: dict[str, dict[str, Any]] = {
    "ViT": _VISION,
    "Dinov2": _VISION,
    "CLIP": _PAIR,
    "Siglip": _PAIR,
    "Swin": {"image_size": 16, "patch_size": 4, "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2]},
    "ConvNext": {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2},
    "HGNetV2": {},
}
VISION |= {"ConvNextV2": VISION["ConvNext"], "Beit": _VISION, "DeiT": _VISION}


@cache
def tiny(family: str, what: str, labels: int = 3) -> nn.Module:
    """A model in evaluation mode, such as ``tiny("Bert", "ForSequenceClassification")``.

    Its weights are so large that every token changes the outputs.
    """
    sizes = {**ENCODERS, **DECODERS, **SEQ2SEQ, **VISION}[family]
    tokens = {"vocab_size": VOCABULARY, "pad_token_id": PAD, "eos_token_id": 1, "bos_token_id": 2}
    dropout = {"attention_dropout": 0.0} if family == "Llama" else {}
    if family in SEQ2SEQ:
        tokens |= {"decoder_start_token_id": 2, "forced_eos_token_id": 1}
    config = getattr(transformers, f"{family}Config")(
        **sizes, **dropout, **({} if family in VISION else tokens), num_labels=labels
    )
    name = "GPT2LMHeadModel" if (family, what) == ("GPT2", "ForCausalLM") else f"{family}{what}"
    generator = torch.Generator().manual_seed(0)
    model: nn.Module = getattr(transformers, name)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.3, generator=generator)
    return model
