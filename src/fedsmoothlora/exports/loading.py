"""Load exports, and refuse adapters on other base models."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel
from safetensors import SafetensorError
from torch import nn

from fedsmoothlora.data.tables import reason
from fedsmoothlora.errors import NoExportError, WrongBaseError
from fedsmoothlora.exports.base import load_pretrained
from fedsmoothlora.logs import quiet_libraries
from fedsmoothlora.modeling.fingerprint import recognises, weights_sha256

FACTS = "fedsmoothlora.json"


def read_facts(folder: Path) -> dict[str, Any]:
    """The content of an export's ``fedsmoothlora.json``.

    Raises ``NoExportError`` if it is missing or damaged.
    """
    try:
        facts: dict[str, Any] = json.loads((folder / FACTS).read_text(encoding="utf-8"))
        for key in ("as", "task", "classes", "prompt"):
            facts[key]
        for key in ("source", "revision", "without"):
            facts["base"][key]
    except (OSError, ValueError, KeyError, TypeError):
        raise NoExportError(
            f"{folder} is no export of fedsmoothlora: it has no {FACTS} that can be read"
        ) from None
    return facts


@contextmanager
def readable(folder: Path) -> Iterator[None]:
    """Raise ``NoExportError`` that names the folder if a library cannot read its files."""
    try:
        yield
    except (OSError, ValueError, TypeError, KeyError, SafetensorError) as error:
        raise NoExportError(
            f"{folder} is an export whose files cannot be read: {reason(error)}; export it again"
        ) from error


def load_adapter(folder: str | Path, base: nn.Module | str | None = None) -> PeftModel:
    """Load an exported adapter on its pretrained model, in evaluation mode.

    Args:
        folder: a folder written by `fedsmoothlora export --as adapter`.
        base: the pretrained model: a module in float32, which is modified, or a source as in a configuration.
            The model that the run started from unless given.

    Returns:
        The model.

    Raises:
        NoExportError: the folder is not an exported adapter.
        WrongBaseError: ``base`` has other weights than the model that was trained.
    """
    folder = Path(folder)
    facts = read_facts(folder)
    if not facts["as"].startswith("adapter"):
        raise NoExportError(f"{folder} is not an adapter but a whole model: load it with transformers")
    if base is None and facts["base"]["source"] is None:
        raise NoExportError(f"{folder} belongs to a model that has no name: give it as base")
    with quiet_libraries():
        model = base if isinstance(base, nn.Module) else _pretrained(facts, base)
    # A hash that was not recorded contradicts nothing.
    wanted, without = facts["base"].get("sha256"), facts["base"].get("without", ())
    if not recognises(wanted, model, without):
        found = weights_sha256(model, without)
        given = "the given module" if isinstance(base, nn.Module) else base or facts["base"]["source"]
        raise WrongBaseError(
            f"the adapter in {folder} belongs to another base model: to {facts['base']['source'] or 'one'} "
            f"whose weights have the SHA-256 {wanted[:16]}...; those of {given} have {found[:16]}..."
        )
    with readable(folder), quiet_libraries(), torch.random.fork_rng():
        return PeftModel.from_pretrained(model, str(folder), config=_peft_config(folder)).eval()


def _peft_config(folder: Path) -> PeftConfig:
    """The adapter's configuration. Keys of newer releases of PEFT that are not set mean nothing here."""
    table = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    known = {field.name for field in fields(LoraConfig)}
    return PeftConfig.from_peft_type(**{k: v for k, v in table.items() if k in known or v})


def _pretrained(facts: Mapping[str, Any], source: str | None) -> nn.Module:
    base = facts["base"]
    revision = base["revision"] if source is None else None
    # Older exports have no kind.
    kind = facts.get("kind")
    return load_pretrained(facts["task"], source or base["source"], revision, facts["classes"], kind)
