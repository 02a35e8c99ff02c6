"""Weighted means over clients, always summed in client order so that arrival order changes nothing."""

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from fedsmoothlora.algebra.lowrank import LowRank
from fedsmoothlora.algebra.update import Balance


def client_weights(counts: Sequence[float]) -> list[float]:
    """Client weights ``p_c = counts_c / sum(counts)``; ``counts`` are training samples.

    Raises ``ValueError`` if there are none, one is negative or not finite, or all are 0.
    """
    total = math.fsum(counts)
    if not counts or not math.isfinite(total) or min(counts) < 0 or total == 0:
        raise ValueError(
            f"client weights must be finite, at least 0 and not all 0; got {list(counts)} (samples a client)"
        )
    return [count / total for count in counts]


def mean_tensor(tensors: Sequence[Tensor], counts: Sequence[float]) -> Tensor:
    """``sum_c p_c x_c`` in the given order, accumulated in float32 or better, in the tensors' dtype.

    Raises ``ValueError`` as ``client_weights``, and if shapes or numbers differ.
    """
    return _mean(tensors, counts).to(tensors[0].dtype)


def _mean(tensors: Sequence[Tensor], counts: Sequence[float]) -> Tensor:
    """The mean in float32 or better: of factors that came coded, rounding is for the server to decide."""
    weights = client_weights(counts)
    if len(tensors) != len(weights) or len({tensor.shape for tensor in tensors}) != 1:
        raise ValueError(
            f"cannot average tensors of shapes {[tuple(t.shape) for t in tensors]} "
            f"with {len(weights)} weights"
        )
    total = torch.zeros_like(tensors[0], dtype=torch.promote_types(tensors[0].dtype, torch.float32))
    for tensor, weight in zip(tensors, weights, strict=True):
        total.add_(tensor, alpha=weight)
    return total


def mean_factors(
    uploads: Sequence[Mapping[str, LowRank | Tensor]], counts: Sequence[float], names: Iterable[str]
) -> dict[str, LowRank]:
    """``B = sum_c p_c B_c`` and ``A = sum_c p_c A_c`` of every layer: factors averaged apart."""
    means = {}
    for name in names:
        found = products_of(uploads, name)
        means[name] = LowRank(
            _mean([product.B for product in found], counts),
            _mean([product.A for product in found], counts),
        )
    return means


def mean_product(
    uploads: Sequence[Mapping[str, LowRank | Tensor]], counts: Sequence[float], name: str
) -> LowRank:
    """``DW = sum_c p_c B_c A_c`` of one layer, exactly, as singular factors or dense.

    No column of the factors is one client's own, so the mean may be sent to other clients.
    """
    return truncated_mean(products_of(uploads, name), counts, None)


def exact_mean(products: Sequence[LowRank], counts: Sequence[float]) -> LowRank:
    """``sum_c p_c B_c A_c`` exactly: ranks add up, until the matrix is smaller than all the factors.

    In that case the result is the matrix as a product with the identity. Otherwise it is the clients' own
    factors side by side, which must not leave the server: see `mean_product`.

    Raises ``ValueError`` as ``client_weights`` and `LowRank.weighted_sum`.
    """
    weights = client_weights(counts)
    if not _outgrow(products):
        return LowRank.weighted_sum(products, weights)
    return LowRank.of(_dense_sum(products, weights))


def truncated_mean(
    products: Sequence[LowRank], counts: Sequence[float], rank: int | None, balance: Balance = "sqrt"
) -> LowRank:
    """``SVD_r(sum_c p_c B_c A_c)``; ``rank=None`` never truncates. Raises ``ValueError`` as `exact_mean`."""
    if _outgrow(products):
        return LowRank.from_dense(_dense_sum(products, client_weights(counts)), rank, balance=balance)
    return LowRank.truncated_sum(products, client_weights(counts), rank, balance)


def _outgrow(products: Sequence[LowRank]) -> bool:
    """Whether factors side by side are more numbers than the matrix: ``sum of ranks * (m + n) > m n``."""
    m, n = products[0].shape if products else (0, 0)
    return sum(product.rank for product in products) * (m + n) > m * n


def _dense_sum(products: Sequence[LowRank], weights: Sequence[float]) -> Tensor:
    """``sum_i w_i B_i A_i``, ``(m, n)``, to which one product after the other is added.

    Raises ``ValueError`` where shapes differ, or there is not one weight a product.
    """
    m, n = products[0].shape
    if {product.shape for product in products} != {(m, n)} or len(weights) != len(products):
        return LowRank.weighted_sum(products, weights).dense()  # says what does not fit
    dtype = torch.float32
    for product in products:
        dtype = torch.promote_types(dtype, product.dtype)
    total = torch.zeros(m, n, dtype=dtype, device=products[0].device)
    for product, weight in zip(products, weights, strict=True):
        total.addmm_(product.B.to(total), product.A.to(total), alpha=weight)
    return total


def mean_part(
    uploads: Sequence[Mapping[str, LowRank | Tensor]], counts: Sequence[float], name: str
) -> Tensor:
    """Weighted mean of one layer's plain tensors: a single factor, or whole weights."""
    return _mean(tensors_of(uploads, name), counts)


def products(update: Mapping[str, LowRank | Tensor]) -> dict[str, LowRank]:
    """An update all of whose values are products.

    Raises ``TypeError`` that names the layer where one is a plain tensor.
    """
    return {name: products_of([update], name)[0] for name in update}


def tensors_of(uploads: Sequence[Mapping[str, LowRank | Tensor]], name: str) -> list[Tensor]:
    """One layer's plain tensor of every upload.

    Raises ``TypeError`` where an upload holds a product for that layer.
    """
    found = [upload[name] for upload in uploads]
    for tensor in found:
        if not isinstance(tensor, Tensor):
            raise TypeError(f"layer {name}: expected a plain tensor; got {type(tensor).__name__}")
    return found  # type: ignore[return-value]


def products_of(uploads: Sequence[Mapping[str, LowRank | Tensor]], name: str) -> list[LowRank]:
    """One layer's product of every upload.

    Raises ``TypeError`` where an upload holds a plain tensor for that layer.
    """
    found = [upload[name] for upload in uploads]
    for product in found:
        if not isinstance(product, LowRank):
            raise TypeError(f"layer {name}: expected a low-rank product; got {type(product).__name__}")
    return found  # type: ignore[return-value]
