"""The recipes of FlowerTune and FedLLM-Bench: published settings, and runs on files of the same form."""

import io
import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from rich.console import Console

from conftest import byte_tokenizer
from fedsmoothlora.config import read, recipes
from fedsmoothlora.runs.planning import plan
from fedsmoothlora.runs.session import run

FLOWERTUNE = sorted(name for name in recipes() if name.startswith("flowertune-"))
FEDLLM = sorted(name for name in recipes() if name.startswith("fedllm-"))

# clients, the number that takes part in a round, and the model's input of a row.
_TRACKS = {
    "flowertune-code": (10, 2, "Add. 1 2"),
    "flowertune-finance": (50, 5, "Add. 1 2"),
    "flowertune-general": (20, 2, "Add."),
    "flowertune-medical": (20, 2, "1 2"),
}
# clients, the number that takes part, rounds, steps, length.
_BENCHMARKS = {
    "fedllm-aya": (38, 4, 200, 10, 1024),
    "fedllm-chatbot-it": (237, 10, 100, 5, 1024),
    "fedllm-wildchat": (50, 3, 100, 10, 2048),
}
SMALL = {
    "model.quantization": None,
    "lora.r": 2,
    "data.validation": 0.25,
    "task.max_length": 250,
    "training.rounds": 1,
    "training.steps": 1,
    "training.precision": "fp32",
    "training.batch_size": 4,
    "training.accumulation": 1,
    "machine.threads": 1,
}


@pytest.mark.parametrize("recipe", FLOWERTUNE)
def test_a_track_has_the_settings_of_flower_s_template_and_runs_on_rows_of_its_form(
    recipe: str, tiny_llama: Path, tmp_path: Path
) -> None:
    clients, sampled, asked = _TRACKS[recipe]
    config = read(recipe)
    assert config.participation.count(clients) == sampled
    assert config.partition.clients == clients  # type: ignore[union-attr]
    assert (config.lora.r, config.lora.alpha, config.lora.dropout) == (32, 64, 0.075)
    training = config.training
    assert (training.rounds, training.steps, training.batch_size) == (200, 10, 16)
    assert (training.lr, training.lr_min, config.task.max_length) == (5e-5, 1e-6, 512)  # type: ignore[attr-defined]
    rows = [
        {"instruction": "Add.", "input": "1 2", "output": f"{n}", "text": "..."} for n in range(8 * clients)
    ]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "train.parquet")
    changes = {**SMALL, "model.source": str(tiny_llama), "data.source": str(tmp_path / "train.parquet")}
    planned = plan(read(recipe, changes))
    ids, labels = planned.task_data.train.row(3)  # type: ignore[attr-defined]
    tokenizer = byte_tokenizer()
    assert tokenizer.decode(ids) == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the "
        f"request.\n### Instruction:\n{asked}\n### Response: 3<end>"
    )
    assert tokenizer.decode([label for label in labels if label >= 0]) == " 3<end>"
    result = run(read(recipe, changes), out=tmp_path / "run", console=Console(file=io.StringIO()))
    assert len(result.values("loss")) == 2


def written(rows: dict[str, list[dict[str, Any]]], folder: Path, form: str) -> Path:
    """A folder with the benchmark's object of clients, or with one file for each client."""
    out = folder / "clients"
    out.mkdir()
    files = {"published": rows} if form == "object" else rows
    for name, content in files.items():
        (out / f"{name}.json").write_text(json.dumps(content))
    return out


@pytest.mark.parametrize(("recipe", "form"), [*((name, "object") for name in FEDLLM), (FEDLLM[0], "files")])
def test_a_benchmark_has_the_settings_of_its_scripts_and_runs_on_rows_of_its_form(
    recipe: str, form: str, tiny_llama: Path, tmp_path: Path
) -> None:
    clients, sampled, rounds, steps, length = _BENCHMARKS[recipe]
    config = read(recipe)
    assert config.participation.count(clients) == sampled
    training = config.training
    assert (training.rounds, training.steps, training.batch_size, training.accumulation) == (
        rounds,
        steps,
        16,
        4,
    )
    assert (training.lr, training.lr_min, config.task.max_length) == (2e-5, 1e-6, length)  # type: ignore[attr-defined]
    assert (config.lora.r, config.lora.alpha, config.lora.dropout) == (16, 32, 0.05)
    multi = recipe == "fedllm-wildchat"
    turns = [{"from": "human", "value": "1+1?"}, {"from": "gpt", "value": "2"}]
    row: dict[str, Any] = {"conversations": turns * 2} if multi else {"instruction": "1+1?", "response": "2"}
    rows = {f"user_{n}": [{**row, "id": f"{n}-{i}"} for i in range(6)] for n in range(3)}
    source = written(rows, tmp_path, form)
    changes = {
        **SMALL,
        "model.source": str(tiny_llama),
        "data.source": str(source),
        "participation.clients": 2,
    }
    if multi:
        changes["task.max_length"] = 256
    planned = plan(read(recipe, changes))
    assert list(planned.partition.clients) == ["user_0", "user_1", "user_2"]
    tokenizer = byte_tokenizer()
    ids, labels = planned.task_data.train.row(0)  # type: ignore[attr-defined]
    text, learned = tokenizer.decode(ids), tokenizer.decode([label for label in labels if label >= 0])
    if multi:
        assert text.endswith("questions. USER: 1+1? ASSISTANT: 2<end> USER: 1+1? ASSISTANT: 2<end>")
        assert learned == " 2<end> 2<end>"
    else:
        assert text.endswith("request.\n\n### Instruction:\n1+1? \n\n### Response: 2<end>")
        assert learned == " 2<end>"
    result = run(read(recipe, changes), out=tmp_path / "run", console=Console(file=io.StringIO()))
    assert len(result.values("loss")) == 2
