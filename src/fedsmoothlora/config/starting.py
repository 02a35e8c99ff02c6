"""A configuration to start from, for the user's own data: the task and the columns are guessed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedsmoothlora.config.column_kinds import (
    IMAGES,
    RECORDINGS,
    Columns,
    are_chats,
    are_decimals,
    are_flags,
    are_images,
    are_lists,
    are_recordings,
    are_texts,
    distinct,
    is_in_a_template,
    list_in,
    named,
)
from fedsmoothlora.config.in_words import toml
from fedsmoothlora.data.chats import CHAT_COLUMNS
from fedsmoothlora.data.leftovers import entries_in
from fedsmoothlora.data.table_files import clients_in, first_rows, is_table
from fedsmoothlora.errors import DataError

# Usual names of training and test sets, and of columns; the likeliest first.
_TRAIN = ("train", "training")
_TEST = ("test", "testing", "val", "valid", "validation", "dev")
_LABELS = ("label", "labels", "class", "category", "target", "sentiment", "topic", "intent", "diagnosis")
_TEXTS = ("text", "sentence", "document", "content", "body", "review", "comment", "message", "title")
_QUESTIONS = ("prompt", "question", "instruction", "query", "problem", "input")
_CONTEXTS = ("context", "passage", "input")
_ANSWERS = ("answer", "response", "output", "completion", "reply", "solution", "summary")
_NUMBERS = ("score", "similarity", "similarity_score", "rating", "value")
_LABEL_LISTS = (*_LABELS, "tags", "topics", "categories", "classes", "genres", "emotions")
_WORDS = ("tokens", "words")
_TAGS = ("tags", "ner_tags", "labels", "ner", "pos_tags")
_PAIRS = (
    ("premise", "hypothesis"),
    ("sentence1", "sentence2"),
    ("sentence_1", "sentence_2"),
    ("question1", "question2"),
    ("text1", "text2"),
    ("text_a", "text_b"),
)
_TRANSLATED = (
    ("article", "highlights"),
    ("article", "summary"),
    ("document", "summary"),
    ("dialogue", "summary"),
    ("source", "target"),
    ("src", "tgt"),
)
_CLIENTS = ("client", "client_id", "site", "hospital", "center", "centre", "institution", "user", "user_id")

_ROWS = 1000  # the first rows, from which columns are guessed
_MOST_CLASSES = 100
_MOST_CLIENTS = 100


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
    """The text of a configuration for a table, a folder of tables, or a folder of images or recordings.

    A comment that begins with ``guessed`` explains every guess.

    Args:
        path: the user's data.

    Raises:
        DataError: there are no such data, or the task cannot be guessed from them.
    """
    if not path.exists():
        raise DataError(f"{path}: there is no such file or folder")
    source, test = _training_and_test(path)
    alone = source.is_file() or is_table(source)
    tables = [source] if alone else [file for file in entries_in(source) if is_table(file)]
    if not all(map(is_table, tables)):
        raise DataError(f"{path}: of unknown kind; should be a CSV, JSONL or Parquet file, or a folder")
    guess = _of_tables(tables) if tables else _of_folders(source)
    return _text(path, source, test, guess)


def _training_and_test(path: Path) -> tuple[Path, Path | None]:
    """The training data, and the test data where a folder has both by their usual names."""
    entries = {entry.stem.lower(): entry for entry in entries_in(path)} if path.is_dir() else {}
    train = next((entries[name] for name in _TRAIN if name in entries), None)
    if train is None:
        return path, None
    return train, next((entries[name] for name in _TEST if name in entries), None)


# -- the task --------------------------------------------------------------------------------------


def _of_folders(root: Path) -> _Guess:
    folders = [entry for entry in entries_in(root) if entry.is_dir()]
    inner = [entry for folder in folders for entry in entries_in(folder) if entry.is_dir()]
    for kind, what, suffixes in (
        ("image-classification", "images", IMAGES),
        ("audio-classification", "recordings", RECORDINGS),
    ):
        if count := sum(_files_in(folder, suffixes) for folder in folders):
            return _Guess(kind, f"{len(folders)} folders of {what}, one for each class", _iid(count))
        if any(_files_in(folder, suffixes) for folder in inner):
            one_each = _Line("kind", "by_file", f"guessed: each of {len(folders)} folders is a client")
            return _Guess(kind, "class folders in client folders", [one_each])
    raise DataError(
        f"{root}: nothing can be guessed; should hold a folder of images or recordings for each class, or "
        "files ending in .csv, .jsonl or .parquet"
    )


def _files_in(folder: Path, suffixes: Sequence[str]) -> int:
    return sum(entry.suffix.lower() in suffixes for entry in entries_in(folder))


def _of_tables(tables: Sequence[Path]) -> _Guess:
    columns = _first_rows(tables[0])
    partition = _partition(tables, columns)
    clients = [line.value for line in partition if line.key == "column"]
    columns = {name: values for name, values in columns.items() if name not in clients}
    texts = [
        name
        for name, values in columns.items()
        if is_in_a_template(name) and are_texts(values) and not are_lists(values)
    ]
    files = next((name for name, values in columns.items() if are_images(values)), None)
    recordings = next((name for name, values in columns.items() if are_recordings(values)), None)
    label = _label(columns, files or recordings)
    chat = next((name for name in CHAT_COLUMNS if name in columns and are_chats(columns[name])), None)
    guess: _Guess | None
    if files is not None:
        guess = _images(files, label, columns, partition)
    elif recordings is not None:
        guess = _recordings(recordings, label, partition)
    elif chat is not None:
        guess = _chats(chat, partition)
    elif {"chosen", "rejected"} <= columns.keys():
        guess = _Guess("preference", "columns 'chosen' and 'rejected'", partition)
    else:
        guess = _texts(texts, label, columns, partition)
    if guess is None:
        raise DataError(
            f"{tables[0]}: the task cannot be guessed: no columns look like labels beside texts, images or "
            f"recordings, or like questions and answers. The columns are {', '.join(columns)}; start from a "
            "recipe instead: fedsmoothlora init RECIPE"
        )
    return guess


def _images(image: str, label: str | None, columns: Columns, partition: Sequence[_Line]) -> _Guess | None:
    because = f"column {image!r} holds images"
    data = [_Line("image_column", image, "guessed: holds images or their paths")] if image != "image" else []
    if (sets := _label_sets({name: columns[name] for name in columns if name != image})) is not None:
        return _Guess("multi-label-image", because, partition, [*data, *sets.data], sets.task)
    if label is None:
        return None
    return _Guess(
        "image-classification",
        because,
        partition,
        [*data, _Line("label_column", label, "guessed: the class")],
    )


def _texts(
    texts: Sequence[str], label: str | None, columns: Columns, partition: Sequence[_Line]
) -> _Guess | None:
    if (guess := _tagged_words(columns, partition)) is not None:
        return guess
    several = _several_labels(texts, columns, partition) or _numbers(texts, columns, partition)
    usual = named(_LABELS, columns)
    if usual is not None and (are_lists(columns[usual]) or are_decimals(columns[usual])):
        return several
    labelled = _labelled_texts(texts, label, columns, partition)
    if usual is not None and named(_TEXTS, texts):
        return labelled
    answers = _answers(texts, columns, partition) or _translations(texts, columns, partition)
    return answers or several or labelled


def _recordings(audio: str, label: str | None, partition: Sequence[_Line]) -> _Guess | None:
    if label is None:
        return None
    data = [_Line("label_column", label, "guessed: the class")]
    if audio != "audio":
        data.insert(0, _Line("audio_column", audio, "guessed: holds recordings or their paths"))
    return _Guess("audio-classification", f"column {audio!r} holds recordings", partition, data)


def _tagged_words(columns: Columns, partition: Sequence[_Line]) -> _Guess | None:
    """Lists of words beside lists of tags of the same lengths."""
    lists = {
        name: [list_in(value) for value in values] for name, values in columns.items() if are_lists(values)
    }
    words, tags = named(_WORDS, lists), named(_TAGS, lists)
    if words is None or tags is None:
        return None
    if any(len(one or ()) != len(other or ()) for one, other in zip(lists[words], lists[tags], strict=True)):
        return None
    task = [
        _Line("tokens_column", words, "guessed: the words"),
        _Line("tags_column", tags, "guessed: a tag for each word"),
    ]
    return _Guess("token-classification", f"columns {words!r} and {tags!r}", partition, [], task)


@dataclass(frozen=True)
class _LabelSets:
    """Lines of ``[data]`` and ``[task]`` that name the columns of labels, and the reason."""

    because: str
    data: Sequence[_Line]
    task: Sequence[_Line]


def _label_sets(columns: Columns) -> _LabelSets | None:
    """A column of lists of labels, or several columns of 0 and 1 where no other column looks like a class."""
    lists = [name for name, values in columns.items() if are_lists(values)]
    if (column := named(_LABEL_LISTS, lists)) is not None:
        return _LabelSets(
            f"column {column!r} holds lists", [_Line("label_column", column, "guessed: lists of labels")], []
        )
    flags = [name for name, values in columns.items() if are_flags(values)]
    others = {name: values for name, values in columns.items() if name not in flags}
    if len(flags) < 2 or named(_LABELS, columns) is not None or _label(others, None) is not None:
        return None
    line = _Line("label_columns", flags, "guessed: 1 in rows that have the label, else 0")
    return _LabelSets(f"{len(flags)} columns hold 0 and 1", [], [line])


def _several_labels(texts: Sequence[str], columns: Columns, partition: Sequence[_Line]) -> _Guess | None:
    sets = _label_sets(columns)
    if sets is None or not texts:
        return None
    task = [*_inputs(texts, columns), *sets.task]
    return _Guess("multi-label", sets.because, partition, sets.data, task)


def _numbers(texts: Sequence[str], columns: Columns, partition: Sequence[_Line]) -> _Guess | None:
    """Texts beside decimal numbers under a usual name."""
    column = named((*_LABELS, *_NUMBERS), [name for name in columns if are_decimals(columns[name])])
    texts = [name for name in texts if name != column and not are_decimals(columns[name])]
    if column is None or not texts:
        return None
    data = [_Line("label_column", column, "guessed: decimal numbers")]
    because = f"column {column!r} holds decimal numbers"
    return _Guess("text-regression", because, partition, data, _inputs(texts, columns))


def _translations(texts: Sequence[str], columns: Columns, partition: Sequence[_Line]) -> _Guess | None:
    """Two columns of texts with names of a text and what is written from it."""
    for source, target in _TRANSLATED:
        first, second = named([source], texts), named([target], texts)
        if first and second and 2 * distinct(columns[second]) > len(columns[second]):
            task = [
                _Line("prompt", f"{{{first}}}", "guessed: the text to read; columns stand in braces"),
                _Line("answer", f"{{{second}}}", "guessed: the text to write"),
            ]
            return _Guess("seq2seq", f"columns {first!r} and {second!r}", partition, [], task)
    return None


def _chats(column: str, partition: Sequence[_Line]) -> _Guess:
    task = [_Line("messages", column, "guessed: chats; the loss is on every turn of the assistant")]
    return _Guess("causal-lm", f"column {column!r} holds chats", partition, [], task)


def _answers(texts: Sequence[str], columns: Columns, partition: Sequence[_Line]) -> _Guess | None:
    question, answer = named(_QUESTIONS, texts), named(_ANSWERS, columns)
    if question is None or answer is None or question == answer:
        return None
    blank = [name for name, values in columns.items() if not any(values)]  # perhaps not in later rows
    context = named([name for name in _CONTEXTS if name != question.lower()], [*texts, *blank])
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
    data = [_Line("label_column", label, f"guessed: {distinct(columns[label])} different values")]
    pair = _pair_of(texts)
    inputs = " and ".join(map(repr, pair)) if pair else repr(_text_of(texts, columns))
    because = f"columns {inputs} and {label!r}"
    return _Guess("text-classification", because, partition, data, _inputs(texts, columns))


def _inputs(texts: Sequence[str], columns: Columns) -> Sequence[_Line]:
    """The line of ``[task]`` that names the model's input: a pair of columns, or one column."""
    if pair := _pair_of(texts):
        return [_Line("text", pair, "guessed: the two texts of a pair")]
    text = _text_of(texts, columns)
    return [_Line("prompt", f"{{{text}}}", "guessed: the model's input; columns stand in braces")]


def _pair_of(texts: Sequence[str]) -> list[str]:
    """The two columns of a pair of texts, by their names; empty if there is no pair."""
    for usual in _PAIRS:
        pair = [name for name in (named([name], texts) for name in usual) if name is not None]
        if len(pair) == len(usual):
            return pair
    return []


def _text_of(texts: Sequence[str], columns: Columns) -> str:
    """The column of the text: by its name, or the one with the longest texts."""
    longest = max(texts, key=lambda name: sum(map(len, map(str, columns[name]))))
    return named((*_TEXTS, *_QUESTIONS), texts) or longest


# -- columns ---------------------------------------------------------------------------------------


def _first_rows(file: Path) -> Columns:
    """The values of every named column in the first rows; None where a row has no value.

    Raises ``DataError`` if the file cannot be read, or has no rows.
    """
    rows = first_rows(file, _ROWS)
    if not rows:
        raise DataError(f"{file}: there are no rows")
    names = dict.fromkeys(name for row in rows for name in row if name)
    return {name: [row.get(name) for row in rows] for name in names}


def _label(columns: Columns, image: str | None) -> str | None:
    """The column of the classes: by its name, or the last one that has few different values."""
    if found := named(_LABELS, columns):
        return found
    few = [
        name
        for name, values in columns.items()
        if name != image and 2 <= distinct(values) <= min(_MOST_CLASSES, len(values) // 2)
    ]
    return few[-1] if few else None


# -- the clients -----------------------------------------------------------------------------------


def _partition(tables: Sequence[Path], columns: Columns) -> Sequence[_Line]:
    if len(tables) > 1:
        return [_Line("kind", "by_file", f"guessed: each of {len(tables)} files is a client")]
    if keys := clients_in(tables[0]):
        return [_Line("kind", "by_file", f"guessed: each of {len(keys)} keys is a client")]
    rows = len(next(iter(columns.values())))
    column = named(_CLIENTS, columns)
    if column is None or not all(map(_is_name, columns[column])):
        return _iid(rows)
    clients = distinct(columns[column])
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
_ENCODER = [_Line("source", "pkg:minilm-l6-first-token", _OTHERS)]
_VISION = [
    _Line("source", "pkg:dinov2-small", _OTHERS),
    _Line("image_size", 56, "a multiple of 14; larger images take longer and may be classified better"),
]
_MODELS = {
    "image-classification": _VISION,
    "multi-label-image": _VISION,
    "audio-classification": [_Line("source", "facebook/wav2vec2-base", "a hub id, or a folder")],
    "text-classification": _ENCODER,
    "text-regression": _ENCODER,
    "multi-label": _ENCODER,
    "token-classification": _ENCODER,
    "seq2seq": [_Line("source", "google-t5/t5-small", "a hub id, or a folder")],
    "causal-lm": [_Line("source", "pkg:smollm2-135m", _OTHERS)],
    "preference": [_Line("source", "pkg:smollm2-135m", _OTHERS)],
}
_IMAGE_TRAINING = [_Line("rounds", 5), _Line("lr", 0.003)]
_TEXT_TRAINING = [_Line("rounds", 5), _Line("optimizer", "adamw"), _Line("lr", 0.001)]
_TRAINING = {
    "image-classification": _IMAGE_TRAINING,
    "multi-label-image": _IMAGE_TRAINING,
    "seq2seq": [_Line("rounds", 5), _Line("lr", 0.0005)],
    "causal-lm": [_Line("rounds", 5), _Line("lr", 0.0005)],
    "preference": [_Line("rounds", 5), _Line("lr", 0.00005)],
}
_GAMMAS = {"image-classification": 256.0, "multi-label-image": 256.0}


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
        "method": [_Line("name", "fedsmoothlora"), _Line("gamma", _GAMMAS.get(guess.kind, 64.0))],
        "training": _TRAINING.get(guess.kind, _TEXT_TRAINING),
    }
    parts = [
        "# Written by `fedsmoothlora init --data`: correct wrong guesses, then run `fedsmoothlora check`.\n"
        "# `fedsmoothlora config SECTION` lists all keys of a section.",
        str(_Line("name", Path(path.resolve().name.removesuffix(".gz")).stem)),
    ]
    parts += ["\n".join([f"[{name}]", *map(str, lines)]) for name, lines in sections.items()]
    return "\n\n".join(parts) + "\n"
