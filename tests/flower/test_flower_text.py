"""Text over Flower's engine: a language model and a classifier of texts, at sites with files of their own."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("flwr")
from test_flower_engine import Setting, assert_same
from test_flower_engine import setting as setting


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
    class_of_node = setting.grid

    def grid(overrides: Any = None) -> Any:
        made = class_of_node(overrides)
        for node in made.nodes.values():
            node["data"] = node["data"].replace(".csv", ".jsonl")
        return made

    found = setting.coordinate(grid())
    assert_same(setting.in_process(), found)
