"""Columns of lists: words, tags and labels, from every kind of table, and CoNLL files."""

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from fedsmoothlora.data.read_texts import TextColumns, TextRows, read_local
from fedsmoothlora.errors import DataError

WORDS = st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=6), max_size=5)
COLUMNS = TextColumns(texts={}, lists={"words": "task.words"})


def found(path: Path, columns: TextColumns = COLUMNS) -> list[tuple[str, ...]]:
    read: TextRows = read_local(path, columns)
    return [tuple(words) for words in read.lists["words"]]


def write_jsonl(folder: Path, rows: list[Any]) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps({"words": words}) + "\n" for words in rows), encoding="utf-8")
    return path


def write_csv(folder: Path, rows: list[Any], as_text: Any = json.dumps) -> Path:
    path = folder / "rows.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([["words"], *([as_text(words)] for words in rows)])
    return path


def write_parquet(folder: Path, rows: list[Any]) -> Path:
    path = folder / "rows.parquet"
    parquet.write_table(pa.table({"words": pa.array(rows, pa.list_(pa.string()))}), path)
    return path


@given(rows=st.lists(WORDS, min_size=1, max_size=4))
@settings(max_examples=30, deadline=None)
def test_every_kind_of_table_gives_the_same_lists(
    rows: list[list[str]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("lists")
    wanted = [tuple(words) for words in rows]
    assert found(write_jsonl(folder, rows)) == wanted
    assert found(write_csv(folder, rows)) == wanted
    assert found(write_csv(folder, rows, as_text=repr)) == wanted  # as pandas writes lists
    assert found(write_parquet(folder, rows)) == wanted


def test_numbers_of_classes_become_their_declared_names(tmp_path: Path) -> None:
    features = datasets.Features({"words": datasets.List(datasets.ClassLabel(names=["O", "B-PER"]))})
    rows = datasets.Dataset.from_dict({"words": [[0, 1], []]}, features=features)
    rows.to_parquet(tmp_path / "rows.parquet")
    rows.save_to_disk(str(tmp_path / "saved"))
    for path in (tmp_path / "rows.parquet", tmp_path / "saved"):
        assert found(path) == [("O", "B-PER"), ()]


def test_lists_without_commas_are_refused(tmp_path: Path) -> None:
    # NumPy writes arrays without commas, and Python would join the texts to "ab".
    for text in ("['a' 'b']", "['a'\n 'b']", "['a', 'b' 'c']"):
        with pytest.raises(DataError, match=r"row 1.*holds a text, should be a list"):
            found(write_csv(tmp_path, [text], as_text=str))


def test_numbers_that_only_python_reads_are_refused_in_lists(tmp_path: Path) -> None:
    for text in ("['a', 1_000]", "[0x10]", "[1, 2j]"):
        with pytest.raises(DataError, match=r"row 1.*holds a text, should be a list"):
            found(write_csv(tmp_path, [text], as_text=str))
    assert found(write_csv(tmp_path, ["['a', -3, 2.5]"], as_text=str)) == [("a", "-3", "2.5")]


def test_a_missing_number_in_a_list_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    parquet.write_table(pa.table({"words": pa.array([[1.0], [float("nan")]])}), path)
    with pytest.raises(DataError, match=r"row 2.*the list holds nothing"):
        found(path)


def test_numbers_without_names_are_texts(tmp_path: Path) -> None:
    assert found(write_jsonl(tmp_path, [[0, 3], [1.0]])) == [("0", "3"), ("1",)]


@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        ("a b", "row 2.*holds a text, should be a list"),
        (None, "row 2.*holds nothing, should be a list"),
        ({"a": 1}, "row 2.*holds an object, should be a list"),
        ([["a"]], "row 2.*the list holds a list"),
        (["a", None], "row 2.*the list holds nothing"),
    ],
    ids=["text", "null", "object", "nested", "null inside"],
)
def test_a_value_that_is_no_list_of_texts_is_refused(tmp_path: Path, value: Any, wanted: str) -> None:
    with pytest.raises(DataError, match=f"rows.jsonl: {wanted}"):
        found(write_jsonl(tmp_path, [["a"], value]))


# -- CoNLL -------------------------------------------------------------------------------------------

CONLL = """-DOCSTART- -X- -X- O

EU NNP B-NP B-ORG
rejects VBZ B-VP O

# . O O
Peter NNP B-NP B-PER
"""
BOTH = TextColumns(texts={}, lists={"tokens": "task.tokens_column", "tags": "task.tags_column"})


@pytest.mark.parametrize("name", ["train.conll", "train.conll.gz"])
def test_a_conll_file_gives_words_and_the_tags_of_its_last_column(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    content = CONLL.encode()
    path.write_bytes(gzip.compress(content, mtime=0) if name.endswith(".gz") else content)
    rows = read_local(path, BOTH)
    assert rows.lists["tokens"] == [("EU", "rejects"), ("#", "Peter")]
    assert rows.lists["tags"] == [("B-ORG", "O"), ("O", "B-PER")]
    assert rows.places[1] == f"{path}: sentence 2 (counted from 1)"


def test_words_of_a_conll_file_with_tabs_may_have_spaces(tmp_path: Path) -> None:
    path = tmp_path / "train.conll"
    path.write_text("New York\tB-LOC\nis\tO\n \nnot\u00a0here\tO\n", encoding="utf-8")
    rows = read_local(path, BOTH)
    assert rows.lists["tokens"] == [("New York", "is"), ("not\u00a0here",)]


COMMENTED = """# newdoc id = weblog-1
# sent_id = 1
# text = Ada ran.
Ada{0}NN{0}B-PER
ran{0}VB{0}O

# a sentence of five words
#{0}SYM{0}O
1{0}CD{0}O
#{0}SYM{0}O

# sent 2
Bob{0}NN{0}B-PER
"""


@pytest.mark.parametrize("separator", ["\t", " "], ids=["tabs", "spaces"])
def test_comments_of_a_conll_file_are_not_read_and_the_word_hash_is(tmp_path: Path, separator: str) -> None:
    path = tmp_path / "train.conll"
    # Between spaces, "# sent 2" could be a word with two columns.
    text = COMMENTED.replace("# sent 2", "# sent 2" if separator == "\t" else "# sent 2 of 2")
    path.write_text(text.format(separator))
    rows = read_local(path, BOTH)
    assert rows.lists["tokens"] == [("Ada", "ran"), ("#", "1", "#"), ("Bob",)]
    assert rows.lists["tags"] == [("B-PER", "O"), ("O", "O", "O"), ("B-PER",)]
    assert rows.notes == [
        f"{path}: 5 lines are comments and not read; the first is line 1, '# newdoc id = weblog-1'"
    ]


@pytest.mark.parametrize("line", ["# sent_id = 1", "# text = a\tb"])
def test_a_comment_with_a_key_may_have_as_many_columns_as_the_words(tmp_path: Path, line: str) -> None:
    path = tmp_path / "train.conll"
    for separator in ("\t", " "):
        path.write_text(f"{line}\n" + separator.join(["Ada", "x", "y", "O"]) + "\n")
        assert read_local(path, BOTH).lists["tokens"] == [("Ada",)]


def test_hash_is_a_word_if_its_line_has_the_columns_of_the_others(tmp_path: Path) -> None:
    path = tmp_path / "train.conll"
    for separator in ("\t", " "):
        for columns in (["SYM", "O"], ["=", "O"], ["O"]):
            lines = [separator.join([word, *columns]) for word in ("#", "Ada", "#", "#tag")]
            path.write_text("\n\n".join(lines))
            assert read_local(path, BOTH).lists["tokens"] == [("#",), ("Ada",), ("#",), ("#tag",)]
    path.write_text("# O\n#tag O\n")  # all lines begin so
    assert read_local(path, BOTH).lists["tokens"] == [("#", "#tag")]


def test_a_folder_of_conll_files_has_the_splits_of_their_names(tmp_path: Path) -> None:
    for split in ("train", "test"):
        (tmp_path / f"{split}.conll").write_text(f"{split}\tO\n")
    assert read_local(tmp_path, BOTH, "test").lists["tokens"] == [("test",)]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("a O\nb\n", "line 2 has 1 columns, should have 2 like the lines before"),
        ("a\n", "line 1 has 1 columns, should have a word and its tag"),
        ("\n\n", "there are no sentences"),
        ("Ada\tNN\tB-PER\n\nBob\tNN\t\n", "line 3: the tag of the word 'Bob' is missing"),
        ("Ada\tO\n\n#\t\n", "line 3: the tag of the word '#' is missing"),
        ("Ada\tNN\tO\n\n#\tO\n", "line 3 has 2 columns"),
        ("Ada NN O\n# x\n", "line 2 has 2 columns"),
    ],
    ids=[
        "uneven",
        "one column",
        "empty",
        "no tag",
        "no tag of #",
        "word # with a tab",
        "# inside a sentence",
    ],
)
def test_a_damaged_conll_file_is_refused_with_its_line(tmp_path: Path, text: str, wanted: str) -> None:
    path = tmp_path / "train.conll"
    path.write_text(text)
    with pytest.raises(DataError, match=wanted):
        read_local(path, BOTH)


def test_a_conll_file_has_no_other_columns(tmp_path: Path) -> None:
    path = tmp_path / "train.conll"
    path.write_text(CONLL)
    with pytest.raises(DataError, match=r"no column 'words' .task.words.*The columns are: tokens, tags"):
        found(path)
