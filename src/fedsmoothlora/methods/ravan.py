"""RAVAN: several heads, each a small matrix between fixed factors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

from annotated_types import Ge

from fedsmoothlora.algebra.update import Coded, Layer, Sent, Update
from fedsmoothlora.errors import ConfigError
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


@dataclass(frozen=True, kw_only=True)
class Ravan(Method):
    """RAVAN (arXiv 2506.05568): heads ``g_i B_i H_i A_i`` of fixed factors, ``g_i H_i`` averaged exactly.

    From the paper: the update is the sum of heads ``g_i B_i H_i A_i``. ``B_i`` and ``A_i`` are fixed and the
    same for all clients. ``H_i`` starts at 0 and ``g_i`` at 1, and both are trained. Clients send the product
    ``g_i H_i``. Because the factors are shared, ``H_i = sum_c p_c g_i^c H_i^c`` with ``g_i = 1`` is the exact
    mean, from which clients continue.

    Decided here: the heads share the columns of one ``B`` and the rows of one ``A``, both orthonormal and
    drawn from the run's seed, so that heads are mutually orthogonal and nothing is sent for them. ``lora.r``
    is the rank of all heads together, ``heads * d``, and an upload has ``heads d^2 = r d`` numbers.

    Attributes:
        heads: number of heads, a divisor of ``lora.r``.
    """

    heads: Annotated[int, Ge(2)] = 2

    name: ClassVar[str] = "ravan"
    family: ClassVar[Family] = "exact"
    traits: ClassVar[Traits] = Traits(
        no_privacy_reason="clipping its matrices, which stand between fixed factors, is not built",
        step_on=None,
        sums_tensors=True,
        asynchronous=True,
        no_step_reason="it averages matrices between fixed factors, on which no server optimiser is defined",
        float32_reason="its matrices have only r*r/heads numbers, so that fewer bits of them save little",
    )
    numbers_up: ClassVar[str] = "r*d"
    numbers_down: ClassVar[str] = "r*d"
    limitation: ClassVar[str] = "all updates are in random directions, `r` on each side"

    def sends(self, round: int) -> Sent:
        """Only the matrices of the heads."""
        return "R"

    def core_shape(self, layer: Layer) -> tuple[int, int]:
        """The heads' ``(d, d)`` matrices below each other."""
        return layer.rank, layer.rank // self.heads

    @property
    def rank_step(self) -> int:
        """The heads share a rank equally."""
        return self.heads

    def check(self, layers: Mapping[str, Layer], *, partial: bool) -> None:
        """Refuse ranks that the heads cannot share equally."""
        for name, layer in layers.items():
            if layer.rank % self.heads:
                raise ConfigError(
                    f"method.heads = {self.heads}: layer {name} has rank {layer.rank}, which is no multiple "
                    "of it; choose another number of heads, lora.r or lora.head_r"
                )

    def start(self, client: ClientView) -> Start:
        """The shared factors with the server's ``H_i``, 0 in round 0."""
        from torch import Tensor

        lora = {name: client.orthonormal(name) for name in client.layers}
        cores = {}
        for name, layer in client.layers.items():
            sent = client.server_lora.get(name)
            cores[name] = sent if isinstance(sent, Tensor) else lora[name].B.new_zeros(self.core_shape(layer))
        return Start(lora=lora, cores=cores, trains=("R",))

    def upload(self, trained: Update, start: Start, client: ClientView) -> Upload:
        """``g_i H_i`` of every head."""
        return Upload(sent=trained)

    def unchanged(self, server: ServerView) -> Update:
        """The heads' ``H_i``, which are 0 before the first aggregation."""
        return server.lora

    def aggregate(
        self, uploads: Sequence[Update], weights: Sequence[float], server: ServerView
    ) -> ServerUpdate:
        """``H_i = sum_c p_c g_i^c H_i^c``; the global model is ``sum_i B_i H_i A_i``."""
        from fedsmoothlora.algebra.averaging import mean_part
        from fedsmoothlora.algebra.lowrank import LowRank, with_core

        cores = {name: mean_part(uploads, weights, name) for name in server.layers}
        model = {}
        for name, core in cores.items():
            fixed = server.orthonormal(name)
            model[name] = LowRank(fixed.B.to(core), with_core(core, fixed.A.to(core)))
        return ServerUpdate(model=model, lora=cores)

    def whole(self, last: ServerUpdate) -> Coded:
        """Every client draws the factors itself, so it needs the ``H_i`` only."""
        return last.lora or {}
