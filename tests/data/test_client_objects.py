"""One JSON object of clients, as FedLLM-Bench publishes them, is the same as a file for each client."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsmoothlora.config.starting import guessed
from fedsmoothlora.data.loading import Data
from fedsmoothlora.data.partitioning.by_file import by_file
from fedsmoothlora.data.settings import DataSettings
from fedsmoothlora.data.text_sources import load_texts, text_columns
from fedsmoothlora.data.texts import Texts
from fedsmoothlora.errors import DataError

ROWS = {
    "client_0": [
        {"instruction": "Say red.", "response": "red"},
        {"instruction": "Say blue.", "response": "blue"},
    ],
    "7.b": [{"instruction": "Dis rouge.", "response": "rouge\n"}],
}
COLUMNS = {"instruction": "task.prompt", "response": "task.answer"}


def load(path: Path) -> Data[Texts]:
    return load_texts(DataSettings(source=str(path)), 0, COLUMNS, None)


def write(path: Path, found: Any, indent: int | None = None) -> Path:
    path.write_text(json.dumps(found, indent=indent, ensure_ascii=False), encoding="utf-8")
    return path


NAMES = st.text(st.characters(codec="utf-8", exclude_characters="/\0"), min_size=1).filter(
    lambda name: name.strip() and name not in COLUMNS
)
TEXTS = st.text(st.characters(codec="utf-8"))


@given(
    clients=st.dictionaries(
        NAMES,
        st.lists(st.fixed_dictionaries({"instruction": TEXTS, "response": TEXTS}), min_size=1, max_size=4),
        min_size=1,
        max_size=5,
    ),
    indent=st.sampled_from([None, 0, 2]),
)
@settings(max_examples=50, deadline=None)
def test_every_client_has_its_own_rows_in_their_order(
    clients: dict[str, list[dict[str, str]]], indent: int | None, tmp_path_factory: pytest.TempPathFactory
) -> None:
    data = load(write(tmp_path_factory.mktemp("clients") / "fed.json", clients, indent))
    assert data.file_of_row is not None
    dealt = by_file(data.file_of_row).clients
    assert {name: [data.train.row(row) for row in rows] for name, rows in dealt.items()} == clients


def test_a_file_for_each_client_gives_the_same_rows_and_clients(tmp_path: Path) -> None:
    one = load(write(tmp_path / "fed.json", ROWS))
    (tmp_path / "files").mkdir()
    for name, rows in ROWS.items():
        write(tmp_path / "files" / f"{name}.json", rows)
    several = load(tmp_path / "files")
    (tmp_path / "folder").mkdir()
    inside = load(write(tmp_path / "folder" / "aya_38c_25k.json", ROWS))
    found = []
    for data in (one, several, inside):
        assert data.file_of_row is not None
        dealt = by_file(data.file_of_row).clients
        found.append({name: [data.train.row(row) for row in rows] for name, rows in dealt.items()})
    assert found == [ROWS, ROWS, ROWS]
    assert any("one JSON object with the rows of 2 clients" in note for note in one.notes)
    assert one.train.places is not None
    assert one.train.places[1].endswith("fed.json: key 'client_0', row 2 (counted from 1)")
    assert one.train.places[2].endswith("key '7.b', row 1 (counted from 1)")


def test_columns_and_clients_are_recognised(tmp_path: Path) -> None:
    file = write(tmp_path / "fed.json", ROWS, indent=1)
    assert text_columns(DataSettings(source=str(file))) == ("instruction", "response")
    started = guessed(file)
    assert "by_file" in started
    assert "each of 2 keys is a client" in started
    assert 'kind = "causal-lm"' in started


def test_chats_are_rows_and_not_clients(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
    row = write(tmp_path / "one.json", {"conversations": turns})
    assert text_columns(DataSettings(source=str(row))) == ("conversations",)
    tools = write(tmp_path / "tools.json", {"messages": turns, "tools": [{"type": "function"}]})
    assert text_columns(DataSettings(source=str(tools))) == ("messages", "tools")
    clients = write(
        tmp_path / "many.json", {"a": [{"conversations": turns}], "b": [{"conversations": turns}]}
    )
    assert text_columns(DataSettings(source=str(clients))) == ("conversations",)


def test_rows_of_json_lines_stay_rows(tmp_path: Path) -> None:
    rows = [
        {"instruction": "a", "response": "b", "marks": [{"start": 0}]},
        {"instruction": "c", "response": "d"},
    ]
    (tmp_path / "own.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert load(tmp_path / "own.json").train.columns["instruction"] == ["a", "c"]
    (tmp_path / "one.jsonl").write_text(json.dumps(rows[0]))
    assert load(tmp_path / "one.jsonl").train.columns["response"] == ["b"]


@pytest.mark.parametrize(
    ("more", "wanted"),
    [
        ({"b": {"instruction": "x"}}, r"key 'b' holds \{.*should be a list of rows"),
        ({"b": "none"}, "key 'b' holds none; should be a list of rows"),
        ({"b": ["x", "y"]}, "key 'b', row 1 is not a JSON object: x"),
        ({"b": [{"instruction": "x", "response": "y"}, None]}, "key 'b', row 2 is not a JSON object: None"),
        ({"b": []}, "key 'b' has no rows"),
        ({" ": [{"instruction": "x", "response": "y"}]}, "key ' ' names a client"),
        ({"a/b": [{"instruction": "x", "response": "y"}]}, "key 'a/b' names a client.* without '/'"),
    ],
    ids=["object", "text", "texts", "null", "empty", "blank", "slash"],
)
@pytest.mark.parametrize("indent", [None, 1])
def test_a_malformed_client_is_refused_with_its_key(
    tmp_path: Path, more: dict[str, Any], wanted: str, indent: int | None
) -> None:
    with pytest.raises(DataError, match=wanted):
        load(write(tmp_path / "fed.json", ROWS | more, indent))


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ('{"a": [{"instruction": "x", "response": "y"}], "a": []}', "the key 'a' is there twice"),
        ('{\n"a": [{"instruction": "x"],\n"b": []}', "line 2 is not valid JSON"),
        ('{\n"a": [{"reply": "x"}]}', r"there is no column 'instruction'.*The columns are: reply"),
        ('{"a": [{"instruction": "x", "response": "y"}]', r"row 1 \(line 1\) is not valid JSON"),
    ],
    ids=["twice", "broken", "columns", "cut"],
)
def test_a_file_that_cannot_be_read_is_refused_with_the_place(tmp_path: Path, text: str, wanted: str) -> None:
    (tmp_path / "fed.json").write_text(text)
    with pytest.raises(DataError, match=wanted):
        load(tmp_path / "fed.json")
