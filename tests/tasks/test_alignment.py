"""Tags are aligned to the first token of each word, by tokenizers of words and of bytes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import transformers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import pre_tokenizers

from fedsmoothlora.config import read
from fedsmoothlora.data.tokens import IGNORED
from fedsmoothlora.modeling.settings import ModelSettings
from fedsmoothlora.modeling.text import load_word_tokenizer
from fedsmoothlora.runs.planning import plan
from fedsmoothlora.tasks.token_classification import at_first_tokens
from task_runs import table_of, write_rows
from word_models import SIZES


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 9)), min_size=1, max_size=8))
def test_every_word_with_tokens_has_its_tag_once_at_its_first_token(
    drawn: list[tuple[int, int]],
) -> None:
    """Words with 0 to 3 tokens, between two special tokens."""
    tags = [tag for _, tag in drawn]
    words = [None, *(word for word, (tokens, _) in enumerate(drawn) for _ in range(tokens)), None]
    labels, tagged = at_first_tokens(words, tags)
    assert len(labels) == len(words)
    assert labels[0] == labels[-1] == IGNORED
    wanted = [tag for tokens, tag in drawn if tokens]
    assert [label for label in labels if label != IGNORED] == wanted
    assert tagged == len(wanted)
    for place, word in enumerate(words):
        if labels[place] != IGNORED:
            assert word is not None
            assert word not in words[:place]


@pytest.fixture
def roberta(tmp_path: Path) -> Path:
    """A tiny RoBERTa with a token for each byte; ``Ġ`` is the space before a word."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
    tokens = {token: number for number, token in enumerate([*special, *letters])}
    folder = tmp_path / "roberta"
    config = transformers.RobertaConfig(**SIZES, vocab_size=len(tokens), max_position_embeddings=66)
    transformers.RobertaModel(config).save_pretrained(folder)
    transformers.RobertaTokenizer(vocab=tokens, merges=[]).save_pretrained(folder)
    return folder


def test_a_byte_level_tokenizer_puts_a_space_before_every_word(roberta: Path, tmp_path: Path) -> None:
    rows = [{"tokens": ["Ada", "ran"], "tags": ["B-PER", "O"]}, {"tokens": ["Bo"], "tags": ["B-PER"]}] * 8
    table = table_of("token-classification", roberta, write_rows(tmp_path, rows))
    data = plan(read(table)).task_data
    batch = data.train.batch([0])
    tokenizer = load_word_tokenizer(ModelSettings(source=str(roberta)))
    found = tokenizer.convert_ids_to_tokens(batch["input_ids"][0].tolist())
    assert found == ["<s>", "Ġ", "A", "d", "a", "Ġ", "r", "a", "n", "</s>"]
    assert [place for place, label in enumerate(batch["labels"][0].tolist()) if label != IGNORED] == [1, 5]


def test_the_exported_tokenizer_splits_words_alike(roberta: Path, tmp_path: Path) -> None:
    from fedsmoothlora.tasks import find

    find("token-classification")().write_processor(ModelSettings(source=str(roberta)), tmp_path / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    words = tokenizer([["Ada", "ran"]], is_split_into_words=True)
    assert words.word_ids(0) == [None, 0, 0, 0, 0, 1, 1, 1, 1, None]
    assert json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())["add_prefix_space"] is True
