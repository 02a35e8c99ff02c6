"""The total change by training is the exact sum of all updates, scaled once, at its own rank."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedsmoothlora import methods
from fedsmoothlora.algebra.lowrank import LowRank
from fedsmoothlora.config import from_table
from fedsmoothlora.errors import NotKeptError
from fedsmoothlora.exports.trained import client_model, compress, global_model
from fedsmoothlora.federation.client_state import ClientState
from fedsmoothlora.federation.initial_state import InitialState
from fedsmoothlora.federation.server import Server
from fedsmoothlora.methods import Layer, Update
from fedsmoothlora.runs.federation import FederationSettings

M, N = 12, 9


def layer(name: str = "fc", rank: int = 2, scale: float = 1.5) -> Layer:
    return Layer(name=name, m=M, n=N, rank=rank, scale=scale, gradient_rank=N)


def random_product(rank: int, seed: int) -> LowRank:
    generator = torch.Generator().manual_seed(seed)
    return LowRank(torch.randn(M, rank, generator=generator), torch.randn(rank, N, generator=generator))


def server(method: str = "fedsmoothlora", updates: tuple[Update, ...] = (), **state: object) -> Server:
    table = {"model": "", "clients": {}, "method": {"name": method}}
    layers = {"fc": layer()}
    return Server(
        method=from_table(FederationSettings, table, "test").method,
        layers=layers,
        initial_state=InitialState(layers, 0, lambda name: torch.zeros(M, N)),
        rounds=5,
        round=len(updates),
        updates=list(updates),
        **{"head": {}, **state},  # type: ignore[arg-type]
    )


def dense(delta: LowRank | Tensor) -> Tensor:
    return delta.dense() if isinstance(delta, LowRank) else delta


@given(
    ranks=st.lists(st.integers(0, 4), min_size=1, max_size=6), whole=st.booleans(), seed=st.integers(0, 99)
)
@settings(deadline=None, max_examples=40)
def test_the_change_is_the_scaled_sum_of_all_updates(ranks: list[int], whole: bool, seed: int) -> None:
    products = [random_product(rank, seed + i) for i, rank in enumerate(ranks)]
    updates: list[Update] = [{"fc": product} for product in products]
    extra = torch.randn(M, N, generator=torch.Generator().manual_seed(seed))
    if whole:
        updates.append({"fc": extra})
    on_top = random_product(2, seed + 50)
    found = global_model(server(updates=tuple(updates), model={"fc": on_top})).deltas["fc"]
    wanted = sum((p.B.double() @ p.A.double() for p in [*products, on_top]), torch.zeros(M, N).double())
    wanted = 1.5 * (wanted + extra.double() if whole else wanted)
    torch.testing.assert_close(dense(found), wanted, rtol=1e-12, atol=1e-12)

    exact = compress(found)
    torch.testing.assert_close(exact.product.dense(), wanted.float(), rtol=1e-4, atol=1e-5)
    assert exact.exact_rank == exact.product.rank == int(torch.linalg.matrix_rank(wanted))


@given(rank=st.integers(1, N + 3), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=40)
def test_an_approximation_is_optimal_and_reports_its_error(rank: int, seed: int) -> None:
    delta = torch.randn(M, N, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    sigma = torch.linalg.svdvals(delta)
    for form in (delta, LowRank(delta, torch.eye(N, dtype=torch.float64))):
        found = compress(form, rank)
        assert (found.product.rank, found.exact_rank) == (min(rank, N), N)
        assert found.product.dtype == torch.float32
        left_out = torch.linalg.norm(delta - found.product.dense().double()) / torch.linalg.norm(delta)
        # Eckart-Young: no product of this rank leaves out less than the other singular values.
        assert found.relative_error == pytest.approx(float(sigma[rank:].norm() / sigma.norm()), abs=1e-12)
        assert float(left_out) == pytest.approx(found.relative_error, abs=1e-6)


def test_shared_directions_of_updates_add_no_rank() -> None:
    same = random_product(2, 0)
    updates: tuple[Update, ...] = tuple(
        {"fc": LowRank(random_product(2, seed).B, same.A)} for seed in range(4)
    )
    assert compress(global_model(server(updates=updates)).deltas["fc"]).exact_rank == 2
    cancelled = ({"fc": same}, {"fc": -same})
    assert compress(global_model(server(updates=cancelled)).deltas["fc"]).exact_rank == 0


def test_a_change_of_zero_has_rank_zero_and_no_error() -> None:
    for zero in (torch.zeros(M, N), LowRank.zeros(M, N), LowRank(torch.zeros(M, 2), torch.ones(2, N))):
        found = compress(zero, 3)
        assert (found.product.rank, found.exact_rank, found.relative_error) == (0, 0, 0.0)


WITHOUT_GLOBAL_MODEL = ["fedsa", "local"]


@pytest.mark.parametrize("method", WITHOUT_GLOBAL_MODEL)
def test_a_method_without_a_global_model_requires_a_client(method: str) -> None:
    with pytest.raises(NotKeptError, match=r"no global model: say whose.*north, south"):
        global_model(server(method, accepted={"south": 0, "north": 0}))


def test_a_clients_model_is_the_start_of_its_last_accepted_round_plus_its_upload() -> None:
    updates: tuple[Update, ...] = tuple({"fc": random_product(1, seed)} for seed in range(3))
    first, last = random_product(2, 10), random_product(2, 11)
    head = {"classifier.bias": torch.ones(3)}
    state = ClientState(uploads={0: {"fc": first, **head}, 2: {"fc": last, **head}})
    mine = {"classifier.bias": torch.zeros(3)}
    for accepted, upload in ((0, first), (2, last)):
        here = server(updates=updates, accepted={"north": accepted}, head=mine)
        found = client_model(here, "north", state)
        wanted = upload.dense() + sum(dense(updates[t]["fc"]) for t in range(accepted))
        torch.testing.assert_close(dense(found.deltas["fc"]).float(), 1.5 * wanted)
        assert torch.equal(found.head["classifier.bias"], torch.ones(3))
        assert found.client == "north"


def test_the_model_of_a_fedsa_client_is_its_own_B_with_the_shared_A_and_head() -> None:
    B, A = random_product(2, 0).B, random_product(2, 1).A
    head = {"classifier.bias": torch.ones(3)}
    here = server("fedsa", ({},), accepted={"north": 0}, lora={"fc": A}, head=head)
    found = client_model(here, "north", ClientState(uploads={0: {"fc": B}}))
    torch.testing.assert_close(dense(found.deltas["fc"]).float(), 1.5 * B @ A)
    assert torch.equal(found.head["classifier.bias"], torch.ones(3))


def test_the_model_of_a_local_client_is_its_kept_state() -> None:
    own, head = random_product(2, 0), {"classifier.bias": torch.ones(3)}
    here = server("local", ({},), accepted={"north": 0}, head={"classifier.bias": torch.zeros(3)})
    found = client_model(here, "north", ClientState(uploads={0: {"fc": own, **head}}))
    torch.testing.assert_close(dense(found.deltas["fc"]).float(), 1.5 * own.dense())
    assert torch.equal(found.head["classifier.bias"], torch.ones(3))


def refuse(make: Callable[[], object], *words: str) -> None:
    with pytest.raises(NotKeptError) as raised:
        make()
    for word in words:
        assert word in str(raised.value)


def test_a_client_that_never_took_part_is_refused_with_those_that_did() -> None:
    here = server(updates=({},), accepted={"north": 0})
    refuse(lambda: client_model(here, "nort", ClientState()), "'nort'", "no upload", "north")


KEEPS_NOTHING = sorted({*methods.names()} - {*WITHOUT_GLOBAL_MODEL, "fedsmoothlora"})


@pytest.mark.parametrize("method", KEEPS_NOTHING)
def test_clients_without_state_of_their_own_have_no_model(method: str) -> None:
    here = server(method, ({},), accepted={"north": 0})
    refuse(
        lambda: client_model(here, "north", ClientState(uploads={0: {}})),
        "north",
        method,
        "start every round from the server's model",
    )


def test_a_lost_state_and_a_missing_head_are_reported() -> None:
    here = server(updates=({},), accepted={"north": 0}, head={"classifier.bias": torch.zeros(3)})
    refuse(lambda: client_model(here, "north", ClientState()), "north", "round 1", "lost")
    state = ClientState(uploads={0: {"fc": random_product(2, 0)}})
    refuse(lambda: client_model(here, "north", state), "own head", "classifier.bias")
