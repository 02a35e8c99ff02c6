"""Tokens that a model has no embedding or no position for are refused before training."""

import pytest
from tiny_families import PAD, VOCABULARY, tiny

from conftest import byte_tokenizer
from fedsmoothlora.errors import ConfigError
from fedsmoothlora.modeling.settings import ModelSettings
from fedsmoothlora.modeling.text import check_tokens

SETTINGS = ModelSettings(source="tiny")


def test_a_padding_token_without_an_embedding_is_refused() -> None:
    model, tokenizer = tiny("Llama", "ForCausalLM"), byte_tokenizer()
    with pytest.raises(ConfigError, match=rf"padding token '<pad>'.*257.*0 to {VOCABULARY - 1} only; resize"):
        check_tokens(SETTINGS, model, tokenizer, [[1]], 8)


def test_a_row_s_token_without_an_embedding_is_refused() -> None:
    model, tokenizer = tiny("Llama", "ForCausalLM"), byte_tokenizer()
    tokenizer.pad_token_id = 0
    check_tokens(SETTINGS, model, tokenizer, [[1], [VOCABULARY - 1]], 8)
    with pytest.raises(ConfigError, match=f"the token .* has the number {VOCABULARY}, "):
        check_tokens(SETTINGS, model, tokenizer, [[1], [VOCABULARY, 2]], 8)


@pytest.mark.parametrize(("family", "reserved"), [("Roberta", PAD + 1), ("Bert", 0)])
def test_the_positions_that_roberta_reserves_for_padding_are_not_available(
    family: str, reserved: int
) -> None:
    model, tokenizer = tiny(family, "ForSequenceClassification"), byte_tokenizer()
    tokenizer.pad_token_id = 0
    most = model.config.max_position_embeddings - reserved
    check_tokens(SETTINGS, model, tokenizer, [[1]], most)
    if reserved:
        with pytest.raises(ConfigError, match=rf"set task\.max_length = {most} or less"):
            check_tokens(SETTINGS, model, tokenizer, [[1]], most + 1)
