"""Bytes of a round's messages and replies: as the package counts them, and as safetensors hold them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from safetensors.torch import save
from torch import Tensor

from benchmarks.rows import Row
from fedsmoothlora.exchange import Message, Reply
from fedsmoothlora.lowrank import LowRank
from fedsmoothlora.methods import Update

# (m, n) of the ViT-S's query, key and value layers, twelve blocks of them, and the head.
_SHAPES = {f"block.{k}.{name}": (384, 384) for k in range(12) for name in ("q", "k", "v")}


def rows() -> Iterator[Row]:
    """One upload and one message of the recipe quickstart (rank 8, a head for ten classes)."""
    head = {"classifier.weight": torch.zeros(10, 768), "classifier.bias": torch.zeros(10)}
    sizes = {}
    for dtype in (torch.float32, torch.bfloat16):
        factors = {
            name: LowRank(torch.zeros(m, 8, dtype=dtype), torch.zeros(8, n, dtype=dtype))
            for name, (m, n) in _SHAPES.items()
        }
        whole = {name: value.to(dtype) for name, value in head.items()}
        reply = Reply(client="north", round=1, samples=800, sent=factors, head=whole)
        message = Message(round=1, updates=factors, head=whole)
        sizes[dtype] = reply.nbytes + message.nbytes
        stored = _stored(reply.sent, reply.head) + _stored(message.updates, message.head)
        yield Row(
            name=f"up and down, {str(dtype).removeprefix('torch.')}: safetensors against the count",
            value=stored / 1e6,
            unit="MB",
            against=sizes[dtype] / 1e6,
            target="at most 1.01",
        )
    yield Row(
        name="up and down: bfloat16 against float32",
        value=sizes[torch.bfloat16] / 1e6,
        unit="MB",
        against=sizes[torch.float32] / 1e6,
        target="0.5",
    )


def _stored(update: Update, head: Mapping[str, Tensor]) -> int:
    tensors = dict(head)
    for name, value in update.items():
        assert isinstance(value, LowRank)
        tensors |= {f"{name}/B": value.B, f"{name}/A": value.A}
    return len(save(tensors))
