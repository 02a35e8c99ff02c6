"""The examples of docs/tasks.md train on the rows that the page shows, and its tables name what exists."""

from __future__ import annotations

import io
import json
import re
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from transformers import Wav2Vec2Config, Wav2Vec2FeatureExtractor, Wav2Vec2Model

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


def kind_of(toml: str) -> str:
    """The task of an example; the default unless it names one."""
    return str(tomllib.loads(toml).get("task", {}).get("kind", "image-classification"))


@pytest.fixture(scope="module")
def tiny_t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return word_seq2seq(tmp_path_factory.mktemp("tiny-t5"))


@pytest.fixture(scope="module")
def tiny_wav2vec2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model with random weights, and its feature extractor."""
    folder = tmp_path_factory.mktemp("tiny-wav2vec2")
    config = Wav2Vec2Config(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
        conv_dim=[8, 8],
        conv_kernel=[10, 5],
        conv_stride=[8, 4],
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
        classifier_proj_size=8,
    )
    Wav2Vec2Model(config).save_pretrained(folder)
    Wav2Vec2FeatureExtractor(return_attention_mask=False).save_pretrained(folder)
    return folder


def write_images(folder: Path, names: Sequence[str]) -> None:
    rng = np.random.default_rng(0)
    for name in names:
        Image.fromarray(rng.integers(0, 255, (56, 56, 3)).astype(np.uint8)).save(folder / name)


def write_recordings(paths: Sequence[Path]) -> None:
    soundfile = pytest.importorskip("soundfile")
    rng = np.random.default_rng(0)
    for path in paths:
        path.parent.mkdir(exist_ok=True)
        soundfile.write(path, 0.1 * rng.normal(size=1600), 16000)


@pytest.mark.parametrize(("rows", "toml"), EXAMPLES)
def test_an_example_trains_on_the_rows_that_it_shows(
    rows: str,
    toml: str,
    tiny_bert: Path,
    tiny_t5: Path,
    tiny_folder: Path,
    tiny_wav2vec2: Path,
    tiny_llama: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FEDSMOOTHLORA_CACHE", str(tmp_path / "cache"))
    shown = [json.loads(line) for line in rows.splitlines()]
    repeated = [row for _ in range(15) for row in shown]
    table: dict[str, Any] = tomllib.loads(toml)
    kind = kind_of(toml)
    source = Path(table["data"]["source"])
    if kind == "multi-label-image":
        source.mkdir()
        write_images(source, [row["file_name"] for row in shown])
        source /= "metadata.jsonl"
    if kind == "image-classification":
        (tmp_path / "scans").mkdir()
        write_images(tmp_path, [row["image"] for row in shown])
    if kind == "audio-classification":
        write_recordings([Path(row["audio"]) for row in shown])
    source.write_text("".join(json.dumps(row) + "\n" for row in repeated))
    models = {"seq2seq": tiny_t5, "audio-classification": tiny_wav2vec2}
    models |= dict.fromkeys(("image-classification", "multi-label-image"), tiny_folder)
    models |= dict.fromkeys(("causal-lm", "preference"), tiny_llama)
    changes: dict[str, Any] = {
        "model.source": str(models.get(kind, tiny_bert)),
        "training.rounds": 1,
        "training.steps": 1,
        "machine.threads": 1,
        "machine.device": "cpu",
        "lora.r": 2,
    }
    if kind in ("seq2seq", "causal-lm"):
        changes["task.metric_rows"] = 2
    if kind in ("causal-lm", "preference"):
        changes["task.max_length"] = 128
    result = run(read(table, changes), out=tmp_path / "run", console=Console(file=io.StringIO()))
    main = tasks.find(kind)().metrics[0]
    assert len(result.values(main)) == 2


def test_there_is_an_example_of_every_task() -> None:
    shown = {kind_of(toml) for language, toml in BLOCKS if language == "toml"}
    assert shown == set(tasks.names())


def test_the_tables_name_tasks_metrics_and_recipes_that_exist() -> None:
    kinds = re.findall(r"^\| `([a-z0-9-]+)` \| (?:one|a|any) .*\| (.*) \|$", PAGE, re.M)
    assert {kind for kind, _ in kinds} == set(tasks.names())
    for kind, metrics in kinds:
        assert set(re.findall(r"`(\w+)`", metrics)) <= set(tasks.find(kind).metrics)
    named = set(re.findall(r"`((?:glue|superglue|minilm|boolq|ast|dinov2|t5)-[a-z0-9-]+)`", PAGE))
    assert named <= set(recipes())
    assert {name for name in recipes() if name.startswith(("glue-", "superglue-"))} <= named
