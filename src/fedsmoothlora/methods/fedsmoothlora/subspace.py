"""Uploads in a subspace that all clients share, in two exchanges a round."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from fedsmoothlora.algebra.update import Balance, Products, Update
from fedsmoothlora.methods.base import ClientView, Method, ServerUpdate, ServerView, Upload

if TYPE_CHECKING:
    from torch import Tensor

    from fedsmoothlora.algebra.lowrank import LowRank


def feedback_key(name: str) -> str:
    """The key of a layer's memory for error feedback, among those that a client keeps."""
    return f"feedback:{name}"


class SharedSubspace(Method):
    """The exchanges of ``exchange = "subspace"``; the server uses sums only.

    All hold the same orthonormal ``Q_t (n, r)`` of each layer. ``M_c`` is the client's update and the memory
    of its error feedback:

    1. first exchange: ``P_c = M_c Q_t`` up, ``P = orth(sum_c p_c P_c)`` down, ``K = (P^T P)^-1``;
    2. second exchange: ``R_c = M_c^T P K`` up, ``R = sum_c p_c R_c`` down, and ``S^t = P R^T`` is merged;
    3. a client keeps ``M_c - P R_c^T``, and ``Q_{t+1} = orth(R)``.

    Source: PowerSGD (arXiv 1905.13727) for the two products.
    """

    balance: Balance
    feedback_rank: int | None

    def first_upload(
        self, changes: Mapping[str, LowRank | Tensor], own: Products, client: ClientView
    ) -> Upload:
        """``P_c = M_c Q_t``; ``M_c``, the change and ``E_c``, is pending, and ``U_c`` is kept for exports.

        Args:
            changes: the client's change of every layer, ``B A + shift``.
            own: ``U_c = SVD_r`` of it.
            client: the client.
        """
        from fedsmoothlora.algebra import subspace
        from fedsmoothlora.algebra.sums import plus

        pending = {name: plus(changes[name], client.kept.get(feedback_key(name))) for name in client.layers}
        return Upload(
            sent={name: subspace.projected(change, client.basis[name]) for name, change in pending.items()},
            kept=own,
            pending=pending,
        )

    def second_upload(self, left: Mapping[str, Tensor], pending: Update, limit: float = math.inf) -> Upload:
        """``R_c = M_c^T P K``; ``E_c = M_c - P R_c^T`` is kept, at ``feedback_rank`` if that is set.

        In ``E_c``, numbers of ``R_c`` are cut to ``limit``, as they arrive.
        """
        from fedsmoothlora.algebra import alignment, subspace, sums

        sent: dict[str, Tensor] = {}
        kept: dict[str, LowRank | Tensor] = {}
        lost = total = 0.0
        for name, change in pending.items():
            sent[name] = subspace.coordinates(change, left[name])
            arriving = sent[name].clamp(-limit, limit)
            rest = sums.remainder(change, subspace.product(left[name], arriving))
            kept[feedback_key(name)] = rest
            if self.feedback_rank is not None:
                kept[feedback_key(name)] = cut = alignment.truncated(rest, self.feedback_rank)
                total += (size := alignment.squared_norm(rest))
                lost += max(size - alignment.squared_norm(cut), 0.0)
        metrics = {"feedback_cut": (lost / total) ** 0.5} if total else {}
        return Upload(sent=sent, kept=kept, metrics=metrics)

    def left_factors(self, means: Mapping[str, Tensor], server: ServerView) -> Mapping[str, Tensor]:
        """``P = orth(sum_c p_c P_c)``."""
        from fedsmoothlora.algebra import subspace

        return {
            name: subspace.orthonormal(means[name], server.generator(name, "left")) for name in server.layers
        }

    def aggregate_means(
        self, left: Mapping[str, Tensor], means: Mapping[str, Tensor], server: ServerView
    ) -> ServerUpdate:
        """``S^t = P (sum_c p_c R_c)^T``; the server remembers ``Q_{t+1} = orth(sum_c p_c R_c)``."""
        from fedsmoothlora.algebra import subspace

        return ServerUpdate(
            merge={name: subspace.product(left[name], means[name]) for name in server.layers},
            memory={
                name: subspace.orthonormal(means[name], server.generator(name, "basis"))
                for name in server.layers
            },
        )

    def basis(self, memory: Update, right: Products) -> Mapping[str, Tensor]:
        """``Q_t`` of the layers in which clients' own computation could differ, or that they cannot do."""
        from torch import Tensor

        from fedsmoothlora.algebra import subspace

        return {
            name: value
            for name, value in memory.items()
            if isinstance(value, Tensor)
            and not (name in right and subspace.is_reproducible(right[name].A.mT))
        }

    def computed_basis(self, name: str, last: LowRank) -> Tensor:
        """``Q_t = orth(R_{t-1})`` of a layer whose ``R_{t-1}`` has independent columns."""
        from fedsmoothlora.algebra import subspace
        from fedsmoothlora.algebra.seeds import generator_for

        return subspace.orthonormal(last.A.mT, generator_for("no column is replaced", name))
