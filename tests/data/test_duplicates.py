import json
import time
from pathlib import Path
from typing import Any

import numpy as np

from fedsmoothlora.data.duplicates import digest, duplicate_notes, hashed_texts, similar_class_notes
from fedsmoothlora.data.settings import DataSettings
from fedsmoothlora.data.text_sources import load_texts
from fedsmoothlora.data.texts import Texts


def write(path: Path, rows: list[tuple[str, str]]) -> str:
    path.write_text("\n".join(json.dumps({"text": text, "label": label}) for text, label in rows))
    return str(path)


def notes(**keys: Any) -> list[str]:
    return load_texts(DataSettings(**keys), 0, {"text": "task.prompt"}, "label").notes


def test_shared_rows_contradictions_and_similar_classes_are_noted_once(tmp_path: Path) -> None:
    train = [("good", "pos"), ("bad", "neg"), ("good", "Pos"), ("good", "neg"), ("fine", "pos")]
    source = write(tmp_path / "a.jsonl", train)
    test = write(tmp_path / "b.jsonl", [("new", "pos"), ("bad", "neg"), ("fine", "neg"), ("bad", "neg")])
    similar, shared, contradicting = notes(source=source, test=test)
    assert similar == "classes whose names differ only in case or spaces: 'Pos' and 'pos'"
    assert shared.startswith("3 of 4 test rows are also training rows, so test metrics are too good; first: ")
    assert "b.jsonl: row 2 (counted from 1) equals" in shared
    assert shared.endswith("a.jsonl: row 2 (counted from 1)")
    assert contradicting.startswith("2 inputs have different labels in different rows; first: ")
    assert "row 1 (counted from 1) has 'pos'" in contradicting
    assert contradicting.endswith("row 3 (counted from 1) has 'Pos'")


def test_different_rows_have_no_notes(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", [("a", "x"), ("b", "y"), ("b", "y")])
    assert notes(source=source, test=write(tmp_path / "b.jsonl", [("A", "x")])) == []
    assert similar_class_notes(["C", "C++", "D"]) == []
    assert load_texts(DataSettings(source=source), 0, {}, "label").notes == []


def test_digests_depend_on_where_one_part_ends() -> None:
    assert digest([b"ab", b"c"]) != digest([b"a", b"bc"])


def test_many_rows_are_compared_in_little_time() -> None:
    rows = 50_000
    texts = Texts({"a": [f"{i} " * 20 for i in range(rows)]}, np.zeros(rows, dtype=np.int64), ("x",))
    begin = time.process_time()
    assert len(duplicate_notes(hashed_texts(texts, ["a"]), hashed_texts(texts, ["a"]), ("x",))) == 1
    assert time.process_time() - begin < 2
