"""Load exports, and refuse adapters on other base models."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers
from peft import LoraConfig, PeftConfig, PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from fedsmoothlora.data.tables import reason
from fedsmoothlora.errors import NoExportError, WrongBaseError
from fedsmoothlora.exports.base import load_pretrained
from fedsmoothlora.logs import quiet_libraries
from fedsmoothlora.modeling.adapters import avoid_fast_path
from fedsmoothlora.modeling.fingerprint import recognises, saved_sha256, weights_sha256
from fedsmoothlora.modeling.roles import linear_layers
from fedsmoothlora.modeling.versions import saved_names

FACTS = "fedsmoothlora.json"
_PREFIX = "base_model.model."  # of PEFT


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
    avoid_fast_path(model)
    names = _names_here(folder, facts, model, given=base)
    with readable(folder), quiet_libraries(), torch.random.fork_rng(), TemporaryDirectory() as scratch:
        files = _renamed(folder, names, Path(scratch)) if names else folder
        return PeftModel.from_pretrained(model, str(files), config=_peft_config(files)).eval()


def _names_here(
    folder: Path, facts: Mapping[str, Any], model: nn.Module, given: nn.Module | str | None
) -> dict[str, str]:
    """The names of the adapted layers in ``model``, by their names in another release of transformers.

    Empty if the export has the names of this release.

    Raises:
        NoExportError: the model has no such layer in this release.
        WrongBaseError: it has other weights than the adapter's base model.
    """
    base = facts["base"]
    # A hash that was not recorded contradicts nothing.
    wanted, without = base.get("sha256"), base.get("without", ())
    if recognises(wanted, model, without):
        return {}
    if base.get("saved_sha256") == saved_sha256(model, without):
        here = {saved: name for name, saved in saved_names(model, linear_layers(model)).items()}
        if absent := [name for name, layer in facts["layers"].items() if layer["saved"] not in here]:
            raise NoExportError(
                f"{folder} adapts {absent[0]}, a layer that this release of transformers "
                f"({transformers.__version__}) does not have: load it with the release of the export"
            )
        return {name: here[layer["saved"]] for name, layer in facts["layers"].items()}
    found = weights_sha256(model, without)
    source = "the given module" if isinstance(given, nn.Module) else given or base["source"]
    raise WrongBaseError(
        f"the adapter in {folder} belongs to another base model: to {base['source'] or 'one'} "
        f"whose weights have the SHA-256 {wanted[:16]}...; those of {source} have {found[:16]}..."
    )


def _renamed(folder: Path, names: Mapping[str, str], out: Path) -> Path:
    """Write the adapter in ``folder`` to ``out`` with the names that its layers have in this release."""
    table = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    patterns = {f"^{re.escape(name)}$": f"^{re.escape(here)}$" for name, here in names.items()}
    for key in ("rank_pattern", "alpha_pattern"):
        table[key] = {patterns[pattern]: value for pattern, value in table.get(key, {}).items()}
    table["target_modules"] = sorted(names.values())
    (out / "adapter_config.json").write_text(json.dumps(table), encoding="utf-8")
    weights = {}
    for name, value in load_file(folder / "adapter_model.safetensors").items():
        layer, kind, rest = name.removeprefix(_PREFIX).partition(".lora_")
        weights[f"{_PREFIX}{names.get(layer, layer)}{kind}{rest}"] = value
    save_file(weights, out / "adapter_model.safetensors", metadata={"format": "pt"})
    return out


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
