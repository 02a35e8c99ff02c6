"""The shipped recipes are valid and run, and those of the paper have the published settings."""

import gzip
import io
import math
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from transformers import AutoConfig, ViTConfig, ViTModel

from fedsmoothlora.algebra.schedules import learning_rate_at
from fedsmoothlora.config import Config, read, recipes, to_toml
from fedsmoothlora.modeling import features
from fedsmoothlora.runs.planning import plan
from fedsmoothlora.runs.result import Result
from fedsmoothlora.runs.session import run
from task_cases import wav2vec2

RECIPES = sorted(recipes())
HUB = [name for name in RECIPES if name.startswith("cifar100-")]
FASHION = [name for name in RECIPES if name.startswith("fashion-mnist-")]
LLAMA = [name for name in RECIPES if name.startswith("llama-")]
GLUE = [name for name in RECIPES if name.startswith(("glue-", "superglue-"))]
PACKAGED_TEXTS = [
    name for name in RECIPES if name.startswith(("frozen-", "smollm2-", "minilm-", "boolq-", "unequal-"))
]
OTHERS = ["ast-drums", "dinov2-mosaics", "t5-pronunciations"]
# The main metric, where it is not accuracy.
MAIN = {
    **{"smollm2-chat": "perplexity", "smollm2-preference": "preference_accuracy"},
    **{"smollm2-asdiv": "exact_match", "minilm-conll": "entity_f1", "minilm-toxicity": "micro_f1"},
    **{"minilm-toxicity-score": "pearson", "glue-stsb": "pearson", "glue-cola": "mcc"},
}
FINE_LABELS = 6
SMALL = {"training.rounds": 1, "training.epochs": None, "training.steps": 2, "machine.threads": 1}


@pytest.fixture(autouse=True)
def _no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody is asked over a network."""
    monkeypatch.setattr("socket.socket.connect", None)


def at_toy_size(recipe: str, changes: dict[str, Any], out: Path) -> Result:
    return run(recipe, {**SMALL, **changes}, out=out, console=Console(file=io.StringIO()))


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_is_valid_and_says_what_it_is_without_a_hub(recipe: str, tmp_path: Path) -> None:
    config = read(recipe)
    assert config.name == recipe
    assert config.description.endswith(".")
    file = tmp_path / "again.toml"
    file.write_text(to_toml(config))
    assert read(file) == config


def test_every_recipe_is_run_by_a_test() -> None:
    tested_in_test_running = [name for name in RECIPES if name.startswith("quickstart")]
    benchmarks = [name for name in RECIPES if name.startswith(("flowertune-", "fedllm-"))]
    assert len(benchmarks) == 7
    tested = [*HUB, *FASHION, *LLAMA, *GLUE, *PACKAGED_TEXTS, *OTHERS, *tested_in_test_running, *benchmarks]
    tested.append("private-hospitals")  # in tests/flower/test_flower_local.py
    assert sorted(tested) == RECIPES
    assert (len(HUB), len(FASHION), len(LLAMA), len(GLUE), len(PACKAGED_TEXTS)) == (2, 2, 3, 13, 11)


# -- the paper's setting for images ------------------------------------------------------------------


@pytest.mark.parametrize("recipe", HUB)
def test_a_recipe_of_the_paper_has_its_published_settings(recipe: str) -> None:
    """arXiv 2605.29460: ViT-S/16 at 224 pixels, CIFAR-100."""
    config: Config = read(recipe)
    options, training = config.method, config.training
    published = {
        "clients": (config.partition.clients, 5),
        "rounds": (training.rounds, 10),
        "epochs": (training.epochs, 1),
        "steps": (training.steps, None),
        "batch": (training.batch_size, 64),
        "validation": (config.data.validation, 0.2),
        "optimiser": (training.optimizer, "sgd"),
        "momentum": (training.momentum, 0.9),
        "lr": (training.lr, 0.01),
        "lr_min": (training.lr_min, 0.0),
        "weight decay": (training.weight_decay, 0.0),
        "clipping": (training.max_grad_norm, None),
        "r": (config.lora.r, 2),
        "head_r": (config.lora.head_r, None),
        "alpha": (config.lora.alpha, 4),
        "scale": (config.lora.scale_of(config.lora.r), 4 / math.sqrt(2)),
        "dropout": (config.lora.dropout, 0.05),
        "targets": (set(config.lora.target_modules), {"attention-qkv", "classifier"}),
        "head": (config.model.head, "lora"),
        "pixels": (config.model.image_size, 224),
        "method": (config.method.name, "fedsmoothlora"),
        "gamma": (options.gamma, 256),
        "zeta": (options.zeta, 1.0),
        "floor": (options.zeta_floor, 0.0),
        "rho": (options.staleness, 1.0),
        "start": (options.start_mode, "truncated"),
        "balance": (options.balance, "sqrt"),
        "aligned": (options.gradient_aligned, "client"),
        "matching": (options.round_matching, True),
        "calibration": (options.calibration_batches, 8),
        "calibration batch": (options.calibration_batch_size or training.batch_size, 64),
        "participation": (config.participation.count(5), 5),
    }
    assert {name: got for name, (got, _) in published.items()} == {
        n: want for n, (_, want) in published.items()
    }
    dealt = (config.partition.kind, config.partition.options().get("alpha"), options.zeta_schedule)
    wanted = {"cifar100-iid": ("iid", None, "constant"), "cifar100-dirichlet": ("dirichlet", 0.1, "cosine")}
    assert dealt == wanted[recipe]
    assert learning_rate_at(0, training.rounds, training.lr, training.lr_min) == 0.01


@pytest.fixture(scope="module")
def local_vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny-vit")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = ViTConfig(
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=16,
            patch_size=8,
        )
        ViTModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def local_cifar(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``train.parquet`` and ``test.parquet`` with the columns of the hub's CIFAR-100."""
    folder = tmp_path_factory.mktemp("cifar")
    for part, rows in [("train", 120), ("test", 18)]:
        rng = np.random.default_rng(rows)
        images = [Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)) for _ in range(rows)]
        labels = [row % FINE_LABELS for row in range(rows)]
        table = {"img": images, "fine_label": labels, "coarse_label": [label // 2 for label in labels]}
        names = datasets.ClassLabel(names=[f"fine {label}" for label in range(FINE_LABELS)])
        coarse = datasets.ClassLabel(names=["a", "b", "c"])
        features = datasets.Features({"img": datasets.Image(), "fine_label": names, "coarse_label": coarse})
        datasets.Dataset.from_dict(table, features=features).to_parquet(folder / f"{part}.parquet")
    return folder


@pytest.mark.parametrize("recipe", HUB)
def test_a_recipe_of_the_paper_runs_on_local_files(
    recipe: str, local_vit: Path, local_cifar: Path, tmp_path: Path
) -> None:
    local = {
        "model.source": str(local_vit),
        "model.image_size": 16,
        "data.source": str(local_cifar / "train.parquet"),
        "data.test": str(local_cifar / "test.parquet"),
        "data.test_split": None,
    }
    planned = plan(read(recipe, local))
    assert planned.classes == tuple(f"fine {label}" for label in range(FINE_LABELS))
    sizes = [len(rows) for rows in planned.partition.clients.values()]
    assert (len(sizes), sum(sizes)) == (5, 120)
    kept = sum(len(rows) for rows in planned.validation.values())
    if recipe == "cifar100-iid":
        assert kept == pytest.approx(24, abs=3)  # 20 %, rounded by client
    assert {layer.rank for layer in planned.layers.values()} == {2}
    assert len(planned.layers) == 4

    result = at_toy_size(recipe, local, tmp_path / "run")
    assert len(result.values("accuracy")) == 2
    samples = sum(line["value"] for line in result.metrics if line["name"] == "samples")
    assert samples == 120 - kept
    assert not (tmp_path / "run" / "head.safetensors").exists()
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()


# -- Fashion-MNIST -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def four_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fashion-MNIST's files as they are published, with few rows of noise."""

    def idx(array: np.ndarray) -> bytes:
        header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
        return gzip.compress(header + array.tobytes())

    folder = tmp_path_factory.mktemp("fashion")
    for part, rows in [("train", 400), ("t10k", 30)]:
        rng = np.random.default_rng(rows)
        pixels = rng.integers(0, 256, (rows, 28, 28), dtype=np.uint8)
        (folder / f"{part}-images-idx3-ubyte.gz").write_bytes(idx(pixels))
        labels = (np.arange(rows) % 10).astype(np.uint8)
        (folder / f"{part}-labels-idx1-ubyte.gz").write_bytes(idx(labels))
    return folder


@pytest.mark.parametrize("recipe", FASHION)
def test_a_recipe_on_fashion_mnist_runs_on_the_four_files(
    recipe: str, four_files: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    changes = {"data.path": str(four_files), "model.source": str(tiny_folder), "partition.clients": 2}
    result = at_toy_size(recipe, changes, tmp_path / "run")
    assert len(result.values("accuracy")) == 2
    assert sum(line["value"] for line in result.metrics if line["name"] == "samples") == 400
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()


# -- texts -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", LLAMA)
def test_a_text_recipe_of_the_paper_has_its_published_settings(recipe: str) -> None:
    """arXiv 2605.29460: Llama-3.2-1B on MetaMathQA, Code-Feedback and Dolly."""
    config: Config = read(recipe)
    options, training, lora = config.method, config.training, config.lora
    published = {
        "model": (config.model.source, "meta-llama/Llama-3.2-1B"),
        "targets": (lora.target_modules, ("all-linear",)),
        "r": (lora.r, 32),
        "scale": (lora.scale_of(lora.r), 64 / 32),
        "dropout": (lora.dropout, 0.0),
        "clients": (config.partition.clients, 3),
        "rounds": (training.rounds, 10),
        "steps": (training.steps, 200),
        "batch": (training.batch_size, 32),
        "parts": (training.accumulation, 8),
        "optimiser": (training.optimizer, "adamw"),
        "lr": (training.lr, 2e-5),
        "lr_min": (training.lr_min, 1e-6),
        "clipping": (training.max_grad_norm, 1.0),
        "precision": (training.precision, "bf16"),
        "length": (config.task.max_length, 1024),
        "gamma": (options.gamma, 64),
        "zeta": (options.zeta, 1.0),
        "floor": (options.zeta_floor, 0.5),
        "rho": (options.staleness, 1.0),
        "start": (options.start_mode, "truncated"),
        "balance": (options.balance, "left"),
        "calibration": (options.calibration_batches, 8),
        "calibration batch": (options.calibration_batch_size, 4),
    }
    assert {name: got for name, (got, _) in published.items()} == {
        n: want for n, (_, want) in published.items()
    }
    assert str(config.task.prompt).startswith("Below is an instruction")
    assert str(config.task.answer).startswith(" {")  # the space between prompt and answer
    dirichlet = recipe == "llama-dolly-dirichlet"
    dealt = (config.partition.kind, config.partition.options().get("alpha"), options.zeta_schedule)
    assert dealt == (("dirichlet", 1.0, "cosine") if dirichlet else ("iid", None, "constant"))
    assert config.data.train_rows == (None if dirichlet else 100_000)


# Rows with the columns that the hub's data sets have, some of a kind that a recipe leaves out.
_HUB_ROWS: dict[str, list[dict[str, str]]] = {
    "llama-metamath": [
        {
            "query": f"What is {row} + 1?",
            "response": f"{row} + 1 = {row + 1}\nThe answer is: {row + 1}",
            "type": "MATH_SV" if row % 5 == 4 else ("GSM_AnsAug", "GSM_SV")[row % 2],
            "original_question": "?",
        }
        for row in range(60)
    ],
    "llama-codefeedback": [
        {"query": f"Print {row}.", "answer": f"```\nprint({row})\n```", "lang": "python", "resource": "x"}
        for row in range(48)
    ],
    "llama-dolly-dirichlet": [
        {
            "instruction": f"Say {row}.",
            "context": "" if row % 2 else "Be brief.",
            "response": str(row),
            "category": ("open_qa", "closed_qa", "brainstorming")[row % 3],
        }
        for row in range(48)
    ],
}


@pytest.mark.parametrize("recipe", LLAMA)
def test_a_text_recipe_of_the_paper_runs_on_local_files(
    recipe: str, tiny_llama: Path, tmp_path: Path
) -> None:
    rows = _HUB_ROWS[recipe]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "train.parquet")
    changes = {
        "model.source": str(tiny_llama),
        "data.source": str(tmp_path / "train.parquet"),
        "data.train_rows": None,
        "data.validation": 0.2,
        "task.max_length": 256,
        "lora.r": 2,
        "method.calibration_batches": 1,
    }
    if recipe == "llama-metamath":
        changes |= {"task.metric_rows": 2, "task.max_new_tokens": 3}
    planned = plan(read(recipe, changes))
    assert len(planned.train) == 48
    assert len(planned.layers) == 2 * 7
    result = at_toy_size(recipe, changes, tmp_path / "run")
    assert len(result.values("perplexity")) == 2
    assert ("exact_match" in result.names) == (recipe == "llama-metamath")
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()


def kept(folder: Path, build: Callable[[Path], None]) -> Path:
    folder = Path(tempfile.mkdtemp(dir=folder))
    build(folder)
    return folder


@pytest.mark.parametrize("recipe", PACKAGED_TEXTS)
def test_a_recipe_on_packaged_texts_runs_with_a_tiny_model(
    recipe: str, tiny_llama: Path, tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(features, "cached", lambda key, build, private: kept(tmp_path, build))
    changes = {"data.train_rows": 200, "data.test_rows": 8, "lora.r": 2, "training.batch_size": 4}
    if recipe in ("smollm2-chat", "smollm2-preference"):
        changes = {"model.source": str(tiny_llama), "lora.r": 2, "task.max_length": 250}
    elif recipe.startswith("smollm2-"):
        changes |= {"model.source": str(tiny_llama), "task.metric_rows": 4}
    else:
        changes |= {"model.source": str(tiny_bert)}
        if read(recipe).partition.kind == "dirichlet":
            changes["partition.min_size"] = 4
    if recipe == "minilm-conll":
        changes["data.train_rows"] = 60
    result = at_toy_size(recipe, changes, tmp_path / "run")
    assert len(result.values(MAIN.get(recipe, "accuracy"))) == 2
    clients = {line["client"] for line in result.metrics if line["name"] == "samples"}
    wanted = {
        "smollm2-chat": {"past and family", "present illness", "systems and drugs"},
        "smollm2-medmcqa": {"basic sciences", "dentistry", "laboratory sciences", "medicine", "surgery"},
    }
    numbers = map(str, range(read(recipe).partition.options().get("clients", 0)))
    assert clients == wanted.get(recipe, set(numbers))


@pytest.mark.parametrize("recipe", OTHERS)
def test_a_recipe_on_other_packaged_data_runs_with_a_tiny_model(
    recipe: str, tiny_folder: Path, tmp_path: Path
) -> None:
    changes: dict[str, Any] = {"lora.r": 2, "training.batch_size": 4}
    if recipe == "ast-drums":
        pytest.importorskip("soundfile")
        changes["model.source"] = str(wav2vec2(tmp_path / "model"))
    else:
        changes |= {"data.train_rows": 24, "data.test_rows": 8}
    if recipe == "dinov2-mosaics":
        changes["model.source"] = str(tiny_folder)
    elif recipe == "t5-pronunciations":
        changes |= {"task.metric_rows": 4, "task.max_answer_length": 4}
    result = at_toy_size(recipe, changes, tmp_path / "run")
    main = {"dinov2-mosaics": "micro_f1", "t5-pronunciations": "rougeL"}
    assert len(result.values(main.get(recipe, "accuracy"))) == 2


# -- GLUE and SuperGLUE ------------------------------------------------------------------------------

# The columns of the hub's data sets, and the names of the classes; STS-B has numbers.
_YES_NO = ("entailment", "not_entailment")
_GLUE_COLUMNS: dict[str, tuple[tuple[str, ...], tuple[str, ...] | None]] = {
    "glue-cola": (("sentence",), ("unacceptable", "acceptable")),
    "glue-sst2": (("sentence",), ("negative", "positive")),
    "glue-mrpc": (("sentence1", "sentence2"), ("not_equivalent", "equivalent")),
    "glue-stsb": (("sentence1", "sentence2"), None),
    "glue-qqp": (("question1", "question2"), ("not_duplicate", "duplicate")),
    "glue-mnli": (("premise", "hypothesis"), ("entailment", "neutral", "contradiction")),
    "glue-qnli": (("question", "sentence"), _YES_NO),
    "glue-rte": (("sentence1", "sentence2"), _YES_NO),
    "glue-wnli": (("sentence1", "sentence2"), ("not_entailment", "entailment")),
    "superglue-boolq": (("question", "passage"), ("False", "True")),
    "superglue-cb": (("premise", "hypothesis"), ("entailment", "contradiction", "neutral")),
    "superglue-wic": (("word", "sentence1", "sentence2"), ("False", "True")),
    "superglue-multirc": (("paragraph", "question", "answer"), ("False", "True")),
}


def glue_rows(recipe: str, rows: int, seed: int) -> datasets.Dataset:
    """Made-up rows with the columns and the types of the hub's data set."""
    columns, classes = _GLUE_COLUMNS[recipe]
    rng = np.random.default_rng(seed)
    label = datasets.Value("float32") if classes is None else datasets.ClassLabel(names=list(classes))
    table: dict[str, list[Any]] = {
        name: [f"{name} {' '.join(map(str, rng.integers(0, 99, 3)))}" for _ in range(rows)]
        for name in columns
    }
    table["label"] = [row % 6 * 0.9 if classes is None else row % len(classes) for row in range(rows)]
    features = {name: datasets.Value("string") for name in columns} | {"label": label}
    table["idx"], features["idx"] = list(range(rows)), datasets.Value("int32")
    return datasets.Dataset.from_dict(table, features=datasets.Features(features))


@pytest.mark.parametrize("recipe", GLUE)
def test_a_recipe_of_glue_asks_the_hub_for_its_subset_and_runs_on_its_columns(
    recipe: str, tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def load_dataset(source: str, name: str, revision: str | None, split: str) -> datasets.Dataset:
        asked.append((source, name, split))
        return glue_rows(recipe, 48 if split == "train" else 12, seed=len(asked))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    changes = {"model.source": str(tiny_bert), "lora.r": 2, "training.batch_size": 4, "task.max_length": 64}
    result = at_toy_size(recipe, changes, tmp_path / "run")
    suite, _, subset = recipe.partition("-")
    source = {"glue": "nyu-mll/glue", "superglue": "aps/super_glue"}[suite]
    tested = "validation_matched" if subset == "mnli" else "validation"
    assert asked == [(source, subset, "train"), (source, subset, tested)]
    main = MAIN.get(recipe, "accuracy")
    assert len(result.values(main)) == 2
    columns, classes = _GLUE_COLUMNS[recipe]
    config = read(recipe)
    task = config.task
    assert set(task.text or ()) in (set(), set(columns))
    assert config.checkpoint.best == main
    labels = AutoConfig.from_pretrained(tmp_path / "run" / "model").id2label
    assert tuple(labels.values()) == (classes or ("label",))
