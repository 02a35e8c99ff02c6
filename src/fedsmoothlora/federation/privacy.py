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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain

import torch
from torch import Tensor

from fedsmoothlora.algebra.coding import decoded
from fedsmoothlora.algebra.lowrank import LowRank
from fedsmoothlora.errors import NotFiniteError
from fedsmoothlora.federation.accounting import Budget
from fedsmoothlora.federation.aggregation import Combined
from fedsmoothlora.federation.changes import under_head
from fedsmoothlora.federation.contributions import Contribution
from fedsmoothlora.federation.messages import Reply
from fedsmoothlora.federation.noise import Noise
from fedsmoothlora.methods import Layer, Method, Products, ServerView, Update
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

        def layer_sums(layer: Layer, parts: Sequence[str]) -> list[Tensor]:
            sums = [torch.zeros(_shape(layer, part), dtype=torch.float64) for part in parts]
            for reply, factor in weighted:
                changes = self._change(decoded(reply.sent)[layer.name], reference.get(layer.name))
                for total, change in zip(sums, changes, strict=True):
                    _add(total, change, factor)
            return sums

        released = self._release(
            server, head, reference, layer_sums, lambda name, held: _head_sum(name, held, weighted)
        )
        metrics = self._metrics(epsilon)
        if self.quantile is not None:
            metrics["clip_norm"] = self.clip_norm
            self.clip_norm = self._next_clip_norm(norms, self.quantile, server.round)
        return replace(released, metrics=metrics)

    @torch.no_grad()
    def combine_sum(
        self,
        total: Contribution,
        clients: int,
        server: ServerView,
        head: Mapping[str, Tensor],
    ) -> Combined:
        """As `combine`, of changes that sites have clipped, and of which only the mean is known.

        Args:
            total: the mean of the changes (`clipped_change`), with secure aggregation.
            clients: the number of clients whose changes are in it.
            server: the server's state.
            head: the head that was sent down, if one is shared; otherwise empty.

        Raises ``FederationStoppedError`` if the release would pass ``privacy.target_epsilon``.
        """
        epsilon = self.budget.spend(server.round)

        def summed(name: str) -> Tensor:
            return total.tensors[name].double() * (clients / total.weight)

        def layer_sums(layer: Layer, parts: Sequence[str]) -> list[Tensor]:
            names = [layer.name] if len(parts) == 1 else [f"{layer.name}/{part}" for part in parts]
            return [summed(name) for name in names]

        released = self._release(
            server,
            head,
            self.method.unchanged(server),
            layer_sums,
            lambda name, held: summed(next(iter(under_head({name: held})))),
            1 + total.rounding,  # rounding to integers can lengthen a change
        )
        return replace(released, metrics=self._metrics(epsilon))

    def _metrics(self, epsilon: float) -> dict[str, float]:
        return {"epsilon": epsilon, **({"seeded_noise": 1.0} if self.seeded else {})}

    def _release(
        self,
        server: ServerView,
        head: Mapping[str, Tensor],
        reference: Update,
        layer_sums: Callable[[Layer, Sequence[str]], Sequence[Tensor]],
        head_sum: Callable[[str, Tensor], Tensor],
        widened: float = 1.0,
    ) -> Combined:
        """The noised mean from the sums of the clipped changes, ``widened`` times as much noise as usual."""
        mean: dict[str, LowRank | Tensor] = {}
        for name, layer in server.layers.items():
            released = self._released(layer, layer_sums, server.round, reference.get(name), widened)
            if released is not None:
                mean.update(memmapped_update({name: released}))  # type: ignore[arg-type]
        heads = {
            name: self._noised(value.double(), head_sum(name, value), server.round, f"head {name}", widened)
            for name, value in head.items()
        }
        return Combined(
            uploads=[mean],
            weights=[1.0],
            head={name: heads[name].to(value.dtype) for name, value in head.items()},
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
        layer_sums: Callable[[Layer, Sequence[str]], Sequence[Tensor]],
        round: int,
        reference: LowRank | Tensor | None,
        widened: float,
    ) -> LowRank | Tensor | None:
        """The noised mean of one layer; None if nothing of it is uploaded in this round."""
        sent = self.method.sends(round)
        if sent == "nothing":
            return None
        parts = ("B", "A") if sent == "product" and self._apart else (sent,)
        noised = [
            self._noised(_held(reference, part), total, round, f"{layer.name} {part}", widened).float()
            for part, total in zip(parts, layer_sums(layer, parts), strict=True)
        ]
        if len(noised) == 2:
            return LowRank(*noised)
        return LowRank.of(noised[0]) if sent == "product" else noised[0]

    def _noised(
        self, reference: Tensor | float, total: Tensor, round: int, name: str, widened: float
    ) -> Tensor:
        noise = self.noise.draw(total.shape, widened * self.std, round, name)
        return total / self.denominator + noise + reference


def clipped_change(
    sent: Update,
    head: Mapping[str, Tensor],
    start: Products,
    before: Mapping[str, Tensor],
    part: str,
    clip_norm: float,
) -> tuple[dict[str, LowRank | Tensor], dict[str, Tensor]]:
    """The change of an upload that averages plain tensors, clipped to the norm ``C``, in float64.

    The server cannot clip an upload that it does not see, so with secure aggregation a client does.

    Args:
        sent: the upload: both factors of a LoRA, one of them, or a weight's change, by layer.
        head: the trained head, if one is shared.
        start: the LoRA from which the client began, by layer; empty if it trained without one.
        before: the head from which it began.
        part: the part of the LoRA that is uploaded, as `Method.sends` names it.
        clip_norm: ``C``.

    Raises ``NotFiniteError`` if a number is not finite.
    """
    changes: dict[str, list[Tensor]] = {}
    for name, value in sent.items():
        if isinstance(value, LowRank):
            whole, held = value.to(dtype=torch.float64), start[name].to(dtype=torch.float64)
            changes[name] = [whole.B - held.B.to(whole.B), whole.A - held.A.to(whole.A)]
        else:
            before_it = getattr(start[name], part) if name in start else torch.zeros(())
            changes[name] = [value.double() - before_it.to(value.device).double()]
    heads = {name: value.double() - before[name].to(value.device).double() for name, value in head.items()}
    norm = math.sqrt(math.fsum(_norm(one) ** 2 for one in (*chain(*changes.values()), *heads.values())))
    if not math.isfinite(norm):
        raise NotFiniteError("its upload is not finite")
    factor = min(1.0, clip_norm / norm) if norm else 1.0
    return (
        {
            name: LowRank(some[0] * factor, some[1] * factor) if len(some) == 2 else some[0] * factor
            for name, some in changes.items()
        },
        {name: value * factor for name, value in heads.items()},
    )


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


def _shape(layer: Layer, part: str) -> tuple[int, int]:
    return {"B": (layer.m, layer.rank), "A": (layer.rank, layer.n)}.get(part, (layer.m, layer.n))


def _head_sum(name: str, held: Tensor, weighted: Sequence[tuple[Reply, float]]) -> Tensor:
    total = torch.zeros(held.shape, dtype=torch.float64)
    for reply, factor in weighted:
        total.add_(reply.head[name].double() - held.double(), alpha=factor)
    return total
