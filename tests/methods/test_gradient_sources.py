"""The sources of a gradient-aligned start's directions: the ablations of FedSmoothLoRA."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fedsmoothlora import methods
from fedsmoothlora.algebra.alignment import gradient_aligned, randomly_aligned
from fedsmoothlora.callbacks import Callback
from fedsmoothlora.federation.client_state import ClientState
from fedsmoothlora.federation.messages import Message
from fedsmoothlora.federation.rounds import run_rounds
from fedsmoothlora.federation.simulation import Simulation
from fedsmoothlora.methods.fedsmoothlora import FedSmoothLoRA

Make = Callable[..., Simulation]
SOURCES = ["client", "shared", "shuffled", "weight", "random", "none"]


class Spy:
    """Records the messages and starts of clients by round."""

    def __init__(self, federation: Simulation) -> None:
        self.messages: dict[tuple[int, str], Message] = {}
        self.gradients: dict[tuple[int, str], Mapping[str, Tensor]] = {}
        self.starts: dict[tuple[int, str], Any] = {}
        learner, method = federation.learner, federation.learner.method
        visit, calibrate, start = learner.visit, learner.calibrate, method.start

        def on_visit(client: str, data: Any, message: Message, *rest: Any) -> Any:
            self.messages[message.round, client] = message
            self._client = message.round, client
            return visit(client, data, message, *rest)

        def on_calibrate(client: str, data: Any, message: Message, *rest: Any) -> Any:
            self.gradients[message.round, client] = calibrate(client, data, message, *rest)
            return self.gradients[message.round, client]

        def on_start(view: Any) -> Any:
            self.starts[self._client] = start(view)
            return self.starts[self._client]

        object.__setattr__(learner, "visit", on_visit)
        object.__setattr__(learner, "calibrate", on_calibrate)
        object.__setattr__(method, "start", on_start)


@pytest.mark.parametrize("source", SOURCES)
def test_every_source_learns_and_starts_at_the_pretrained_weights(toy_federation: Make, source: str) -> None:
    federation = toy_federation({"method.gradient_aligned": source, "training.rounds": 4})
    spy = Spy(federation)
    records = list(run_rounds(federation, Callback()))
    assert (records[-1].value("loss") or 99) < (records[0].value("loss") or 0)
    for client in federation.clients:
        start = spy.starts[0, client]
        for name, product in start.lora.items():
            moved = product.dense() + start.shift[name].dense()
            assert float(moved.abs().max()) < 1e-6
            sigma = torch.linalg.svdvals(product.dense())[: product.rank]
            want = 0.0 if source == "none" else product.shape[0] ** 0.5 / 64
            torch.testing.assert_close(sigma, torch.full_like(sigma, want), rtol=1e-3, atol=1e-6)


def test_shared_starts_are_of_the_mean_gradient(toy_federation: Make) -> None:
    federation = toy_federation({"method.gradient_aligned": "shared", "training.rounds": 2})
    spy = Spy(federation)
    list(run_rounds(federation, Callback()))
    total = sum(len(rows) for rows in federation.clients.values())
    for t in range(2):
        for client in federation.clients:
            for name, mean_given in spy.messages[t, client].gradients.items():
                mean = sum(
                    len(rows) / total * spy.gradients[t, other][name]
                    for other, rows in federation.clients.items()
                )
                torch.testing.assert_close(mean_given, mean, rtol=1e-4, atol=1e-8)
                if t == 0:
                    want = gradient_aligned(mean_given, 2, 64.0)
                    torch.testing.assert_close(spy.starts[t, client].lora[name].dense(), want.dense())


def test_an_exchanged_gradient_is_the_one_that_the_client_would_have_used(toy_federation: Make) -> None:
    own = toy_federation()
    spy = Spy(own)
    list(run_rounds(own, Callback()))
    for client, data in own.clients.items():
        own.learner.model.backbone._merged.clear()  # type: ignore[attr-defined]
        own.learner.model.backbone.set_shift()
        gradients = own.learner.calibrate(client, data, spy.messages[0, client], ClientState(), Callback())
        for name, gradient in gradients.items():
            want = gradient_aligned(gradient, 2, 64.0)
            torch.testing.assert_close(spy.starts[0, client].lora[name].dense(), want.dense())


@given(st.integers(2, 9), st.integers(0, 10_000))
def test_shuffled_gives_every_client_another_clients_gradient_once(clients: int, seed: int) -> None:
    gradients = [{"w": torch.full((2, 2), float(i))} for i in range(clients)]
    generator = torch.Generator().manual_seed(seed)
    given = FedSmoothLoRA(gradient_aligned="shuffled").exchange(gradients, [1.0] * clients, generator)
    got = [int(one["w"][0, 0]) for one in given]
    assert sorted(got) == list(range(clients))
    assert all(got[i] != i for i in range(clients))


def test_a_single_client_receives_its_own_gradient() -> None:
    gradients = [{"w": torch.ones(2, 2)}]
    for source in ("shared", "shuffled"):
        method = FedSmoothLoRA(gradient_aligned=source)  # type: ignore[arg-type]
        given = method.exchange(gradients, [3.0], torch.Generator())
        assert torch.equal(given[0]["w"], gradients[0]["w"])


def test_bytes_of_exchanged_gradients_are_counted_in_both_directions(toy_federation: Make) -> None:
    plain = list(run_rounds(toy_federation(), Callback()))
    for source in ("shared", "shuffled"):
        federation = toy_federation({"method.gradient_aligned": source})
        dense = 3 * 4 * sum(layer.m * layer.n for layer in federation.server.layers.values())
        for before, record in zip(plain[1:], list(run_rounds(federation, Callback()))[1:], strict=True):
            for name in ("bytes_up", "bytes_down"):
                assert record.value(name) == (before.value(name) or 0) + dense


def test_a_client_whose_exchanged_gradient_diverges_is_left_out(toy_federation: Make) -> None:
    class NotNumbers:
        def __init__(self, examples: Any) -> None:
            self.examples = examples

        def __len__(self) -> int:
            return len(self.examples)

        def batch(self, rows: Any) -> Any:
            batch = self.examples.batch(rows)
            return {**batch, "pixel_values": batch["pixel_values"] * torch.nan}

    federation = toy_federation({"method.gradient_aligned": "shared", "training.rounds": 1})
    bad = list(federation.clients)[1]
    federation.clients = {**federation.clients, bad: NotNumbers(federation.clients[bad])}
    spy = Spy(federation)
    records = list(run_rounds(federation, Callback()))
    assert {client for _, client in spy.messages} == set(federation.clients) - {bad}
    assert records[-1].value("left_out") == 1


def test_weight_directions_are_those_of_the_pretrained_weight(toy_federation: Make) -> None:
    federation = toy_federation({"method.gradient_aligned": "weight", "method.round_matching": False})
    spy = Spy(federation)
    pretrained = federation.learner.model.backbone.pretrained
    wanted = {name: gradient_aligned(pretrained(name), 2, 64.0) for name in federation.server.layers}
    list(run_rounds(federation, Callback()))
    for start in spy.starts.values():
        for name, product in start.lora.items():
            torch.testing.assert_close(product.dense(), wanted[name].dense())


def test_random_directions_are_new_for_every_client_and_round(toy_federation: Make) -> None:
    federation = toy_federation({"method.gradient_aligned": "random", "method.round_matching": False})
    spy = Spy(federation)
    list(run_rounds(federation, Callback()))
    starts = [start.lora[name].dense() for start in spy.starts.values() for name in list(start.lora)[:1]]
    assert len(starts) == 9
    for i, one in enumerate(starts):
        for other in starts[:i]:
            assert float((one - other).norm()) > 0.5 * float(one.norm())


def test_random_directions_have_the_size_of_aligned_ones() -> None:
    found = randomly_aligned(12, 20, 3, 16.0, torch.Generator().manual_seed(1))
    sigma = torch.linalg.svdvals(found.dense())[:3]
    torch.testing.assert_close(sigma, torch.full((3,), 12**0.5 / 16))


@pytest.mark.parametrize("source", SOURCES)
def test_a_rank_above_that_of_the_source_is_refused(source: Any) -> None:
    layer = methods.Layer("classifier", 4, 32, 2, scale=1.0, gradient_rank=3)
    method = FedSmoothLoRA(gradient_aligned=source)
    if source in ("client", "shared", "shuffled"):
        with pytest.raises(ValueError, match=r"classifier.*at most 3.*none"):
            method.check({"classifier": layer}, partial=False)
    else:
        method.check({"classifier": layer}, partial=False)
    if source == "weight":
        with pytest.raises(ValueError, match="at most 4"):
            method.check({"classifier": replace(layer, rank=3)}, partial=False)
