"""Combine the accepted replies of a round: client weights, and robust means (`server.aggregation`)."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from torch import Tensor

from fedsmoothlora.algebra.averaging import mean_tensor
from fedsmoothlora.algebra.coding import decoded
from fedsmoothlora.algebra.lowrank import LowRank
from fedsmoothlora.algebra.robust import (
    capped_weights,
    geometric_median,
    gram,
    median,
    multi_krum,
    trimmed_mean,
)
from fedsmoothlora.federation.messages import Reply
from fedsmoothlora.federation.settings import ServerSettings
from fedsmoothlora.methods import Layer, Update


@dataclass(frozen=True, kw_only=True)
class Combined:
    """The uploads of a round, ready for the method's average.

    Attributes:
        uploads: the clients' uploads; a single one if they were combined by coordinate.
        weights: the clients' weights, to which ``p_c`` is proportional.
        head: the mean head; empty if no head is shared.
        metrics: metrics of the weights, by name.
    """

    uploads: Sequence[Update]
    weights: Sequence[float]
    head: Mapping[str, Tensor]
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Aggregation:
    """The rule by which a round's replies are combined.

    Attributes:
        settings: ``[server]``.
        max_weight: ``uploads.max_weight``.
        factors_apart: the method averages the factors ``B`` and ``A`` separately.
    """

    settings: ServerSettings = field(default_factory=ServerSettings)
    max_weight: float | None = None
    factors_apart: bool = False

    def combine(
        self, replies: Sequence[Reply], layers: Mapping[str, Layer], head: Mapping[str, Tensor]
    ) -> Combined:
        """The uploads with their weights, and the mean head.

        Args:
            replies: the accepted replies, ordered by client; at least one.
            layers: the adapted layers.
            head: the head that was sent down, if one is shared; otherwise empty.
        """
        if self.settings.aggregation in ("trimmed_mean", "median"):
            return self._by_coordinate(replies, head)
        weights = self._weights(replies, layers, head)
        means = {name: mean_tensor([reply.head[name] for reply in replies], weights) for name in head}
        metrics = {} if self.settings.aggregation == "mean" else {"largest_weight": max(weights)}
        return Combined(
            uploads=[decoded(reply.sent) for reply in replies], weights=weights, head=means, metrics=metrics
        )

    def _weights(
        self, replies: Sequence[Reply], layers: Mapping[str, Layer], head: Mapping[str, Tensor]
    ) -> Sequence[float]:
        counts: Sequence[float] = [reply.samples for reply in replies]
        if self.max_weight is not None and len(counts) > 2:
            counts = capped_weights(counts, self.max_weight)
        if self.settings.aggregation == "mean" or len(replies) == 1:
            return counts
        products = gram(
            [_vector(reply, head) for reply in replies],
            {} if self.factors_apart else {name: layer.scale for name, layer in layers.items()},
        )
        if self.settings.aggregation == "geometric_median":
            return geometric_median(products, counts)
        return multi_krum(products, self.settings.byzantine or 0)

    def _by_coordinate(self, replies: Sequence[Reply], head: Mapping[str, Tensor]) -> Combined:
        """Combine all uploads into one: the robust mean of every coordinate, one layer at a time."""
        byzantine = self.settings.byzantine or 0
        mean: Callable[[Sequence[Tensor]], Tensor] = (
            median if self.settings.aggregation == "median" else partial(trimmed_mean, byzantine=byzantine)
        )
        uploads = [decoded(reply.sent) for reply in replies]
        combined = {name: self._mean_value([upload[name] for upload in uploads], mean) for name in uploads[0]}
        heads = {
            name: mean([reply.head[name] for reply in replies]).to(value.dtype)
            for name, value in head.items()
        }
        return Combined(uploads=[combined], weights=[1.0], head=heads)

    def _mean_value(
        self, values: Sequence[LowRank | Tensor], mean: Callable[[Sequence[Tensor]], Tensor]
    ) -> LowRank | Tensor:
        products = [value for value in values if isinstance(value, LowRank)]
        if not products:
            tensors = [value for value in values if isinstance(value, Tensor)]
            return mean(tensors).float()
        if self.factors_apart:
            return LowRank(
                mean([product.B for product in products]).float(),
                mean([product.A for product in products]).float(),
            )
        return LowRank.of(mean([product.dense() for product in products]).float())


def _vector(reply: Reply, head: Mapping[str, Tensor]) -> Update:
    """The upload together with the change of the head: everything that changes the global model.

    A packed layer is decoded when it is read, so that few are in memory at once.
    """
    moved = {f"head {name}": reply.head[name].double() - sent.double() for name, sent in head.items()}
    return ChainMap(moved, decoded(reply.sent))  # type: ignore[arg-type]  # it is only read
