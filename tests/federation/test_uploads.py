"""Checks of replies: thousands of damaged ones, the rule for norms, clipping; norms against dense float64."""

from __future__ import annotations

import math
import random
import statistics
import warnings
from dataclasses import replace
from types import MappingProxyType

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fedsmoothlora.algebra.averaging import mean_tensor
from fedsmoothlora.algebra.lowrank import LowRank
from fedsmoothlora.federation.messages import Reply
from fedsmoothlora.federation.settings import UploadSettings
from fedsmoothlora.federation.uploads import ReplySpec, check_replies
from fedsmoothlora.methods import Layer

SEEDS = st.integers(0, 2**32 - 1)
MODERATE = settings(max_examples=60, deadline=None)
DEFAULT = UploadSettings()
PRODUCTS = {
    "encoder.q": Layer("encoder.q", 9, 7, 3, 2.0, 7),
    "encoder.v": Layer("encoder.v", 6, 8, 2, 2.0, 6),
}
TENSORS = {"down.B": (5, 2), "bias": (4,)}
HEAD = {"head.weight": torch.linspace(-1, 1, 12).reshape(3, 4), "head.bias": torch.ones(3)}
CLIENTS = [f"c{i}" for i in range(8)]
ROUND = ReplySpec(
    experiment="run-1",
    round=4,
    attempt=1,
    clients={client: 10 + i for i, client in enumerate(CLIENTS)},
    products=PRODUCTS,
    tensors=TENSORS,
    head=HEAD,
)


def good(client: str, seed: int, *, size: float = 1.0) -> Reply:
    """A valid reply: factors of any allowed rank above 0, and norms near each other."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=draw)

    sent: dict = {}
    for name, layer in PRODUCTS.items():
        rank = 1 + int(torch.randint(layer.rank, (), generator=draw))
        sent[name] = LowRank(size * normal(layer.m, rank), normal(rank, layer.n))
    sent |= {name: size * normal(*shape) for name, shape in TENSORS.items()}
    return Reply(
        client=client,
        experiment="run-1",
        round=4,
        attempt=1,
        samples=ROUND.clients.get(client, 5),
        sent=sent,
        head={name: value + 0.1 * size * normal(*value.shape) for name, value in HEAD.items()},
        metrics={"train_loss": 0.5, "steps": 3},
    )


def dense_norms(reply: Reply) -> tuple[float, float]:
    """The oracle: both norms from dense float64 matrices, with numpy."""
    blocks = [
        v.B.detach().double().numpy() @ v.A.detach().double().numpy()
        if isinstance(v, LowRank)
        else v.detach().double().numpy()
        for v in reply.sent.values()
    ]
    changes = [reply.head[name].detach().double().numpy() - HEAD[name].double().numpy() for name in HEAD]
    return tuple(float(np.linalg.norm(np.concatenate([b.ravel() for b in x]))) for x in (blocks, changes))


def only_products(*uploads: LowRank | torch.Tensor) -> tuple[list[Reply], ReplySpec]:
    """A round of one layer ``w`` without a head, one client per upload."""
    first = uploads[0]
    expected = ReplySpec(
        experiment="e",
        round=0,
        attempt=0,
        clients={f"c{i}": 1 for i in range(len(uploads))},
        products={"w": Layer("w", *first.shape, 4, 1.0, 4)} if isinstance(first, LowRank) else {},
        tensors={} if isinstance(first, LowRank) else {"w": tuple(first.shape)},
    )
    replies = [
        Reply(client=f"c{i}", experiment="e", round=0, samples=1, sent={"w": upload})
        for i, upload in enumerate(uploads)
    ]
    return replies, expected


def of_norm(norm: float, *, seed: int = 0) -> LowRank:
    draw = torch.Generator().manual_seed(seed)
    product = LowRank(torch.randn(6, 2, generator=draw), torch.randn(2, 5, generator=draw))
    return product * (norm / product.norm())


def tensors_of(reply: object) -> list[torch.Tensor]:
    """Every tensor that can be reached in a reply, however damaged."""
    found = []
    for field in ("sent", "head"):
        value = getattr(reply, field, None) if type(reply) is Reply else None
        for part in value.values() if type(value) is dict else [value]:
            factors = (
                [getattr(part, "B", None), getattr(part, "A", None)] if type(part) is LowRank else [part]
            )
            found += [x for x in factors if isinstance(x, torch.Tensor)]
    return found


def assert_averageable(accepted: list[Reply]) -> None:
    if not accepted:
        return
    counts = [reply.samples for reply in accepted]
    for name, layer in PRODUCTS.items():
        total = LowRank.weighted_sum(
            [reply.sent[name] for reply in accepted], [c / sum(counts) for c in counts]
        )
        mean = total.truncate(layer.rank)
        assert mean.is_finite()
        assert math.isfinite(mean.norm())
        assert math.isfinite(total.norm())
        assert bool(total.dense().isfinite().all())
    for name in TENSORS:
        assert bool(mean_tensor([reply.sent[name] for reply in accepted], counts).isfinite().all())
    for name in HEAD:
        assert bool(mean_tensor([reply.head[name] for reply in accepted], counts).isfinite().all())


# Damage. A mutation takes a good reply and a random source, and returns the damaged reply together with the
# words that the reason must hold beside the client's name.


class Hostile:
    """Raises an error at every access."""

    def _fail(self, *args: object) -> None:
        raise RuntimeError("hostile")

    __repr__ = __str__ = __eq__ = __hash__ = __len__ = __iter__ = __bool__ = __float__ = _fail  # type: ignore
    __getattr__ = __lt__ = __gt__ = __getitem__ = __contains__ = _fail  # type: ignore


class Subclass(torch.Tensor):
    pass


def emptied(*shape: int) -> torch.Tensor:
    tensor = torch.ones(*shape)
    tensor.untyped_storage().resize_(0)
    return tensor


def unmade(B: object, A: object) -> LowRank:
    """A product that was created without its own checks."""
    product = object.__new__(LowRank)
    object.__setattr__(product, "B", B)
    object.__setattr__(product, "A", A)
    return product


NESTED: list = []
NESTED.append(NESTED)
JUNK = [
    None,
    True,
    -1,
    0,
    2.5,
    math.nan,
    math.inf,
    -(10**5000),
    10**400,
    "text",
    "x" * 10_000,
    "line\nbreak\x1b[31m",
    b"bytes",
    1j,
    [],
    {},
    {"a": {"b": [1]}},
    NESTED,
    {1, 2},
    object,
    object(),
    Hostile(),
    np.float32(3),
    np.int64(11),
    np.zeros((2, 2)),
    np.array(3),
    np.array(["a", None], dtype=object),
    torch.tensor(3),
    torch.tensor(math.nan),
    torch.zeros(0),
    torch.zeros(2, 2, device="meta"),
    torch.zeros(2, 2, dtype=torch.complex64),
    torch.zeros(2, 2).to_sparse(),
    LowRank.zeros(2, 2),
    lambda: 1 / 0,
]


def with_layer(reply: Reply, name: str, value: object) -> Reply:
    return replace(reply, sent={**reply.sent, name: value})


def with_head(reply: Reply, name: str, value: object) -> Reply:
    return replace(reply, head={**reply.head, name: value})


def spoil(tensor: torch.Tensor, value: float, rng: random.Random) -> torch.Tensor:
    spoiled = tensor.clone()
    spoiled.view(-1)[rng.randrange(spoiled.numel())] = value
    return spoiled


def quietly(make, *args: object) -> object:
    """Call a deprecated or prototype function of torch without its warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return make(*args)


def bad_tensors(shape: tuple[int, ...], rng: random.Random) -> object:
    """A tensor that is not an ordinary float32 one of that shape with finite values."""
    plain = torch.randn(shape)
    return rng.choice(
        [
            lambda: plain.double(),
            lambda: plain.half(),
            lambda: plain.bfloat16(),
            lambda: plain.int(),
            lambda: plain > 0,
            lambda: plain.to(torch.complex64),
            lambda: plain.to_sparse(),
            lambda: quietly(torch.quantize_per_tensor, plain, 0.1, 0, torch.qint8),
            lambda: quietly(torch.nested.nested_tensor, [plain, plain]),
            lambda: quietly(plain.reshape(1, -1).to_sparse_csr),
            lambda: torch.empty(shape, device="meta"),
            lambda: emptied(*shape),
            lambda: plain.as_subclass(Subclass),
            lambda: plain.numpy(),
            lambda: plain.tolist(),
            lambda: plain[None],
            lambda: torch.randn([*shape[:-1], shape[-1] + 1]),
            lambda: torch.tensor(1.0),
            lambda: spoil(plain, math.nan, rng),
            lambda: spoil(plain, rng.choice([math.inf, -math.inf]), rng),
            lambda: spoil(plain, rng.choice([1e30, -3e38]), rng),
            lambda: rng.choice(JUNK),
        ]
    )()


def bad_client(reply, rng):
    client = rng.choice([*JUNK, "C1", "c1 ", "", "c99"])
    return replace(reply, client=client), ("not asked",)


def bad_experiment(reply, rng):
    return replace(reply, experiment=rng.choice([*JUNK, "run-2", "", "run-1 "])), ("experiment", "run-1")


def bad_round(reply, rng):
    # People count rounds from 1: t = 4 is their round 5.
    return replace(reply, round=rng.choice([*JUNK, 3, 5, 4.0, "4", np.int64(4), torch.tensor(4)])), (
        "round 5",
    )


def bad_attempt(reply, rng):
    return replace(reply, attempt=rng.choice([*JUNK, 2, 1.0, torch.tensor(1)])), ("attempt 1",)


def bad_samples(reply, rng):
    known = ROUND.clients[reply.client]
    wrong = [*JUNK, 0, -5, 1_000_000_001, 2**64, 1.0 * known, str(known), np.int64(known), True]
    wrong += [torch.tensor(known), known + 1, known - 1]
    return replace(reply, samples=rng.choice(wrong)), ("training samples",)


def bad_sent(reply, rng):
    value = rng.choice([junk for junk in JUNK if type(junk) is not dict] + [list(reply.sent.items())])
    return replace(reply, sent=value), ("upload",)


def bad_head_mapping(reply, rng):
    value = rng.choice([junk for junk in JUNK if type(junk) is not dict])
    return replace(reply, head=value), ("head",)


def missing_layer(reply, rng):
    name = rng.choice(list(reply.sent))
    return replace(reply, sent={k: v for k, v in reply.sent.items() if k != name}), ("lacks", name)


def unknown_layer(reply, rng):
    name = rng.choice(["encoder.k", "", 3, None, ("encoder.q",), 10**5000, math.nan, "x" * 500])
    return with_layer(reply, name, next(iter(reply.sent.values()))), ("unknown layer",)


def renamed_layer(reply, rng):
    name = rng.choice(list(reply.sent))
    return replace(reply, sent={(k + "x" if k == name else k): v for k, v in reply.sent.items()}), (name,)


def missing_head(reply, rng):
    name = rng.choice(list(HEAD))
    return replace(reply, head={k: v for k, v in reply.head.items() if k != name}), ("lacks", name)


def unknown_head(reply, rng):
    return with_head(reply, rng.choice(["head.other", 3, None]), torch.zeros(2)), ("unknown tensor",)


def bad_head(reply, rng):
    name = rng.choice(list(HEAD))
    return with_head(reply, name, bad_tensors(tuple(HEAD[name].shape), rng)), (name,)


def bad_plain_tensor(reply, rng):
    name = rng.choice(list(TENSORS))
    return with_layer(reply, name, bad_tensors(TENSORS[name], rng)), (name,)


def product_for_tensor(reply, rng):
    return with_layer(reply, "down.B", LowRank(torch.ones(5, 1), torch.ones(1, 2))), ("down.B", "LowRank")


def tensor_for_product(reply, rng):
    name = rng.choice(list(PRODUCTS))
    return with_layer(reply, name, reply.sent[name].dense()), (name, "low-rank product")


def junk_for_product(reply, rng):
    name = rng.choice(list(PRODUCTS))
    product = reply.sent[name]
    value = rng.choice([*JUNK, (product.B, product.A), {"B": product.B, "A": product.A}])
    return with_layer(reply, name, value), (name,)


def bad_factor(reply, rng):
    name = rng.choice(list(PRODUCTS))
    product = reply.sent[name]
    if rng.random() < 0.5:
        value = unmade(bad_tensors(tuple(product.B.shape), rng), product.A)
    else:
        value = unmade(product.B, bad_tensors(tuple(product.A.shape), rng))
    return with_layer(reply, name, value), (name,)


def both_factors_bad(reply, rng):
    name = rng.choice(list(PRODUCTS))
    product = reply.sent[name]
    change = rng.choice(
        [
            lambda x: x.double(),
            lambda x: x.bfloat16(),
            lambda x: x.to(torch.complex64),
            lambda x: x.long(),
            lambda x: x.to("meta"),
            lambda x: x.to_sparse(),
            lambda x: x * math.nan,
            lambda x: x * math.inf,
        ]
    )
    return with_layer(reply, name, LowRank(change(product.B), change(product.A))), (name,)


def hollow_product(reply, rng):
    name = rng.choice(list(PRODUCTS))
    return with_layer(reply, name, object.__new__(LowRank)), (name, "factor B")


def other_product(reply, rng):
    class Lying(LowRank):
        def norm(self) -> float:
            return 0.0

    name = rng.choice(list(PRODUCTS))
    return with_layer(reply, name, Lying(reply.sent[name].B, reply.sent[name].A)), (name, "Lying")


def turned_product(reply, rng):
    name = rng.choice(list(PRODUCTS))
    product = reply.sent[name]
    return with_layer(reply, name, LowRank(product.A.mT, product.B.mT)), (name, "expected")


def rank_too_high(reply, rng):
    name = rng.choice(list(PRODUCTS))
    layer = PRODUCTS[name]
    rank = layer.rank + rng.choice([1, 2, 500])
    product = LowRank(torch.randn(layer.m, rank), torch.randn(rank, layer.n))
    return with_layer(reply, name, product), (name, f"rank {rank}", f"at most {layer.rank}")


def overflowing_product(reply, rng):
    name = rng.choice(list(PRODUCTS))
    layer = PRODUCTS[name]
    big = rng.choice([1e10, 1e17])  # each factor is finite, and far from overflow by itself
    B, A = torch.full((layer.m, 2), big), torch.full((2, layer.n), big)
    A[1] *= rng.choice([1, -1])  # at -1 the product is 0, through terms that are not
    return with_layer(reply, name, LowRank(B, A)), (name, "overflow")


def not_a_reply(reply, rng):
    return rng.choice([*JUNK, object.__new__(Reply), vars(reply)]), ()


def hostile_mapping(reply, rng):
    class Broken(dict):
        def keys(self):
            raise KeyError("hostile")

        items = values = __iter__ = keys

    return replace(reply, **{rng.choice(["sent", "head", "metrics"]): Broken(reply.sent)}), (
        "cannot be read",
    )


MUTATIONS = [value for value in list(globals().values()) if getattr(value, "__code__", None)]
MUTATIONS = [m for m in MUTATIONS if m.__code__.co_varnames[:2] == ("reply", "rng")]


def too_large(reply: Reply, rng: random.Random) -> Reply:
    name = rng.choice(list(reply.sent))
    return with_layer(reply, name, reply.sent[name] * 1e4)


def head_too_large(reply: Reply, rng: random.Random) -> Reply:
    name = rng.choice(list(HEAD))
    return with_head(reply, name, HEAD[name] + 1e5 * (reply.head[name] - HEAD[name]))


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.__name__)
def test_each_kind_of_damage_is_refused_beside_good_replies(mutation):
    others = [good(client, i) for i, client in enumerate(CLIENTS[1:4])]
    for seed in range(8):
        bad, words = mutation(good("c0", seed), random.Random(seed))
        checked = check_replies([others[0], bad, *others[1:]], ROUND, DEFAULT)
        assert [id(reply) for reply in checked.accepted] == [id(reply) for reply in others]
        ((reply, reason),) = checked.refused
        assert reply is bad
        assert all(word in reason for word in ("client ", *words))


@pytest.mark.slow
def test_thousands_of_damaged_replies_are_refused_with_a_reason_and_nothing_else_is():
    tried = dict.fromkeys([m.__name__ for m in MUTATIONS], 0)

    @given(SEEDS)
    @settings(max_examples=700, deadline=None, database=None)
    def damage(seed):
        rng = random.Random(seed)
        clients = rng.sample(CLIENTS, len(CLIENTS))
        honest = [good(client, seed + i) for i, client in enumerate(clients[:3])]
        damaged = []
        for i, client in enumerate(clients[3:]):
            mutation = rng.choice(MUTATIONS)
            tried[mutation.__name__] += 1
            torch.manual_seed(seed + i)
            damaged.append((client, *mutation(good(client, seed + i), rng)))
        # Every now and then also an upload and a head that are only too large, and a second reply.
        large = [(too_large(honest[0], rng), "upload"), (head_too_large(honest[1], rng), "head's change")]
        large = [
            (replace(reply, client=f"large{i}", samples=5), what) for i, (reply, what) in enumerate(large)
        ]
        large = [pair for pair in large if rng.random() < 0.3]
        expected = replace(ROUND, clients={**ROUND.clients, "large0": 5, "large1": 5})
        repeats = [good(honest[2].client, seed + 99)] if rng.random() < 0.3 else []
        replies = [*honest, *repeats, *(reply for _, reply, _ in damaged), *(reply for reply, _ in large)]
        rng.shuffle(replies)
        untouched = [t for reply in replies for t in tensors_of(reply)]
        versions = [t._version for t in untouched]
        values = [(t, t.clone()) for reply in honest for t in tensors_of(reply)]

        checked = check_replies(replies, expected, DEFAULT)

        assert [t._version for t in untouched] == versions
        assert all(torch.equal(a, b) for a, b in values)
        position = {id(reply): i for i, reply in reversed(list(enumerate(replies)))}
        counts = sorted(honest, key=lambda reply: position[id(reply)])
        if repeats:
            pair = sorted([honest[2], repeats[0]], key=lambda reply: position[id(reply)])
            counts = sorted([*honest[:2], pair[0]], key=lambda reply: position[id(reply)])
        assert [id(reply) for reply in checked.accepted] == [id(reply) for reply in counts]
        assert len(checked.refused) == len(replies) - 3
        reasons: dict[int, str] = {id(reply): reason for reply, reason in checked.refused}
        for client, reply, words in damaged:
            reason = reasons[id(reply)]
            kept_name = type(reply) is Reply and getattr(reply, "client", None) is client
            assert reason.startswith(f"client {client}: " if kept_name else "client "), reason
            assert all(str(word) in reason for word in words), (words, reason)
            assert len(reason) < 1200
            assert reason.isprintable()
        for reply, what in large:
            assert reasons[id(reply)].startswith(f"client {reply.client}: the norm of its {what} is")
        if repeats:
            assert f"client {honest[2].client}: a repeat" in reasons[id(pair[1])]
        assert_averageable(checked.accepted)

    damage()
    assert sum(tried.values()) >= 3000
    assert len(MUTATIONS) == 26
    assert min(tried.values()) >= 50


@pytest.mark.parametrize("junk", JUNK, ids=lambda junk: type(junk).__name__)
def test_no_content_of_a_field_raises_an_error(junk):
    others = [good(client, i) for i, client in enumerate(CLIENTS[1:4])]
    for field in ("client", "experiment", "round", "attempt", "samples", "sent", "head"):
        checked = check_replies([replace(good("c0", 9), **{field: junk}), *others], ROUND, DEFAULT)
        assert [id(r) for r in checked.accepted] == [id(r) for r in others]
        assert len(checked.refused) == 1
    checked = check_replies([replace(good("c0", 9), metrics=junk), *others], ROUND, DEFAULT)
    assert len(checked.accepted) == 4
    assert checked.accepted[0].metrics == {}
    assert check_replies([junk], ROUND, DEFAULT).accepted == []


# Good replies


@given(SEEDS, st.integers(0, 8), st.booleans())
@MODERATE
def test_an_honest_round_is_accepted_as_it_is(seed, count, listed):
    replies = [good(client, seed + i) for i, client in enumerate(CLIENTS[:count])]
    checked = check_replies(replies if listed else tuple(replies), ROUND, DEFAULT)
    assert [id(reply) for reply in checked.accepted] == [id(reply) for reply in replies]
    assert checked.refused == []
    assert_averageable(checked.accepted)


def test_lower_ranks_gradients_layouts_and_other_mappings_are_accepted():
    reply = good("c0", 1)
    q, v = PRODUCTS["encoder.q"], PRODUCTS["encoder.v"]
    sent = {
        "bias": nn.Parameter(torch.ones(4)),
        "encoder.v": LowRank(torch.ones(v.m, 1).expand(v.m, 2), torch.ones(v.n, 2).mT),
        "down.B": torch.ones(2, 5).mT,
        "encoder.q": LowRank.zeros(q.m, q.n),
    }
    head = {name: value.clone().requires_grad_() for name, value in HEAD.items()}
    reply = replace(reply, sent=MappingProxyType(sent), head=head)
    (accepted,) = check_replies([reply], ROUND, DEFAULT).accepted
    assert list(accepted.sent) == list(sent)
    assert torch.equal(accepted.sent["encoder.v"].dense(), torch.full((v.m, v.n), 2.0))
    assert not any(tensor.requires_grad for tensor in tensors_of(accepted))
    assert head["head.bias"].requires_grad  # the one given keeps what it had
    assert accepted.head["head.bias"].data_ptr() == head["head.bias"].data_ptr()  # no copy
    assert_averageable([accepted])


def test_invalid_metrics_are_dropped_and_the_reply_is_accepted():
    metrics = {"loss": 0.5, "steps": 7, "seconds": np.float64(2.0)}
    bad = {"nan": math.nan, "inf": -math.inf, "flag": True, "huge": 10**400, "text": "1", "none": None}
    bad |= {3: 1.0, None: 1.0, "tensor": torch.tensor(1.0), "nested": {"a": 1.0}, "complex": 1j}
    reply = replace(good("c0", 1), metrics={**metrics, **bad})
    (accepted,) = check_replies([reply], ROUND, DEFAULT).accepted
    assert accepted.metrics == metrics
    assert accepted.sent is reply.sent
    assert "nan" in reply.metrics


def test_the_dtype_is_the_expected_one_and_clipping_keeps_it():
    uploads = [of_norm(norm, seed=i).to(dtype=torch.bfloat16) for i, norm in enumerate([1, 1, 4])]
    replies, expected = only_products(*uploads)
    assert check_replies(replies, expected, DEFAULT).accepted == []
    expected = replace(expected, dtype=torch.bfloat16)
    accepted = check_replies(replies, expected, UploadSettings(clip_to_median=True)).accepted
    assert [reply.sent["w"].dtype for reply in accepted] == [torch.bfloat16] * 3
    assert accepted[2].sent["w"].norm() == pytest.approx(1, rel=0.02)


# Repeats and order


def test_the_first_valid_reply_of_a_client_is_accepted():
    first, second = good("c0", 1), good("c0", 2)
    checked = check_replies([first, second], ROUND, DEFAULT)
    assert [id(reply) for reply in checked.accepted] == [id(first)]
    assert checked.refused[0][0] is second
    assert "a repeat" in checked.refused[0][1]
    again = check_replies([first, first], ROUND, DEFAULT)
    assert len(again.accepted) == len(again.refused) == 1
    for bad in (replace(first, round=3), with_layer(first, "bias", torch.full((4,), math.nan))):
        checked = check_replies([bad, second, first], ROUND, DEFAULT)
        assert [id(reply) for reply in checked.accepted] == [id(second)]
        assert [id(reply) for reply, _ in checked.refused] == [id(bad), id(first)]


@given(SEEDS, st.booleans())
@MODERATE
def test_the_order_of_arrival_changes_no_decision(seed, clip):
    rng = random.Random(seed)
    replies = [
        good(client, seed + i, size=rng.choice([0.0, 0.5, 1, 1, 3, 30, 1e4]))
        for i, client in enumerate(CLIENTS)
    ]
    # Some clients also, or only, send something damaged.
    damaged = [bad_factor(replies[0], rng)[0], bad_samples(replies[1], rng)[0], bad_sent(replies[2], rng)[0]]
    replies = [*replies[rng.randrange(3) :], *damaged]
    rules = UploadSettings(max_norm_factor=rng.choice([1.5, 10.0]), clip_to_median=clip)
    shuffled = rng.sample(replies, len(replies))
    one, other = check_replies(replies, ROUND, rules), check_replies(shuffled, ROUND, rules)
    assert {(id(r), why) for r, why in one.refused} == {(id(r), why) for r, why in other.refused}
    by_client = {reply.client: reply for reply in other.accepted}
    assert sorted(by_client) == sorted(reply.client for reply in one.accepted)
    for reply in one.accepted:
        for a, b in zip(tensors_of(reply), tensors_of(by_client[reply.client]), strict=True):
            assert torch.equal(a, b)
    position = {id(reply): i for i, reply in enumerate(shuffled)}
    refused = [position[id(reply)] for reply, _ in other.refused]
    assert refused == sorted(refused)


# Size


@given(SEEDS)
@MODERATE
def test_norms_and_medians_match_dense_matrices(seed):
    rng = random.Random(seed)
    replies = [
        good(client, seed + i, size=10 ** rng.uniform(-2, 2))
        for i, client in enumerate(CLIENTS[: rng.randint(1, 8)])
    ]
    factor = rng.choice([1.2, 3.0, 10.0])
    norms = [dense_norms(reply) for reply in replies]
    medians = [statistics.median(column) for column in zip(*norms, strict=True)]
    ratios = [[norm / median for norm, median in zip(pair, medians, strict=True)] for pair in norms]
    if any(abs(ratio / factor - 1) < 1e-4 for pair in ratios for ratio in pair):
        return  # on the edge; rounding decides
    checked = check_replies(replies, ROUND, UploadSettings(max_norm_factor=factor))
    want = [r.client for r, pair in zip(replies, ratios, strict=True) if max(pair) <= factor]
    assert [reply.client for reply in checked.accepted] == want


@given(SEEDS)
@MODERATE
def test_clipping_scales_larger_norms_to_the_median_and_enlarges_nothing(seed):
    rng = random.Random(seed)
    replies = [
        good(client, seed + i, size=10 ** rng.uniform(-0.4, 0.4))
        for i, client in enumerate(CLIENTS[: rng.randint(1, 8)])
    ]
    norms = [dense_norms(reply) for reply in replies]
    medians = [statistics.median(column) for column in zip(*norms, strict=True)]
    kept = [[t.clone() for t in tensors_of(reply)] for reply in replies]
    accepted = check_replies(
        replies, ROUND, UploadSettings(max_norm_factor=100, clip_to_median=True)
    ).accepted
    assert len(accepted) == len(replies)
    for reply, given_reply, before, copies in zip(accepted, replies, norms, kept, strict=True):
        for after, norm, median in zip(dense_norms(reply), before, medians, strict=True):
            assert after == pytest.approx(min(norm, median), rel=1e-5)
        if all(norm < 0.999 * median for norm, median in zip(before, medians, strict=True)):
            assert reply is given_reply
        shrink = min(1.0, medians[0] / before[0])
        for name in PRODUCTS:
            assert torch.allclose(
                reply.sent[name].dense(), shrink * given_reply.sent[name].dense(), rtol=1e-4, atol=1e-5
            )
        shrink = min(1.0, medians[1] / before[1])
        for name, base in HEAD.items():
            want = base + shrink * (given_reply.head[name] - base)
            assert torch.allclose(reply.head[name], want, rtol=1e-4, atol=1e-6)
        assert all(t.dtype == torch.float32 for t in tensors_of(reply))
        assert all(torch.equal(a, b) for a, b in zip(tensors_of(given_reply), copies, strict=True))
    assert_averageable(accepted)


def test_an_upload_ten_times_the_median_passes_and_one_above_does_not():
    one = torch.tensor([[1.0, 0.0]])
    replies, expected = only_products(one, one, 10 * one, one)
    assert len(check_replies(replies, expected, DEFAULT).accepted) == 4
    replies, expected = only_products(one, one, 10.001 * one, one)
    checked = check_replies(replies, expected, DEFAULT)
    assert [reply.client for reply in checked.accepted] == ["c0", "c1", "c3"]
    (_, reason), *_ = checked.refused
    assert reason == (
        "client c2: the norm of its upload is 10; it may be at most 10 times the median of this round's "
        "4 valid replies, 1"
    )


def test_the_change_of_the_head_is_compared_separately():
    replies = [good(client, i) for i, client in enumerate(CLIENTS[:4])]
    replies[2] = head_too_large(replies[2], random.Random(0))
    ((reply, reason),) = check_replies(replies, ROUND, DEFAULT).refused
    assert reply is replies[2]
    assert "client c2: the norm of its head's change" in reason


def test_damaged_uploads_do_not_move_the_median():
    big = [replace(r, sent={"w": r.sent["w"] * 1e4}, round=7) for r in only_products(*[of_norm(1)] * 5)[0]]
    replies, expected = only_products(of_norm(1), of_norm(1), of_norm(50))
    checked = check_replies([*big, *replies], expected, DEFAULT)
    assert [reply.client for reply in checked.accepted] == ["c0", "c1"]


def test_two_uploads_have_no_majority():
    assert len(check_replies(*only_products(of_norm(1), of_norm(1e6)), UploadSettings()).accepted) == 2


def test_if_most_uploads_are_zero_only_zero_is_accepted():
    zero = LowRank.zeros(6, 5)
    for clip in (False, True):
        rules = UploadSettings(clip_to_median=clip)
        checked = check_replies(*only_products(zero, zero, zero * 3.0, of_norm(1e-20)), rules)
        assert [reply.client for reply in checked.accepted] == ["c0", "c1", "c2"]
        assert len(check_replies(*only_products(zero, of_norm(1), zero), rules).accepted) == 2
        assert len(check_replies(*only_products(zero, of_norm(1), of_norm(2)), rules).accepted) == 3


def test_an_infinite_factor_refuses_no_size():
    zero, rules = LowRank.zeros(6, 5), UploadSettings(max_norm_factor=math.inf)
    assert len(check_replies(*only_products(zero, zero, of_norm(1e9)), rules).accepted) == 3
    clipped = check_replies(
        *only_products(zero, zero, of_norm(1e9)), replace(rules, clip_to_median=True)
    ).accepted
    assert [reply.sent["w"].norm() for reply in clipped] == [0, 0, 0]


@pytest.mark.parametrize("size", [1e-30, 1e-12, 1e8])
def test_tiny_and_large_norms_are_distinguished(size):
    root = torch.eye(6)[:, :2] * size  # its squares underflow or overflow in float32
    products = [LowRank(root * k, torch.eye(5)[:2]) for k in (1, 1, 2, 30)]
    assert [r.client for r in check_replies(*only_products(*products), DEFAULT).accepted] == [
        "c0",
        "c1",
        "c2",
    ]


def test_the_largest_accepted_values_can_be_averaged():
    q, v = PRODUCTS["encoder.q"], PRODUCTS["encoder.v"]
    replies = []
    for i, client in enumerate(CLIENTS):
        sent = {
            "encoder.q": LowRank(torch.eye(q.m)[:, :1] * 9e17, torch.eye(q.n)[:1]),
            "encoder.v": LowRank(torch.eye(v.m)[:, :1] * 9e8, torch.eye(v.n)[:1] * 9e8),
            "down.B": torch.full((5, 2), 3e17),
            "bias": torch.full((4,), 4e17),
        }
        head = {name: torch.full_like(value, 2e17) for name, value in HEAD.items()}
        replies.append(replace(good(client, i), sent=sent, head=head))
    checked = check_replies(replies, ROUND, DEFAULT)
    assert len(checked.accepted) == 8
    assert_averageable(checked.accepted)


def test_a_method_without_uploads_and_an_empty_round_pass():
    expected = ReplySpec(experiment="e", round=0, attempt=0, clients={"a": 3, "b": 3})
    replies = [Reply(client=c, experiment="e", round=0, samples=3, sent={}) for c in "ab"]
    assert check_replies(replies, expected, DEFAULT).accepted == replies
    assert check_replies([], expected, DEFAULT) == check_replies((), ROUND, DEFAULT)
    assert (
        "the round asked none" in check_replies(replies, replace(expected, clients={}), DEFAULT).refused[0][1]
    )
