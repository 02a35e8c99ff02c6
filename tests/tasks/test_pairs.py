"""Pairs of texts are encoded as the tokenizer encodes pairs, with segment ids where the model has them."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from fedsmoothlora.config import read
from fedsmoothlora.data.texts import Texts
from fedsmoothlora.errors import ConfigError
from fedsmoothlora.runs.planning import plan
from fedsmoothlora.runs.session import run
from word_models import WORDS, word_encoder

TEXT = st.lists(st.sampled_from(WORDS), min_size=1, max_size=20).map(" ".join)


@pytest.fixture(scope="module", params=["bert", "roberta"])
def encoder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return word_encoder(request.param, tmp_path_factory.mktemp(request.param))


def rows(count: int = 96) -> list[dict[str, str]]:
    """The label is the temperature in the first text; the second has the other one."""
    found = []
    for number in range(count):
        colour, label, other = WORDS[number % 4], *(("cold", "warm") if number // 4 % 2 else ("warm", "cold"))
        found.append({"premise": f"{label} {colour}", "hypothesis": f"{other} {colour}", "label": label})
    return found


def table(model: Path, folder: Path, found: list[dict[str, str]] | None = None) -> dict[str, Any]:
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in found or rows()))
    return {
        "name": "pairs",
        "model": {"source": str(model)},
        "lora": {"r": 2, "alpha": 4},
        "data": {"source": str(path), "validation": 0.2},
        "task": {"kind": "text-classification", "text": ["premise", "hypothesis"], "max_length": 16},
        "partition": {"kind": "iid", "clients": 2},
        "method": {"name": "fedit"},
        "training": {"rounds": 2, "steps": 10, "lr": 0.02},
        "machine": {"threads": 1, "device": "cpu"},
    }


@given(pairs=st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=5))
@settings(max_examples=25, deadline=None)
def test_a_pair_has_the_tokens_of_the_tokenizers_own_pair_encoding(
    encoder: Path, pairs: list[tuple[str, str]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    data = plan(read(table(encoder, tmp_path_factory.mktemp("rows")))).task_data
    first, second = (list(texts) for texts in zip(*pairs, strict=True))
    texts = Texts({"premise": first, "hypothesis": second}, np.zeros(len(pairs), dtype=np.int64), ("a", "b"))
    batch = data.examples(texts).batch(range(len(pairs)))
    wanted = AutoTokenizer.from_pretrained(encoder)(
        first, second, truncation="longest_first", max_length=16, padding=True, return_tensors="pt"
    )
    assert set(batch) - {"labels"} == set(wanted)
    assert ("token_type_ids" in batch) == ("bert" in encoder.name and "roberta" not in encoder.name)
    for name, value in wanted.items():
        assert torch.equal(batch[name], value), name


def test_a_classifier_of_pairs_learns_and_the_saved_model_classifies_pairs(
    encoder: Path, tmp_path: Path
) -> None:
    result = run(table(encoder, tmp_path), out=tmp_path / "run", console=Console(file=io.StringIO()))
    assert result.accuracy > 0.9
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "model")
    found = rows(16)
    columns = ([row[name] for row in found] for name in ("premise", "hypothesis"))
    with torch.no_grad():
        logits = model(**tokenizer(*columns, padding=True, return_tensors="pt")).logits
    right = [
        model.config.id2label[int(label)] == row["label"]
        for label, row in zip(logits.argmax(-1), found, strict=True)
    ]
    assert np.mean(right) > 0.8


def test_rows_that_are_cut_are_counted_and_a_text_may_be_empty(encoder: Path, tmp_path: Path) -> None:
    found = [
        *rows(8),
        {"premise": "red " * 30, "hypothesis": "blue", "label": "warm"},
        {"premise": "", "hypothesis": "blue", "label": "warm"},
    ]
    notes = plan(read(table(encoder, tmp_path, found))).notes
    assert any("1 of 10 training texts are longer than task.max_length = 16 tokens" in note for note in notes)


@pytest.mark.parametrize(
    ("task", "wanted"),
    [
        ({"prompt": "{premise}"}, r"task.prompt = '\{premise\}' and task.text = \['premise', 'hypothesis'\]"),
        ({"text": ["premise", "premise"]}, "names one column twice"),
        ({"text": ["premise"]}, "task.text"),
        ({"text": ["premise", "hypotesis"]}, "no column 'hypotesis' .task.text.; did you mean 'hypothesis'"),
    ],
    ids=["both", "twice", "one", "typo"],
)
def test_a_wrong_pair_is_refused(encoder: Path, tmp_path: Path, task: dict[str, Any], wanted: str) -> None:
    wrong = table(encoder, tmp_path)
    wrong["task"] |= task
    with pytest.raises(ConfigError, match=wanted):
        plan(read(wrong))


def test_a_row_with_two_empty_texts_is_refused_with_its_place(encoder: Path, tmp_path: Path) -> None:
    found = [*rows(8), {"premise": " ", "hypothesis": "", "label": "warm"}]
    with pytest.raises(ConfigError, match=r"pairs.jsonl: row 9.*'premise' and 'hypothesis': both .* empty"):
        plan(read(table(encoder, tmp_path, found)))
