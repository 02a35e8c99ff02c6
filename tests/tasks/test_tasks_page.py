"""The examples of docs/tasks.md train on the rows that the page shows, and its tables name what exists."""

from __future__ import annotations

import io
import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fedsmoothlora import tasks
from fedsmoothlora.config import read, recipes
from fedsmoothlora.runs.session import run
from task_runs import word_seq2seq

PAGE = (Path(__file__).parents[2] / "docs" / "tasks.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(jsonl|toml)\n(.*?)^```$", PAGE, re.S | re.M)
EXAMPLES = [
    pytest.param(rows, toml, id=tomllib.loads(toml)["name"])
    for (_, rows), (language, toml) in zip(BLOCKS[::2], BLOCKS[1::2], strict=True)
    if language == "toml"
]


@pytest.fixture(scope="module")
def tiny_t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return word_seq2seq(tmp_path_factory.mktemp("tiny-t5"))


@pytest.mark.parametrize(("rows", "toml"), EXAMPLES)
def test_an_example_trains_on_the_rows_that_it_shows(
    rows: str, toml: str, tiny_bert: Path, tiny_t5: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shown = [json.loads(line) for line in rows.splitlines()]
    repeated = [row for _ in range(15) for row in shown]
    table: dict[str, Any] = tomllib.loads(toml)
    Path(table["data"]["source"]).write_text("".join(json.dumps(row) + "\n" for row in repeated))
    is_seq2seq = table["task"]["kind"] == "seq2seq"
    changes: dict[str, Any] = {
        "model.source": str(tiny_t5 if is_seq2seq else tiny_bert),
        "training.rounds": 1,
        "training.steps": 1,
        "machine.threads": 1,
        "machine.device": "cpu",
        "lora.r": 2,
    }
    if is_seq2seq:
        changes["task.metric_rows"] = 2
    result = run(read(table, changes), out=tmp_path / "run", console=Console(file=io.StringIO()))
    main = tasks.find(table["task"]["kind"])().metrics[0]
    assert len(result.values(main)) == 2


def test_there_is_an_example_of_every_task_of_the_table_that_has_no_other_page() -> None:
    shown = {tomllib.loads(toml)["task"]["kind"] for language, toml in BLOCKS if language == "toml"}
    assert shown == {
        *("text-classification", "text-regression", "multi-label"),
        *("token-classification", "seq2seq"),
    }


def test_the_tables_name_tasks_metrics_and_recipes_that_exist() -> None:
    kinds = re.findall(r"^\| `([a-z0-9-]+)` \| (?:one|a|any) .*\| (.*) \|$", PAGE, re.M)
    assert {kind for kind, _ in kinds} <= set(tasks.names())
    assert len(kinds) == 6
    for kind, metrics in kinds:
        assert set(re.findall(r"`(\w+)`", metrics)) <= set(tasks.find(kind).metrics)
    named = set(re.findall(r"`((?:glue|superglue|minilm|boolq)-[a-z0-9-]+)`", PAGE))
    assert named <= set(recipes())
    assert {name for name in recipes() if name.startswith(("glue-", "superglue-"))} <= named
