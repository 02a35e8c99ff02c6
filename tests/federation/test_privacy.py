"""Client-level privacy: sensitivity, noise, the empty round, and what leaves a client."""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedsmoothlora import methods
from fedsmoothlora.algebra.coding import decoded
from fedsmoothlora.algebra.lowrank import LowRank
from fedsmoothlora.algebra.update import Layer, Update
from fedsmoothlora.callbacks import Callback
from fedsmoothlora.errors import NotFiniteError
from fedsmoothlora.federation import changes
from fedsmoothlora.federation.accounting import Budget
from fedsmoothlora.federation.aggregation import Combined
from fedsmoothlora.federation.contributions import Contribution
from fedsmoothlora.federation.messages import Message, Reply
from fedsmoothlora.federation.noise import Noise, secure_gaussians
from fedsmoothlora.federation.participation import sample_in_secret
from fedsmoothlora.federation.privacy import PrivateMean, clipped_change
from fedsmoothlora.federation.rounds import run_rounds
from fedsmoothlora.federation.serialization import flatten
from fedsmoothlora.federation.settings import PrivacySettings
from fedsmoothlora.federation.simulation import ClientReply, Simulation
from fedsmoothlora.federation.wire import pack
from fedsmoothlora.methods import ServerView
from fedsmoothlora.secure_aggregation.fixed_point import FixedPoint

pytest.importorskip("opacus")

Make = Callable[..., Simulation]
LAYERS = {"w": Layer("w", 6, 5, 2, 0.5, 5), "v": Layer("v", 4, 3, 2, 2.0, 3)}
HEAD = {"bias": torch.tensor([1.0, -2.0, 3.0])}
PRIVATE = [name for name in methods.names() if methods.find(name).traits.uses_mean_only]
CLIP, POPULATION, RATE = 0.7, 5, 0.5

ON = {
    "privacy.unit": "client",
    "privacy.clip_norm": 0.5,
    "privacy.noise_multiplier": 1.0,
    "privacy.delta": 1e-5,
}
SEEDED = {**ON, "privacy.seed": 3}


class NoNoise(Noise):
    def draw(self, shape: Any, std: float, round: int, name: str) -> Tensor:
        return torch.zeros(tuple(shape), dtype=torch.float64)


def private_mean(method: str, noise: Noise | None = None) -> PrivateMean:
    chosen = PrivacySettings(unit="client", clip_norm=CLIP, noise_multiplier=2.0, delta=1e-5)
    return PrivateMean(
        method=methods.find(method)(),
        clip_norm=CLIP,
        population=POPULATION,
        budget=Budget(settings=chosen, sample_rate=RATE, rounds=9),
        noise=noise or NoNoise(),
    )


def lora(layer: Layer, seed: int, size: float = 1.0) -> LowRank:
    draw = torch.Generator().manual_seed(seed)
    B = torch.randn(layer.m, layer.rank, generator=draw)
    return LowRank(size * B, torch.randn(layer.rank, layer.n, generator=draw))


def view(round: int = 0, seed: int = 100) -> ServerView:
    """A server whose LoRA, where the method keeps one, is not 0."""
    held = {name: lora(layer, seed + place) for place, (name, layer) in enumerate(LAYERS.items())}
    return ServerView(
        round=round, rounds=9, layers=LAYERS, model=held, initial=lambda name: held[name], prepared=held
    )


def server_of(method: str, round: int = 0) -> ServerView:
    """`view`, without a LoRA for methods that merge everything."""
    keeps = method not in ("fedsmoothlora", "flora", "florist", "full", "frlora")
    return view(round) if keeps else replace(view(round), model={})


def upload(method: str, round: int, seed: int, size: float) -> dict[str, LowRank | Tensor]:
    part = methods.find(method)().sends(round)
    found: dict[str, LowRank | Tensor] = {}
    for place, (name, layer) in enumerate(LAYERS.items()):
        product = lora(layer, seed * 10 + place, size)
        dense = torch.randn(layer.m, layer.n, generator=torch.Generator().manual_seed(seed)) * size
        found[name] = {"product": product, "B": product.B, "A": product.A, "W": dense}[part]
    return found


def reply(method: str, client: int, size: float, round: int = 0) -> Reply:
    bias = HEAD["bias"] + size * torch.randn(3, generator=torch.Generator().manual_seed(client))
    return Reply(
        client=str(client),
        round=round,
        samples=1,
        sent=upload(method, round, client, size),
        head={"bias": bias},
    )


def coordinates(values: Mapping[str, LowRank | Tensor], apart: bool) -> Tensor:
    """Everything that is released, as one vector in float64."""
    parts: list[Tensor] = []
    for value in values.values():
        if isinstance(value, Tensor):
            parts.append(value)
        else:
            parts += [value.B, value.A] if apart else [value.B.double() @ value.A.double()]
    return torch.cat([part.double().flatten() for part in parts])


def released(method: str, combined: Combined) -> Tensor:
    apart = methods.find(method).traits.averages_factors
    return torch.cat([coordinates(combined.uploads[0], apart), coordinates(combined.head, apart)])


@pytest.mark.parametrize("method", PRIVATE)
@settings(max_examples=10, deadline=None)
@given(
    sizes=st.lists(st.sampled_from([0.0, 1e-3, 0.05, 1.0, 30.0, 1e6]), min_size=1, max_size=4),
    left_out=st.integers(0, 3),
    round=st.integers(0, 1),
)
def test_one_client_changes_a_release_by_at_most_the_clip_norm_over_the_denominator(
    method: str, sizes: list[float], left_out: int, round: int
) -> None:
    server, rule = server_of(method, round), private_mean(method)
    everyone = [reply(method, client, size, round) for client, size in enumerate(sizes)]
    others = [one for place, one in enumerate(everyone) if place != left_out % len(everyone)]

    with_it = released(method, rule.combine(everyone, server, HEAD))
    without = released(method, rule.combine(others, server, HEAD))

    distance = float(torch.linalg.vector_norm(with_it - without))
    rounding = 1e-6 * (1 + float(without.norm()))  # of float32, in which noised numbers are released
    assert distance <= CLIP / (RATE * POPULATION) + rounding
    if max(sizes) >= 30 and sizes[left_out % len(sizes)] >= 30:
        assert distance >= 0.99 * CLIP / (RATE * POPULATION) - rounding  # the bound is reached


@pytest.mark.parametrize("method", PRIVATE)
def test_the_mean_of_uploads_gives_a_private_method_the_same_update_as_the_uploads(method: str) -> None:
    """The promise of `Traits.uses_mean_only`; the reference of the mean is a dense weighted sum."""
    kind, weights = methods.find(method), [0.25, 0.75]
    for round in (0, 1):
        server = server_of(method, round)
        uploads: list[Update] = [upload(method, round, seed, 1.0) for seed in (1, 2)]
        mean = {
            name: _mean([one[name] for one in uploads], weights, kind.traits.averages_factors)
            for name in LAYERS
        }
        expected, found = (
            kind().aggregate(sent, counts, server) for sent, counts in ((uploads, weights), ([mean], [1.0]))
        )
        for part in ("merge", "model"):
            one, other = getattr(expected, part), getattr(found, part)
            assert one.keys() == other.keys()
            for name in one:
                torch.testing.assert_close(_dense(other[name]), _dense(one[name]), rtol=1e-3, atol=1e-4)


def _dense(value: Any) -> Tensor:
    return value if isinstance(value, Tensor) else value.dense()


def _mean(values: list[Any], weights: list[float], apart: bool) -> LowRank | Tensor:
    def total(parts: list[Tensor]) -> Tensor:
        return (
            torch.stack([w * part.double() for w, part in zip(weights, parts, strict=True)])
            .sum(dim=0)
            .float()
        )

    if isinstance(values[0], Tensor):
        return total(values)
    if apart:
        return LowRank(total([value.B for value in values]), total([value.A for value in values]))
    return LowRank.of(total([value.dense() for value in values]))


@pytest.mark.parametrize("method", PRIVATE)
def test_small_changes_are_averaged_over_the_expected_number_of_clients(method: str) -> None:
    """Against dense sums; uploads are as close to what the clients started from as clipping never touches."""
    server = server_of(method)
    apart = methods.find(method).traits.averages_factors
    start = methods.find(method)().unchanged(server)
    changed = []
    for client in (1, 2):
        moved = upload(method, 0, client, 1e-2)
        sent: dict[str, LowRank | Tensor] = {}
        for name, value in moved.items():
            held = start.get(name)
            if isinstance(value, Tensor):
                sent[name] = 1e-2 * value if held is None else held + 1e-2 * value
            elif apart:
                sent[name] = LowRank(held.B + 1e-2 * value.B, held.A + 1e-2 * value.A)
            else:
                sent[name] = 1e-2 * value if held is None else held + 1e-2 * value
        changed.append(replace(reply(method, client, 1e-2), sent=sent))

    found = private_mean(method).combine(changed, server, HEAD)

    def change(values: Mapping[str, Any]) -> Tensor:
        base = {name: start.get(name) for name in LAYERS}
        vector = coordinates(values, apart)
        held = {n: base[n] if base[n] is not None else _zero(values[n]) for n in values}
        return vector - coordinates(held, apart)

    expected = sum(change(one.sent) for one in changed) / (RATE * POPULATION)
    torch.testing.assert_close(change(found.uploads[0]), expected, rtol=1e-3, atol=2e-6)
    heads = sum(one.head["bias"].double() - HEAD["bias"].double() for one in changed) / (RATE * POPULATION)
    torch.testing.assert_close(
        found.head["bias"].double() - HEAD["bias"].double(), heads, rtol=1e-4, atol=1e-6
    )
    assert found.weights == [1.0]


def _zero(value: LowRank | Tensor) -> LowRank | Tensor:
    return torch.zeros_like(value) if isinstance(value, Tensor) else LowRank.zeros(*value.shape)


def test_a_long_upload_is_clipped_as_a_whole_to_the_clip_norm() -> None:
    """Layers without the scale, together with the head's change: one factor for all of them."""
    one = reply("flora", 1, 20.0)
    dense = {name: _dense(value).double() for name, value in one.sent.items()}
    change = one.head["bias"].double() - HEAD["bias"].double()
    norm = math.sqrt(sum(float(value.square().sum()) for value in (*dense.values(), change)))
    found = private_mean("flora").combine([one], server_of("flora"), HEAD)

    for name, value in dense.items():
        got = _dense(found.uploads[0][name]).double()
        torch.testing.assert_close(got, value * CLIP / norm / (RATE * POPULATION), rtol=1e-5, atol=1e-6)
    expected = HEAD["bias"].double() + change * CLIP / norm / (RATE * POPULATION)
    torch.testing.assert_close(found.head["bias"].double(), expected, rtol=1e-5, atol=1e-6)


SUMMED = [name for name in PRIVATE if methods.find(name).traits.sums_tensors]


def masked_sum(method: str, replies: list[Reply], server: ServerView) -> Contribution:
    """The mean of changes that clients clip, through integers of 32 bits, as under masks."""
    part = methods.find(method)().sends(server.round)
    start = {} if part == "W" else server.prepared if method == "frlora" else server.model
    words, code = None, None
    for one in replies:
        sent, head = clipped_change(decoded(one.sent), one.head, start, HEAD, part, CLIP)
        tensors = {**flatten(sent), **changes.under_head(head)}
        arrays = {name: value.numpy() for name, value in sorted(tensors.items())}
        shapes = {name: value.shape for name, value in arrays.items()}
        code = FixedPoint(shapes=shapes, bounds=dict.fromkeys(shapes, CLIP), clients=POPULATION)
        numbers = code.encode(arrays, 1.0)
        words = numbers if words is None else words + numbers
    assert code is not None
    assert words is not None
    mean = code.decode(words, len(replies))
    assert mean.saturated == 0
    tensors = {name: torch.from_numpy(value) for name, value in mean.tensors.items()}
    return Contribution(weight=1.0, tensors=tensors, rounding=code.rounding)


@pytest.mark.parametrize("method", SUMMED)
@settings(max_examples=10, deadline=None)
@given(
    sizes=st.lists(st.sampled_from([0.0, 1e-3, 0.05, 1.0, 30.0, 1e6]), min_size=1, max_size=4),
    round=st.integers(0, 1),
)
def test_the_sum_of_changes_that_clients_clip_is_released_as_that_of_uploads(
    method: str, sizes: list[float], round: int
) -> None:
    server, rule = server_of(method, round), private_mean(method)
    replies = [reply(method, client, size, round) for client, size in enumerate(sizes)]
    found = rule.combine_sum(masked_sum(method, replies, server), len(replies), server, HEAD)
    expected = rule.combine(replies, server, HEAD)
    torch.testing.assert_close(released(method, found), released(method, expected), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", ["fedit", "full"])
@settings(max_examples=30, deadline=None)
@given(size=st.floats(0, 1e6), client=st.integers(0, 99))
def test_a_change_that_a_client_clips_is_no_longer_than_the_noise_is_made_for(
    method: str, size: float, client: int
) -> None:
    """Rounding to integers included, by which the noise is larger."""
    server = server_of(method)
    total = masked_sum(method, [reply(method, client, size)], server)
    norm = math.sqrt(sum(float(value.square().sum()) for value in total.tensors.values()))
    assert norm <= CLIP * (1 + total.rounding)


def test_the_noise_of_a_masked_sum_grows_with_the_rounding() -> None:
    drawn: set[float] = set()

    class Recorded(NoNoise):
        def draw(self, shape: Any, std: float, round: int, name: str) -> Tensor:
            drawn.add(std)
            return super().draw(shape, std, round, name)

    server, rule = server_of("fedit"), private_mean("fedit", Recorded())
    total = masked_sum("fedit", [reply("fedit", 1, 1.0)], server)
    rule.combine_sum(replace(total, rounding=0.25), 1, server, HEAD)
    assert drawn == {1.25 * rule.std}


def test_a_change_that_is_not_finite_is_not_masked() -> None:
    server, bad = server_of("fedit"), reply("fedit", 1, 1.0)
    broken = replace(bad, head={"bias": torch.tensor([1.0, math.nan, 1.0])})
    with pytest.raises(NotFiniteError):
        masked_sum("fedit", [broken], server)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e30])
@pytest.mark.parametrize("method", ["flora", "fedit", "ffa"])
def test_an_upload_that_is_not_finite_counts_as_0(method: str, bad: float) -> None:
    server, good = server_of(method), reply(method, 1, 1.0)
    broken = reply(method, 2, 1.0)
    for value in broken.sent.values():
        (value if isinstance(value, Tensor) else value.B)[0, 0] = bad
        if not isinstance(value, Tensor):
            value.A[0, :] = bad
    rule = private_mean(method)
    alone, both = (released(method, rule.combine(one, server, HEAD)) for one in ([good], [good, broken]))
    if bad == 1e30:  # finite in float64: clipped like any other
        assert float((alone - both).norm()) <= CLIP / (RATE * POPULATION) + 1e-5
    else:
        assert torch.equal(alone, both)


@pytest.mark.parametrize("method", ["flora", "fedit", "ffa", "full", "flexlora"])
@pytest.mark.parametrize("replies", [0, 3])
def test_the_noise_has_the_variance_that_the_accountant_is_told(method: str, replies: int) -> None:
    """Also in a round without any client. The numbers released with and without noise are compared."""
    server, sent = server_of(method), [reply(method, client, 1.0) for client in range(replies)]
    plain = released(method, private_mean(method).combine(sent, server, HEAD))
    draws = [
        released(method, private_mean(method, Noise(s)).combine(sent, server, HEAD)) - plain
        for s in range(40)
    ]
    noise = torch.stack(draws)
    std = private_mean(method).std

    assert std == pytest.approx(2.0 * CLIP / (RATE * POPULATION))
    assert float(noise.std()) == pytest.approx(std, rel=0.1)
    assert float(noise.std(dim=0).min()) > 0.5 * std  # every coordinate has its own noise
    correlation = torch.corrcoef(noise.T).fill_diagonal_(0).abs().max()
    assert float(correlation) < 0.75


def test_secure_noise_is_standard_normal_and_never_the_same() -> None:
    from scipy import stats

    found = secure_gaussians(40_000)
    assert stats.kstest(found, "norm").pvalue > 1e-6
    assert abs(float(stats.kurtosis(found))) < 0.2
    assert not (found == secure_gaussians(40_000)).any()
    assert secure_gaussians(0).shape == (0,)


def test_noise_of_a_seed_is_the_same_for_the_same_round_and_name_only() -> None:
    one, again = (Noise(5).draw((3, 2), 2.0, 1, "w") for _ in range(2))
    assert torch.equal(one, again)
    assert not torch.equal(one, Noise(5).draw((3, 2), 2.0, 2, "w"))
    assert not torch.equal(one, Noise(5).draw((3, 2), 2.0, 1, "v"))
    assert not torch.equal(Noise().draw((3, 2), 2.0, 1, "w"), Noise().draw((3, 2), 2.0, 1, "w"))


def test_clients_are_drawn_each_by_itself() -> None:
    clients = [str(number) for number in range(2000)]
    counts = [len(sample_in_secret(clients, 0.1, 0)) for _ in range(3)]
    assert all(120 < count < 280 for count in counts)  # 200 +- 6 standard deviations
    first, second = sample_in_secret(clients, 0.5, 0), sample_in_secret(clients, 0.5, 0)
    assert first != second
    assert sample_in_secret(clients, 1.0, 0) == clients
    assert sample_in_secret(clients, 0.5, 2, seed=1) == sample_in_secret(clients, 0.5, 2, seed=1)
    assert sample_in_secret(clients, 0.5, 2, seed=1) != sample_in_secret(clients, 0.5, 3, seed=1)


def test_a_membership_attack_succeeds_without_noise_and_stays_within_epsilon_with_it() -> None:
    """The strongest attack: the target's upload and all others are known, only its presence is not."""
    from scipy.stats import beta

    server, trials = server_of("flora"), 150
    others, target = [reply("flora", 1, 1.0)], reply("flora", 2, 30.0)

    def release(noise: Noise, present: bool) -> Tensor:
        sent = [*others, target] if present else others
        return released("flora", private_mean("flora", noise).combine(sent, server, HEAD))

    there, gone = (release(NoNoise(), present) for present in (True, False))
    direction, middle = there - gone, float((there + gone) @ (there - gone)) / 2
    assert float(there @ direction) > middle > float(gone @ direction)  # without noise it never fails

    def found(present: bool) -> int:
        return sum(bool(release(Noise(), present) @ direction > middle) for _ in range(trials))

    hits, alarms = found(True), found(False)

    least_hits = float(beta.ppf(0.001, hits, trials - hits + 1))  # Clopper and Pearson
    most_alarms = float(beta.ppf(0.999, alarms + 1, trials - alarms))
    rule = private_mean("flora")
    epsilon = Budget(settings=rule.budget.settings, sample_rate=1.0, rounds=1).epsilon_after(1)
    assert math.log((least_hits - 1e-5) / most_alarms) <= epsilon
    # The noise's standard deviation is about twice the distance of both releases: 60 % of answers are right.
    assert 0.4 < hits / trials < 0.8


def test_a_client_clips_its_coded_change_as_the_server_will_and_feeds_back_only_what_coding_lost() -> None:
    """The part that clipping removes is dropped; otherwise it would pile up in the client's memory."""
    change = {"w.lora_B": 5 * torch.randn(6, 2), "head:bias": 5 * torch.randn(3)}
    left = {"w.lora_B": torch.ones(6, 2)}
    total = torch.cat([(change["w.lora_B"] + 1).flatten(), change["head:bias"]])
    coded, lost = changes.code_changes(change, left, 4, CLIP)

    sent = torch.cat([(changes.received(coded[key]) + lost[key]).flatten() for key in change])
    torch.testing.assert_close(sent, total * CLIP / total.norm(), rtol=1e-4, atol=1e-6)
    unclipped, _ = changes.code_changes(change, left, 4, 1e9)
    plain, _ = changes.code_changes(change, left, 4)
    for key in change:
        assert torch.equal(changes.received(unclipped[key]), changes.received(plain[key]))


class Sent(Callback):
    """The steps and notes that a run shows of its clients."""

    def __init__(self) -> None:
        self.steps: list[float] = []
        self.notes: list[str] = []

    def on_client_begin(self, client: str, steps: int) -> None:
        self.steps.append(steps)

    def on_client_step(self, client: str, loss: float) -> None:
        self.steps.append(loss)

    def on_note(self, text: str) -> None:
        self.notes.append(text)


class Recorder:
    """The engine of a federation, and every reply that it yields."""

    in_turn = True

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self.replies: list[ClientReply] = []
        self.messages: list[Message] = []

    def train(self, simulation: Any, clients: Any, message: Any, callback: Callback) -> Any:
        def recorded(client: str) -> Message:
            self.messages.append(message(client))
            return self.messages[-1]

        for one in self.engine.train(simulation, clients, recorded, callback):
            self.replies.append(one)
            yield one

    def calibrate(self, *_: Any) -> Any:
        raise AssertionError("gradients must not leave a client")

    def validate(self, simulation: Simulation, message: Any, callback: Callback) -> Mapping[str, Any]:
        assert not simulation.validation
        return {}


RECORDED = {
    "accuracy",
    "loss",
    "macro_f1",
    "mcc",
    "auroc",
    "epsilon",
    "seeded_noise",
    "seconds_round",
    "seconds_evaluation",
}


@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param({}, id="fedsmoothlora"),
        pytest.param({"method.name": "fedit", "transport.bits": 4}, id="fedit-4-bits"),
        pytest.param({"method.name": "full"}, id="full"),
    ],
)
def test_nothing_but_the_upload_leaves_a_client(toy_federation: Make, overrides: dict[str, Any]) -> None:
    federation = toy_federation({**SEEDED, "training.rounds": 2, "model.head": "full", **overrides})
    engine = federation.engine = Recorder(federation.engine)  # type: ignore[assignment]
    shown = Sent()
    records = list(run_rounds(federation, shown))

    assert len(engine.replies) == 6
    names = federation.server.layers.keys()
    for one in engine.replies:
        assert one.start == {}
        reply = one.reply
        assert (reply.samples, reply.metrics, reply.control) == (1, {}, {})
        # On the wire: no field but who answers which message, and no tensor but of layers and head.
        payload = pack(reply)
        assert payload.fields == {
            **{"client": one.client, "experiment": reply.experiment, "round": reply.round},
            **{"attempt": 0, "exchange": 0, "samples": 1},
        }
        assert {name.removesuffix(".lora_B").removesuffix(".lora_A") for name in reply.sent} == set(names)
        assert reply.head.keys() == federation.server.head.keys()
    assert all(not message.gradients and not message.control for message in engine.messages)
    assert shown.steps == []
    assert shown.notes == []
    for record in records:
        assert {metric.name for metric in record.metrics} <= RECORDED
        assert all(metric.client is None for metric in record.metrics)
    assert records[0].value("epsilon") is None
    assert records[2].value("epsilon") > records[1].value("epsilon") > 0  # type: ignore[operator]


def test_a_round_without_clients_releases_noise_and_is_counted(toy_federation: Make) -> None:
    federation = toy_federation(
        {**ON, "participation.sampling": "poisson", "participation.fraction": 1e-6, "training.rounds": 1}
    )
    records = list(run_rounds(federation, Callback()))
    assert len(federation.server.updates) == 1
    assert all(float(_dense(value).norm()) > 0 for value in federation.server.updates[0].values())
    assert records[1].value("epsilon") is not None
    assert federation.server.private is not None
    assert len(federation.server.private.budget.ledger.releases) == 1


def test_a_refused_upload_counts_as_0_and_the_round_is_not_repeated(toy_federation: Make) -> None:
    federation = toy_federation({**SEEDED, "training.rounds": 1})
    inner = federation.engine

    class Broken(Recorder):
        def train(self, simulation: Any, clients: Any, message: Any, callback: Callback) -> Any:
            for one in inner.train(simulation, clients, message, callback):
                yield replace(one, reply=replace(one.reply, samples=40))  # it may not say how many it has

    federation.engine = Broken(inner)  # type: ignore[assignment]
    shown = Sent()
    list(run_rounds(federation, shown))
    assert federation.server.round == 1
    assert federation.server.accepted == {}
    assert len(shown.notes) == 3


def test_a_large_upload_is_clipped_and_never_refused_for_its_size(toy_federation: Make) -> None:
    federation = toy_federation({**SEEDED, "training.rounds": 1})
    inner = federation.engine

    class Large(Recorder):
        def train(self, simulation: Any, clients: Any, message: Any, callback: Callback) -> Any:
            for one in inner.train(simulation, clients, message, callback):
                sent = {name: 1e4 * value for name, value in one.reply.sent.items()}
                yield replace(one, reply=replace(one.reply, sent=sent)) if one.client == "0" else one

    federation.engine = Large(inner)  # type: ignore[assignment]
    list(run_rounds(federation, Callback()))
    assert set(federation.server.accepted) == set(federation.clients)
