"""A tiny saved model, a tiny data set of four textures, and federations made of them."""

import gc
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from rich.console import Console
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import (
    BertConfig,
    BertModel,
    Dinov2Config,
    Dinov2Model,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from fedsmoothlora.config import read, to_toml
from fedsmoothlora.data import registry
from fedsmoothlora.data.raw import RawImages
from fedsmoothlora.experiments import planned_runs
from fedsmoothlora.federation.simulation import Simulation
from fedsmoothlora.runs import session
from fedsmoothlora.runs.planning import build, plan
from fedsmoothlora.runs.session import run

# No test depends on time: on a busy machine, drawing an example or a test of it may take seconds.
settings.register_profile("unhurried", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("unhurried")

CLASSES = ("rows", "columns", "checks", "plain")


def textures(images: int, seed: int) -> RawImages:
    """Grey 28 x 28 images whose texture is their class: separable, so that any working method learns."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:28, :28]
    patterns = np.stack([y // 2 % 2, x // 2 % 2, (y // 2 + x // 2) % 2, np.full((28, 28), 0.5)])
    labels = np.arange(images, dtype=np.int64) % len(CLASSES)
    noisy = 60 + 120 * patterns[labels] + rng.normal(0, 20, (images, 28, 28))
    return RawImages(noisy.clip(0, 255).astype(np.uint8), labels, CLASSES)


@pytest.fixture(scope="session", autouse=True)
def _faster() -> Iterator[None]:
    """Look for garbage less often, and do not wait for the disk, since no test cuts the power."""
    gc.set_threshold(50_000, 10, 10)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda file: None)
        yield


@pytest.fixture(scope="module", autouse=True)
def _loaded_modules_are_not_collected() -> None:
    """Freeze loaded objects: every run collects garbage, which takes 0.5 s with all objects of torch."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _no_report(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw reports only in tests marked ``report``, because charts take longer than the rest of a run."""
    if request.node.get_closest_marker("report") is None:
        monkeypatch.setattr(session, "write_report", lambda folder: folder / "report.html")


@pytest.fixture(scope="session")
def browser() -> str:
    """The browser that is installed."""
    names = ("chromium", "chromium-browser", "google-chrome")
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None:
        message = f"no browser: none of {', '.join(names)} is installed"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    return found


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Dinov2 of width 32 with two layers, with random weights, as transformers saves it."""
    folder = tmp_path_factory.mktemp("tiny-dinov2")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = Dinov2Config(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=28,
            patch_size=14,
            initializer_range=0.2,
        )
        Dinov2Model(config).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.25, 0.3]})
    )
    return folder


@pytest.fixture
def toy_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """``pkg:textures``: 96 images to train on, 64 to test on."""
    real = registry.packaged
    toy = SimpleNamespace(NAME="textures", load=lambda: (textures(96, 1), textures(64, 2)))

    def packaged(folder: str) -> dict[str, Any]:
        return {**real(folder), **({"textures": toy} if folder.endswith("data.packaged") else {})}

    monkeypatch.setattr(registry, "packaged", packaged)


@pytest.fixture
def toy_table(tiny_folder: Path, toy_data: None) -> dict[str, Any]:
    """A complete configuration of a run that takes well under a second."""
    return {
        "name": "toy",
        "model": {"source": str(tiny_folder), "image_size": 28},
        "lora": {"r": 2, "alpha": 4, "dropout": 0.1},
        "data": {"source": "pkg:textures"},
        "partition": {"kind": "dirichlet", "clients": 3, "alpha": 1.0, "min_size": 8},
        "method": {"name": "fedsmoothlora", "gamma": 64, "calibration_batches": 2},
        "training": {"rounds": 3, "batch_size": 8, "lr": 0.02, "max_grad_norm": 1.0},
        "evaluation": {"batch_size": 64},
        "machine": {"threads": 1, "device": "cpu"},
    }


@pytest.fixture
def toy_federation(toy_table: dict[str, Any]) -> Callable[..., Simulation]:
    """``toy_federation({"method.name": "fedit"})``: a new federation, ready for round 0."""

    def make(overrides: dict[str, Any] | None = None) -> Simulation:
        return build(plan(read(toy_table, overrides)))

    return make


class FinishedRuns:
    """Folders of finished runs by configuration; each configuration is run once."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._folders: dict[str, Path] = {}

    def copy(self, table: dict[str, Any], overrides: dict[str, Any] | None, out: Path) -> Path:
        """A copy of the folder of a run without a report, at ``out``."""
        config = read(table, overrides)
        key = to_toml(config)
        if key not in self._folders:
            folder = self._root / str(len(self._folders))
            run(config, out=folder, console=Console(quiet=True))
            self._folders[key] = folder
        return Path(shutil.copytree(self._folders[key], out))


@pytest.fixture(scope="session")
def finished_runs(tmp_path_factory: pytest.TempPathFactory) -> FinishedRuns:
    """Finished runs that are shared by tests which only read or copy a run's folder."""
    return FinishedRuns(tmp_path_factory.mktemp("finished-runs"))


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with one token per byte, an end of sequence, a padding token and a chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(BPE({letter: number for number, letter in enumerate(alphabet)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(token, special=True) for token in ("<end>", "<pad>")])
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        eos_token="<end>",
        pad_token="<pad>",
        chat_template=(
            "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}<end>\n{% endfor %}"
            "{% if add_generation_prompt %}[assistant]{% endif %}"
        ),
    )


def _saved(model: type[PreTrainedModel], config: Any, folder: Path) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A causal language model of two layers over bytes, with grouped keys and tied embeddings."""
    config = LlamaConfig(
        vocab_size=258,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        initializer_range=0.2,
        eos_token_id=256,
        pad_token_id=257,
        bos_token_id=None,
    )
    return _saved(LlamaForCausalLM, config, tmp_path_factory.mktemp("tiny-llama"))


@pytest.fixture(scope="session")
def tiny_gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same in GPT-2's layout: weights stored transposed, and learned positions."""
    config = GPT2Config(
        attn_pdrop=0.0,
        embd_pdrop=0.0,
        resid_pdrop=0.0,
        vocab_size=258,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=256,
        initializer_range=0.2,
        eos_token_id=256,
        pad_token_id=257,
        bos_token_id=None,
    )
    return _saved(GPT2LMHeadModel, config, tmp_path_factory.mktemp("tiny-gpt2"))


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoder of two layers over bytes, without a head."""
    config = BertConfig(
        vocab_size=258,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=256,
        initializer_range=0.2,
        pad_token_id=257,
    )
    return _saved(BertModel, config, tmp_path_factory.mktemp("tiny-bert"))


def _widened(folder: Path, model: type[PreTrainedModel], **sizes: int) -> Path:
    config = model.config_class.from_pretrained(folder, **sizes)
    return _saved(model, config, folder.with_name(folder.name + "-wide"))


@pytest.fixture(scope="session")
def wide_llama(tiny_llama: Path) -> Path:
    """`tiny_llama` in widths that 4-bit blocks divide."""
    return _widened(
        tiny_llama, LlamaForCausalLM, hidden_size=64, head_dim=16, intermediate_size=128, num_hidden_layers=2
    )


@pytest.fixture(scope="session")
def wide_gpt2(tiny_gpt2: Path) -> Path:
    """`tiny_gpt2` likewise."""
    return _widened(tiny_gpt2, GPT2LMHeadModel, n_embd=64)


@pytest.fixture(scope="session")
def wide_bert(tiny_bert: Path) -> Path:
    """`tiny_bert` likewise."""
    return _widened(tiny_bert, BertModel, hidden_size=64, intermediate_size=128)


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the runs that a comparison started or resumed."""
    names: list[str] = []

    def counted(config: Any, **options: Any) -> Any:
        names.append(config.name)
        return run(config, **options)

    monkeypatch.setattr(planned_runs, "run", counted)
    return names
