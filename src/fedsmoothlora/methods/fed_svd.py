"""FedSVD: only ``B`` is trained, and ``A`` is renewed by an SVD of the product."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from annotated_types import Ge

from fedsmoothlora.algebra.update import Sent, Update
from fedsmoothlora.errors import LostStateError
from fedsmoothlora.methods.base import (
    ClientView,
    Family,
    Method,
    ServerUpdate,
    ServerView,
    Start,
    Traits,
    Upload,
)

if TYPE_CHECKING:
    from fedsmoothlora.algebra.lowrank import LowRank


@dataclass(frozen=True, kw_only=True)
class FedSVD(Method):
    """FedSVD (arXiv 2505.12805): ``B`` trained and averaged exactly, ``A`` renewed by an SVD of ``B A``.

    From the paper: clients train and send ``B`` only. The server averages it, factors the product,
    ``U S V^T = (sum_c p_c B_c) A``, and continues with ``A = V^T``, whose rows are orthonormal, and
    ``B = U S``. The product does not change, so the aggregation is exact.

    Decided here: ``A`` starts at PEFT's random initialisation. The SVD is computed from thin factors,
    ``A^T = Q R`` and ``U S V^T = B R^T``, so the new ``A = V^T Q^T`` has the row space of the old one even
    where ``B`` has a lower rank. The rows of ``A`` turn towards the directions of the update, but they never
    leave the row space of the initial ``A``. In rounds without an SVD only ``B`` is sent down, and clients
    keep ``A``.

    Attributes:
        refactor_every: number of rounds from one SVD to the next.
    """

    refactor_every: Annotated[int, Ge(1)] = 1

    name: ClassVar[str] = "fed_svd"
    family: ClassVar[Family] = "exact"
    traits: ClassVar[Traits] = Traits(
        averages_factors=True,
        uses_mean_only=True,
        sums_tensors=True,
        no_async_reason="each SVD renews A, and a B that was trained with an older A does not belong to it",
        step_on=None,
        no_step_reason="the columns of B belong to other directions after each SVD, so steps do not add up",
        packed_reason="each SVD replaces both factors, so there is no small change of them to send",
    )
    numbers_down: ClassVar[str] = "r*(m + n)"
    limitation: ClassVar[str] = "all updates are in the row space of its random `A`"

    def sends(self, round: int) -> Sent:
        """Only ``B``."""
        return "B"

    def start(self, client: ClientView) -> Start:
        """The server's factors; ``A`` is not trained.

        Raises ``LostStateError`` if the server sent only ``B`` and the client's ``A`` is lost.
        """
        from torch import Tensor

        from fedsmoothlora.algebra.lowrank import LowRank

        lora = {}
        for name in client.layers:
            sent, A = client.server_lora.get(name), client.kept.get(name)
            if sent is None:
                lora[name] = client.initial(name)
            elif isinstance(sent, LowRank):
                lora[name] = sent
            elif isinstance(A, Tensor):
                lora[name] = LowRank(sent, A)
            else:
                raise LostStateError(f"the factor A of layer {name} that the client should have kept is lost")
        return Start(lora=lora, trains=("B",))

    def upload(self, trained: Update, start: Start, client: ClientView) -> Upload:
        """The trained ``B``; the client keeps ``A`` if the server will not renew it."""
        from fedsmoothlora.algebra.averaging import products

        factors = products(trained)
        kept = {} if self._refactors(client.round) else {name: factors[name].A for name in factors}
        return Upload(sent={name: product.B for name, product in factors.items()}, kept=kept)

    def aggregate(
        self, uploads: Sequence[Update], weights: Sequence[float], server: ServerView
    ) -> ServerUpdate:
        """``(sum_c p_c B_c) A``, refactored in the rounds that do so."""
        from fedsmoothlora.algebra.averaging import mean_part
        from fedsmoothlora.algebra.lowrank import LowRank

        B = {name: mean_part(uploads, weights, name) for name in server.layers}
        model = {n: LowRank(B[n], server.model.get(n, server.initial(n)).A) for n in server.layers}
        if not self._refactors(server.round):
            return ServerUpdate(model=model, lora=B)
        return ServerUpdate(model={name: refactored(product) for name, product in model.items()})

    def _refactors(self, round: int) -> bool:
        """Whether the server renews ``A`` at the end of a round."""
        return (round + 1) % self.refactor_every == 0


def refactored(product: LowRank) -> LowRank:
    """``B A = U S V^T`` as ``(U S, V^T)``, with ``V^T`` ``(r, n)`` in the row space of ``A``."""
    import torch

    from fedsmoothlora.algebra.lowrank import LowRank

    Q, R = torch.linalg.qr(product.A.mT)  # A = R^T Q^T, Q (n, r)
    U, sigma, Vt = torch.linalg.svd(product.B @ R.mT, full_matrices=False)  # of (m, r)
    return LowRank((U * sigma).contiguous(), (Vt @ Q.mT).contiguous())
