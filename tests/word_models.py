"""Tokenizers of a few words with their own form for pairs, and tiny encoders for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing

SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")
WORDS = ("red", "blue", "green", "grey", "cold", "warm", "old", "new", "one", "two", "and", "not")
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}


def word_tokenizer(family: str) -> Any:
    """``<s> a </s> b </s>``, with the segment ids 0 and 1 for BERT and without for RoBERTa."""
    words = {word: number for number, word in enumerate((*SPECIAL, *WORDS))}
    made = Tokenizer(WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = WhitespaceSplit()
    second = 1 if family == "bert" else 0
    made.post_processor = TemplateProcessing(
        single="<s> $A </s>",
        pair=f"<s>:0 $A:0 </s>:0 $B:{second} </s>:{second}",
        special_tokens=[("<s>", 1), ("</s>", 2)],
    )
    names = ["input_ids", *(["token_type_ids"] if family == "bert" else []), "attention_mask"]
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made,
        **dict(zip(("pad_token", "cls_token", "sep_token", "unk_token"), SPECIAL, strict=True)),
        model_input_names=names,
    )


def word_encoder(family: str, folder: Path) -> Path:
    """A pretrained encoder with random weights and its tokenizer, in transformers' format."""
    name = {"bert": "Bert", "roberta": "Roberta"}[family]
    more = {} if family == "bert" else {"type_vocab_size": 1}
    config = getattr(transformers, f"{name}Config")(
        **SIZES,
        **more,
        vocab_size=len(SPECIAL) + len(WORDS),
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        getattr(transformers, f"{name}Model")(config).save_pretrained(folder)
    word_tokenizer(family).save_pretrained(folder)
    return folder
