"""Tiny pretrained models of every task in transformers' format, and invented updates."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor

from fedsmoothlora.algebra.lowrank import LowRank
from fedsmoothlora.exports.base import Base, auto_class
from fedsmoothlora.exports.card import Provenance
from fedsmoothlora.exports.export import write_folder
from fedsmoothlora.exports.trained import Trained
from fedsmoothlora.modeling.loading import head_modules, load_weights, model_config
from fedsmoothlora.modeling.settings import ModelSettings

SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]
WORDS = [
    *("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"),
    *("is", "the", "answer", "question", "to", "and", "or", "what", ":", "?", "+", "="),
]
VOCABULARY = len(SPECIAL) + len(WORDS)
CLASSES = ("good", "bad", "neither")
Change = LowRank | Tensor


@dataclass(frozen=True)
class Kind:
    """A pretrained model in a folder.

    Attributes:
        task: the task for which it is loaded.
        folder: the checkpoint.
        inputs: the inputs of the forward pass.
    """

    task: str
    folder: Path
    inputs: dict[str, Tensor]

    @property
    def source(self) -> str:
        return str(self.folder)

    def base(self) -> Base:
        """The pretrained model with a head of three classes, as a run would load it."""
        settings = ModelSettings(source=self.source)
        labels = {"id2label": dict(enumerate(CLASSES))} if self.task != "text-generation" else {}
        model, drawn = load_weights(
            getattr(transformers, auto_class(self.task)), settings, model_config(settings, **labels), 0
        )
        tokenizer = None if self.task == "image-classification" else tiny_tokenizer()
        return Base(
            model=model.eval(),
            head=head_modules(model),
            drawn=drawn,
            write_processor=lambda folder: tokenizer.save_pretrained(folder) if tokenizer else None,
        )

    def about(self, **deltas: Any) -> Provenance:
        """The provenance that an export records."""
        facts: dict[str, Any] = {
            "name": "made-up",
            "source": self.source,
            "revision": None,
            "data": "made-up.csv",
            "method": "fedsmoothlora",
            "rounds": 3,
            "planned_rounds": 4,
            "clients": 2,
            "client": None,
            "classes": () if self.task == "text-generation" else CLASSES,
            "task": self.task,
        }
        return Provenance(**{**facts, **deltas})

    def write(self, trained: Trained, as_: str, out: Path) -> Path:
        """Export it."""
        write_folder(trained, self.base(), self.about(), as_, out)
        return out

    @torch.no_grad()
    def logits(self, model: torch.nn.Module) -> Tensor:
        logits: Tensor = model.eval()(**self.inputs).logits
        return logits


def tiny_tokenizer(**deltas: Any) -> Any:
    """A tokenizer of a few words."""
    words = {word: number for number, word in enumerate([*SPECIAL, *WORDS])}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **dict(zip(("pad_token", "bos_token", "eos_token", "unk_token"), SPECIAL, strict=True)),
        **deltas,
    )


def small(**deltas: Any) -> dict[str, Any]:
    return {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, **deltas}


def make_vit() -> Any:
    return transformers.Dinov2Model(
        transformers.Dinov2Config(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=28,
            patch_size=14,
            initializer_range=0.2,
        )
    )


def make_bert() -> Any:
    config = small(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48)
    return transformers.BertModel(transformers.BertConfig(**config, initializer_range=0.2))


def make_llama(**deltas: Any) -> Any:
    config = small(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        initializer_range=0.2,
        **deltas,
    )
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**config))


def make_gpt2() -> Any:
    config = small(n_embd=32, n_layer=2, n_head=2, n_positions=32, initializer_range=0.2)
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**config))


MAKERS: dict[str, tuple[str, Callable[[], Any]]] = {
    "vit": ("image-classification", make_vit),
    "bert": ("text-classification", make_bert),
    "gpt2-classifier": ("text-classification", make_gpt2),
    "llama": ("text-generation", make_llama),
    "gpt2": ("text-generation", make_gpt2),
}


def make_kinds(make_folder: Callable[[str], Path]) -> dict[str, Kind]:
    """One pretrained model of each kind, each in a folder of its own."""
    pixels = torch.randn(3, 3, 28, 28, generator=torch.Generator().manual_seed(1))
    tokens = torch.randint(3, VOCABULARY, (3, 9), generator=torch.Generator().manual_seed(2))
    found = {}
    for name, (task, make) in MAKERS.items():
        folder = make_folder(name)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            make().save_pretrained(folder)
        if task != "image-classification":
            tiny_tokenizer().save_pretrained(folder)
        inputs = {"pixel_values": pixels} if task == "image-classification" else {"input_ids": tokens}
        found[name] = Kind(task, folder, inputs)
    return found


def delta(model: torch.nn.Module, layer: str, rank: int | None, seed: int = 0) -> Change:
    """A made-up change of a layer, ``(m, n)``, of that rank or dense."""
    weight = model.get_submodule(layer).weight
    assert isinstance(weight, Tensor)
    m, n = weight.shape if isinstance(model.get_submodule(layer), torch.nn.Linear) else weight.mT.shape
    generator = torch.Generator().manual_seed(seed)
    if rank is None:
        return 0.1 * torch.randn(m, n, generator=generator, dtype=torch.float64)
    B = torch.randn(m, rank, generator=generator, dtype=torch.float64)
    A = torch.randn(rank, n, generator=generator, dtype=torch.float64)
    return LowRank(0.2 * B, A)
