import csv
import gzip
import io
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from fedsmoothlora.data.loading import Data, is_path
from fedsmoothlora.data.read_texts import TextColumns, read_local
from fedsmoothlora.data.settings import DataSettings
from fedsmoothlora.data.tables import read_table
from fedsmoothlora.data.text_sources import load_texts
from fedsmoothlora.data.texts import Texts
from fedsmoothlora.errors import ConfigError, DataError

ROWS = [{"prompt": f"p {i}", "answer": ("one", "two")[i % 2]} for i in range(6)]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("FEDSMOOTHLORA_CACHE", str(folder))
    return folder


def write(path: Path, rows: list[dict[str, Any]], delimiter: str = ",") -> Path:
    """The rows in the format of the path's suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = path.name.removesuffix(".gz").rpartition(".")[2]
    if kind == "parquet":
        parquet.write_table(pa.Table.from_pylist(rows), path)
        return path
    text = io.StringIO(newline="")
    if kind in ("csv", "tsv"):
        writer = csv.writer(text, delimiter="\t" if kind == "tsv" else delimiter)
        writer.writerow(rows[0])
        writer.writerows(row.values() for row in rows)
    else:
        lines = [json.dumps(row) for row in rows]
        text.write("[" + ",\n".join(lines) + "]" if kind == "json" else "\n".join(lines))
    content = text.getvalue().encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def load(
    source: Path | str, *, label: str | None = None, client: str | None = None, **keys: Any
) -> Data[Texts]:
    wanted = {"prompt": "task.prompt", "answer": "task.answer"}
    return load_texts(DataSettings(source=str(source), **keys), 0, wanted, label, client)


def prompts(part: Texts | None) -> list[str]:
    assert part is not None
    return list(part.columns["prompt"])


# -- the text of the file --------------------------------------------------------------------------

KINDS = [
    "a.csv",
    "a.tsv",
    "a.jsonl",
    "a.json",
    "a.parquet",
    "a.csv.gz",
    "a.tsv.gz",
    "a.jsonl.gz",
    "a.json.gz",
]


@pytest.mark.parametrize("name", KINDS)
def test_every_format_is_read(tmp_path: Path, name: str) -> None:
    data = load(write(tmp_path / name, ROWS), label="answer")
    assert prompts(data.train) == [row["prompt"] for row in ROWS]
    assert data.classes == ("one", "two")
    assert data.file_of_row == [name.removesuffix(".gz")] * 6


# A surrogate is no character, and UTF-8 cannot have it.
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=5), st.sampled_from(KINDS))
def test_a_table_of_texts_is_read_back_exactly(rows: list[tuple[str, str]], name: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = write(Path(folder) / name, [{"a": a, "b": b} for a, b in rows])
        table = read_table(path, {"a": "x", "b": "x"})
        assert list(zip(table.raw_texts("a"), table.raw_texts("b"), strict=True)) == rows
        one = write(Path(folder) / name, [{"a": a} for a, _ in rows])
        assert read_table(one, {"a": "x"}).raw_texts("a") == [a for a, _ in rows]


NUMBERS = ["1", "1.50", "1e22", "-0.0", "9007199254740993", "123456789012345678901234567890", "1E-7", "2.0"]


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.jsonl", "a.json"])
def test_numbers_and_dates_keep_the_text_of_the_file(tmp_path: Path, name: str) -> None:
    texts = [*NUMBERS, "2024-03-01", "007", "NA", "true"]
    if name.endswith("sv"):
        write(tmp_path / name, [{"a": text} for text in texts])
    else:
        values = [*NUMBERS, '"2024-03-01"', '"007"', '"NA"', "true"]
        lines = [f'{{"a": {value}}}' for value in values]
        (tmp_path / name).write_text("[" + ",".join(lines) + "]" if name == "a.json" else "\n".join(lines))
    table = read_table(tmp_path / name, {"a": "x"})
    assert table.raw_texts("a") == texts
    assert table.texts("a", "client") == texts


def test_a_column_of_dates_alone_stays_text(tmp_path: Path) -> None:
    rows = [{"prompt": "p", "answer": f"2024-03-0{day}", "site": f"2024-0{day}-01"} for day in (1, 2)]
    data = load(write(tmp_path / "a.jsonl", rows), client="site")
    assert data.train.columns["answer"] == ["2024-03-01", "2024-03-02"]
    assert data.client_of_row == ["2024-01-01", "2024-02-01"]


def test_numbers_of_parquet_are_read_with_their_shortest_digits(tmp_path: Path) -> None:
    columns = {
        "short": pa.array([0.1, 2.0], pa.float32()),
        "large": pa.array([2**53 + 1, 2**64 - 1], pa.uint64()),
        "date": pa.array([0, 1], pa.date32()),
    }
    parquet.write_table(pa.table(columns), tmp_path / "a.parquet")
    table = read_table(tmp_path / "a.parquet", dict.fromkeys(columns, "x"))
    assert table.raw_texts("short") == ["0.1", "2"]
    assert table.raw_texts("large") == ["9007199254740993", "18446744073709551615"]
    assert table.raw_texts("date") == ["1970-01-01", "1970-01-02"]


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.parquet"])
def test_a_replaced_file_of_the_same_path_size_and_time_is_read_again(
    tmp_path: Path, cache: Path, name: str
) -> None:
    for text in ("old", "new"):
        path = write(tmp_path / name, [{"prompt": text, "answer": "x"}])
        os.utime(path, (0, 0))
        assert prompts(load(path).train) == [text]
    assert not any(cache.iterdir())


def test_bytes_of_images_are_memory_mapped_from_an_unlinked_file(tmp_path: Path, cache: Path) -> None:
    content = [os.urandom(1000) for _ in range(200)]
    parquet.write_table(pa.table({"image": content}), tmp_path / "a.parquet")
    table = read_table(tmp_path / "a.parquet", {"image": "x"})
    before = pa.total_allocated_bytes()
    assert [row["image"] for row in table.rows] == content
    assert table.columns.cells["image"].chunk(0).buffers()[2].is_mutable is False
    assert pa.total_allocated_bytes() - before < 100_000
    assert [path.name for path in cache.rglob("*")] == ["scratch"]
    assert (cache / "scratch").stat().st_mode & 0o777 == 0o700


# -- what is accepted ------------------------------------------------------------------------------


def test_an_unnamed_index_column_is_ignored(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(",prompt,,answer\n0,p,x,one\n1,q,y,two\n")
    assert prompts(load(tmp_path / "a.csv").train) == ["p", "q"]


def test_a_field_can_be_longer_than_the_limit_of_the_csv_module(tmp_path: Path) -> None:
    limit, text = csv.field_size_limit(), "long " * 40_000
    for name in ("a.csv", "a.tsv"):
        assert prompts(load(write(tmp_path / name, [{"prompt": text, "answer": "one"}])).train) == [text]
    assert csv.field_size_limit() == limit


def test_a_json_key_that_appears_late_is_empty_in_earlier_rows(tmp_path: Path) -> None:
    lines = ['{"prompt": "p"}', "", '{"prompt": "q", "answer": null}', '{"answer": 3, "prompt": "r"}']
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    assert load(tmp_path / "a.jsonl").train.columns["answer"] == ["", "", "3"]


@pytest.mark.parametrize("delimiter", [";", "\t", "|"])
def test_the_delimiter_of_a_csv_file_is_found_and_reported(tmp_path: Path, delimiter: str) -> None:
    path = write(tmp_path / "a.csv", [{"prompt": "a, b; c", "answer": "1,5"}, *ROWS], delimiter)
    data = load(path)
    assert prompts(data.train)[0] == "a, b; c"
    assert data.train.columns["answer"][0] == "1,5"
    assert "the values are separated by" in data.notes[0]


def test_quotation_marks_of_a_tsv_file_without_quoting_are_text(tmp_path: Path) -> None:
    text = 'prompt\tanswer\n"Hello" he said\tone\nso "what\ttwo\n"open\tthree\n'
    (tmp_path / "a.tsv").write_text(text)
    data = load(tmp_path / "a.tsv")
    assert prompts(data.train) == ['"Hello" he said', 'so "what', '"open']
    assert "quotation marks" in data.notes[0]


def test_data_sets_saved_to_disk_are_memory_mapped(tmp_path: Path, cache: Path) -> None:
    features = datasets.Features(
        {name: datasets.Value("string") for name in ("prompt", "answer")}
        | {"label": datasets.ClassLabel(names=["z", "a"])}
    )
    rows = datasets.Dataset.from_list(
        [{**row, "label": i % 2} for i, row in enumerate(ROWS)], features=features
    )
    rows.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": rows, "test": rows.select([0])}).save_to_disk(tmp_path / "dict")
    alone = load(tmp_path / "one", label="label")
    assert (prompts(alone.train), alone.classes) == ([row["prompt"] for row in ROWS], ("z", "a"))
    both = load(tmp_path / "dict", label="label")
    assert (len(both.train), prompts(both.test)) == (6, ["p 0"])
    assert not any(cache.iterdir())


def test_leftovers_of_file_servers_are_ignored(tmp_path: Path) -> None:
    write(tmp_path / "a.csv", ROWS)
    for name in ("._a.csv", ".DS_Store", "~$a.csv", "@eaDir/a.csv", "__MACOSX/a.csv"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"\0")
    data = load(tmp_path)
    assert (set(data.file_of_row or ()), data.notes) == ({"a.csv"}, [])


def test_a_missing_path_is_not_looked_for_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("asked the hub"))
    for source in ("data/train.csv", "train.jsonl.gz", "./data", "../x/y", "~/data", "/a", "a/b/c", "a b"):
        assert is_path(source)
        with pytest.raises(ConfigError, match="there is no such file or folder"):
            load(source)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    with pytest.raises(ConfigError, match="there is no such file or folder"):
        load("mine/xrays")
    assert not is_path("someone/pets.v1")
    assert not is_path("squad")


# -- splits ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("train", "test", "validation"),
    [
        ("train-00000-of-00001.parquet", "test-00000-of-00001.parquet", "validation-00000-of-00001.parquet"),
        ("data/train-a.tsv", "data/test-a.tsv", "data/validation-a.tsv"),
        ("train.csv", "test.csv", "val.csv"),
        ("a.csv", "my_eval_2.csv", "dev.csv"),
        ("Train.csv", "TEST.csv", "Valid.csv"),
        ("train/a.jsonl", "test/a.jsonl", "val/a.jsonl"),
    ],
)  # fmt: skip
def test_test_and_validation_files_of_a_folder_are_not_training_rows(
    tmp_path: Path, train: str, test: str, validation: str
) -> None:
    for name, part in [(train, "train"), (test, "test"), (validation, "validation")]:
        write(tmp_path / "x" / name, [{"prompt": f"{part} {i}", "answer": "x"} for i in range(2)])
    (tmp_path / "x" / "README.md").write_text("x")
    (tmp_path / "x" / "dataset_infos.json").write_text("{}")
    data = load(tmp_path / "x")
    assert (prompts(data.train), prompts(data.test)) == (["train 0", "train 1"], ["test 0", "test 1"])
    (note,) = [note for note in data.notes if "splits" in note]
    assert "validation (1 file) is not read, test (1 file) is the test set" in note
    if "-of-" not in validation:
        assert prompts(load(tmp_path / "x", test_split="validation").test) == ["validation 0", "validation 1"]
    named = load(tmp_path / "x", test=str(tmp_path / "x" / test))
    assert (len(named.train), prompts(named.test)) == (2, ["test 0", "test 1"])


def test_a_coordinator_reads_the_test_files_of_a_folder(tmp_path: Path) -> None:
    for name in ("train", "test"):
        write(tmp_path / f"{name}.csv", [{"prompt": name, "answer": "x", "label": "a"}] * 2)
    keys = DataSettings(source="at the sites", test=str(tmp_path), classes=("a", "b"))
    wanted = {"prompt": "task.prompt"}
    data = load_texts(keys, 0, wanted, "label", elsewhere=True)
    assert (len(data.train), prompts(data.test)) == (0, ["test", "test"])


@pytest.mark.parametrize("names", [("latest.csv", "contest.csv"), ("client-1.csv", "client-2.csv")])
def test_other_names_are_not_splits(tmp_path: Path, names: tuple[str, str]) -> None:
    for name in names:
        write(tmp_path / name, ROWS)
    data = load(tmp_path)
    assert (len(data.train), data.test, data.notes) == (12, None, [])
    with pytest.raises(ConfigError, match="test_split = 'x' does not belong"):
        load(tmp_path, test_split="x")


def test_splits_with_other_names_must_be_chosen(tmp_path: Path) -> None:
    for name in ("train_sft", "test_sft"):
        write(tmp_path / f"{name}-00000-of-00001.jsonl", [{"prompt": name, "answer": "x"}])
    with pytest.raises(DataError, match=r"the splits test_sft, train_sft; there is no 'train'.*train_split"):
        load(tmp_path)
    data = load(tmp_path, train_split="train_sft", test_split="test_sft")
    assert (prompts(data.train), prompts(data.test)) == (["train_sft"], ["test_sft"])
    write(tmp_path / "other" / "train_test.csv", ROWS)
    with pytest.raises(DataError, match="keywords of the splits test and train"):
        load(tmp_path / "other")


def test_a_file_that_is_training_and_test_data_is_refused(tmp_path: Path) -> None:
    for name in ("a.csv", "b.csv"):
        write(tmp_path / "x" / name, ROWS)
    (tmp_path / "link.csv").symlink_to(tmp_path / "x" / "b.csv")
    for test in ("x/b.csv", "x/../x/b.csv", "link.csv", "x"):
        with pytest.raises(DataError, match="the file is both training and test data"):
            load(tmp_path / "x", test=str(tmp_path / test))


# -- what is refused -------------------------------------------------------------------------------


def test_decimal_numbers_are_not_classes(tmp_path: Path) -> None:
    for name in ("a.csv", "a.jsonl", "a.parquet"):
        rows = [{"prompt": "p", "answer": "a", "score": score} for score in (2.0, 3.8, 0.25)]
        path = write(tmp_path / name, rows)
        with pytest.raises(DataError, match=r"row 2 .*column 'score': .*decimal number 3.8.*data.classes"):
            load(path, label="score")
    assert load(path, label="score", classes=("2", "3.8", "0.25")).train.labels.tolist() == [0, 1, 2]


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_whole_numbers_with_a_decimal_point_are_the_classes_of_these_numbers(
    tmp_path: Path, name: str
) -> None:
    rows = [{"prompt": "p", "answer": "a", "label": label} for label in (10.0, 2.0, 10.0)]
    assert load(write(tmp_path / name, rows), label="label").classes == ("2", "10")


@pytest.mark.parametrize(
    ("cells", "wanted"),
    [
        ([0, 1], ("no", "yes")),
        (["yes", "no"], ("yes", "no")),
        ([0, 2], "row 2.*column 'label': 2 is neither the number of a class, 0 to 1, nor one of the names"),
        (["no", "maybe"], "row 2.*'maybe' is neither"),
        ([0.0, float("nan")], "row 2.*the label is missing"),
        ([1, -1], "row 2.*the label is missing"),
        ([0.5, 1.0], "row 1.*0.5 is neither"),
        ([0.0, float("inf")], "row 2.*inf is neither"),
    ],
    ids=["numbers", "names", "too large", "unknown name", "NaN", "-1", "fraction", "infinite"],
)
def test_cells_of_declared_classes_are_numbers_or_names(
    cells: list[Any], wanted: tuple[str, ...] | str, tmp_path: Path
) -> None:
    features = {"info": {"features": {"label": {"names": ["no", "yes"], "_type": "ClassLabel"}}}}
    table = pa.table({"text": ["a", "b"], "label": cells})
    path = tmp_path / "rows.parquet"
    parquet.write_table(table.replace_schema_metadata({"huggingface": json.dumps(features)}), path)
    columns = TextColumns(texts={"text": "task.prompt"}, label="label")
    if isinstance(wanted, str):
        with pytest.raises(DataError, match=wanted):
            read_local(path, columns)
    else:
        assert tuple(read_local(path, columns).labels or ()) == wanted


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_a_list_is_not_a_class(tmp_path: Path, name: str) -> None:
    rows = [{"prompt": "p", "answer": "a", "label": ["x", "y"]}] * 2
    with pytest.raises(
        DataError, match=r"row 1 .*column 'label': holds a list; a label is one text or number"
    ):
        load(write(tmp_path / name, rows), label="label")


HEAD = b"prompt,answer\np,one\n"


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("a.csv", HEAD + b"q\n", r"row 2 \(.*\): 1 value for 2 columns: column 'answer' is missing"),
        ("a.csv", HEAD + b"q,two,x\n", r"row 2 \(.*\): 3 values for 2 columns"),
        ("a.csv", HEAD + b'"q,two\n', "a quotation mark in the row that begins on line 3 is never closed"),
        ("a.csv", HEAD + b'r,x\nq,"two\ny,z\n', "in the row that begins on line 4 is never closed"),
        ("a.csv", "prompt,answer\np,é\n".encode("latin-1"), "line 2 is not UTF-8 text .*0xe9 at place 3"),
        ("a.csv", "prompt,answer\np,x\n".encode("utf-16"), "line 1 is not UTF-8 text.*probably UTF-16"),
        ("a.csv", "prompt,answer\np,x\n".encode("utf-16-le"), "NUL characters.*UTF-16"),
        ("a.csv", b"prompt;reply\np;x\n", "no column 'answer'.*The columns are: prompt, reply"),
        ("a.tsv", b"prompt\tanswer\nq\n", r"row 1 \(.*\): 1 value for 2 columns"),
        ("a.jsonl", b'{"prompt": "p", "prompt": "q"}', r"row 1 \(line 1\): the key 'prompt' is there twice"),
        ("a.json", b'{\n"prompt": "p",\n"answer": "x"\n}', "should be one object in each line, or an array"),
        ("a.json", b'[{"prompt": "p", "answer": "x"}, 3]', r"row 2 \(.*\) is not a JSON object: 3"),
        ("a.json", b'[{"prompt": "p", "answer": "x"}', "line 1 is not valid JSON"),
        ("a.json", b'[{"prompt": "p", "answer": "x"}] x', "line 1 is not valid JSON.*nothing after it"),
        ("a.jsonl", b'{"prompt": "\\ud83d", "answer": "x"}', "row 1 .*half of a character"),
        ("a.jsonl", b'{"prompt": {"x": 1}, "answer": "x"}', "row 1 .*holds an object, should be text"),
        ("a.jsonl", b'{"prompt": [1, 2], "answer": "x"}', "row 1 .*holds a list, should be text"),
        ("a.csv.gz", gzip.compress(HEAD, mtime=0)[:-9], "cannot be decompressed"),
        ("a.csv.gz", HEAD, "cannot be decompressed"),
    ],
)  # fmt: skip
def test_a_damaged_file_is_named_with_the_place(tmp_path: Path, name: str, content: bytes, text: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=rf"(?s)a\.\w+(\.gz)?: .*{text}"):
        load(tmp_path / name)


def test_a_column_that_one_of_the_files_lacks_is_named_with_the_file(tmp_path: Path) -> None:
    write(tmp_path / "a.csv", ROWS)
    write(tmp_path / "b.jsonl", [{"prompt": "p", "reply": "x"}])
    with pytest.raises(DataError, match=r"b\.jsonl: there is no column 'answer'"):
        load(tmp_path)


def test_a_file_and_its_compressed_copy_are_refused(tmp_path: Path) -> None:
    for name in ("a.csv", "a.csv.gz"):
        write(tmp_path / name, ROWS)
    with pytest.raises(DataError, match=r"a\.csv is there too"):
        load(tmp_path)


@pytest.mark.parametrize(
    "form", ["{}.jsonl", "{}.csv", "{}.csv.gz", "{}-00000-of-00001.csv", "data/{}.jsonl"], ids=str
)
def test_two_files_of_one_split_can_be_named_apart(tmp_path: Path, form: str) -> None:
    """As MNLI's two development sets; the names of the hub's shards are those of its splits."""
    (tmp_path / "data").mkdir()
    for name in ("train", "validation_matched", "validation_mismatched"):
        rows = [{"text": f"{name} {label}", "label": label} for label in ("x", "y")]
        path = tmp_path / form.format(name)
        if ".jsonl" in form:
            content = "".join(json.dumps(row) + "\n" for row in rows)
        else:
            content = "text,label\n" + "".join(f"{row['text']},{row['label']}\n" for row in rows)
        path.write_bytes(gzip.compress(content.encode()) if form.endswith(".gz") else content.encode())

    def tested(**splits: str) -> Data[Texts]:
        settings = DataSettings(source=str(tmp_path), **splits)  # type: ignore[arg-type]
        return load_texts(settings, 0, {"text": "task.prompt"}, "label")

    for name in ("validation_matched", "validation_mismatched"):
        data = tested(test_split=name)
        assert data.test is not None
        assert data.test.columns["text"] == [f"{name} x", f"{name} y"]
        assert data.train.columns["text"] == ["train x", "train y"]
        assert f"{name} (" in data.notes[0]
        assert "is the test set" in data.notes[0]
    data = tested(train_split="validation_matched", test_split="validation_mismatched")
    assert data.train.columns["text"] == ["validation_matched x", "validation_matched y"]
    with pytest.raises(DataError, match="there is no 'validation_m'"):
        tested(test_split="validation_m")
    if "-of-" in form:
        return
    both = tested(test_split="validation").test
    assert both is not None
    assert len(both) == 4
    with pytest.raises(
        DataError, match=r"both training and test data \(data.train_split and data.test_split\)"
    ):
        tested(train_split="validation", test_split="validation_matched")


def test_a_subset_is_asked_of_the_hub_and_refused_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def load_dataset(source: str, **options: Any) -> datasets.Dataset:
        asked.append((source, options["name"]))
        return datasets.Dataset.from_dict({"text": ["a", "b"], "label": ["x", "y"]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    load_texts(DataSettings(source="owner/name", subset="part"), 0, {"text": "task.prompt"}, "label")
    assert asked == [("owner/name", "part")]
    (tmp_path / "own.csv").write_text("text,label\na,x\nb,y\n")
    for source in (str(tmp_path / "own.csv"), "pkg:bbc-news"):
        with pytest.raises(
            ConfigError, match=r"data.subset = 'part' does not belong to .*--set data.subset=\)"
        ):
            load_texts(DataSettings(source=source, subset="part"), 0, {"text": "task.prompt"}, "label")
