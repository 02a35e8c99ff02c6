"""A thousand clients, ten in a round: memory depends only on the clients that take part."""

from __future__ import annotations

import contextlib
import gc
import io
import json
import os
import statistics
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from benchmarks.rows import peak_allocated
from conftest import textures
from fedsmoothlora import methods
from fedsmoothlora.algebra.lowrank import LowRank
from fedsmoothlora.data import registry
from fedsmoothlora.federation.catch_up import catch_up
from fedsmoothlora.federation.initial_state import InitialState
from fedsmoothlora.federation.messages import Reply, memmapped_reply
from fedsmoothlora.federation.participation import sample_clients
from fedsmoothlora.federation.server import Server
from fedsmoothlora.federation.settings import UploadSettings
from fedsmoothlora.federation.uploads import check_replies
from fedsmoothlora.methods import Layer, Update
from fedsmoothlora.runs.session import run
from fedsmoothlora.storage.checkpoints import Checkpoints
from fedsmoothlora.storage.client_store import StoredStates

ROUNDS, A_ROUND, FEW, MANY = 8, 10, 50, 1000
LAYERS, WIDTH, RANK = 6, 32, 2  # query, key and value of two layers


def anonymous_memory() -> int:
    """Anonymous memory of this process in bytes, without mapped files."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return 1024 * int(line.split()[1])
    pytest.skip("needs /proc/self/status")


def tensor_bytes() -> int:
    """Bytes of all tensors that are alive."""
    gc.collect()
    storages = {}
    for one in gc.get_objects():
        # What other tests left behind may be a tensor without storage.
        if issubclass(type(one), torch.Tensor):
            with contextlib.suppress(ReferenceError, RuntimeError, NotImplementedError):
                storages[one.untyped_storage().data_ptr()] = one.untyped_storage().nbytes()
    return sum(storages.values())


def in_child(work: Callable[[], object]) -> None:
    """Run ``work`` in a forked process, so that memory left by one run is not counted for another."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        except BaseException:
            traceback.print_exc()
            raise
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def measured_run(table: dict[str, Any], clients: int, folder: Path, *, in_memory: bool = False) -> None:
    """Run, and write the memory in use after every round to ``folder/held.json``."""
    held: list[dict[str, int]] = []
    real = Checkpoints.save

    def save(self: Checkpoints, *arguments: Any) -> None:
        real(self, *arguments)
        tensors = tensor_bytes()  # collects garbage first
        held.append({"tensors": tensors, "objects": sys.getallocatedblocks(), "process": anonymous_memory()})

    Checkpoints.save = save  # type: ignore[method-assign]  # in the forked child only
    if in_memory:
        kept: dict[str, Any] = {}
        load, store = StoredStates.load, StoredStates.save
        StoredStates.load = lambda self, client, w: kept.setdefault(client, load(self, client, w))  # type: ignore[method-assign]
        StoredStates.save = lambda self, client, one: (kept.update({client: one}), store(self, client, one))[
            1
        ]  # type: ignore[method-assign]
    run(
        table,
        {"partition.clients": clients, "partition.kind": "iid"},
        out=folder,
        console=Console(file=io.StringIO()),
    )
    (folder / "held.json").write_text(json.dumps(held))


@pytest.fixture
def table(toy_table: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The toy federation on 2,000 images, with two steps of one image in a visit."""
    data = textures(2 * MANY, 1), textures(64, 2)
    toy = SimpleNamespace(NAME="textures", load=lambda: data)
    real = registry.packaged  # with the smaller toy data
    monkeypatch.setattr(
        registry,
        "packaged",
        lambda folder: {**real(folder), **({"textures": toy} if folder.endswith("data.packaged") else {})},
    )
    return {
        **toy_table,
        "partition": {},
        "participation": {"clients": A_ROUND},
        "training": {"rounds": ROUNDS, "steps": 2, "batch_size": 1, "lr": 0.01},
    }


def held(folder: Path, what: str) -> list[int]:
    return [one[what] for one in json.loads((folder / "held.json").read_text())]


@pytest.mark.slow
def test_memory_depends_on_the_clients_of_a_round_not_on_all_clients(
    table: dict[str, Any], tmp_path: Path
) -> None:
    few, many = tmp_path / "few", tmp_path / "many"
    for clients, folder in ((FEW, few), (MANY, many)):
        in_child(lambda clients=clients, folder=folder: measured_run(table, clients, folder))

    # Tensors: none that goes with the number of clients. One client's kept upload and updates are 6 KiB, 60
    # clients' 360 KiB; the sum of all updates grows to one dense matrix a layer, 24 KiB, at most.
    assert max(held(many, "tensors")) <= max(held(few, "tensors")) + 8 * 1024
    assert held(many, "tensors")[-1] <= held(many, "tensors")[1] + 32 * 1024
    # Python's blocks of memory: a client's id, its rows and what evaluates them.
    assert max(held(many, "objects")) <= max(held(few, "objects")) + 30 * (MANY - FEW)
    # All that the process has for itself, allocators' slack and all: 8 MiB (1.1 MiB measured).
    assert max(held(many, "process")) <= max(held(few, "process")) + 8 * 2**20
    assert held(many, "process")[-1] <= held(many, "process")[1] + 8 * 2**20

    ids = [str(i) for i in range(MANY)]
    visited: dict[str, int] = {}  # by client, its last round
    metrics = [json.loads(line) for line in (many / "metrics.jsonl").read_text().splitlines()]
    for t in range(ROUNDS):
        chosen = sample_clients(ids, A_ROUND, 0, t, 0)
        lines = [line for line in metrics if line["round"] == t + 1]
        assert {line["client"] for line in lines if line["name"] == "samples"} == set(chosen)
        factors = 4 * RANK * 2 * WIDTH
        down = sum(
            LAYERS * min((t - visited.get(client, 0)) * factors, 4 * WIDTH * WIDTH) for client in chosen
        )
        totals = {line["name"]: line["value"] for line in lines if line["client"] is None}
        assert totals["bytes_down"] == down + A_ROUND * head_bytes(many)
        assert totals["bytes_up"] == A_ROUND * (LAYERS * factors + head_bytes(many))
        visited.update(dict.fromkeys(chosen, t))
    assert {path.name for path in (many / "clients").iterdir()} == visited.keys()
    assert A_ROUND * 5 < len(visited) < MANY

    # Rounds take about as long, early and late, with few clients and with many.
    seconds = {
        folder: [
            line["value"]
            for line in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
            if line["name"] == "seconds_round"
        ]
        for folder in (few, many)
    }
    assert len(seconds[many]) == ROUNDS
    assert statistics.median(seconds[many][-3:]) < 3 * statistics.median(seconds[many][1:4]) + 0.5
    assert statistics.median(seconds[many]) < 3 * statistics.median(seconds[few]) + 0.5


def head_bytes(folder: Path) -> int:
    """The size of the fully trained head, from the file of the initial head."""
    data = (folder / "head.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    return len(data) - 8 - length


@pytest.mark.slow
def test_the_measurement_notices_states_in_memory(table: dict[str, Any], tmp_path: Path) -> None:
    """The measurement of the test above, for a run that keeps its clients' states in memory."""
    in_child(lambda: measured_run(table, MANY, tmp_path / "run", in_memory=True))
    tensors = held(tmp_path / "run", "tensors")
    assert tensors[-1] > tensors[1] + 4 * 32 * 1024


WIDE = 96
MEAN_METHODS = ("fedsmoothlora", "fedit", "flexlora", "flora", "fedex")


def waiting_replies(server: Server, count: int) -> list[Reply]:
    """Memory-mapped replies of many clients, as at the end of a round."""

    def upload(client: int) -> Update:
        draw = torch.Generator().manual_seed(client)
        sent = server.method.sends(server.round)
        found: dict[str, LowRank | torch.Tensor] = {}
        for name, layer in server.layers.items():
            B = torch.randn(layer.m, layer.rank, generator=draw)
            A = torch.randn(layer.rank, layer.n, generator=draw)
            found[name] = LowRank(B, A) if sent == "product" else {"B": B, "A": A}[sent]
        return found

    return [
        memmapped_reply(Reply(client=f"{c:03d}", round=0, samples=1 + c % 5, sent=upload(c)))
        for c in range(count)
    ]


def wide_server(method: str) -> Server:
    layers = {
        f"layer {k}": Layer(f"layer {k}", WIDE, WIDE, RANK, scale=1.0, gradient_rank=WIDE) for k in range(4)
    }
    origin = InitialState(layers, 0, lambda name: torch.zeros(WIDE, WIDE))
    return Server(method=methods.find(method)(), layers=layers, initial_state=origin, rounds=9, head={})


@pytest.mark.parametrize("method", MEAN_METHODS)
def test_uploads_are_aggregated_one_layer_at_a_time(method: str) -> None:
    """Beyond the matrix of one layer, ``m n`` numbers, four times the uploads take no more memory."""
    peaks = []
    for count in (30, 120):
        server = wide_server(method)
        replies = waiting_replies(server, count)
        peaks.append(peak_allocated(partial(server.aggregate, replies)))
        made = tensor_size(server.updates[0]) + tensor_size(server.model)
        assert peaks[-1] - made <= 8 * 4 * WIDE * WIDE  # an SVD's workspace included
    assert sum(reply.nbytes for reply in replies) > 1.5 * peaks[-1]
    assert peaks[1] <= 1.1 * peaks[0]


@pytest.mark.parametrize("clip", [False, True], ids=["as they came", "clipped"])
def test_uploads_are_checked_one_at_a_time(clip: bool) -> None:
    server = wide_server("fedsmoothlora")
    replies = waiting_replies(server, 120)
    expected = server.reply_spec({reply.client: reply.samples for reply in replies})
    before = anonymous_memory()
    found = check_replies(replies, expected, UploadSettings(clip_to_median=clip))
    changed = sum(one is not other for one, other in zip(found.accepted, replies, strict=True))
    assert changed > 40 if clip else not changed
    # The files' pages are not the process's own.
    assert anonymous_memory() - before < 0.25 * sum(reply.nbytes for reply in replies) + 2**20


def tensor_size(update: Update) -> int:
    return sum(value.nbytes for value in update.values())


def test_catching_up_over_many_rounds_takes_no_more_memory_than_over_few() -> None:
    server = wide_server("fedsmoothlora")

    def updates(count: int) -> Iterator[Update]:
        for t in range(count):
            draw = torch.Generator().manual_seed(t)
            yield {
                name: LowRank(
                    torch.randn(WIDE, RANK, generator=draw), torch.randn(RANK, WIDE, generator=draw)
                )
                for name in server.layers
            }

    few = peak_allocated(lambda: catch_up(updates(110), server.layers))
    many = peak_allocated(lambda: catch_up(updates(220), server.layers))
    assert many <= 1.1 * few


def test_clients_that_lack_the_same_updates_share_one_sum() -> None:
    server = wide_server("fedsmoothlora")
    for t in range(3):
        replies = [replace(reply, round=t) for reply in waiting_replies(server, 3)]
        server.delivered(replies[0].client)
        server.aggregate(replies)
    newcomers = [server.message(f"newcomer {k}").updates for k in range(5)]
    assert all(one is newcomers[0] for one in newcomers)
    assert server.message(replies[0].client).updates is not newcomers[0]
    before = newcomers[0]
    server.aggregate([replace(reply, round=3) for reply in replies])
    assert server.message("newcomer 0").updates is not before  # and never an old one
