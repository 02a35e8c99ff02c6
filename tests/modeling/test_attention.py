"""The implementation of the attention that `model.attention` names."""

from pathlib import Path
from typing import Any

import pytest
import torch

from fedsmoothlora.config import read
from fedsmoothlora.errors import ConfigError
from fedsmoothlora.modeling.settings import ModelSettings
from fedsmoothlora.modeling.text import load_causal_language_model
from fedsmoothlora.runs.planning import plan

Table = dict[str, Any]


def test_implementations_differ_by_rounding_only(tiny_llama: Path) -> None:
    ids = torch.arange(12).view(2, 6)
    logits = {}
    for attention in ("auto", "eager", "sdpa"):
        settings = ModelSettings(source=str(tiny_llama), attention=attention)  # type: ignore[arg-type]
        for empty in (True, False):
            model = load_causal_language_model(settings, empty=empty).model
            used = model.config._attn_implementation
            assert used == ("sdpa" if attention == "auto" else attention)
        with torch.inference_mode():
            logits[attention] = model.eval()(input_ids=ids).logits
    torch.testing.assert_close(logits["eager"], logits["sdpa"], rtol=1e-4, atol=1e-5)
    assert torch.equal(logits["auto"], logits["sdpa"])


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({}, r"computes in bfloat16 only.*set model\.dtype = 'bfloat16'"),
        ({"model.dtype": "bfloat16"}, r"needs a GPU with CUDA, and machine\.device = 'cpu'"),
    ],
    ids=["float32", "cpu"],
)
def test_flash_attention_is_refused_where_it_cannot_work(
    toy_table: Table, overrides: Table, words: str
) -> None:
    fixed = {"model.attention": "flash_attention_2", "machine.device": "cpu"}
    with pytest.raises(ConfigError, match=words):
        read(toy_table, {**fixed, **overrides})


def test_an_implementation_that_is_not_installed_is_refused_before_weights_are_loaded(
    toy_table: Table,
) -> None:
    overrides = {"model.attention": "flash_attention_2", "model.dtype": "bfloat16", "machine.device": "auto"}
    with pytest.raises(ConfigError, match=r"model\.attention = 'flash_attention_2': .* cannot use it here: "):
        plan(read(toy_table, overrides))


def test_a_run_is_exported_for_machines_without_the_implementation() -> None:
    settings = ModelSettings(source="x", attention="flash_attention_2", dtype="bfloat16")
    assert settings.unquantised() == ModelSettings(source="x")
