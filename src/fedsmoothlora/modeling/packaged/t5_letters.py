"""A small T5 with random weights for letters and phonemes.

No package that we know of has a pretrained model of texts with an encoder and a decoder.
"""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

from fedsmoothlora.data.packages import Package

NAME = "t5-letters"
PACKAGE = Package("transformers", version("transformers"), sha256="")  # always installed, so never fetched
LICENCE = "Apache-2.0"
DESCRIPTION = (
    "A T5 of two layers in encoder and decoder (width 128, 1M parameters) with random weights, whose tokens "
    "are letters and the phonemes of the CMU Pronouncing Dictionary, for pkg:pronunciations."
)

_SPECIAL = ("<pad>", "</s>", "<unk>")
_PHONEMES = (
    *("AA", "AE", "AH", "AO", "AW", "AY", "B", "CH", "D", "DH", "EH", "ER", "EY", "F", "G", "HH", "IH", "IY"),
    *("JH", "K", "L", "M", "N", "NG", "OW", "OY", "P", "R", "S", "SH", "T", "TH", "UH", "UW", "V", "W", "Y"),
    *("Z", "ZH"),
)
TOKENS = (*_SPECIAL, *"abcdefghijklmnopqrstuvwxyz", *_PHONEMES)
_SEED = 0


def convert(folder: Path) -> None:
    """Draw the weights by a fixed seed, and write them with a tokenizer of words between blanks.

    Args:
        folder: An existing folder, to be filled.
    """
    import torch
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

    number = {token: at for at, token in enumerate(TOKENS)}
    made = Tokenizer(WordLevel(number, unk_token="<unk>"))
    made.pre_tokenizer = WhitespaceSplit()
    made.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", number["</s>"])])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    config = T5Config(
        vocab_size=len(TOKENS),
        d_model=128,
        d_kv=32,
        d_ff=512,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        pad_token_id=number["<pad>"],
        eos_token_id=number["</s>"],
        decoder_start_token_id=number["<pad>"],
    )
    with torch.random.fork_rng():
        torch.manual_seed(_SEED)
        T5ForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
