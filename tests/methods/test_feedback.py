"""Server feedback and server rank, beyond the paper: `E^{t+1} = E^t + (1 - zeta_{t+1}) (avg - S^t)`."""

import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor

from fedsmoothlora.algebra.lowrank import LowRank
from fedsmoothlora.algebra.schedules import zeta_at
from fedsmoothlora.callbacks import Callback
from fedsmoothlora.config import read
from fedsmoothlora.errors import ConfigError, InterruptedRunError
from fedsmoothlora.federation.client import Learner
from fedsmoothlora.federation.rounds import run_rounds
from fedsmoothlora.federation.simulation import Simulation
from fedsmoothlora.methods import Layer, Method, ServerUpdate, ServerView
from fedsmoothlora.methods.fedsmoothlora import FedSmoothLoRA
from fedsmoothlora.runs.planning import plan
from fedsmoothlora.runs.session import run

F64 = torch.float64
RANK, COUNTS, ROUNDS = 2, (3, 1, 4), 30
LAYERS = {
    name: Layer(name, m, n, RANK, scale=2.0, gradient_rank=min(m, n))
    for name, (m, n) in {"tall": (15, 11), "wide": (9, 18)}.items()
}


def method(**options: Any) -> Method:
    return FedSmoothLoRA(**options)


def dense(value: LowRank) -> np.ndarray:
    return value.B.double().numpy() @ value.A.double().numpy()


def svd(matrix: np.ndarray, rank: int) -> np.ndarray:
    U, sigma, Vt = np.linalg.svd(matrix, full_matrices=False)
    return (U[:, :rank] * sigma[:rank]) @ Vt[:rank]


def drawn(seed: int, dtype: torch.dtype) -> dict[str, LowRank]:
    draw = torch.Generator().manual_seed(seed)
    return {
        name: LowRank(
            torch.randn(layer.m, RANK, generator=draw, dtype=F64).to(dtype),
            torch.randn(RANK, layer.n, generator=draw, dtype=F64).to(dtype),
        )
        for name, layer in LAYERS.items()
    }


def average(uploads: Sequence[Mapping[str, LowRank]], name: str) -> np.ndarray:
    weights = np.array(COUNTS) / sum(COUNTS)
    return sum(p * dense(upload[name]) for p, upload in zip(weights, uploads, strict=True))  # type: ignore


def play(
    server: Method,
    rounds: int = ROUNDS,
    dtype: torch.dtype = F64,
    each: Callable[..., None] = lambda *_: None,
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], ServerUpdate]:
    """Sums of all averages and of all that was merged, by layer, and the last round's update."""
    averages = {name: np.zeros((x.m, x.n)) for name, x in LAYERS.items()}
    merged = {name: np.zeros((x.m, x.n)) for name, x in LAYERS.items()}
    update = ServerUpdate()
    for t in range(rounds):
        uploads = [drawn(100 * t + c, dtype) for c in range(3)]
        view = ServerView(round=t, rounds=rounds, layers=LAYERS, memory=update.memory)
        before, update = update, server.aggregate(uploads, COUNTS, view)
        each(t, before, {name: average(uploads, name) for name in LAYERS}, update)
        for name in LAYERS:
            averages[name] += average(uploads, name)
            merged[name] += dense(update.merge[name])
    return averages, merged, update


# -- the algebra -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "tolerance"), [(F64, 1e-10), (torch.float32, 1e-4)])
@pytest.mark.parametrize("off", [{"zeta": 0.0}, {"round_matching": False}], ids=["zeta 0", "no matching"])
def test_at_zeta_0_nothing_is_lost_over_many_rounds(
    off: dict[str, Any], dtype: torch.dtype, tolerance: float
) -> None:
    averages, merged, update = play(method(server_feedback=True, **off), dtype=dtype)
    for name, wanted in averages.items():
        left = dense(update.memory[name])
        assert np.linalg.norm(left) > 0.05 * np.linalg.norm(wanted)  # or the test says nothing
        assert np.linalg.norm(merged[name] + left - wanted) <= tolerance * np.linalg.norm(wanted)


@pytest.mark.parametrize("schedule", ["constant", "cosine", "linear"])
@pytest.mark.parametrize("balance", ["sqrt", "left"])
def test_every_round_follows_the_formula(schedule: Any, balance: Any) -> None:
    zeta, floor = 0.7, 0.2

    def check(t: int, before: ServerUpdate, mean: Mapping[str, np.ndarray], update: ServerUpdate) -> None:
        for name in LAYERS:
            E = dense(before.memory[name]) if before.memory else 0.0
            S = dense(update.merge[name])
            np.testing.assert_allclose(S, svd(mean[name] + E, RANK), atol=1e-10)
            carried = zeta_at(t + 1, 8, schedule=schedule, zeta=zeta, floor=floor)
            np.testing.assert_allclose(
                dense(update.memory[name]), E + (1 - carried) * (mean[name] - S), atol=1e-10
            )

    options = {"zeta": zeta, "zeta_floor": floor, "zeta_schedule": schedule, "balance": balance}
    play(method(server_feedback=True, **options), rounds=8, each=check)


def test_at_zeta_1_feedback_changes_nothing() -> None:
    """Clients carry the truncation error in their own matches, so the memory stays empty."""
    _, plain, _ = play(method())
    _, fed, update = play(method(server_feedback=True))
    for name in LAYERS:
        np.testing.assert_allclose(fed[name], plain[name], atol=1e-10)
        assert update.memory[name].rank == 0


def test_without_feedback_there_is_no_memory() -> None:
    assert play(method(zeta=0.0), rounds=2)[2].memory == {}


@pytest.mark.parametrize("cap", [1, 3, 5])
def test_feedback_rank_bounds_the_memory_and_keeps_the_leading_part(cap: int) -> None:
    def check(t: int, before: ServerUpdate, mean: Mapping[str, np.ndarray], update: ServerUpdate) -> None:
        for name in LAYERS:
            E = dense(before.memory[name]) if before.memory else 0.0
            left = E + mean[name] - dense(update.merge[name])
            assert update.memory[name].rank <= cap
            np.testing.assert_allclose(dense(update.memory[name]), svd(left, cap), atol=1e-10)

    play(method(server_feedback=True, zeta=0.0, feedback_rank=cap), rounds=8, each=check)


def test_without_a_cap_the_memory_has_no_more_directions_than_the_layer() -> None:
    _, _, update = play(method(server_feedback=True, zeta=0.0))
    for name, layer in LAYERS.items():
        assert update.memory[name].rank <= min(layer.m, layer.n)


@pytest.mark.parametrize("rank", [2, 4, 5])
@pytest.mark.parametrize("fed", [False, True])
def test_server_rank_is_the_rank_of_every_update(rank: int, fed: bool) -> None:
    def check(t: int, before: ServerUpdate, mean: Mapping[str, np.ndarray], update: ServerUpdate) -> None:
        for name in LAYERS:
            assert update.merge[name].rank == rank
            E = dense(before.memory[name]) if before.memory else 0.0
            np.testing.assert_allclose(dense(update.merge[name]), svd(mean[name] + E, rank), atol=1e-10)

    play(method(server_rank=rank, server_feedback=fed, zeta=0.0), rounds=6, each=check)


# -- what is refused ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "partial", "key"),
    [
        ({"feedback_rank": 4}, False, "feedback_rank"),
        ({"server_rank": 1}, False, "server_rank"),
        ({"server_feedback": True}, True, "zeta = 0"),
        ({"server_feedback": True, "zeta": 0.3, "zeta_schedule": "cosine"}, True, "zeta = 0"),
        # It rises from 0 to its floor.
        (
            {"server_feedback": True, "zeta": 0.0, "zeta_schedule": "linear", "zeta_floor": 0.5},
            True,
            "zeta = 0",
        ),
    ],
)
def test_options_that_clash_are_refused_by_name(options: dict[str, Any], partial: bool, key: str) -> None:
    with pytest.raises(ValueError, match=f"method.{key}"):
        method(**options).check(LAYERS, partial=partial)


@pytest.mark.parametrize(
    ("options", "partial"),
    [
        ({"server_feedback": True}, False),
        ({"server_feedback": True, "zeta": 0.0}, True),
        ({"server_feedback": True, "zeta": 0.0, "zeta_floor": 0.5}, True),  # constant: without a floor
        ({"server_feedback": True, "round_matching": False}, True),
        ({"server_feedback": True, "feedback_rank": 1}, False),
        ({"server_rank": RANK}, True),
        ({"server_rank": 7}, True),
    ],
)
def test_other_combinations_are_accepted(options: dict[str, Any], partial: bool) -> None:
    method(**options).check(LAYERS, partial=partial)


def test_a_configuration_of_clients_that_miss_rounds_is_refused_with_feedback_and_matching(
    toy_table: dict[str, Any],
) -> None:
    changes = {"method.server_feedback": True, "participation.clients": 2}
    with pytest.raises(ConfigError, match=r"method\.zeta = 0"):
        plan(read(toy_table, changes))
    plan(read(toy_table, {**changes, "method.zeta": 0.0}))
    plan(read(toy_table, {**changes, "participation.clients": 3}))


# -- federations -------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [2, 3, 6])
def test_the_rank_of_the_server_is_what_is_sent_down(
    toy_federation: Callable[..., Simulation], rank: int
) -> None:
    federation = toy_federation({"method.server_rank": rank})
    layers = federation.server.layers.values()
    head = sum(value.nbytes for value in federation.server.head.values())
    up = sum(4 * 2 * (layer.m + layer.n) for layer in layers)
    down = sum(4 * rank * (layer.m + layer.n) for layer in layers)
    for record in run_rounds(federation, Callback()):
        if record.round:
            assert record.value("bytes_up") == 3 * (up + head)
        if record.round > 1:
            assert record.value("bytes_down") == 3 * (down + head)


def test_a_client_that_missed_rounds_is_caught_up_with_what_was_merged(
    toy_federation: Callable[..., Simulation],
) -> None:
    """The sum of everything that the client received, memory included, equals the server's sum."""
    federation = toy_federation(
        {
            "method.server_feedback": True,
            "method.zeta": 0.0,
            "participation.clients": 1,
            "training.rounds": 7,
            "training.steps": 2,
        }
    )
    sent: dict[str, list[Any]] = {client: [] for client in federation.clients}
    visit = federation.learner.visit

    class Seen:
        def __getattr__(self, name: str) -> Any:
            return getattr(learner, name)

        def visit(self, client: str, data: Any, message: Any, *rest: Any) -> Any:
            sent[client].append(message)
            return visit(client, data, message, *rest)

    learner = federation.learner
    federation.learner = Seen()  # type: ignore[assignment]
    for _ in run_rounds(federation, Callback()):
        pass
    updates = federation.server.updates
    assert any(len(m.updates) and m.round - m.first_update > 1 for ms in sent.values() for m in ms)
    for messages in sent.values():
        for name, layer in federation.server.layers.items():
            total = torch.zeros(layer.m, layer.n)
            for message in messages:
                for value in [message.updates[name]] if name in message.updates else []:
                    total += value if isinstance(value, Tensor) else value.dense()
                wanted = sum(
                    (update[name].dense() for update in updates[: message.round]), torch.zeros_like(total)
                )
                torch.testing.assert_close(total, wanted, rtol=1e-4, atol=1e-5)


def traces(folder: Path) -> tuple[list[dict[str, Any]], dict[str, bytes]]:
    """Metrics without times; bytes of updates, model and checkpoints, whose tensors hold the memory."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    files = [
        *(folder / "updates").glob("*"),
        *(folder / "checkpoints").glob("*.safetensors"),
        folder / "model" / "model.safetensors",
    ]
    return (
        [line for line in lines if not line["name"].startswith("seconds")],
        {path.name: path.read_bytes() for path in sorted(files)},
    )


# FlexLoRA has the same option.
@pytest.mark.parametrize(
    "options",
    [
        {"name": "fedsmoothlora", "gamma": 64, "calibration_batches": 2, "zeta": 0.0},
        {"name": "fedsmoothlora", "gamma": 64, "calibration_batches": 2, "zeta": 0.5, "server_rank": 3},
        {"name": "flexlora"},
    ],
    ids=["zeta 0", "zeta 0.5", "flexlora"],
)
@pytest.mark.parametrize("error", [InterruptedRunError, KeyboardInterrupt])
def test_a_resumed_run_keeps_the_memory_bit_for_bit(
    toy_table: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
    error: type[BaseException],
) -> None:
    toy_table["method"] = {**options, "server_feedback": True, "feedback_rank": 5}
    toy_table["training"] = {"rounds": 4, "steps": 2, "batch_size": 8, "lr": 0.02}
    run(toy_table, out=tmp_path / "whole", console=Console(file=io.StringIO()))
    visits, visit = 0, Learner.visit

    def stopped(self: Learner, *arguments: Any) -> Any:
        nonlocal visits
        visits += 1
        if visits in (4, 9):  # before the first client of the second round, and in the last
            raise error("stopped")
        return visit(self, *arguments)

    monkeypatch.setattr(Learner, "visit", stopped)
    folder = tmp_path / "stopped"
    with pytest.raises(error):
        run(toy_table, out=folder, console=Console(file=io.StringIO()))
    with pytest.raises(error):
        run(resume=folder, console=Console(file=io.StringIO()))
    run(resume=folder, console=Console(file=io.StringIO()))
    assert visits > 12
    metrics, files = traces(folder)
    wanted, wanted_files = traces(tmp_path / "whole")
    assert metrics == wanted
    assert files == wanted_files


def test_feedback_gets_nearer_to_the_sum_of_averages_than_truncation_alone() -> None:
    averages, plain, _ = play(method(zeta=0.0))
    _, fed, _ = play(method(zeta=0.0, server_feedback=True))
    missing = {
        key: math.sqrt(sum(float(np.sum((merged[name] - averages[name]) ** 2)) for name in LAYERS))
        for key, merged in (("plain", plain), ("fed", fed))
    }
    assert missing["fed"] < missing["plain"]
