"""Runs of text models are exported, loaded by other libraries, and used for generation."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from tiny_models import WORDS, Kind, make_kinds
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from fedsmoothlora import export, load_adapter
from fedsmoothlora.exports.generation import generate
from fedsmoothlora.logs import quiet_libraries
from fedsmoothlora.runs.session import run


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Kind]:
    return make_kinds(tmp_path_factory.mktemp)


def quiet() -> Console:
    return Console(file=io.StringIO(), width=200)


NUMBERS = WORDS[:9]


def rows() -> list[dict[str, str]]:
    found = []
    for number, name in enumerate(NUMBERS):
        for other in NUMBERS[: number + 1]:
            even = "even" if number % 2 else "odd"
            found.append({"left": f"the {name}", "right": f"or {other}", "larger": name, "label": even})
    return found


@pytest.fixture
def ran(kinds: dict[str, Kind], tmp_path: Path) -> Callable[..., Path]:
    """``ran("gpt2", kind="causal-lm", ...)``: the folder of a finished run of two rounds."""
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows()))

    def make(name: str, method: str = "fedsmoothlora", **task: Any) -> Path:
        table = {
            "name": "words",
            "model": {"source": kinds[name].source},
            "lora": {"r": 2, "alpha": 4},
            "data": {"source": str(data), "validation": 0.2},
            "task": {"max_length": 24, **task},
            "partition": {"kind": "iid", "clients": 2},
            "method": {"name": method, **({"gamma": 64} if method == "fedsmoothlora" else {})},
            "training": {"rounds": 2, "steps": 4, "batch_size": 8, "lr": 0.02},
            "machine": {"threads": 1, "device": "cpu"},
        }
        run(table, out=tmp_path / "run", console=quiet())
        return tmp_path / "run"

    return make


Ran = Callable[..., Path]
LANGUAGE = {"kind": "causal-lm", "prompt": "what is {left} {right} ? answer :", "answer": "{larger}"}


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_language_model_is_exported_and_answers_as_in_training(
    ran: Ran, kinds: dict[str, Kind], tmp_path: Path, name: str
) -> None:
    folder = ran(name, **LANGUAGE)
    for as_ in ("merged", "adapter"):
        export(folder, as_, out=tmp_path / as_, console=quiet())
    with quiet_libraries():
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    tokens = tokenizer("what is the four or two ? answer :", return_tensors="pt")["input_ids"]
    adapted = load_adapter(tmp_path / "adapter")
    with torch.no_grad():
        merged, adapter, before = (m(tokens).logits for m in (model, adapted, kinds[name].base().model))
    torch.testing.assert_close(adapter, merged, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(merged, before, atol=0.05)

    written = model.generate(tokens, max_new_tokens=5, do_sample=False, pad_token_id=0)[0, tokens.shape[1] :]
    wanted = tokenizer.decode(written, skip_special_tokens=True)
    assert wanted
    row = '{"left": "the four", "right": "or two"}'
    for where in (folder, folder / "model", tmp_path / "merged", tmp_path / "adapter"):
        # Nothing stands between the columns, so that plain text may take the place of both.
        for prompt in (row, "the four or two"):
            assert generate(where, prompt, max_new_tokens=5) == wanted
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["task_type"], config["modules_to_save"]) == ("CAUSAL_LM", None)


def test_a_clients_own_language_model_needs_no_head(ran: Ran, tmp_path: Path) -> None:
    folder = ran("llama", **LANGUAGE)
    export(folder, client="1", out=tmp_path / "own", console=quiet())
    export(folder, out=tmp_path / "global", console=quiet())
    tokens = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        own, everyones = (load_adapter(tmp_path / part)(tokens).logits for part in ("own", "global"))
    assert not torch.allclose(own, everyones, atol=1e-3)


@pytest.mark.parametrize("name", ["bert", "gpt2-classifier"])
def test_a_classifier_of_texts_is_exported_with_its_head(ran: Ran, tmp_path: Path, name: str) -> None:
    folder = ran(name, "fedit", kind="text-classification", prompt="{left} {right}")
    for as_ in ("merged", "adapter"):
        export(folder, as_, out=tmp_path / as_, console=quiet())
    with quiet_libraries():
        model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    tokens = AutoTokenizer.from_pretrained(tmp_path / "merged")("the four or two", return_tensors="pt")
    inputs = {"input_ids": tokens["input_ids"]}
    with torch.no_grad():
        adapted, merged = load_adapter(tmp_path / "adapter")(**inputs).logits, model(**inputs).logits
    torch.testing.assert_close(adapted, merged, rtol=1e-4, atol=1e-4)
    assert model.config.id2label == {0: "even", 1: "odd"}
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert "num_labels=2" in card
    assert "base.config.pad_token_id = 0" in card
