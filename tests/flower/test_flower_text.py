"""Text over Flower's engine: a language model and a classifier of texts, at sites with files of their own."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("flwr")
from flwr.app import ConfigRecord
from test_flower_engine import DirectGrid, Setting, assert_same, metrics
from test_flower_engine import setting as setting
from test_flower_hostile import log_of


def write_texts(root: Path) -> None:
    for name, rows in {
        "data/hospital-a": 12,
        "data/hospital-b": 8,
        "data/hospital-c": 8,
        "test/test": 8,
    }.items():
        file = root / f"{name}.jsonl"
        file.parent.mkdir(exist_ok=True)
        lines = [
            {
                "question": f"{row} plus {row % 3}?",
                "answer": str(row + row % 3),
                "label": ("even", "odd")[row % 2],
            }
            for row in range(rows)
        ]
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))


def text_grid(setting: Setting, overrides: Mapping[str, Any] | None = None) -> DirectGrid:
    grid = setting.grid(overrides)
    for node in grid.nodes.values():
        node["data"] = node["data"].replace(".csv", ".jsonl")
    return grid


@pytest.fixture
def long_answers(setting: Setting, wide_llama: Path) -> Setting:
    """A language model whose sites have answers of very different length, and no test rows."""
    shutil.rmtree(setting.root / "data")
    write_texts(setting.root)
    rows = [{"question": f"{row}?", "answer": "1 2 3 4 5 6 7 8 9 " * 2} for row in range(8)]
    file = setting.root / "data" / "hospital-c.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    setting.table |= {
        "model": {"source": str(wide_llama)},
        "task": {"kind": "causal-lm", "prompt": "{question}", "answer": "{answer}", "max_length": 64},
        "data": {"source": str(setting.root / "data"), "validation": 0.25},
        "method": {"name": "fedit"},
        "lora": {"r": 2, "alpha": 4},
        "training": {"rounds": 1, "steps": 1, "batch_size": 4, "lr": 0.01},
    }
    return setting


def test_losses_of_sites_are_weighted_by_their_tokens_as_in_one_process(long_answers: Setting) -> None:
    found = long_answers.coordinate(text_grid(long_answers))
    assert_same(long_answers.in_process(), found, but=("bytes_down",))
    values = metrics(found)
    losses = [values[1, client, "loss"] for client in ("hospital-a", "hospital-b", "hospital-c")]
    by_rows = (3 * losses[0] + 2 * losses[1] + 2 * losses[2]) / 7
    assert abs(values[1, None, "loss"] - by_rows) > 1e-3  # so that the test tells both apart


@pytest.mark.parametrize("weight", [1e15, 0, -3.0, float("nan"), "many", True])
def test_a_number_of_tokens_that_no_rows_can_have_is_refused(long_answers: Setting, weight: Any) -> None:
    grid = text_grid(long_answers)

    def hostile(message: Any, context: Any, app: Any) -> Any:
        reply = app(message, context)
        if message.metadata.message_type == "evaluate":
            reply.content["evaluation"] = ConfigRecord({"weight": weight})
        return reply

    grid.stand_in[12] = hostile
    folder = long_answers.coordinate(grid)
    assert any(
        "the weight of its metrics is not a number above 0 and at most 128" in line for line in log_of(folder)
    )
    values = metrics(folder)
    assert (1, "hospital-c", "loss") not in values
    low, high = sorted(values[1, client, "loss"] for client in ("hospital-a", "hospital-b"))
    assert low <= values[1, None, "loss"] <= high


@pytest.mark.parametrize(
    ("kind", "held"),
    [
        ("causal-lm", {}),
        ("causal-lm", {"quantization": "nf4"}),
        ("causal-lm", {"dtype": "bfloat16"}),
        ("text-classification", {}),
        ("preference", {}),
    ],
    ids=str,
)
def test_sites_with_texts_train_what_one_process_trains(
    setting: Setting, request: pytest.FixtureRequest, kind: str, held: dict[str, str]
) -> None:
    shutil.rmtree(setting.root / "data")
    shutil.rmtree(setting.root / "test")
    write_texts(setting.root)
    causal = kind != "text-classification"
    model = request.getfixturevalue("wide_llama" if causal else "wide_bert")
    task: dict[str, Any] = {"kind": kind, "prompt": "{question}", "max_length": 32}
    if kind == "causal-lm":
        task["answer"] = "{answer}"
    if kind == "preference":
        task |= {"chosen": "{answer}", "rejected": "{label}"}
    setting.table |= {
        "model": {"source": str(model), **held},
        "task": task,
        "data": {"source": str(setting.root / "data"), "test": str(setting.root / "test/test.jsonl")}
        | ({} if causal else {"classes": ["even", "odd"]}),
        "method": {"name": "fedit"},
        "lora": {"r": 2, "alpha": 4},
        "training": {"rounds": 2, "batch_size": 4, "lr": 0.01},
    }
    found = setting.coordinate(text_grid(setting))
    assert_same(setting.in_process(), found)
