"""`fedsmoothlora init --data` writes a configuration for the user's own data that `check` accepts."""

import csv
import gzip
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from PIL import Image
from pyarrow import Table, parquet
from rich.console import Console

from fedsmoothlora.config import read
from fedsmoothlora.config.model import Config
from fedsmoothlora.config.starting import guessed
from fedsmoothlora.errors import DataError
from fedsmoothlora.runs.check import check

Rows = Sequence[dict[str, Any]]
Writer = Callable[[Path, Rows], Path]

REVIEWS = [
    {
        "id": str(row),
        "text": f"a film number {row}",
        "label": ["good", "bad"][row % 2],
        "site": "abc"[row % 3],
    }
    for row in range(48)
]
QUESTIONS = [{"question": f"What is {row} and 1?", "answer": str(row + 1)} for row in range(48)]


def write_csv(file: Path, rows: Rows) -> Path:
    with file.open("w", newline="", encoding="utf-8") as text:
        lines = csv.DictWriter(text, rows[0].keys())
        lines.writeheader()
        lines.writerows(rows)
    return file


def write_jsonl(file: Path, rows: Rows) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def write_json(file: Path, rows: Rows) -> Path:
    file.write_text(json.dumps(list(rows), indent=1))
    return file


def write_parquet(file: Path, rows: Rows) -> Path:
    parquet.write_table(Table.from_pylist(list(rows)), file)
    return file


def write_tsv(file: Path, rows: Rows) -> Path:
    text = write_csv(file, rows).read_text(encoding="utf-8")
    file.write_text(text.replace(",", "\t"), encoding="utf-8")
    return file


def write_semicolons(file: Path, rows: Rows) -> Path:
    text = write_csv(file, rows).read_text(encoding="utf-8")
    file.write_text(text.replace(",", ";"), encoding="utf-8")
    return file


def write_compressed(write: Writer) -> Writer:
    def compressed(file: Path, rows: Rows) -> Path:
        file.write_bytes(gzip.compress(write(file, rows).read_bytes()))
        return file

    return compressed


def write_saved(folder: Path, rows: Rows) -> Path:
    Dataset.from_list(list(rows)).save_to_disk(folder)
    return folder


def write_images(folder: Path, classes: Sequence[str] = ("cat", "dog"), each: int = 24) -> Path:
    for label in classes:
        (folder / label).mkdir(parents=True)
        for number in range(each):
            pixels = np.full((28, 28, 3), 5 * number, dtype=np.uint8)
            Image.fromarray(pixels).save(folder / label / f"{number}.png")
    return folder


@pytest.fixture
def config(tmp_path: Path) -> Callable[[Path], Config]:
    """The configuration that is written for some data."""

    def make(data: Path, overrides: dict[str, Any] | None = None) -> Config:
        file = tmp_path / "written.toml"
        file.write_text(guessed(data), encoding="utf-8")
        return read(file, overrides)

    return make


Make = Callable[..., Config]
# The name of the file, and its writer.
WRITERS: list[Any] = [
    pytest.param("rows.csv", write_csv, id="csv"),
    pytest.param("rows.csv", write_semicolons, id="semicolons"),
    pytest.param("rows.tsv", write_tsv, id="tsv"),
    pytest.param("rows.jsonl", write_jsonl, id="jsonl"),
    pytest.param("rows.json", write_json, id="json"),
    pytest.param("rows.parquet", write_parquet, id="parquet"),
    pytest.param("rows.csv.gz", write_compressed(write_csv), id="csv.gz"),
    pytest.param("rows.jsonl.gz", write_compressed(write_jsonl), id="jsonl.gz"),
    pytest.param("rows", write_saved, id="saved"),
]


@pytest.mark.parametrize(("name", "write"), WRITERS)
def test_a_table_with_text_and_label_is_classified(
    config: Make, tmp_path: Path, name: str, write: Writer
) -> None:
    found = config(write(tmp_path / name, REVIEWS))
    assert (found.name, found.task.kind) == ("rows", "text-classification")
    assert (found.data.label_column, found.task.prompt) == ("label", "{text}")
    assert found.partition.options() == {"column": "site"}


@pytest.mark.parametrize(("name", "write"), WRITERS)
def test_a_table_with_questions_and_answers_gives_a_language_model_task(
    config: Make, tmp_path: Path, name: str, write: Writer
) -> None:
    found = config(write(tmp_path / name, QUESTIONS))
    assert found.task.kind == "causal-lm"
    assert (found.task.prompt, found.task.answer) == ("{question}\n", "{answer}")
    assert found.partition.options() == {"clients": 5}


def test_chats_and_preferences_are_recognised(config: Make, tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}]
    chats = config(write_jsonl(tmp_path / "chats.jsonl", [{"messages": turns}] * 16))
    assert (chats.task.kind, chats.task.messages) == ("causal-lm", "messages")  # type: ignore[attr-defined]
    pairs = [{"prompt": "1+1?", "chosen": "2", "rejected": "3"}] * 16
    assert config(write_jsonl(tmp_path / "pairs.jsonl", pairs)).task.kind == "preference"


def test_every_guess_has_a_comment(tmp_path: Path) -> None:
    text = guessed(write_csv(tmp_path / "reviews.csv", REVIEWS))
    assert 'label_column = "label"  # guessed: 2 different values' in text
    assert 'column = "site"  # guessed: each of its values is a client; 3 in the first rows' in text


def test_an_instruction_with_an_input_is_one_prompt(config: Make, tmp_path: Path) -> None:
    rows = [{"instruction": "Add.", "input": f"{n} 1", "output": str(n + 1)} for n in range(20)]
    found = config(write_jsonl(tmp_path / "alpaca.jsonl", rows))
    assert (found.task.prompt, found.task.answer) == ("{instruction}\n{input}\n", "{output}")


def test_an_input_that_the_first_rows_lack_is_part_of_the_prompt(config: Make, tmp_path: Path) -> None:
    rows = [{"instruction": f"Add {n}.", "input": "", "output": str(n)} for n in range(20)]
    found = config(write_jsonl(tmp_path / "alpaca.jsonl", rows))
    assert found.task.prompt == "{instruction}\n{input}\n"


def test_a_guessed_pair_is_named_in_the_comment(tmp_path: Path) -> None:
    rows = [{"premise": f"a text {n}", "hypothesis": f"b {n}", "label": "yn"[n % 2]} for n in range(20)]
    assert "columns 'premise' and 'hypothesis' and 'label'" in guessed(
        write_jsonl(tmp_path / "p.jsonl", rows)
    )


def test_answer_columns_are_preferred_to_columns_not_called_label(config: Make, tmp_path: Path) -> None:
    rows = [
        {"title": "ab"[n % 2], "context": f"{n} is here", "question": f"where is {n}?", "answer": "here"}
        for n in range(20)
    ]
    found = config(write_jsonl(tmp_path / "reading.jsonl", rows))
    assert (found.task.kind, found.task.prompt) == ("causal-lm", "{context}\n{question}\n")


def test_columns_with_unusual_names_are_recognised_by_their_values(config: Make, tmp_path: Path) -> None:
    rows = [{"stars": n % 3, "opinion": f"long opinion about {n}", "{odd}": "x" * 90} for n in range(30)]
    found = config(write_jsonl(tmp_path / "opinions.jsonl", rows))
    assert (found.data.label_column, found.task.prompt) == ("stars", "{opinion}")


TEXT = [f"some text about thing {n}" for n in range(24)]
GUESSED: list[Any] = [
    pytest.param(
        [{"premise": t, "hypothesis": t[::-1], "label": "yes" if len(t) % 2 else "no"} for t in TEXT],
        ("text-classification", {"text": ("premise", "hypothesis")}, "label"),
        id="pair",
    ),
    pytest.param(
        [{"sentence1": t, "sentence2": t[::-1], "score": n / 7} for n, t in enumerate(TEXT)],
        ("text-regression", {"text": ("sentence1", "sentence2")}, "score"),
        id="numbers-of-pairs",
    ),
    pytest.param(
        [{"text": t, "label": str(n / 7)} for n, t in enumerate(TEXT)],
        ("text-regression", {"prompt": "{text}"}, "label"),
        id="numbers",
    ),
    pytest.param(
        [{"text": t, "tags": ["a", "b"][: n % 3]} for n, t in enumerate(TEXT)],
        ("multi-label", {"prompt": "{text}"}, "tags"),
        id="lists",
    ),
    pytest.param(
        [{"comment": t, "toxic": n % 2, "threat": n % 3 // 2} for n, t in enumerate(TEXT)],
        ("multi-label", {"prompt": "{comment}", "label_columns": ("toxic", "threat")}, None),
        id="flags",
    ),
    pytest.param(
        [{"tokens": t.split(), "ner_tags": ["O"] * 5} for t in TEXT],
        ("token-classification", {"tokens_column": "tokens", "tags_column": "ner_tags"}, None),
        id="tags",
    ),
    pytest.param(
        [{"article": t * 3, "summary": t} for t in TEXT],
        ("seq2seq", {"prompt": "{article}", "answer": "{summary}"}, None),
        id="seq2seq",
    ),
    pytest.param(
        [{"question": t, "answer": t, "score": n / 7, "tags": ["a"]} for n, t in enumerate(TEXT)],
        ("causal-lm", {"prompt": "{question}\n"}, None),
        id="answers-beside-scores-and-tags",
    ),
    pytest.param(
        [{"text": t, "label": "ab"[n % 2], "score": n / 7} for n, t in enumerate(TEXT)],
        ("text-classification", {"prompt": "{text}"}, "label"),
        id="label-beside-scores",
    ),
    pytest.param(
        [{"image": f"{n}.png", "labels": ["a", "b"][: n % 3]} for n in range(24)],
        ("multi-label-image", {}, "labels"),
        id="lists-of-images",
    ),
    pytest.param(
        [{"image": f"{n}.png", "a": n % 2, "b": n % 3 // 2, "finding": "xyz"[n % 3]} for n in range(24)],
        ("image-classification", {}, "finding"),
        id="class-beside-flags",
    ),
    pytest.param(
        [{"path": f"{n}.wav", "label": "ab"[n % 2]} for n in range(24)],
        ("audio-classification", {}, "label"),
        id="recordings",
    ),
]


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
@pytest.mark.parametrize(("rows", "wanted"), GUESSED)
def test_the_task_follows_from_the_columns_and_their_values(
    config: Make, tmp_path: Path, rows: Rows, wanted: tuple[str, dict[str, Any], str | None], suffix: str
) -> None:
    if suffix == ".csv":  # lists are written as JSON
        rows = [{k: json.dumps(v) if isinstance(v, list) else v for k, v in row.items()} for row in rows]
    found = config({".csv": write_csv, ".jsonl": write_jsonl}[suffix](tmp_path / f"own{suffix}", rows))
    kind, task, label = wanted
    assert (found.task.kind, found.data.label_column) == (kind, label)
    for key, value in task.items():
        assert getattr(found.task, key) == value


def test_a_conll_file_is_tagged(config: Make, tmp_path: Path) -> None:
    (tmp_path / "own.conll").write_text("Ada B-PER\nsleeps O\n\nIt O\nrains O\n")
    assert config(tmp_path / "own.conll").task.kind == "token-classification"


def test_folders_of_recordings_are_classified(config: Make, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / "sounds" / name).mkdir(parents=True)
        (tmp_path / "sounds" / name / "1.wav").write_bytes(b"")
    assert config(tmp_path / "sounds").task.kind == "audio-classification"


def test_files_in_a_folder_are_clients_and_train_and_test_are_not(config: Make, tmp_path: Path) -> None:
    (tmp_path / "sites").mkdir()
    for name in ("north", "south"):
        write_csv(tmp_path / "sites" / f"{name}.csv", REVIEWS)
    assert config(tmp_path / "sites").partition.kind == "by_file"
    (tmp_path / "parts").mkdir()
    for name in ("train", "test"):
        write_csv(tmp_path / "parts" / f"{name}.csv", REVIEWS)
    data = config(tmp_path / "parts").data
    assert (data.source, data.test) == (str(tmp_path / "parts/train.csv"), str(tmp_path / "parts/test.csv"))


def test_a_table_of_images_is_classified(config: Make, tmp_path: Path) -> None:
    write_images(tmp_path / "x")
    rows = [{"file": f"x/cat/{n}.png", "finding": "yes" if n % 2 else "no"} for n in range(24)]
    found = config(write_csv(tmp_path / "xrays.csv", rows))
    assert found.task.kind == "image-classification"
    assert (found.data.image_column, found.data.label_column) == ("file", "finding")


def test_image_folders_are_classified(config: Make, tmp_path: Path) -> None:
    found = config(write_images(tmp_path / "photos"))
    assert (found.task.kind, found.partition.options()) == ("image-classification", {"clients": 5})
    for client in ("north", "south"):
        write_images(tmp_path / "clients" / client, each=2)
    assert config(tmp_path / "clients").partition.kind == "by_file"


@pytest.mark.parametrize("kind", ["csv", "jsonl", "images"])
def test_check_accepts_what_is_written(
    config: Make, tmp_path: Path, tiny_bert: Path, tiny_llama: Path, tiny_folder: Path, kind: str
) -> None:
    data, model = {
        "csv": lambda: (write_csv(tmp_path / "reviews.csv", REVIEWS), tiny_bert),
        "jsonl": lambda: (write_jsonl(tmp_path / "sums.jsonl", QUESTIONS), tiny_llama),
        "images": lambda: (write_images(tmp_path / "photos"), tiny_folder),
    }[kind]()
    overrides = {"model.source": str(model), "machine.device": "cpu", "lora.r": 2}
    if kind == "jsonl":
        overrides["task.max_length"] = 64
    said = io.StringIO()
    check(config(data, overrides), Console(file=said, width=200))
    assert "everything that can be checked before training is in order" in said.getvalue()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"notes.txt": "hello"}, "nothing can be guessed"),
        ({}, "nothing can be guessed"),
        ({"a.csv": "x,y\n1.5,2.5\n3.5,4.5\n"}, "The columns are x, y"),
        ({"a.csv": "text\nhello\nyou\n"}, "the task cannot be guessed"),
        ({"a.csv": "text,label\n"}, "there are no rows"),
        ({"a.jsonl": "{\n"}, "not valid JSON"),
        ({"a.jsonl": "[1, 2]\n"}, "row 1 .* is not a JSON object"),
        ({"a.parquet": "nothing"}, "not a Parquet file"),
    ],
)
def test_data_that_cannot_be_guessed_are_refused(tmp_path: Path, content: dict[str, str], said: str) -> None:
    for name, text in content.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=said):
        guessed(tmp_path)


def test_a_missing_path_and_an_unknown_kind_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no such file or folder"):
        guessed(tmp_path / "gone.csv")
    (tmp_path / "a.xlsx").write_text("")
    with pytest.raises(DataError, match="of unknown kind"):
        guessed(tmp_path / "a.xlsx")


def test_a_long_field_of_csv_can_be_read(config: Make, tmp_path: Path) -> None:
    rows = [{"text": "word " * 40_000, "label": str(n % 2)} for n in range(4)]
    assert config(write_csv(tmp_path / "long.csv", rows)).task.kind == "text-classification"
