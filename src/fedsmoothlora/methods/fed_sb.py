"""Fed-SB: only a small matrix between fixed factors is trained and averaged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from annotated_types import Ge

from fedsmoothlora.algebra.update import Coded, Layer, Sent, Update
from fedsmoothlora.errors import ConfigError, LostStateError
from fedsmoothlora.methods.base import (
    Calibration,
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
class FedSB(Method):
    """Fed-SB (arXiv 2502.15436): only ``R (r, r)`` between fixed factors is trained, and averaged exactly.

    From the paper: the LoRA is ``B R A``. ``B`` and ``A`` are the leading singular vectors of the gradient at
    the pretrained weights, and all clients have the same. Only ``R`` is trained and sent, and because
    ``sum_c p_c B R_c A = B (sum_c p_c R_c) A``, its mean is exact.

    Decided here: round 0 exchanges the gradients and trains nothing, so that a run of ``T`` rounds trains in
    ``T - 1`` of them. In it every client sends ``SVD_r(G_c)`` of its own calibration gradient, ``r (m + n)``
    numbers, and the server takes ``B``, ``A`` from the leading singular vectors of ``sum_c p_c SVD_r(G_c)``;
    directions that no client's gradient has are filled with arbitrary orthonormal ones. With the next message
    ``B`` and ``A`` go down once, ``r (m + n)`` numbers, and clients keep them. ``R`` starts at 0, so that
    training begins at the pretrained weights.

    Attributes:
        calibration_batches: batches of the client's training data for its gradient.
        calibration_batch_size: their size; that of training unless set.
    """

    calibration_batches: Annotated[int, Ge(1)] = 8
    calibration_batch_size: Annotated[int, Ge(1)] | None = None

    name: ClassVar[str] = "fed_sb"
    family: ClassVar[Family] = "exact"
    traits: ClassVar[Traits] = Traits(
        no_privacy_reason="its first round sends gradients, whose release is not clipped and counted",
        no_sum_reason="its first round averages products, whose factors cannot be added up",
        no_async_reason=(
            "its first round gives all clients the same factors, and none can train before it is over"
        ),
        step_on=None,
        no_step_reason="it averages a matrix between fixed factors, on which no server optimiser is defined",
        stable_parameters=True,
        float32_reason="its matrix R has only r*r numbers, so that fewer bits of them save little",
    )
    numbers_down: ClassVar[str] = "r*r"
    limitation: ClassVar[str] = (
        "all updates are in `r` directions of the first gradient; round 0 exchanges `r (m + n)` numbers and "
        "trains nothing"
    )

    @property
    def calibration(self) -> Calibration:
        """The batches of the gradient that round 0 exchanges."""
        return Calibration(batches=self.calibration_batches, batch_size=self.calibration_batch_size)

    def sends(self, round: int) -> Sent:
        """The gradient's product in round 0, then ``R``."""
        return "R" if self.trains_in(round) else "product"

    def trains_in(self, round: int) -> bool:
        """Round 0 exchanges gradients."""
        return round > 0

    def holds_rest(self, accepted: int, round: int) -> bool:
        """A client that has trained keeps ``B`` and ``A``."""
        return self.trains_in(accepted)

    def check(self, layers: Mapping[str, Layer], *, partial: bool) -> None:
        """Refuse ranks above the rank of a layer's gradient."""
        for name, layer in layers.items():
            if layer.rank > layer.gradient_rank:
                raise ConfigError(
                    f"method 'fed_sb' takes r = {layer.rank} directions of the gradient of layer {name}, "
                    f"which has at most {layer.gradient_rank}: lower lora.r, or lora.head_r for the head"
                )

    def start(self, client: ClientView) -> Start:
        """``B``, ``A`` and ``R``; in round 0 the initial LoRA, which is not trained.

        Raises ``LostStateError`` if the server sent only ``R`` and the client's ``B``, ``A`` are lost.
        """
        from torch import Tensor

        from fedsmoothlora.algebra.lowrank import LowRank

        if not self.trains_in(client.round):
            return super().start(client)
        lora, cores = {}, {}
        for name, layer in client.layers.items():
            sent = client.server_lora[name]
            R = client.server_lora.get(core_key(name))
            fixed: LowRank | Tensor | None = sent
            if isinstance(sent, Tensor):
                fixed, R = client.kept.get(name), sent
            if not isinstance(fixed, LowRank):
                raise LostStateError(f"the factors of layer {name} that the client should have kept are lost")
            lora[name] = fixed
            cores[name] = R if isinstance(R, Tensor) else fixed.B.new_zeros(layer.rank, layer.rank)
        return Start(lora=lora, cores=cores, trains=("R",))

    def upload(self, trained: Update, start: Start, client: ClientView) -> Upload:
        """``SVD_r(G_c)`` in round 0, then ``R``; the client keeps ``B`` and ``A``."""
        from fedsmoothlora.algebra.lowrank import LowRank
        from fedsmoothlora.algebra.spectral import leading_singular_triplets

        if self.trains_in(client.round):
            return Upload(sent=trained, kept=start.lora)
        sent = {}
        for name, gradient in client.gradients({}).items():
            P, sigma, Q = leading_singular_triplets(gradient, client.layers[name].rank)
            sent[name] = LowRank((P * sigma).contiguous(), Q.mT.contiguous())
        return Upload(sent=sent)

    def aggregate(
        self, uploads: Sequence[Update], weights: Sequence[float], server: ServerView
    ) -> ServerUpdate:
        """``B`` and ``A`` in round 0, then ``R = sum_c p_c R_c``; the global model is ``B R A``."""
        import torch

        from fedsmoothlora.algebra.averaging import mean_part, products, products_of, truncated_mean
        from fedsmoothlora.algebra.lowrank import LowRank

        if not self.trains_in(server.round):
            means = {
                name: truncated_mean(products_of(uploads, name), weights, layer.rank)
                for name, layer in server.layers.items()
            }
            fixed = {name: orthonormal(mean, server.layers[name].rank) for name, mean in means.items()}
            model = {n: LowRank(torch.zeros_like(product.B), product.A) for n, product in fixed.items()}
            return ServerUpdate(model=model, lora=fixed, memory=fixed)
        fixed = products(server.memory)
        cores = {name: mean_part(uploads, weights, name) for name in server.layers}
        model = {name: LowRank(fixed[name].B, cores[name] @ fixed[name].A) for name in server.layers}
        return ServerUpdate(model=model, lora=cores, memory=fixed)

    def whole(self, last: ServerUpdate) -> Coded:
        """``B``, ``A`` and, once it is trained, ``R``."""
        from torch import Tensor

        cores = {core_key(n): value for n, value in (last.lora or {}).items() if isinstance(value, Tensor)}
        return {**last.memory, **cores}


def core_key(layer: str) -> str:
    """The name of a layer's ``R`` in a message that has ``B`` and ``A`` too."""
    return f"{layer}.lora_R"


def orthonormal(product: LowRank, rank: int) -> LowRank:
    """Orthonormal ``B (m, rank)`` and ``A (rank, n)`` whose leading directions are those of singular factors.

    ``product`` has at most ``rank`` directions; the missing ones are arbitrary.
    """
    import torch

    from fedsmoothlora.algebra.lowrank import LowRank

    def basis(columns: torch.Tensor) -> torch.Tensor:
        missing = columns.new_zeros(len(columns), rank - columns.shape[1])
        return torch.linalg.qr(torch.cat([columns, missing], dim=1)).Q

    return LowRank(basis(product.B), basis(product.A.mT).mT.contiguous())
