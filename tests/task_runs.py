"""Small runs of every task for texts, on rows that a tiny model can learn."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers

from word_models import SPECIAL, WORDS, word_encoder, word_tokenizer

COLOURS = WORDS[:4]
KINDS = ("text-regression", "multi-label", "token-classification", "seq2seq")


def rows_of(kind: str, count: int = 64) -> list[dict[str, Any]]:
    """Rows whose targets follow from their words: numbers, labels, tags or a text."""
    found = []
    for number in range(count):
        first, second = COLOURS[number % 4], COLOURS[(number // 4) % 4]
        client = "north" if number % 3 else "south"
        if kind == "text-regression":
            text, target = f"{first} and {second}", {"score": number % 4 - 1.5 + 0.25 * (number // 4 % 4)}
        elif kind == "multi-label":
            text, target = f"{first} and {second}", {"label": sorted({first, second})}
        elif kind == "token-classification":
            words = [first, "warm", "and", second]
            tags = ["B-COLOUR", "I-COLOUR", "O", "B-COLOUR"]
            found.append({"tokens": words, "tags": tags, "client": client})
            continue
        else:
            text, target = f"{first} {first} and {second}", {"answer": first}
        found.append({"text": text, **target, "client": client})
    return found


TASKS: dict[str, dict[str, Any]] = {
    "text-regression": {"kind": "text-regression", "max_length": 16},
    "multi-label": {"kind": "multi-label", "max_length": 16},
    "token-classification": {"kind": "token-classification", "max_length": 16},
    "seq2seq": {
        "kind": "seq2seq",
        "prompt": "{text}",
        "max_length": 16,
        "max_answer_length": 4,
        "scores": ["rouge", "bleu", "exact-match"],
        "metric_rows": 8,
    },
}


def write_rows(folder: Path, rows: list[dict[str, Any]], name: str = "own.jsonl") -> Path:
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def table_of(kind: str, model: Path, source: Path, **more: Any) -> dict[str, Any]:
    """A complete configuration of a short run."""
    label = {"label_column": "score"} if kind == "text-regression" else {}
    return {
        "name": "own",
        "model": {"source": str(model)},
        "lora": {"r": 2, "alpha": 4},
        "data": {"source": str(source), "validation": 0.25, **label},
        "task": TASKS[kind],
        "partition": {"kind": "iid", "clients": 2},
        "method": {"name": "fedsmoothlora", "gamma": 64, "calibration_batches": 1},
        "training": {"rounds": 2, "steps": 10, "lr": 0.02},
        "machine": {"threads": 1, "device": "cpu"},
        **more,
    }


def word_seq2seq(folder: Path, family: str = "T5") -> Path:
    """A tiny encoder with a decoder, with random weights, and a tokenizer of the same words."""
    torch_sizes: dict[str, Any] = {"vocab_size": len(SPECIAL) + len(WORDS)}
    torch_sizes |= {"pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0}
    if family == "T5":
        config = transformers.T5Config(
            **torch_sizes, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, dropout_rate=0.0
        )
        model = transformers.T5ForConditionalGeneration
    else:
        config = transformers.BartConfig(
            **torch_sizes,
            bos_token_id=1,
            forced_eos_token_id=2,
            d_model=32,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=48,
            decoder_ffn_dim=48,
            max_position_embeddings=64,
            dropout=0.0,
            init_std=0.2,
        )
        model = transformers.BartForConditionalGeneration
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model(config).save_pretrained(folder)
    tokenizer = word_tokenizer("roberta")
    tokenizer.eos_token = "</s>"
    tokenizer.save_pretrained(folder)
    return folder


def model_for(kind: str, folder: Path) -> Path:
    """A tiny pretrained model for a task."""
    return word_seq2seq(folder) if kind == "seq2seq" else word_encoder("bert", folder)
