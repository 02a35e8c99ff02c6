"""Files whose SHA-256 is recorded, in another file or in themselves, and checked when they are read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load as load_tensors
from torch import Tensor

from fedsmoothlora.errors import StateError
from fedsmoothlora.federation.serialization import serialised
from fedsmoothlora.storage.files import read_bytes, write_bytes


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write a safetensors file whole, and return its SHA-256."""
    data, digest = serialised(tensors)
    write_bytes(path, data)
    return digest


def write_if_new(path: Path, data: bytes) -> str:
    """Write a file unless it already has these bytes, and return its name."""
    if not path.is_file() or path.read_bytes() != data:
        write_bytes(path, data)
    return path.name


def read_tensors(path: Path, digest: str) -> dict[str, Tensor]:
    """The tensors of a safetensors file. Raises ``StateError`` unless its SHA-256 is ``digest``."""
    return load_tensors(verified_bytes(path, digest))


def verified_bytes(path: Path, digest: str) -> bytes:
    """The bytes of a file. Raises ``StateError`` unless their SHA-256 is ``digest``."""
    data = read_bytes(path)
    if hashlib.sha256(data).hexdigest() != digest:
        raise StateError(f"{path} is truncated or was altered: its SHA-256 is not the one recorded")
    return data


def write_hashed_json(path: Path, table: Mapping[str, Any]) -> None:
    """Write a JSON object that contains its own SHA-256."""
    body = json.dumps(table, sort_keys=True)
    digest = hashlib.sha256(body.encode()).hexdigest()
    write_bytes(path, json.dumps({**table, "sha256": digest}, sort_keys=True, indent=1).encode())


def read_hashed_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises ``StateError`` unless it contains its own SHA-256."""
    data = read_bytes(path)
    try:
        table = dict(json.loads(data))
        digest = table.pop("sha256")
        whole = hashlib.sha256(json.dumps(table, sort_keys=True).encode()).hexdigest() == digest
    except (ValueError, KeyError, TypeError, RecursionError):
        whole = False
    if not whole:
        raise StateError(f"{path} is truncated or was altered: its SHA-256 is not the one recorded")
    return dict(table)
