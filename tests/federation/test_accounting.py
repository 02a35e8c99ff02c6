"""Epsilon against published values and closed forms, and the budget."""

import logging
import math
import subprocess
import sys

import numpy as np
import pytest
from scipy.optimize import brentq
from scipy.stats import norm

from fedsmoothlora.errors import ConfigError, FederationStoppedError
from fedsmoothlora.federation.accounting import _ORDERS, Budget, MemoryLedger, epsilon, require_opacus
from fedsmoothlora.federation.settings import PrivacySettings

pytest.importorskip("opacus")

DELTA = 1e-5


def budget(rate: float = 1.0, rounds: int = 10, **keys: object) -> Budget:
    settings = PrivacySettings(unit="client", clip_norm=1.0, delta=DELTA, **keys)  # type: ignore[arg-type]
    return Budget(settings=settings, sample_rate=rate, rounds=rounds)


def exact_epsilon(noise: float, releases: int) -> float:
    """Of Gaussian releases without sampling: they are one with less noise (arXiv 1805.06530, theorem 8)."""
    mu = math.sqrt(releases) / noise

    def excess(value: float) -> float:
        return float(norm.cdf(mu / 2 - value / mu) - math.exp(value) * norm.cdf(-mu / 2 - value / mu) - DELTA)

    return float(brentq(excess, 0, 200))


@pytest.mark.parametrize(("noise", "releases"), [(1.1, 1), (2.0, 10), (5.0, 100), (0.8, 3)])
def test_without_sampling_epsilon_is_above_the_exact_one_and_close(noise: float, releases: int) -> None:
    exact = exact_epsilon(noise, releases)
    counts = (((noise, 1.0), releases),)
    assert exact <= epsilon(counts, DELTA, "prv") <= exact + 0.02
    assert exact <= epsilon(counts, DELTA, "rdp") <= 1.25 * exact


@pytest.mark.parametrize(("noise", "rate"), [(1.0, 0.1), (0.7, 0.3), (2.0, 0.5)])
def test_with_sampling_one_release_is_above_the_integral_of_its_privacy_loss(
    noise: float, rate: float
) -> None:
    """delta(eps) of N(0, z^2) and its mixture with N(1, z^2), integrated in both directions."""
    x = np.linspace(-40 * noise, 1 + 40 * noise, 2_000_001)
    without = norm.pdf(x, 0, noise)
    mixed = (1 - rate) * without + rate * norm.pdf(x, 1, noise)

    def delta(value: float) -> float:
        gaps = [np.maximum(p - math.exp(value) * q, 0) for p, q in ((mixed, without), (without, mixed))]
        return max(float(np.trapezoid(gap, x)) for gap in gaps)

    counts = (((noise, rate), 1),)
    for accountant in ("rdp", "prv"):
        assert delta(epsilon(counts, DELTA, accountant)) <= DELTA * 1.001
    assert delta(epsilon(counts, DELTA, "prv") - 0.05) > DELTA  # no more than the error that it allows


# Abadi et al. 2016 (arXiv 1607.00133), section 5.2, and the three rows of TensorFlow Privacy's tutorial on
# MNIST: 60000 rows in batches of 256.
PUBLISHED = [
    (4.0, 0.01, 10_000, 1.26),
    (1.3, 256 / 60_000, 15 * 60_000 // 256, 1.19),
    (1.1, 256 / 60_000, 60 * 60_000 // 256, 3.01),
    (0.7, 256 / 60_000, 45 * 60_000 // 256, 7.10),
]


@pytest.mark.parametrize(("noise", "rate", "releases", "published"), PUBLISHED)
def test_published_values(noise: float, rate: float, releases: int, published: float) -> None:
    """With the conversion from Renyi divergence that they used; today's is tighter (arXiv 2004.00010)."""
    from opacus.accountants.analysis.rdp import compute_rdp

    orders = np.array(_ORDERS)
    rdp = compute_rdp(q=rate, noise_multiplier=noise, steps=releases, orders=list(orders))
    assert float((rdp + math.log(1 / DELTA) / (orders - 1)).min()) == pytest.approx(published, abs=0.01)
    assert 0.7 * published < epsilon((((noise, rate), releases),), DELTA, "rdp") < published


def test_opacus_called_directly_agrees() -> None:
    from opacus.accountants import RDPAccountant

    accountant = RDPAccountant()
    for _ in range(7):
        accountant.step(noise_multiplier=1.3, sample_rate=0.2)
    spent = budget(0.2, noise_multiplier=1.3)
    for round in range(7):
        spent.spend(round)
    assert spent.epsilon == pytest.approx(accountant.get_epsilon(DELTA), rel=2e-3)  # other orders


@pytest.mark.parametrize(
    ("target", "rate", "rounds", "accountant"),
    [(8.0, 0.1, 50, "rdp"), (0.5, 1.0, 10, "prv"), pytest.param(0.05, 0.5, 3, "rdp", marks=pytest.mark.slow)],
)
def test_a_target_gives_the_least_noise_that_stays_within_it(
    target: float, rate: float, rounds: int, accountant: str
) -> None:
    planned = budget(rate, rounds, target_epsilon=target, accountant=accountant)
    assert 0.97 * target <= planned.epsilon_after(rounds) <= target


def test_the_budget_ends_before_it_would_be_passed_and_a_repeated_round_counts() -> None:
    planned = budget(1.0, 3, target_epsilon=2.0)
    for round in (0, 1, 1):
        assert planned.stop_reason is None
        assert planned.spend(round) <= 2.0
    assert planned.stop_reason is not None
    assert "privacy.target_epsilon = 2" in planned.stop_reason
    with pytest.raises(FederationStoppedError, match="another release would pass"):
        planned.spend(2)
    assert len(planned.ledger.releases) == 3


def test_releases_of_other_noise_count_with_their_own() -> None:
    ledger = MemoryLedger()
    first = budget(0.5, 3, noise_multiplier=1.0)
    first.ledger = ledger
    first.spend(0)
    second = budget(0.5, 3, noise_multiplier=3.0)
    second.ledger = ledger
    both = second.spend(1)
    assert epsilon((((3.0, 0.5), 2),), DELTA, "rdp") < both < epsilon((((1.0, 0.5), 2),), DELTA, "rdp")


def test_an_impossible_target_is_refused() -> None:
    with pytest.raises(ConfigError, match="cannot be reached with any noise"):
        _ = budget(1.0, 10, target_epsilon=1e-9).noise_multiplier


@pytest.mark.slow
def test_importing_opacus_leaves_the_root_logger_alone() -> None:
    """Otherwise every message of a run would be on standard error too."""
    code = (
        "import logging; from fedsmoothlora.federation.accounting import require_opacus; require_opacus(); "
        "root = logging.getLogger(); print(root.handlers, root.level)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == f"[] {logging.WARNING}\n"


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opacus", None)
    with pytest.raises(ConfigError, match=r"pip install 'fedsmoothlora\[privacy\]'"):
        require_opacus()
