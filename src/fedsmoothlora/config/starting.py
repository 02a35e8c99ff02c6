"""A configuration to start from, for the user's own data: the task and the columns are guessed."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Formatter
from typing import Any

from fedsmoothlora.config.in_words import toml
from fedsmoothlora.config.peeking import first_rows
from fedsmoothlora.data.chats import CHAT_COLUMNS, is_chat
from fedsmoothlora.data.leftovers import entries_in
from fedsmoothlora.data.tables import is_table
from fedsmoothlora.errors import DataError

_IMAGES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")

# Usual names of training and test sets, and of columns; the likeliest first.
_TRAIN = ("train", "training")
_TEST = ("test", "testing", "val", "valid", "validation", "dev")
_LABELS = ("label", "labels", "class", "category", "target", "sentiment", "topic", "intent", "diagnosis")
_TEXTS = ("text", "sentence", "document", "content", "body", "review", "comment", "message", "title")
_QUESTIONS = ("prompt", "question", "instruction", "query", "problem", "input")
_CONTEXTS = ("context", "passage", "input")
_ANSWERS = ("answer", "response", "output", "completion", "reply", "solution", "summary")
_CLIENTS = ("client", "client_id", "site", "hospital", "center", "centre", "institution", "user", "user_id")

_MOST_CLASSES = 100
_MOST_CLIENTS = 100

Columns = Mapping[str, Sequence[Any]]


@dataclass(frozen=True)
class _Line:
    """A key of the new configuration, its value, and a comment for the user."""

    key: str
    value: Any
    comment: str = ""

    def __str__(self) -> str:
        text = f"{self.key} = {toml(self.value)}"
        return f"{text}  # {self.comment}" if self.comment else text


@dataclass(frozen=True)
class _Guess:
    """A task, the reason for it, and lines of ``[partition]``, ``[data]`` and ``[task]``."""

    kind: str
    because: str
    partition: Sequence[_Line]
    data: Sequence[_Line] = ()
    task: Sequence[_Line] = ()


def guessed(path: Path) -> str:
    """The text of a configuration for a table, a folder of tables, or an image folder.

    A comment that begins with ``guessed`` explains every guess.

    Args:
        path: the user's data.

    Raises:
        DataError: there are no such data, or the task cannot be guessed from them.
    """
    if not path.exists():
        raise DataError(f"{path}: there is no such file or folder")
    source, test = _training_and_test(path)
    tables = [file for file in entries_in(source) if is_table(file)] if source.is_dir() else [source]
    if not all(map(is_table, tables)):
        raise DataError(f"{path}: of unknown kind; should be a CSV, JSONL or Parquet file, or a folder")
    guess = _of_tables(tables) if tables else _of_image_folder(source)
    return _text(path, source, test, guess)


def _training_and_test(path: Path) -> tuple[Path, Path | None]:
    """The training data, and the test data where a folder has both by their usual names."""
    entries = {entry.stem.lower(): entry for entry in entries_in(path)} if path.is_dir() else {}
    train = next((entries[name] for name in _TRAIN if name in entries), None)
    if train is None:
        return path, None
    return train, next((entries[name] for name in _TEST if name in entries), None)


# -- the task --------------------------------------------------------------------------------------


def _of_image_folder(root: Path) -> _Guess:
    kind = "image-classification"
    folders = [entry for entry in entries_in(root) if entry.is_dir()]
    if any(map(_images_in, folders)):
        because = f"{len(folders)} folders of images, one for each class"
        return _Guess(kind, because, _iid(sum(map(_images_in, folders))))
    if any(_images_in(inner) for folder in folders for inner in entries_in(folder) if inner.is_dir()):
        one_each = _Line("kind", "by_file", f"guessed: each of {len(folders)} folders is a client")
        return _Guess(kind, "class folders in client folders", [one_each])
    raise DataError(
        f"{root}: nothing can be guessed; should hold a folder of images for each class, or files ending in "
        ".csv, .jsonl or .parquet"
    )


def _images_in(folder: Path) -> int:
    return sum(entry.suffix.lower() in _IMAGES for entry in entries_in(folder))


def _of_tables(tables: Sequence[Path]) -> _Guess:
    columns = first_rows(tables[0])
    partition = _partition(tables, columns)
    clients = [line.value for line in partition if line.key == "column"]
    columns = {name: values for name, values in columns.items() if name not in clients}
    texts = [name for name, values in columns.items() if _is_in_a_template(name) and _are_texts(values)]
    image = next((name for name, values in columns.items() if _are_images(values)), None)
    label = _label(columns, image)
    chat = next((name for name in CHAT_COLUMNS if name in columns and _are_chats(columns[name])), None)
    if image is not None:
        guess = _images(image, label, partition)
    elif chat is not None:
        guess = _chats(chat, partition)
    elif {"chosen", "rejected"} <= columns.keys():
        guess = _Guess("preference", "columns 'chosen' and 'rejected'", partition)
    elif _named(_TEXTS, texts) and _named(_LABELS, columns):
        guess = _labelled_texts(texts, label, columns, partition)
    else:
        guess = _answers(texts, columns, partition) or _labelled_texts(texts, label, columns, partition)
    if guess is None:
        raise DataError(
            f"{tables[0]}: the task cannot be guessed: no columns look like labels beside texts or images, "
            f"or like questions and answers. The columns are {', '.join(columns)}; start from a recipe "
            "instead: fedsmoothlora init RECIPE"
        )
    return guess


def _images(image: str, label: str | None, partition: Sequence[_Line]) -> _Guess | None:
    if label is None:
        return None
    data = [_Line("label_column", label, "guessed: the class")]
    if image != "image":
        data.insert(0, _Line("image_column", image, "guessed: holds images or their paths"))
    return _Guess("image-classification", f"column {image!r} holds images", partition, data)


def _chats(column: str, partition: Sequence[_Line]) -> _Guess:
    task = [_Line("messages", column, "guessed: chats; the loss is on every turn of the assistant")]
    return _Guess("causal-lm", f"column {column!r} holds chats", partition, [], task)


def _answers(texts: Sequence[str], columns: Columns, partition: Sequence[_Line]) -> _Guess | None:
    question, answer = _named(_QUESTIONS, texts), _named(_ANSWERS, columns)
    if question is None or answer is None or question == answer:
        return None
    context = _named([name for name in _CONTEXTS if name != question.lower()], texts)
    parts = [f"{{{name}}}" for name in (context, question) if name]
    if question.lower() == "instruction":
        parts.reverse()  # an instruction stands before its input
    task = [
        _Line("prompt", "\n".join(parts) + "\n", "guessed: the model's input; columns stand in braces"),
        _Line("answer", f"{{{answer}}}", "guessed: the text to learn"),
    ]
    return _Guess("causal-lm", f"columns {question!r} and {answer!r}", partition, [], task)


def _labelled_texts(
    texts: Sequence[str], label: str | None, columns: Columns, partition: Sequence[_Line]
) -> _Guess | None:
    texts = [name for name in texts if name != label]
    if label is None or not texts:
        return None
    longest = max(texts, key=lambda name: sum(map(len, map(str, columns[name]))))
    text = _named((*_TEXTS, *_QUESTIONS), texts) or longest
    data = [_Line("label_column", label, f"guessed: {_distinct(columns[label])} different values")]
    task = [_Line("prompt", f"{{{text}}}", "guessed: the text to classify; columns stand in braces")]
    return _Guess("text-classification", f"columns {text!r} and {label!r}", partition, data, task)


# -- columns ---------------------------------------------------------------------------------------


def _named(usual: Iterable[str], names: Iterable[str]) -> str | None:
    """The first column that has one of the usual names."""
    by_lower = {name.lower(): name for name in names}
    return next((by_lower[name] for name in usual if name in by_lower), None)


def _label(columns: Columns, image: str | None) -> str | None:
    """The column of the classes: by its name, or the last one that has few different values."""
    if found := _named(_LABELS, columns):
        return found
    few = [
        name
        for name, values in columns.items()
        if name != image and 2 <= _distinct(values) <= min(_MOST_CLASSES, len(values) // 2)
    ]
    return few[-1] if few else None


def _distinct(values: Sequence[Any]) -> int:
    return len({str(value) for value in values})


def _are_texts(values: Sequence[Any]) -> bool:
    return all(isinstance(value, str | None) for value in values) and any(values)


def _are_images(values: Sequence[Any]) -> bool:
    """Whether these are paths or bytes of images; the image feature of ``datasets`` holds either."""
    if all(isinstance(value, bytes) or (isinstance(value, dict) and "bytes" in value) for value in values):
        return True
    return all(isinstance(value, str) and value.lower().endswith(_IMAGES) for value in values)


def _are_chats(values: Sequence[Any]) -> bool:
    """Whether these are lists of messages, or the JSON text of such lists."""
    return all(is_chat(value if isinstance(value, str) else json.dumps(value)) for value in values)


def _is_in_a_template(name: str) -> bool:
    """Whether a template such as ``{name}`` can name the column."""
    try:
        return list(Formatter().parse(f"{{{name}}}")) == [("", name, "", None)]
    except ValueError:
        return False


# -- the clients -----------------------------------------------------------------------------------


def _partition(tables: Sequence[Path], columns: Columns) -> Sequence[_Line]:
    if len(tables) > 1:
        return [_Line("kind", "by_file", f"guessed: each of {len(tables)} files is a client")]
    rows = len(next(iter(columns.values())))
    column = _named(_CLIENTS, columns)
    if column is None or not all(map(_is_name, columns[column])):
        return _iid(rows)
    clients = _distinct(columns[column])
    if not 2 <= clients <= min(_MOST_CLIENTS, rows // 2):
        return _iid(rows)
    return [
        _Line("kind", "by_column"),
        _Line("column", column, f"guessed: each of its values is a client; {clients} in the first rows"),
    ]


def _is_name(value: Any) -> bool:
    return value is not None and bool(str(value).strip())


def _iid(rows: int) -> Sequence[_Line]:
    return [
        _Line("kind", "iid", "no clients were found in the data: rows are dealt at random"),
        _Line("clients", max(1, min(5, rows // 8))),
    ]


# -- the file --------------------------------------------------------------------------------------

_OTHERS = "or a folder that transformers can load, or a hub id"
_MODELS = {
    "image-classification": [
        _Line("source", "pkg:dinov2-small", _OTHERS),
        _Line("image_size", 56, "a multiple of 14; larger images take longer and may be classified better"),
    ],
    "text-classification": [_Line("source", "pkg:minilm-l6-first-token", _OTHERS)],
    "causal-lm": [_Line("source", "pkg:smollm2-135m", _OTHERS)],
    "preference": [_Line("source", "pkg:smollm2-135m", _OTHERS)],
}
_TRAINING = {
    "image-classification": [_Line("rounds", 5), _Line("lr", 0.003)],
    "text-classification": [_Line("rounds", 5), _Line("optimizer", "adamw"), _Line("lr", 0.001)],
    "causal-lm": [_Line("rounds", 5), _Line("lr", 0.0005)],
    "preference": [_Line("rounds", 5), _Line("lr", 0.00005)],
}
_GAMMA = {"image-classification": 256.0, "text-classification": 64.0, "causal-lm": 64.0, "preference": 64.0}


def _text(path: Path, source: Path, test: Path | None, guess: _Guess) -> str:
    evaluated_on = (
        _Line("validation", 0.2, "share of each client's rows to evaluate on; or set data.test")
        if test is None
        else _Line("test", str(test), "guessed from its name")
    )
    sections = {
        "model": _MODELS[guess.kind],
        "data": [_Line("source", str(source)), *guess.data, evaluated_on],
        "task": [_Line("kind", guess.kind, f"guessed: {guess.because}"), *guess.task],
        "partition": guess.partition,
        "method": [_Line("name", "fedsmoothlora"), _Line("gamma", _GAMMA[guess.kind])],
        "training": _TRAINING[guess.kind],
    }
    parts = [
        "# Written by `fedsmoothlora init --data`: correct wrong guesses, then run `fedsmoothlora check`.\n"
        "# `fedsmoothlora config SECTION` lists all keys of a section.",
        str(_Line("name", path.resolve().stem)),
    ]
    parts += ["\n".join([f"[{name}]", *map(str, lines)]) for name, lines in sections.items()]
    return "\n\n".join(parts) + "\n"
