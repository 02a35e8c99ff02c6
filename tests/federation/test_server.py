from collections.abc import Sequence
from dataclasses import replace
from itertools import permutations

import pytest
import torch
from torch import Tensor

from fedsmoothlora import methods
from fedsmoothlora.algebra.lowrank import LowRank
from fedsmoothlora.config import read
from fedsmoothlora.federation.catch_up import catch_up
from fedsmoothlora.federation.initial_state import InitialState
from fedsmoothlora.federation.messages import Message, Reply
from fedsmoothlora.federation.server import Server
from fedsmoothlora.federation.settings import UploadSettings
from fedsmoothlora.federation.uploads import check_replies
from fedsmoothlora.methods import Layer, Method, Update

SHAPES = {"square": (12, 12), "wide": (6, 20)}
RANK = 2
LAYERS = {
    name: Layer(name=name, m=m, n=n, rank=RANK, scale=1.0, gradient_rank=min(m, n))
    for name, (m, n) in SHAPES.items()
}


def products(seed: int, rank: int = RANK) -> dict[str, LowRank]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: LowRank(torch.randn(m, rank, generator=generator), torch.randn(rank, n, generator=generator))
        for name, (m, n) in SHAPES.items()
    }


def method(name: str) -> Method:
    return read(
        {
            "name": "x",
            "model": {"source": "x"},
            "data": {"source": "x"},
            "method": {"name": name},
        }
    ).method


def pretrained(name: str) -> Tensor:
    return tensor(*SHAPES[name], seed=99)


def server(name: str = "fedsmoothlora") -> Server:
    head = {"head.weight": torch.zeros(3, 4), "head.bias": torch.zeros(3)}
    own = method(name)
    prepared = own.prepare(LAYERS, pretrained)
    origin = InitialState(LAYERS, 0, pretrained, prepared=prepared)
    return Server(method=own, layers=LAYERS, initial_state=origin, rounds=5, head=head)


def tensor(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def sent_by(name: str, seed: int) -> Update:
    """An upload of round 0, of the kind that the method sends."""
    kind = method(name).sends(0)
    if kind == "product":
        return products(seed)
    if kind == "nothing":
        return {}
    shapes = {n: {"B": (m, RANK), "A": (RANK, k), "W": (m, k)} for n, (m, k) in SHAPES.items()}
    shapes = {n: {**those, "R": method(name).core_shape(LAYERS[n])}[kind] for n, those in shapes.items()}
    return {n: tensor(*shape, seed=seed + i) for i, (n, shape) in enumerate(shapes.items())}


def bits(update: Update | None) -> dict[str, list[Tensor]]:
    return {n: [v] if isinstance(v, Tensor) else [v.B, v.A] for n, v in (update or {}).items()}


def reply(client: str, round: int, seed: int, samples: int = 10, name: str = "fedsmoothlora") -> Reply:
    generator = torch.Generator().manual_seed(seed)
    head = {
        "head.weight": torch.randn(3, 4, generator=generator),
        "head.bias": torch.randn(3, generator=generator),
    }
    return Reply(client=client, round=round, samples=samples, sent=sent_by(name, seed), head=head)


def dense_sum(updates: Sequence[dict[str, LowRank]], name: str) -> Tensor:
    return sum(
        (update[name].B.double() @ update[name].A.double() for update in updates),
        torch.zeros(SHAPES[name], dtype=torch.float64),
    )


@pytest.mark.parametrize("missed", range(1, 15))
def test_a_client_that_missed_rounds_gets_their_sum_in_the_smallest_form(missed: int) -> None:
    updates = [products(seed) for seed in range(missed)]
    message = catch_up(updates, LAYERS)
    for name, (m, n) in SHAPES.items():
        got = message[name]
        matrix = got if isinstance(got, Tensor) else got.dense()
        torch.testing.assert_close(matrix.double(), dense_sum(updates, name), rtol=1e-4, atol=1e-4)
        as_they_are = 4 * missed * RANK * (m + n)
        compressed = 4 * min(missed * RANK, m, n) * (m + n)
        assert got.nbytes == min(as_they_are, compressed, 4 * m * n)


def test_updates_in_half_precision_are_sent_as_they_are_while_that_is_smaller() -> None:
    updates = [{"square": products(seed)["square"].to(dtype=torch.bfloat16)} for seed in range(2)]
    assert catch_up(updates, LAYERS)["square"].nbytes == 2 * 2 * RANK * 24


def test_a_layer_that_some_rounds_did_not_touch_is_summed_over_the_others() -> None:
    updates = [products(0), {"wide": products(1)["wide"]}]
    message = catch_up(updates, LAYERS)
    torch.testing.assert_close(message["square"].dense().double(), dense_sum(updates[:1], "square"))
    assert catch_up([{}, {}], LAYERS) == {}


def test_messages_carry_exactly_the_updates_that_a_client_lacks() -> None:
    there = server()
    for round in range(3):
        replies = [reply("always", round, round)]
        if round == 1:
            replies.append(reply("once", round, 100))
        for one in replies:
            there.delivered(one.client)
        there.aggregate(replies)
    for client, first, accepted in (("always", 2, 2), ("once", 1, 1), ("never", 0, -1)):
        message = there.message(client, attempt=4)
        assert (message.round, message.attempt, message.accepted_round) == (3, 4, accepted)
        assert message.first_update == first
        for name in SHAPES:
            value = message.updates[name]
            matrix = value if isinstance(value, Tensor) else value.dense()
            wanted = dense_sum(there.updates[first:], name)
            torch.testing.assert_close(matrix.double(), wanted, rtol=1e-4, atol=1e-4)
        for name, value in there.head.items():
            assert torch.equal(message.head[name], value)
    there.delivered("never")
    assert there.message("never").updates == {}


@pytest.mark.parametrize("name", methods.names())
def test_the_order_in_which_replies_arrive_changes_nothing(name: str) -> None:
    replies = [reply(f"client-{i}", 0, i, samples, name) for i, samples in enumerate((7, 31, 2, 13))]
    wanted = server(name)
    first = wanted.aggregate(replies)
    for order in permutations(replies):
        there = server(name)
        update = there.aggregate(order)
        for part in ("merge", "model", "lora", "memory"):
            mine, theirs = bits(getattr(update, part)), bits(getattr(first, part))
            assert mine.keys() == theirs.keys()
            for layer in mine:
                assert all(torch.equal(a, b) for a, b in zip(mine[layer], theirs[layer], strict=True))
        assert all(torch.equal(value, wanted.head[key]) for key, value in there.head.items())


def test_the_head_is_the_mean_weighted_by_training_rows() -> None:
    there = server()
    replies = [reply("a", 0, 0, 30), reply("b", 0, 1, 10)]
    there.aggregate(replies)
    for name, value in there.head.items():
        torch.testing.assert_close(value, 0.75 * replies[0].head[name] + 0.25 * replies[1].head[name])
    assert there.round == 1
    assert there.accepted == {"a": 0, "b": 0}


def test_an_upload_that_did_not_arrive_is_not_counted_as_accepted() -> None:
    there = server()
    there.aggregate([reply("a", 0, 0), reply("b", 0, 1)])
    there.aggregate([reply("a", 1, 2)])
    assert there.accepted == {"a": 1, "b": 0}


def test_a_round_without_replies_is_an_error_and_changes_nothing() -> None:
    there = server()
    with pytest.raises(ValueError, match="weights"):
        there.aggregate([])
    assert (there.round, there.updates) == (0, [])


def test_bytes_of_a_message_are_those_of_all_tensors() -> None:
    updates, lora = products(0), products(1)
    head = {"head.weight": torch.zeros(3, 4), "head.bias": torch.zeros(3)}
    factors = sum(4 * RANK * (m + n) for m, n in SHAPES.values())
    message = Message(round=1, updates={**updates, "wide": updates["wide"].dense()}, lora=lora, head=head)
    assert message.nbytes == 4 * (RANK * 24 + 6 * 20) + factors + 4 * 15
    assert Reply(client="a", round=1, samples=3, sent=updates, head=head).nbytes == factors + 4 * 15
    assert Message(round=0).nbytes == 0


def test_a_head_that_is_not_shared_is_sent_unchanged_and_to_new_clients_only() -> None:
    there = server("local")
    before = {name: value.clone() for name, value in there.head.items()}
    assert there.message("a").head.keys() == before.keys()
    there.aggregate([reply("a", 0, 0, name="local")])
    assert there.message("a").head == {}
    assert there.message("b").head.keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in there.head.items())
    assert not there.reply_spec({"a": 1}).head


@pytest.mark.parametrize("name", methods.names())
def test_the_reply_spec_has_the_shapes_that_the_method_sends(name: str) -> None:
    replies = [reply(f"client-{i}", 0, i, name=name) for i in range(3)]
    if not method(name).traits.shares_head:
        replies = [replace(one, head={}) for one in replies]
    there = server(name)
    clients = {one.client: one.samples for one in replies}
    assert len(check_replies(replies, there.reply_spec(clients), UploadSettings()).accepted) == 3
    if method(name).sends(0) == "nothing":
        return
    # One layer is missing, or is of another kind.
    other: Update = products(0, RANK) if method(name).sends(0) != "product" else sent_by("full", 0)
    for wrong in ({"square": replies[0].sent["square"]}, {**replies[0].sent, "wide": other["wide"]}):
        checked = check_replies(
            [replace(replies[0], sent=wrong), *replies[1:]], there.reply_spec(clients), UploadSettings()
        )
        assert [one.client for one in checked.accepted] == list(clients)[1:]
