"""Fed-SB against its formula: fixed directions of the gradient, an exact mean of R, and who is sent what."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from lone_client import ROUNDS, lone, recorded, trained_by_hand
from oracles import (
    COUNTS,
    LAYERS,
    RANK,
    client_view,
    close,
    dense,
    mean,
    method,
    normal,
    server_view,
    svd,
)
from torch import Tensor

from fedsmoothlora.algebra.lowrank import LowRank
from fedsmoothlora.callbacks import Callback
from fedsmoothlora.config import ConfigError, read
from fedsmoothlora.errors import LostStateError
from fedsmoothlora.federation.client_state import ClientState
from fedsmoothlora.federation.rounds import run_rounds
from fedsmoothlora.federation.simulation import Simulation
from fedsmoothlora.methods import ServerUpdate
from fedsmoothlora.modeling.adapters import AdaptedModel
from fedsmoothlora.runs.planning import plan
from layer_names import QUERY

Make = Callable[..., Simulation]
F64 = torch.float64


def gradients(seed: int) -> dict[str, Tensor]:
    return {name: normal(x.m, x.n, seed=seed + 7 * i) for i, (name, x) in enumerate(LAYERS.items())}


def exchanged() -> tuple[list[dict[str, Tensor]], ServerUpdate]:
    """Three clients' gradients, and the server's update of round 0."""
    fed_sb, own = method("fed_sb"), [gradients(100 * c) for c in range(3)]
    uploads = []
    for found in own:
        view = client_view(0, gradients=lambda at, found=found: found)
        uploads.append(fed_sb.upload({}, fed_sb.start(view), view).sent)
    return own, fed_sb.aggregate(uploads, COUNTS, server_view(0))


def cores(seed: int) -> dict[str, Tensor]:
    return {name: normal(RANK, RANK, seed=seed + i) for i, name in enumerate(LAYERS)}


def test_the_factors_span_the_leading_directions_of_the_mean_of_the_truncated_gradients() -> None:
    own, update = exchanged()
    assert not update.merge
    for name in LAYERS:
        want = mean([svd(found[name].numpy(), RANK) for found in own])
        U, _, Vt = np.linalg.svd(want, full_matrices=False)
        fixed = update.memory[name]
        assert isinstance(fixed, LowRank)
        B, A = fixed.B.numpy(), fixed.A.numpy()
        close(B.T @ B, np.eye(RANK))
        close(A @ A.T, np.eye(RANK))
        close(B @ B.T, U[:, :RANK] @ U[:, :RANK].T)
        close(A.T @ A, Vt[:RANK].T @ Vt[:RANK])
        close(dense(update.model[name]), np.zeros((LAYERS[name].m, LAYERS[name].n)))  # R = 0


def test_gradients_of_lower_rank_still_give_orthonormal_factors() -> None:
    zero = {n: LowRank.zeros(x.m, x.n, dtype=F64) for n, x in LAYERS.items()}
    one = {n: LowRank(normal(x.m, 1, seed=1), normal(1, x.n, seed=2)) for n, x in LAYERS.items()}
    for uploads in ([zero], [one], [zero, one]):
        update = method("fed_sb").aggregate(uploads, [1] * len(uploads), server_view(0))
        for fixed in update.memory.values():
            assert isinstance(fixed, LowRank)
            close((fixed.B.mT @ fixed.B).numpy(), np.eye(RANK))
            close((fixed.A @ fixed.A.mT).numpy(), np.eye(RANK))


@pytest.mark.parametrize("seed", range(3))
def test_the_global_product_is_exactly_the_mean_of_products(seed: int) -> None:
    fed_sb, (_, first) = method("fed_sb"), exchanged()
    views = [client_view(1, server_lora=first.lora)] * 3
    before = first
    for t in (1, 2):
        starts = [fed_sb.start(view) for view in views]
        trained = [cores(seed + 10 * c + 100 * t) for c in range(3)]
        uploads = [fed_sb.upload(one, start, views[0]) for one, start in zip(trained, starts, strict=True)]
        view = server_view(t, memory=before.memory, model=before.model)
        update = fed_sb.aggregate([upload.sent for upload in uploads], COUNTS, view)
        for name in LAYERS:
            fixed = first.memory[name]
            products = [fixed.B.numpy() @ one[name].numpy() @ fixed.A.numpy() for one in trained]
            close(dense(update.model[name]), mean(products))
            for start in starts:  # all clients start from the global model
                got = start.lora[name].B @ start.cores[name] @ start.lora[name].A
                close(got.numpy(), dense(before.model[name]))
                assert tuple(start.trains) == ("R",)
        views = [client_view(t + 1, server_lora=update.lora, kept=upload.kept) for upload in uploads]
        newcomer = fed_sb.start(client_view(t + 1, server_lora=fed_sb.whole(update)))
        known = fed_sb.start(views[0])
        for name in LAYERS:
            assert torch.equal(newcomer.cores[name], known.cores[name])
            assert torch.equal(newcomer.lora[name].A, known.lora[name].A)
        before = update


def test_a_client_that_lost_the_factors_cannot_start() -> None:
    with pytest.raises(LostStateError, match="factors of layer tall"):
        method("fed_sb").start(client_view(3, server_lora=cores(1)))


# -- the matrix between the factors in the model


def test_a_model_with_a_matrix_between_the_factors_computes_its_product(toy_federation: Make) -> None:
    model = toy_federation({"method.name": "fed_sb"}).learner.model
    assert isinstance(model, AdaptedModel)
    layers = model.layers
    lora = {n: LowRank(torch.randn(x.m, x.rank), torch.randn(x.rank, x.n)) for n, x in layers.items()}
    R = {name: torch.randn(x.rank, x.rank) for name, x in layers.items()}
    x = torch.randn(2, 3, 28, 28)
    product = {name: LowRank(p.B, R[name] @ p.A) for name, p in lora.items()}
    model.model.eval()  # without dropout
    with torch.no_grad():
        model.load_lora(product)
        want = model.model(pixel_values=x).logits
        model.load_lora(lora, R)
        got = model.model(pixel_values=x).logits
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(model.cores()[name], R[name]) for name in layers)
    for name, found in model.lora().items():
        torch.testing.assert_close(found.dense(), product[name].dense())
    model.train_only(("R",))
    trained = {name for name in model.trained_parameters() if ".lora_" in name}
    assert trained == {f"{name}.lora_R" for name in layers}
    with model.without_lora():
        pass
    assert {name for name in model.trained_parameters() if ".lora_" in name} == trained
    model.load_lora(lora)  # without a matrix, it is the identity
    for name, found in model.lora().items():
        torch.testing.assert_close(found.dense(), lora[name].dense())
    with pytest.raises(
        ConfigError, match=r"a matrix \(2, 2\) between the LoRA factors expected, .*; got \(3, 3\)"
    ):
        model.load_lora(lora, dict.fromkeys(layers, torch.zeros(3, 3)))


# -- in a federation


def test_a_lone_client_trains_R_as_by_hand(toy_federation: Make) -> None:
    """The weights after the run are ``W + s B R A`` with R trained by plain SGD on the same batches."""
    federation = lone(toy_federation, {"method.name": "fed_sb"})
    batches = recorded(federation)
    records = list(run_rounds(federation, Callback()))
    assert records[1].value("train_loss") is None  # round 0 trains nothing
    assert records[1].value("loss") == pytest.approx(records[0].value("loss"), rel=1e-5)

    layers, fixed = federation.server.layers, federation.server.memory
    R = {name: torch.zeros(x.rank, x.rank, requires_grad=True) for name, x in layers.items()}

    def product(name: str) -> Tensor:
        factors = fixed[name]
        assert isinstance(factors, LowRank)
        return factors.B @ R[name] @ factors.A

    trained_by_hand(federation, batches, range(1, ROUNDS), product, lambda: R.values())


def lora_bytes(simulation: Simulation, client: str) -> int:
    return sum(value.nbytes for value in simulation.server.message(client).lora.values())


def test_B_and_A_go_down_once_and_again_only_to_a_client_that_lost_them(toy_federation: Make) -> None:
    federation = toy_federation({"method.name": "fed_sb", "training.rounds": 5, "participation.clients": 2})
    layers, server = federation.server.layers.values(), federation.server
    both, small = (
        4 * sum(x.rank * (x.m + x.n) for x in layers),
        4 * sum(x.rank * x.rank for x in layers),
    )
    for record in run_rounds(federation, Callback()):
        if not record.round:
            continue
        for client in federation.clients:
            accepted = server.accepted.get(client, -1)
            first = both if server.round == 1 else both + small
            assert lora_bytes(federation, client) == (small if accepted > 0 else first)
    client = next(c for c, accepted in server.accepted.items() if accepted > 0)
    server.unanswered(client)
    assert lora_bytes(federation, client) == both + small


class Notes(Callback):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def on_note(self, text: str) -> None:
        self.notes.append(text)


def test_a_client_that_lost_its_state_sits_out_a_round_and_comes_back(toy_federation: Make) -> None:
    federation = toy_federation({"method.name": "fed_sb", "training.rounds": 5})
    lost, callback = next(iter(federation.clients)), Notes()
    counts = []
    for record in run_rounds(federation, callback):
        counts.append(record.value("clients"))
        if record.round == 2:
            federation.states.save(lost, ClientState())
    assert counts[1:] == [3, 3, 2, 3, 3]
    assert sum(f"client {lost} sits out round 3" in note for note in callback.notes) == 1


def test_scaffold_corrects_R(toy_federation: Make) -> None:
    federation = toy_federation(
        {
            "method.name": "fed_sb",
            "training.scaffold": True,
            "training.momentum": 0.0,
            "training.max_grad_norm": None,
            "training.rounds": 4,
        }
    )
    records = list(run_rounds(federation, Callback()))
    assert all(record.value("refused") == 0 for record in records[1:])
    control = federation.server.control or {}
    assert {f"{name}.lora_R" for name in federation.server.layers} <= control.keys()


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        ({"transport.bits": 16}, r"R has only r\*r numbers"),
        ({"transport.bits": 4}, r"R has only r\*r numbers"),
        ({"server.optimizer": "adam"}, "a matrix between fixed factors"),
        ({"lora.client_ranks": "halving"}, "must all have one"),
        ({"training.rounds": 1}, "trains in none of them"),
        (
            {"model.head": "lora", "lora.target_modules": [QUERY, "classifier"], "lora.head_r": 4},
            "gradient of layer classifier, which has at most 3",
        ),
    ],
    ids=["16 bits", "4 bits", "server optimiser", "ranks", "one round", "head"],
)
def test_settings_that_do_not_fit_are_refused_with_the_reason(
    toy_table: dict[str, Any], overrides: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ConfigError, match=reason):
        plan(read(toy_table, {"method.name": "fed_sb", **overrides}))
