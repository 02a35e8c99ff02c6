"""A suite of questions gives the accuracies that likelihoods of single rows give, beside the base model's."""

import csv
import io
import json
import re
from collections.abc import Sequence
from pathlib import Path

import datasets
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
from fedsmoothlora.errors import DataError, GenerationError
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


@pytest.mark.parametrize(
    ("system", "template", "wanted"),
    [
        ("Be {{brief}}.", None, "[system]Be {brief}.<end>\n[user]1?<end>\n[assistant]"),
        ("{topic}", None, "[user]1?<end>\n[assistant]"),
        (
            "Be brief.",
            "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}:{% endif %}{% endfor %}",
            "Be brief.\n\n1?:",
        ),
    ],
    ids=["text", "columns", "no system turn"],
)
def test_questions_follow_the_runs_system_message(
    system: str, template: str | None, wanted: str, tiny_llama: Path
) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template or tokenizer.chat_template
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    writer = Writer(model, tokenizer, Prompting(chat=True, system=system))
    (prompt,) = evaluation._prompts(writer, [Question("1?", "A", ("A", "B"))])
    assert tokenizer.decode(prompt) == wanted


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


PHRASES = [("Profit rose.", "positive"), ("Sales fell @ home.", "negative"), ("Nokia is Finnish.", "neutral")]


def phrase_bank(folder: Path, form: str) -> Path:
    """The Financial PhraseBank in one of the forms in which it is published."""
    path = folder / f"phrases.{form}"
    if form == "txt":
        path.write_text("".join(f"{text}@{label}\n" for text, label in PHRASES), encoding="latin-1")
    else:
        names = ["negative", "neutral", "positive"]
        features = datasets.Features(
            {"sentence": datasets.Value("string"), "label": datasets.ClassLabel(names=names)}
        )
        rows = [{"sentence": text, "label": names.index(label)} for text, label in PHRASES]
        datasets.Dataset.from_list(rows, features=features).to_parquet(str(path))
    return path


@pytest.mark.parametrize("form", ["txt", "parquet"])
def test_the_financial_phrasebank_is_read_in_its_published_forms(tmp_path: Path, form: str) -> None:
    *_, bank = suites.with_own_questions("finance", phrase_bank(tmp_path, form))
    assert [benchmark.name for benchmark in suites.SUITES["finance"]] == ["FiQA"]
    assert bank.name == "Financial PhraseBank"
    assert [question.answer for question in bank.load()] == [label for _, label in PHRASES]
    for question, (text, _) in zip(bank.load(), PHRASES, strict=True):
        assert question.options == ("negative", "neutral", "positive")
        assert question.prompt.startswith(f"News: {text}\n")


MMLU = {"virology": [("What?", ["a", "b", "c", "d"], 1), ("Why, oh why?", ["1", "2", "3", "4"], 3)]}
MMLU["high_school_physics"] = [("How?", ["u", "v", "w", "x"], 0)]


def mmlu(folder: Path, form: str) -> Path:
    """MMLU in one of the forms in which it is published."""
    if form == "files":
        for subject, rows in MMLU.items():
            with (folder / f"{subject}_test.csv").open("w", newline="") as file:
                lines = csv.writer(file)
                lines.writerows([question, *choices, "ABCD"[answer]] for question, choices, answer in rows)
        return folder
    found = [
        {"question": question, "subject": subject, "choices": choices, "answer": answer}
        for subject, rows in MMLU.items()
        for question, choices, answer in rows
    ]
    path = folder / "test-00000-of-00001.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in found))
    return path


@pytest.mark.parametrize("form", ["files", "table"])
def test_mmlu_is_read_by_subject_in_its_published_forms(tmp_path: Path, form: str) -> None:
    physics, virology = suites.with_own_questions("general", mmlu(tmp_path, form))
    assert (physics.name, virology.name) == ("MMLU high school physics", "MMLU virology")
    assert [question.answer for question in virology.load()] == ["B", "D"]
    assert virology.load()[1].prompt == "Question: Why, oh why?\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer:"


def test_a_table_has_a_row_for_each_subject_and_their_mean(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation, "SUITES", suites.SUITES)
    physics, virology, mean = evaluate(trained, "general", own=mmlu(tmp_path, "table"))
    assert (physics.trained, virology.trained) == (1.0, 0.0)  # the model says A
    assert mean.benchmark == "MMLU, mean of 2"
    assert (mean.trained, mean.rows, mean.interval) == (0.5, 3, None)
    assert mean.base == (physics.base + virology.base) / 2  # type: ignore[operator]


@pytest.mark.parametrize(
    ("suite", "name", "content", "wanted"),
    [
        ("finance", "a.txt", "Profit rose.@good\n", "a.txt: line 1: has the sentiment 'good'"),
        ("finance", "a.txt", "Profit rose.\n", "a.txt: line 1"),
        ("finance", "a.txt", "", "is empty"),
        ("finance", "a.csv", "text,label\nx,positive\n", "there is no column 'sentence'"),
        ("general", "a.csv", "question,answer\nx,A\n", "there is no column"),
        ("general", "b_test.csv", "What?,a,b,c,A\n", "there is no column"),
        (
            "general",
            "a.jsonl",
            '{"question": "x", "subject": "y", "choices": ["a"], "answer": 0}',
            "1 options",
        ),
    ],
    ids=["sentiment", "no-at", "empty", "sentence", "columns", "one-file", "options"],
)
def test_wrong_questions_of_the_user_are_refused_with_their_place(
    tmp_path: Path, suite: str, name: str, content: str, wanted: str
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=wanted):
        suites.with_own_questions(suite, tmp_path / name)


def test_questions_of_the_user_belong_to_suites_that_take_them(tmp_path: Path) -> None:
    with pytest.raises(GenerationError, match="the suite 'medical' takes no questions of your own"):
        suites.with_own_questions("medical", tmp_path)
    with pytest.raises(DataError, match="there is no such file or folder"):
        suites.with_own_questions("finance", tmp_path / "none.csv")


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        ([], "--suite, --lm-eval"),
        (["--suite", "medical", "--lm-eval", "mmlu"], "--suite, --lm-eval"),
        (["--lm-eval", "mmlu", "--data", "x"], "--data"),
        (["--suite", "medical", "--include", "x"], "--include"),
    ],
    ids=["none", "both", "data", "include"],
)
def test_options_that_contradict_each_other_are_refused(
    tmp_path: Path, arguments: list[str], wanted: str
) -> None:
    done = CliRunner().invoke(cli.app, ["evaluate", str(tmp_path), *arguments])
    assert done.exit_code == 2
    assert wanted in re.sub(r"\x1b\[[0-9;]*m", "", done.output)


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
