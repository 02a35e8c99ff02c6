"""A suite of questions gives the accuracies that likelihoods of single rows give, beside the base model's."""

import io
import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import nn
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from conftest import byte_tokenizer
from fedsmoothlora import cli
from fedsmoothlora.data import suites
from fedsmoothlora.data.suites import Benchmark, Question
from fedsmoothlora.errors import GenerationError
from fedsmoothlora.exports import evaluation
from fedsmoothlora.exports.evaluation import evaluate, score
from fedsmoothlora.exports.export import export
from fedsmoothlora.exports.generation import Prompting, Writer
from fedsmoothlora.runs.session import run

CHOICES = [
    Question(f"Question: {n}?\nA. one\nB. two\nC. three\nAnswer:", "ABC"[n % 3], ("A", "B", "C"))
    for n in range(9)
]
VERDICTS = [Question(f"{n}?" * (n + 1), ("yes", "no")[n % 2], ("yes", "no")) for n in range(6)]
TEXTS = [Question(f"{n}?", f"it is {n}") for n in range(5)]


@torch.no_grad()
def likelihood(model: nn.Module, prompt: Sequence[int], answer: Sequence[int]) -> float:
    """``log p(answer | prompt)`` from one unpadded row."""
    logits = model(input_ids=torch.tensor([[*prompt, *answer]])).logits[0].log_softmax(dim=-1)
    return sum(float(logits[len(prompt) + at - 1, token]) for at, token in enumerate(answer))


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("questions", [CHOICES, VERDICTS], ids=["letters", "verdicts"])
@pytest.mark.parametrize("which", ["tiny_llama", "tiny_gpt2"])
def test_the_accuracy_is_that_of_the_likeliest_options(
    which: str, questions: list[Question], chat: bool, request: pytest.FixtureRequest
) -> None:
    model = AutoModelForCausalLM.from_pretrained(request.getfixturevalue(which), dtype=torch.float64).eval()
    tokenizer = byte_tokenizer()
    hits = 0
    for question in questions:
        text = f"[user]{question.prompt}<end>\n[assistant]" if chat else question.prompt
        prompt = tokenizer(text)["input_ids"]
        scores = [
            likelihood(model, prompt, tokenizer(option if chat else f" {option}")["input_ids"])
            for option in question.options
        ]
        hits += question.options[scores.index(max(scores))] == question.answer
    writer = Writer(model, tokenizer, Prompting(chat=chat))
    assert score(writer, questions, 4) == hits / len(questions)


def test_free_answers_are_measured_by_their_loss(tiny_llama: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float64).eval()
    tokenizer, total, tokens = byte_tokenizer(), 0.0, 0
    for question in TEXTS:
        answer = tokenizer(f" {question.answer}")["input_ids"]
        total -= likelihood(model, tokenizer(question.prompt)["input_ids"], answer)
        tokens += len(answer)
    found = score(Writer(model, tokenizer, Prompting()), TEXTS, 2)
    assert found == pytest.approx(total / tokens, rel=1e-6)


@pytest.fixture
def trained(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run that learns to answer every question with A."""
    made = {"medical": (Benchmark("letters", lambda: CHOICES), Benchmark("texts", lambda: TEXTS))}
    monkeypatch.setattr(evaluation, "SUITES", made)
    rows = [{"prompt": question.prompt, "answer": " A"} for question in CHOICES]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows * 2))
    table = {
        "name": "own",
        "model": {"source": str(tiny_llama)},
        "data": {"source": str(tmp_path / "own.jsonl"), "validation": 0.3},
        "task": {"kind": "causal-lm", "max_length": 128},
        "partition": {"kind": "iid", "clients": 2},
        "method": {"name": "fedit"},
        "training": {"rounds": 2, "steps": 6, "lr": 0.02},
        "machine": {"threads": 1, "device": "cpu"},
    }
    run(table, out=tmp_path / "run", console=Console(file=io.StringIO()))
    return tmp_path / "run"


def test_a_run_and_its_export_are_measured_beside_the_base_model(
    trained: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    letters, texts = evaluate(trained, "medical")
    assert (letters.benchmark, letters.metric, letters.rows) == ("letters", "accuracy", 9)
    assert letters.trained == 3 / 9  # the model says A, which is right in a third
    assert letters.interval == pytest.approx((0.1206, 0.6458), abs=1e-4)  # Wilson (1927)
    base = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()
    assert letters.base == score(Writer(base, byte_tokenizer(), Prompting()), CHOICES, 8)
    assert (texts.metric, texts.interval) == ("loss", None)
    assert texts.trained != texts.base
    export(trained, "adapter", out=tmp_path / "adapter")
    again = evaluate(tmp_path / "adapter", "medical")
    assert [found.trained for found in again] == pytest.approx([letters.trained, texts.trained], rel=1e-5)
    assert [found.base for found in again] == pytest.approx([letters.base, texts.base], rel=1e-5)


def test_the_command_prints_both_models(trained: Path) -> None:
    done = CliRunner().invoke(cli.app, ["evaluate", str(trained), "--suite", "medical", "--rows", "6"])
    assert done.exit_code == 0, done.output
    for part in ("letters", "accuracy", "base", "trained", " 6 ", "95 %"):
        assert part in done.stdout


def test_an_unknown_suite_and_wrong_numbers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(GenerationError, match="unknown suite 'law'; there are medical, finance, general"):
        evaluate(tmp_path, "law")
    with pytest.raises(GenerationError, match="should be at least 1"):
        evaluate(tmp_path, "medical", rows=0)


def test_the_suites_are_the_package_s_questions_and_every_answer_is_an_option() -> None:
    counts = {}
    for suite in suites.SUITES.values():
        for benchmark in suite:
            questions = benchmark.load()
            counts[benchmark.name] = len(questions)
            for question in questions:
                assert question.answer
                assert not question.options or question.answer in question.options
                assert question.prompt.endswith("\nAnswer:")
    assert counts == {
        "PubMedQA": 500,
        "MedMCQA": 832,
        "MedQA": 1273,
        "MMLU clinical": 1089,
        "FiQA": 648,
        "MMLU": 2850,
    }
