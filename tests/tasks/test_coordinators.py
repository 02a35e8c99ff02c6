"""A coordinator, which has no training rows, and a site check the configuration of every task for texts."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fedsmoothlora.config import read
from fedsmoothlora.runs.check import check
from task_runs import KINDS as OWN_KINDS
from task_runs import model_for, rows_of, table_of, write_rows

CLASSES = {
    "text-classification": ["red", "green", "grey", "blue"],
    "multi-label": ["red", "green", "grey", "blue"],
    "token-classification": ["O", "B-COLOUR", "I-COLOUR"],
}
KINDS = ("text-classification", "causal-lm", *OWN_KINDS)


@pytest.mark.parametrize("has_test", [True, False], ids=["test-set", "validation"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_coordinator_without_training_rows_passes_the_check(
    kind: str, has_test: bool, tiny_llama: Path, tmp_path: Path
) -> None:
    like = {"text-classification": "multi-label", "causal-lm": "seq2seq"}.get(kind, kind)
    model = tiny_llama if kind == "causal-lm" else model_for(kind, tmp_path / "model")
    table: dict[str, Any] = table_of(like, model, Path("at-the-sites.jsonl"), flower={"clients": ["a", "b"]})
    if kind != like:
        templates = {"prompt": "{text}", "answer": "{answer}"} if kind == "causal-lm" else {}
        table["task"] = {"kind": kind, "max_length": 16, **templates}
    table["data"] |= {"classes": CLASSES[kind]} if kind in CLASSES else {}
    if has_test:
        rows = rows_of(like, 8)
        if kind == "text-classification":
            rows = [{**row, "label": row["label"][0]} for row in rows]
        table["data"] |= {
            "test": str(write_rows(tmp_path, rows, "test.jsonl")),
            "validation": 0.0,
        }
    out = io.StringIO()
    check(read(table), Console(file=out, width=200))
    assert "everything that can be checked before training is in order" in out.getvalue()
    if has_test:
        check(read(table), Console(file=out), site="a", data=table["data"]["test"])
    assert f"0 training rows, {'8 test rows' if has_test else 'no test set'}" in out.getvalue()
