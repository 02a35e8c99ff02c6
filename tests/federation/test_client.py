from collections.abc import Callable
from typing import Any

import pytest
import torch

from fedsmoothlora.algebra.lowrank import LowRank
from fedsmoothlora.callbacks import Callback
from fedsmoothlora.federation.client_state import ClientState
from fedsmoothlora.federation.messages import Message
from fedsmoothlora.federation.simulation import Simulation

M, N = 6, 5


def product(seed: int) -> LowRank:
    generator = torch.Generator().manual_seed(seed)
    return LowRank(torch.randn(M, 2, generator=generator), torch.randn(2, N, generator=generator))


S = [product(seed) for seed in range(8)]
U = {round: {"w": product(100 + round)} for round in range(8)}


def message(round: int, accepted: int, first: int, **more: Any) -> Message:
    """A message with ``S^first ... S^{round-1}`` to a client last accepted in round ``accepted``."""
    updates = {} if first == round else {"w": LowRank.weighted_sum(S[first:round], [1.0] * (round - first))}
    return Message(
        round=round,
        accepted_round=accepted,
        **{"forget_before": accepted, "first_update": first, "updates": updates, **more},
    )


def assert_received(state: ClientState, since: int, until: int) -> None:
    received = state.received_since(since, until)
    assert received is not None
    wanted = sum((S[j].B @ S[j].A for j in range(since, until)), torch.zeros(M, N))
    torch.testing.assert_close(received["w"].dense(), wanted)


def trained_in_round_3() -> ClientState:
    return ClientState().after(message(3, -1, 0)).with_upload(3, U[3])


def test_a_new_client_keeps_its_upload_and_all_later_updates() -> None:
    state = trained_in_round_3().after(message(4, 3, 3))
    assert state.uploads == {3: U[3]}
    assert_received(state, 3, 4)


def test_an_accepted_upload_replaces_the_previous_one() -> None:
    state = trained_in_round_3().after(message(4, 3, 3)).with_upload(4, U[4]).after(message(5, 4, 4))
    assert state.uploads == {4: U[4]}
    assert_received(state, 4, 5)


def test_a_refused_upload_leaves_the_old_one_with_all_updates_since() -> None:
    state = trained_in_round_3().after(message(4, 3, 3)).with_upload(4, U[4]).after(message(6, 3, 4))
    assert state.uploads[3] is U[3]
    assert_received(state, 3, 6)


def test_a_client_that_missed_rounds_sums_everything_since_its_own() -> None:
    assert_received(trained_in_round_3().after(message(7, 3, 3)), 3, 7)


def test_dense_and_factored_updates_are_summed() -> None:
    dense = {"w": (S[4] + S[5]).dense()}
    state = trained_in_round_3().after(message(4, 3, 3)).after(message(6, 3, 4, updates=dense))
    assert_received(state, 3, 6)


def test_updates_of_one_layer_only_leave_the_others_as_they_were() -> None:
    state = trained_in_round_3().after(message(4, 3, 3)).after(message(5, 3, 4, updates={"v": S[4]}))
    received = state.received_since(3, 5)
    assert received is not None
    torch.testing.assert_close(received["w"].dense(), S[3].dense())
    torch.testing.assert_close(received["v"].dense(), S[4].dense())


def test_the_same_message_again_changes_nothing() -> None:
    state = trained_in_round_3()
    for _ in range(3):
        state = state.after(message(4, 3, 3))
        assert state.uploads == {3: U[3]}
        assert_received(state, 3, 4)


def test_a_restored_server_finds_the_upload_that_it_had_accepted() -> None:
    ahead = trained_in_round_3().after(message(4, 3, 3)).with_upload(4, U[4])
    ahead = ahead.after(message(5, 4, 4, forget_before=3)).with_upload(5, U[5])
    state = ahead.after(message(4, 3, 3, forget_before=3))
    assert state.uploads == {3: U[3]}
    assert_received(state, 3, 4)


def test_updates_with_a_gap_are_incomplete() -> None:
    state = trained_in_round_3().after(message(6, 3, 5))  # S^3 and S^4 never came
    assert state.received_since(3, 6) is None


def test_state_that_no_message_needs_is_removed() -> None:
    state = trained_in_round_3()
    for round in range(4, 8):
        state = state.after(message(round, round - 1, round - 1)).with_upload(round, U[round])
        assert len(state.uploads) == 2
        assert len(state.segments) == 1


@pytest.mark.parametrize(
    "state",
    [
        ClientState(),  # it lost its state
        ClientState().with_upload(3, U[3]),  # it lost what it did in round 4, which the server accepted
    ],
)
def test_a_client_that_lost_the_accepted_upload_has_nothing_to_match(state: ClientState) -> None:
    assert 4 not in state.after(message(5, 4, 4)).uploads


class Notes(Callback):
    def __init__(self) -> None:
        self.notes: list[str] = []
        self.steps: list[float] = []

    def on_note(self, text: str) -> None:
        self.notes.append(text)

    def on_client_step(self, client: str, loss: float) -> None:
        self.steps.append(loss)


def test_a_visit_reports_its_metrics_and_keeps_its_upload(
    toy_federation: Callable[..., Simulation],
) -> None:
    federation = toy_federation()
    client, data = next(iter(federation.clients.items()))
    callback = Notes()
    message = federation.server.message(client)
    visited = federation.learner.visit(client, data, message, ClientState(), callback)
    reply, state = visited.reply, visited.state
    assert (reply.client, reply.round, reply.samples) == (client, 0, len(data))
    assert len(callback.steps) == -(-len(data) // 8)
    assert reply.metrics["train_loss"] == pytest.approx(sum(callback.steps) / len(callback.steps))
    assert (reply.metrics["train_loss_first"], reply.metrics["train_loss_last"]) == (
        callback.steps[0],
        callback.steps[-1],
    )
    assert reply.sent.keys() == federation.server.layers.keys()
    assert state.uploads.keys() == {0}
    assert state.uploads[0].keys() == {*federation.server.layers, *federation.server.head}
    for name, value in reply.head.items():  # so that the client's own model can be exported
        assert torch.equal(state.uploads[0][name], value)
    assert callback.notes == []


def test_a_repeated_visit_is_identical_and_another_attempt_differs(
    toy_federation: Callable[..., Simulation],
) -> None:
    federation = toy_federation()
    client, data = next(iter(federation.clients.items()))

    def visit(attempt: int) -> torch.Tensor:
        message = federation.server.message(client, attempt)
        reply = federation.learner.visit(client, data, message, ClientState(), Callback()).reply
        assert reply.attempt == attempt
        return reply.head["classifier.weight"]

    first, again, other = visit(0), visit(0), visit(1)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_client_that_lost_its_accepted_upload_is_noted(
    toy_federation: Callable[..., Simulation],
) -> None:
    federation = toy_federation()
    client, data = next(iter(federation.clients.items()))
    callback = Notes()
    message = Message(round=1, accepted_round=0, head=federation.server.head)
    federation.learner.visit(client, data, message, ClientState(), callback)
    assert any(client in note and "round 1" in note for note in callback.notes)
