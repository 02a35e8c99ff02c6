"""The clip norm that follows a quantile of the norms of uploads (arXiv 1905.03871)."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from test_privacy import HEAD, LAYERS, SEEDED, NoNoise, released, reply, server_of
from torch import Tensor

from fedsmoothlora import methods
from fedsmoothlora.callbacks import Callback
from fedsmoothlora.errors import ConfigError
from fedsmoothlora.federation.accounting import Budget
from fedsmoothlora.federation.messages import Reply
from fedsmoothlora.federation.noise import Noise
from fedsmoothlora.federation.privacy import PrivateMean, multiplier_beside_a_quantile, next_clip_norm
from fedsmoothlora.federation.rounds import run_rounds
from fedsmoothlora.federation.settings import PrivacySettings
from fedsmoothlora.federation.simulation import Simulation

pytest.importorskip("opacus")

Make = Callable[..., Simulation]


def rule(noise: Noise | None = None, *, clip_norm: float = 1.0) -> PrivateMean:

    settings = PrivacySettings(
        unit="client", clip_norm=clip_norm, clip_quantile=0.5, noise_multiplier=1.0, delta=1e-5
    )
    return PrivateMean(
        method=methods.find("flora")(),
        clip_norm=settings.first_clip_norm,
        population=100,
        budget=Budget(settings=settings, sample_rate=0.5, rounds=9),
        noise=noise or NoNoise(),
    )


def of_norm(client: int, norm: float) -> Reply:
    """An upload of one layer whose norm is known, with an unchanged head."""
    sent = {name: replace_norm(name, norm if name == "w" else 0.0) for name in LAYERS}
    return replace(reply("flora", client, 1.0), sent=sent, head=dict(HEAD))


def replace_norm(name: str, norm: float) -> Any:
    from fedsmoothlora.algebra.lowrank import LowRank

    layer = LAYERS[name]
    B, A = torch.zeros(layer.m, layer.rank), torch.zeros(layer.rank, layer.n)
    B[0, 0], A[0, 0] = norm, 1.0
    return LowRank(B, A)


def test_the_share_of_small_uploads_is_measured_around_one_half() -> None:
    """10 of 50 expected clients came: 7 below, 3 above. The others count as halves."""
    private = rule()
    norms = [0.5] * 6 + [1.0] + [2.0, 9.0, math.inf]
    sent = [of_norm(client, min(norm, 1e30)) for client, norm in enumerate(norms)]
    found = private.combine(sent, server_of("flora"), HEAD)
    share = 0.5 + (7 * 0.5 - 3 * 0.5) / 50
    assert found.metrics["clip_norm"] == 1.0  # that of this round
    assert private.clip_norm == pytest.approx(math.exp(-0.2 * (share - 0.5)))
    assert private.clip_norm == next_clip_norm(1.0, share, 0.5)


@pytest.mark.parametrize("quantile", [0.2, 0.5, 0.9])
@pytest.mark.parametrize("first", [0.01, 30.0])
def test_the_clip_norm_follows_the_quantile_of_a_known_distribution(quantile: float, first: float) -> None:
    """Log-normal norms, with the noise of 100 expected clients. All take part."""
    draw, norm = torch.Generator().manual_seed(7), first
    noise = Noise(seed=1)
    tail = []
    for round in range(400):
        norms = torch.randn(100, generator=draw).exp()
        excess = float(((norms <= norm).double() - 0.5).sum())
        excess += float(noise.draw((1,), 100 / 20, round, "bits"))
        norm = next_clip_norm(norm, 0.5 + excess / 100, quantile)
        tail.append(norm)
    wanted = math.exp(math.sqrt(2) * float(torch.erfinv(torch.tensor(2 * quantile - 1))))
    settled = math.exp(sum(map(math.log, tail[-150:])) / 150)
    assert settled == pytest.approx(wanted, rel=0.15)


def test_both_releases_together_are_as_private_as_one_with_the_multiplier() -> None:
    """Scaled by their noise, one client moves the pair by ``1 / z``: the sensitivities are ``C`` and 1/2."""
    for z, bits in ((1.0, 2.5), (0.7, 1.0), (3.0, 1.6)):
        beside = multiplier_beside_a_quantile(z, bits)
        assert beside > z
        assert math.hypot(1 / beside, 0.5 / bits) == pytest.approx(1 / z)
    assert multiplier_beside_a_quantile(1.0, 1e9) == pytest.approx(1.0)


def test_one_client_moves_mean_and_count_together_by_less_than_the_noise_allows() -> None:
    private, server = rule(), server_of("flora")
    everyone = [of_norm(client, size) for client, size in enumerate((0.1, 5.0, 1e6))]
    after, means = [], []
    for sent in (everyone, everyone[:-1], everyone[1:]):
        one = rule()
        means.append(released("flora", one.combine(sent, server, HEAD)))
        after.append(-math.log(one.clip_norm) / 0.2 * 50)  # the sum of halves
    for mean, count in zip(means[1:], after[1:], strict=True):
        moved = float((mean - means[0]).norm()) / private.std
        assert math.hypot(moved, abs(count - after[0]) / private.quantile_noise) <= 1.0 * (1 + 1e-5)


def test_the_noise_is_that_of_the_mean_alone_and_scales_with_the_norm_of_the_round() -> None:
    server = server_of("flora")
    private = rule()
    assert private.quantile_noise == 2.5  # a twentieth of 50 clients
    assert private.std == pytest.approx(multiplier_beside_a_quantile(1.0, 2.5) / 50)
    draws: list[Tensor] = [
        released("flora", rule(Noise(seed), clip_norm=4.0).combine([], server, HEAD)) for seed in range(20)
    ]
    plain = released("flora", rule(clip_norm=4.0).combine([], server, HEAD))
    assert float((torch.stack(draws) - plain).std()) == pytest.approx(4 * private.std, rel=0.1)
    releases = rule(Noise(1)).budget.ledger.releases
    assert releases == ()


def test_the_ledger_has_one_release_with_the_whole_multiplier() -> None:
    private = rule(Noise(1))
    private.combine([], server_of("flora"), HEAD)
    (one,) = private.budget.ledger.releases
    assert (one.noise_multiplier, one.sample_rate, one.steps) == (1.0, 0.5, 1)


@pytest.mark.parametrize(
    ("clients", "rate", "noise", "words"),
    [
        (
            20,
            0.5,
            None,
            r"a twentieth of the 10 clients of a round\) is not above half of the noise multiplier 1",
        ),
        (1000, 0.5, 0.5, r"privacy.quantile_noise = 0.5 is not above half"),
    ],
    ids=["few-clients", "little-noise"],
)
def test_a_quantile_that_would_take_all_privacy_is_refused(
    clients: int, rate: float, noise: float | None, words: str
) -> None:
    settings = PrivacySettings(unit="client", clip_quantile=0.5, quantile_noise=noise, delta=1e-5)
    with pytest.raises(ConfigError, match=words):
        settings.check(clients, rate, 1.0)
    settings.check(clients, rate, 0.9)
    assert settings.first_clip_norm == 0.1


def test_only_the_server_knows_of_the_quantile_and_every_round_has_its_norm(toy_federation: Make) -> None:
    chosen = {"privacy.clip_quantile": 0.5, "privacy.quantile_noise": 1.0, "training.rounds": 3}
    federation = toy_federation({**SEEDED, **chosen})
    records = list(run_rounds(federation, Callback()))
    norms: Sequence[float | None] = [record.value("clip_norm") for record in records[1:]]
    assert norms[0] == 0.5
    assert len(set(norms)) == 3
    assert federation.learner.changes.clip_norm == 0.5  # clients do not clip with these transports
