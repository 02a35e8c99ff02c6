"""The privacy that releases have spent, by Opacus' accountants.

With ``privacy.unit = "client"`` a release is one noised mean of the server. With ``"sample"`` it is what a
client learns in one round: so many steps of DP-SGD. Each release is recorded before it is computed, so that
none is ever uncounted. A round that is run again is a further release.
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any, Protocol

from fedsmoothlora.errors import ConfigError, FederationStoppedError
from fedsmoothlora.federation.settings import PrivacySettings
from fedsmoothlora.training.opacus_import import opacus_module

# The orders of Renyi differential privacy. Beside those of Opacus there are larger ones for small epsilons;
# below 11 there are fewer, since those near 1 take most of the time.
_ORDERS = [1 + x / 4 for x in range(1, 40)] + list(range(11, 64)) + [80, 96, 128, 192, 256, 384, 512]
_TOLERANCE = 0.01  # how far epsilon may be below the target; of targets below 1 that share


@dataclass(frozen=True, kw_only=True)
class Release:
    """A noised mean that left the server, or DP-SGD at a client, or one that was about to begin.

    Attributes:
        round: ``t``, counted from 0.
        noise_multiplier: ``z``.
        sample_rate: ``q``, the probability with which a client took part, or a row was in a batch.
        epsilon: the epsilon of this release and all before it.
        steps: the number of times that noise was added.
    """

    round: int
    noise_multiplier: float
    sample_rate: float
    epsilon: float
    steps: int = 1


class Ledger(Protocol):
    """Storage of the releases of a run, or of a client in a run."""

    @property
    def releases(self) -> Sequence[Release]:
        """All releases so far, in order."""
        ...

    def record(self, release: Release) -> None:
        """Store one more release; it is kept, whatever happens next, when this returns."""
        ...


class MemoryLedger:
    """Releases in memory, for runs that are never resumed."""

    def __init__(self) -> None:
        self._releases: list[Release] = []

    @property
    def releases(self) -> Sequence[Release]:
        """All releases so far, in order."""
        return tuple(self._releases)

    def record(self, release: Release) -> None:
        """Store one more release."""
        self._releases.append(release)


@dataclass(kw_only=True)
class Budget:
    """The privacy of a run or a client: how much noise releases get, and what all of them have spent.

    Attributes:
        settings: ``[privacy]``.
        sample_rate: ``q``.
        rounds: ``T``, for which ``target_epsilon`` is computed.
        steps: the number of times that a release adds noise; more than one with ``unit = "sample"``.
        ledger: the releases so far.
    """

    settings: PrivacySettings
    sample_rate: float
    rounds: int
    steps: int = 1
    ledger: Ledger = field(default_factory=MemoryLedger)

    @cached_property
    def noise_multiplier(self) -> float:
        """``z``: as set, or the smallest for which ``rounds`` releases stay within ``target_epsilon``."""
        settings = self.settings
        if settings.noise_multiplier is not None:
            return float(settings.noise_multiplier)
        assert settings.target_epsilon is not None  # checked with the configuration
        return least_noise(
            settings.target_epsilon,
            self._delta,
            self.sample_rate,
            self.rounds * self.steps,
            settings.accountant,
        )

    @property
    def epsilon(self) -> float:
        """The epsilon of all releases so far."""
        releases = self.ledger.releases
        return releases[-1].epsilon if releases else 0.0

    def epsilon_after(self, releases: int) -> float:
        """Epsilon if this many more releases are made."""
        counts: Counter[tuple[float, float]] = Counter()
        for one in self.ledger.releases:
            counts[one.noise_multiplier, one.sample_rate] += one.steps
        counts[self.noise_multiplier, self.sample_rate] += releases * self.steps
        return epsilon(tuple(counts.items()), self._delta, self.settings.accountant)

    def spend(self, round: int) -> float:
        """Record the release of a round, and return epsilon with it.

        Raises ``FederationStoppedError`` if it would pass ``target_epsilon``; then nothing is recorded.
        """
        if reason := self.stop_reason:
            raise FederationStoppedError(f"round {round + 1}: {reason}")
        after = self.epsilon_after(1)
        self.ledger.record(
            Release(
                round=round,
                noise_multiplier=self.noise_multiplier,
                sample_rate=self.sample_rate,
                epsilon=after,
                steps=self.steps,
            )
        )
        return after

    @property
    def stop_reason(self) -> str | None:
        """Why no release may follow; None if one more stays within ``target_epsilon``."""
        target = self.settings.target_epsilon
        if target is None or (after := self.epsilon_after(1)) <= target:
            return None
        return (
            f"another release would pass privacy.target_epsilon = {target:g}: epsilon would be {after:.4g}; "
            f"{len(self.ledger.releases)} releases have spent {self.epsilon:.4g}"
        )

    @property
    def _delta(self) -> float:
        assert self.settings.delta is not None  # checked with the configuration
        return self.settings.delta


@lru_cache(maxsize=256)
def epsilon(releases: Sequence[tuple[tuple[float, float], int]], delta: float, accountant: str) -> float:
    """Epsilon of Poisson-sampled Gaussian releases, for neighbours that differ in one client or one row.

    Args:
        releases: pairs of noise multiplier and sample rate, each with the number of times of adding noise.
        delta: delta.
        accountant: ``rdp`` (arXiv 1908.10530) or ``prv`` (arXiv 2106.02848).
    """
    history = [(noise, rate, count) for (noise, rate), count in releases if count]
    if not history:
        return 0.0
    counted = opacus_module("accountants").create_accountant(mechanism=accountant)
    counted.history = history
    with warnings.catch_warnings():
        # At the edge of the orders the bound is valid, but not the smallest.
        warnings.simplefilter("ignore")
        found = float(counted.get_epsilon(delta, **_options(accountant)))
    return found if math.isfinite(found) else math.inf


@lru_cache(maxsize=256)
def least_noise(target: float, delta: float, sample_rate: float, releases: int, accountant: str) -> float:
    """The noise multiplier with which so many releases have an epsilon just below ``target``.

    Raises ``ConfigError`` if no noise is enough.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return float(
                opacus_module("accountants.utils").get_noise_multiplier(
                    target_epsilon=target,
                    target_delta=delta,
                    sample_rate=sample_rate,
                    steps=releases,
                    accountant=accountant,
                    epsilon_tolerance=_TOLERANCE * min(1.0, target),
                    **_options(accountant),
                )
            )
    except ValueError as error:
        raise ConfigError(
            f"privacy.target_epsilon = {target:g} cannot be reached with any noise: {error}"
        ) from None


def require_opacus() -> None:
    """Raise ``ConfigError`` if Opacus is not installed."""
    opacus_module("accountants")


def _options(accountant: str) -> dict[str, Any]:
    return {"alphas": _ORDERS} if accountant == "rdp" else {}
