"""A complete configuration of a short run for every registered task, on rows of different lengths."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image

from task_runs import word_seq2seq
from word_models import WORDS, word_encoder

ROWS = 24
RATE = 4000
_COLOURS = WORDS[:4]

Row = dict[str, Any]


def _text(number: int) -> str:
    """A text of 1 to 9 words."""
    return " ".join([_COLOURS[number % 4], *["and", _COLOURS[number // 4 % 4]] * (number % 5)])


# -- the rows ----------------------------------------------------------------------------------------

_FIELDS: Mapping[str, Callable[[int], Row]] = {
    "text-classification": lambda n: {"text": _text(n), "label": "cold" if n % 3 else "warm"},
    "text-regression": lambda n: {"text": _text(n), "label": n % 4 - 1.5 + 0.25 * (n // 4 % 4)},
    "multi-label": lambda n: {"text": _text(n), "label": sorted({_COLOURS[n % 4], _COLOURS[n // 4 % 4]})},
    "token-classification": lambda n: {
        "tokens": _text(n).split(),
        "tags": ["O" if word == "and" else "B-COLOUR" for word in _text(n).split()],
    },
    "seq2seq": lambda n: {"prompt": _text(n), "answer": " ".join([_COLOURS[n % 4]] * (1 + n % 3))},
    "causal-lm": lambda n: {"prompt": _text(n), "answer": f" {_COLOURS[n % 4]}"},
    "preference": lambda n: {"prompt": _text(n), "chosen": f" {_COLOURS[n % 4]}", "rejected": " no"},
}

_TASKS: Mapping[str, Row] = {"seq2seq": {"max_answer_length": 8}, "audio-classification": {"max_seconds": 1}}
_LENGTHS = {"causal-lm": 80, "preference": 80}


def _write_rows(kind: str, folder: Path) -> Path:
    path = folder / "own.jsonl"
    rows = [_FIELDS[kind](number) for number in range(ROWS)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def _write_images(kind: str, folder: Path) -> Path:
    """Bright halves of dark images; of one class, or of one or two labels."""
    rng = np.random.default_rng(0)
    rows = []
    for number in range(ROWS):
        pixels = rng.integers(0, 60, (28, 28, 3)).astype(np.uint8)
        left, top = bool(number % 3), bool(number % 2)
        pixels[:, :14] += 150 * left
        pixels[:14] += 40 * top
        Image.fromarray(pixels).save(folder / f"{number}.png")
        several = [name for name, there in (("left", left), ("top", top)) if there]
        label = several if kind == "multi-label-image" else "left" if left else "right"
        rows.append({"image": f"{number}.png", "label": label})
    path = folder / "own.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def _write_recordings(folder: Path) -> Path:
    import soundfile

    rng = np.random.default_rng(0)
    rows = []
    for number in range(ROWS):
        label, pitch = ("high", 900.0) if number % 3 else ("low", 150.0)
        time = np.arange(200 + 40 * (number % 4)) / RATE
        soundfile.write(
            folder / f"{number}.wav",
            0.5 * np.sin(2 * np.pi * pitch * time) + 0.02 * rng.normal(size=len(time)),
            RATE,
        )
        rows.append({"audio": f"{number}.wav", "label": label})
    path = folder / "own.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


# -- the models --------------------------------------------------------------------------------------


def wav2vec2(folder: Path) -> Path:
    """A tiny base model with random weights and its feature extractor."""
    config = transformers.Wav2Vec2Config(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
        conv_dim=[8, 8],
        conv_kernel=[10, 5],
        conv_stride=[8, 4],
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
        classifier_proj_size=8,
        initializer_range=0.2,
        feat_extract_norm="layer",
        do_stable_layer_norm=True,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.Wav2Vec2Model(config).save_pretrained(folder)
    transformers.Wav2Vec2FeatureExtractor(sampling_rate=RATE, return_attention_mask=True).save_pretrained(
        folder
    )
    return folder


def configuration(
    kind: str, folder: Path, *, image_model: Path, language_model: Path, **training: Any
) -> dict[str, Any]:
    """A complete configuration; its rows and, unless it is given, its model are written to ``folder``."""
    (folder / "rows").mkdir(parents=True)
    (folder / "model").mkdir()
    model: Path
    if kind == "audio-classification":
        source, model = _write_recordings(folder / "rows"), wav2vec2(folder / "model")
    elif kind in ("image-classification", "multi-label-image"):
        source, model = _write_images(kind, folder / "rows"), image_model
    else:
        source = _write_rows(kind, folder / "rows")
        if kind in ("causal-lm", "preference"):
            model = language_model
        elif kind == "seq2seq":
            model = word_seq2seq(folder / "model")
        else:
            model = word_encoder("bert", folder / "model")
    task = {"kind": kind, **_TASKS.get(kind, {})}
    if kind in _FIELDS:
        task["max_length"] = _LENGTHS.get(kind, 16)
    labelled = kind in ("text-classification", "text-regression", "multi-label")
    return {
        "name": "every-task",
        "model": {"source": str(model), **({"image_size": 28} if model == image_model else {})},
        "lora": {"r": 2, "alpha": 4},
        "data": {
            "source": str(source),
            "validation": 0.25,
            **({"label_column": "label"} if labelled else {}),
        },
        "task": task,
        "partition": {"kind": "iid", "clients": 2},
        "method": {"name": "fedit"},
        "training": {"rounds": 1, "steps": 2, "batch_size": 4, **training},
        "machine": {"threads": 1, "device": "cpu"},
    }
