"""Bytes of a round's messages and replies: as counted by the package and as sent by Flower."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from flwr.common.serde import recorddict_to_proto

from benchmarks.rows import Row
from fedsmoothlora.algebra.lowrank import LowRank
from fedsmoothlora.config import read
from fedsmoothlora.federation.messages import Message, Reply
from fedsmoothlora.federation.wire import pack
from fedsmoothlora.flower.records import to_records
from fedsmoothlora.runs.planning import build, plan

_METRICS = ("train_loss", "train_loss_first", "train_loss_last", "start_error", "ga_kept")
_SECONDS = ("seconds_start", "seconds_training", "seconds_upload", "seconds_loading")


def rows() -> Iterator[Row]:
    """One upload and one message of the recipe quickstart: a ViT-S, rank 8, a head for ten classes."""
    factors: dict[str, int] = {}
    measured: dict[str, int] = {}
    for dtype, bits in (("float32", 32), ("bfloat16", 16), ("4 bits", 4)):
        reply, message = _exchanged(bits)
        factors[dtype] = sum(
            value.nbytes for part in (reply.sent, message.updates) for value in part.values()
        )
        measured[dtype] = _on_the_wire(reply) + _on_the_wire(message)
        yield Row(
            name=f"up and down, {dtype}: what Flower is given, serialised, against the count",
            value=measured[dtype] / 1e6,
            unit="MB",
            against=(reply.nbytes + message.nbytes) / 1e6,
            target="at most 1.01",
        )
    for what, bytes_of in (("factors alone", factors), ("all that crosses the wire", measured)):
        yield Row(
            name=f"up and down, {what}: bfloat16 against float32",
            value=bytes_of["bfloat16"] / 1e6,
            unit="MB",
            against=bytes_of["float32"] / 1e6,
            target="0.5" if bytes_of is factors else "",
        )


def _exchanged(bits: int) -> tuple[Reply, Message]:
    """A client's reply of the first round, with made-up numbers, and the server's message after it."""
    simulation = build(plan(read("quickstart", {"transport.bits": bits})))
    server, client = simulation.server, next(iter(simulation.clients))
    server.experiment = "0" * 32
    draw = torch.Generator().manual_seed(0)
    sent = {
        name: LowRank(
            torch.randn(layer.m, layer.rank, generator=draw), torch.randn(layer.rank, layer.n, generator=draw)
        )
        for name, layer in server.layers.items()
    }
    reply = Reply(
        client=client,
        experiment=server.experiment,
        round=0,
        samples=len(simulation.clients[client]),
        sent=server.transport.coded(sent),
        head=server.head,
        metrics=dict.fromkeys((*_METRICS, *_SECONDS), 0.1),
    )
    server.delivered(client)
    server.aggregate([reply])
    return reply, server.message(client)


def _on_the_wire(content: Reply | Message) -> int:
    """Bytes of the protocol buffer that Flower sends, without TLS and gRPC."""
    return len(recorddict_to_proto(to_records(pack(content), status={"status": "done"})).SerializeToString())
