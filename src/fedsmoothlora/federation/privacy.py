"""Client-level differential privacy by the server: the noised mean of clipped uploads.

DP-FedAvg (arXiv 1710.06963). Two federations are neighbours if one has all clients of the other but one.
Every round releases::

    mean = reference + (1 / (q N)) sum_c clip_C(upload_c - reference) + noise,   noise ~ N(0, (z C / (q N))^2)

``reference`` is the upload of a client that changed nothing (`Method.unchanged`), ``N`` the number of all
clients and ``q`` the probability with which one takes part. The norm that ``clip_C`` limits to ``C`` goes
over all layers and the head together; products count without the scale ``s``. The denominator is fixed:
clients that were not drawn, that failed, or whose upload was refused count as 0. So one client changes the
sum by at most ``C``, and the mean by ``C / (q N)``, which is ``1 / z`` of the noise's standard deviation.

With ``privacy.clip_quantile``, ``C`` follows a quantile of the norms (arXiv 1905.03871; `next_clip_norm`). A
round then makes two releases, which are together as private as one with the multiplier ``z``.

The method receives the noised mean as the only upload. Truncation, coding, error feedback and federated
optimisers see nothing else of the round, so that they are post-processing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fedsmoothlora.algebra.coding import decoded
from fedsmoothlora.algebra.lowrank import LowRank
from fedsmoothlora.federation.accounting import Budget
from fedsmoothlora.federation.aggregation import Combined
from fedsmoothlora.federation.messages import Reply
from fedsmoothlora.federation.noise import Noise
from fedsmoothlora.methods import Layer, Method, ServerView, Update
from fedsmoothlora.modeling.memmap import memmapped_update

# The rate at which ``C`` follows its quantile, as published.
_RATE = 0.2

# The change of one layer by an upload, in float64: a product, a single tensor, or both factors of a LoRA.
_Change = Sequence[LowRank | Tensor]


@dataclass(kw_only=True)
class PrivateMean:
    """The rule that combines a round's replies with client-level privacy, in place of `Aggregation`.

    Attributes:
        method: the federated method.
        clip_norm: ``C``, that of the round to come if it follows a quantile.
        population: ``N``, the number of all clients.
        budget: the noise multiplier ``z`` and the sample rate ``q``, and the ledger of releases.
        noise: draws the noise.
    """

    method: Method
    clip_norm: float
    population: int
    budget: Budget
    noise: Noise = field(default_factory=Noise)

    @property
    def seeded(self) -> bool:
        """Whether the noise can be computed from a seed, so that nothing is private."""
        return self.noise.seed is not None

    @property
    def denominator(self) -> float:
        """``q N``, the expected number of clients in a round."""
        return self.budget.sample_rate * self.population

    @property
    def quantile(self) -> float | None:
        """The quantile of the norms of uploads that ``C`` follows; None if ``C`` is fixed."""
        return self.budget.settings.clip_quantile

    @property
    def quantile_noise(self) -> float:
        """``sigma_b``, the standard deviation of the noise of the number of uploads below ``C``."""
        return self.budget.settings.noise_of_quantile(self.population, self.budget.sample_rate)

    @property
    def mean_multiplier(self) -> float:
        """The noise multiplier of the mean alone: ``z``, or more if a quantile is released beside it."""
        z = self.budget.noise_multiplier
        return z if self.quantile is None else multiplier_beside_a_quantile(z, self.quantile_noise)

    @property
    def std(self) -> float:
        """``z C / (q N)``, the standard deviation of the noise of every released number of the mean."""
        return self.mean_multiplier * self.clip_norm / self.denominator

    @torch.no_grad()
    def combine(self, replies: Sequence[Reply], server: ServerView, head: Mapping[str, Tensor]) -> Combined:
        """The noised mean as a single upload, and the noised head.

        The release is in the ledger before it is computed. Noised layers are in a memory-mapped file: of a
        product, the whole matrix is noised, of which only one is in memory at a time.

        Args:
            replies: the accepted replies, ordered by client; there may be none.
            server: the server's state.
            head: the head that was sent down, if one is shared; otherwise empty.

        Raises ``FederationStoppedError`` if the release would pass ``privacy.target_epsilon``.
        """
        epsilon = self.budget.spend(server.round)
        reference = self.method.unchanged(server)
        norms = [self._norm(reply, reference, head) for reply in replies]
        factors = [min(1.0, self.clip_norm / norm) if norm else 1.0 for norm in norms]
        weighted = [(reply, factor) for reply, factor in zip(replies, factors, strict=True) if factor]
        mean: dict[str, LowRank | Tensor] = {}
        for name, layer in server.layers.items():
            released = self._released(layer, weighted, server.round, reference.get(name))
            if released is not None:
                mean.update(memmapped_update({name: released}))  # type: ignore[arg-type]
        heads = {
            name: self._noised(value.double(), _head_sum(name, value, weighted), server.round, f"head {name}")
            for name, value in head.items()
        }
        metrics = {"epsilon": epsilon, **({"seeded_noise": 1.0} if self.seeded else {})}
        if self.quantile is not None:
            metrics["clip_norm"] = self.clip_norm
            self.clip_norm = self._next_clip_norm(norms, self.quantile, server.round)
        return Combined(
            uploads=[mean],
            weights=[1.0],
            head={name: heads[name].to(value.dtype) for name, value in head.items()},
            metrics=metrics,
        )

    def _next_clip_norm(self, norms: Sequence[float], quantile: float, round: int) -> float:
        """The noised share of uploads below ``C``, and what ``C`` becomes by it."""
        # Without the halves one client would change the sum by 1, and with them by 1/2. Clients that did not
        # take part count as halves.
        excess = sum((norm <= self.clip_norm) - 0.5 for norm in norms)
        noise = float(self.noise.draw((1,), self.quantile_noise, round, "clip quantile"))
        share = 0.5 + (excess + noise) / self.denominator
        return next_clip_norm(self.clip_norm, share, quantile)

    def _norm(self, reply: Reply, reference: Update, head: Mapping[str, Tensor]) -> float:
        """The norm of an upload's change; infinite if a value is not finite."""
        squares = [
            _norm(part) ** 2
            for name, value in decoded(reply.sent).items()
            for part in self._change(value, reference.get(name))
        ]
        squares += [_norm(reply.head[name].double() - value.double()) ** 2 for name, value in head.items()]
        return math.sqrt(math.fsum(squares)) if all(map(math.isfinite, squares)) else math.inf

    def _change(self, value: LowRank | Tensor, reference: LowRank | Tensor | None) -> _Change:
        """The parts of ``value - reference``."""
        if isinstance(value, Tensor):
            assert not isinstance(reference, LowRank)
            return [value.double() if reference is None else value.double() - reference.double()]
        product = value.to(dtype=torch.float64)
        if reference is None:
            return [product.B, product.A] if self._apart else [product]
        assert isinstance(reference, LowRank)
        held = reference.to(dtype=torch.float64)
        return [product.B - held.B, product.A - held.A] if self._apart else [product - held]

    @property
    def _apart(self) -> bool:
        return self.method.traits.averages_factors

    def _released(
        self,
        layer: Layer,
        weighted: Sequence[tuple[Reply, float]],
        round: int,
        reference: LowRank | Tensor | None,
    ) -> LowRank | Tensor | None:
        """The noised mean of one layer; None if nothing of it is uploaded in this round."""
        sent = self.method.sends(round)
        if sent == "nothing":
            return None
        m, n, r = layer.m, layer.n, layer.rank
        shapes = {"B": (m, r), "A": (r, n)}
        parts = ("B", "A") if sent == "product" and self._apart else (sent,)
        sums = [torch.zeros(shapes.get(part, (m, n)), dtype=torch.float64) for part in parts]
        for reply, factor in weighted:
            changes = self._change(decoded(reply.sent)[layer.name], reference)
            for total, change in zip(sums, changes, strict=True):
                _add(total, change, factor)
        noised = [
            self._noised(_held(reference, part), total, round, f"{layer.name} {part}").float()
            for part, total in zip(parts, sums, strict=True)
        ]
        if len(noised) == 2:
            return LowRank(*noised)
        return LowRank.of(noised[0]) if sent == "product" else noised[0]

    def _noised(self, reference: Tensor | float, total: Tensor, round: int, name: str) -> Tensor:
        noise = self.noise.draw(total.shape, self.std, round, name)
        return total / self.denominator + noise + reference


def multiplier_beside_a_quantile(noise_multiplier: float, quantile_noise: float) -> float:
    """``z_delta = (z^-2 - (2 sigma_b)^-2)^(-1/2)`` (arXiv 1905.03871, theorem 1).

    A mean with the noise multiplier ``z_delta``, and a number of clients, each of which counts as one half or
    minus one half, with noise of the standard deviation ``sigma_b``, are together as private as one mean with
    the noise multiplier ``z``.

    Args:
        noise_multiplier: ``z``.
        quantile_noise: ``sigma_b``, above ``z / 2``.
    """
    return float((noise_multiplier**-2 - (2 * quantile_noise) ** -2) ** -0.5)


def next_clip_norm(clip_norm: float, share: float, quantile: float) -> float:
    """``C exp(-0.2 (share - quantile))``: smaller if too many uploads were below ``C``.

    Args:
        clip_norm: ``C`` of the round.
        share: the noised share of uploads with a norm of at most ``C``.
        quantile: the share that is wanted.
    """
    return clip_norm * math.exp(-_RATE * (share - quantile))


def _held(reference: LowRank | Tensor | None, part: str) -> Tensor | float:
    """The reference of one part of a layer, in float64."""
    if isinstance(reference, LowRank):
        whole = reference.dense() if part == "product" else getattr(reference, part)
        return whole.double()
    return 0.0 if reference is None else reference.double()


def _norm(part: LowRank | Tensor) -> float:
    """The Frobenius norm of a product or a tensor; not a number if an entry is not finite."""
    if isinstance(part, Tensor):
        return float(torch.linalg.vector_norm(part))
    return part.norm() if part.is_finite() else math.nan


def _add(total: Tensor, change: LowRank | Tensor, factor: float) -> None:
    if isinstance(change, Tensor):
        total.add_(change, alpha=factor)
    else:
        total.addmm_(change.B, change.A, alpha=factor)


def _head_sum(name: str, held: Tensor, weighted: Sequence[tuple[Reply, float]]) -> Tensor:
    total = torch.zeros(held.shape, dtype=torch.float64)
    for reply, factor in weighted:
        total.add_(reply.head[name].double() - held.double(), alpha=factor)
    return total
