"""Weighted means over clients. Sums are in client order, so the order of arrival changes no result."""

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from fedsmoothlora.algebra.lowrank import LowRank
from fedsmoothlora.algebra.update import Balance


def client_weights(counts: Sequence[float]) -> list[float]:
    """Client weights ``p_c = counts_c / sum(counts)`` from numbers of training samples.

    Raises ``ValueError`` if there are no counts, if one is negative or not finite, or if all are 0.
    """
    total = math.fsum(counts)
    if not counts or not math.isfinite(total) or min(counts) < 0 or total == 0:
        raise ValueError(
            f"client weights must be finite, at least 0 and not all 0; got {list(counts)} (samples by client)"
        )
    return [count / total for count in counts]


def mean_tensor(tensors: Sequence[Tensor], counts: Sequence[float]) -> Tensor:
    """``sum_c p_c x_c`` in the given order, accumulated in float32 or better, returned in the tensors' dtype.

    Raises ``ValueError`` as ``client_weights`` does, and if shapes or lengths differ.
    """
    return _mean(tensors, counts).to(tensors[0].dtype)


def _mean(tensors: Sequence[Tensor], counts: Sequence[float]) -> Tensor:
    """The mean in float32 or better; the server decides whether to round it to the uploads' dtype."""
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
    """``B = sum_c p_c B_c`` and ``A = sum_c p_c A_c`` of every layer: separate means of the factors."""
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
    """``DW = sum_c p_c B_c A_c`` of one layer, exactly, as singular factors.

    The factors do not contain a single client's columns, so the mean may be sent to other clients.
    """
    return truncated_mean(products_of(uploads, name), counts, None)


def exact_mean(products: Sequence[LowRank], counts: Sequence[float]) -> LowRank:
    """``sum_c p_c B_c A_c`` exactly.

    The result concatenates the clients' own factors, which must not leave the server (see `mean_product`). If
    the dense matrix is smaller than all factors, the result is the matrix times the identity.

    Raises ``ValueError`` as ``client_weights`` and `LowRank.weighted_sum` do.
    """
    weights = client_weights(counts)
    if not _outgrow(products):
        return LowRank.weighted_sum(products, weights)
    return LowRank.of(_dense_sum(products, weights))


def truncated_mean(
    products: Sequence[LowRank], counts: Sequence[float], rank: int | None, balance: Balance = "sqrt"
) -> LowRank:
    """``SVD_r(sum_c p_c B_c A_c)``; ``rank=None`` keeps all. Raises ``ValueError`` as `exact_mean` does."""
    if _outgrow(products):
        return LowRank.from_dense(_dense_sum(products, client_weights(counts)), rank, balance=balance)
    return LowRank.truncated_sum(products, client_weights(counts), rank, balance)


def _outgrow(products: Sequence[LowRank]) -> bool:
    """Whether all factors have more numbers than the matrix: ``sum of ranks * (m + n) > m n``."""
    m, n = products[0].shape if products else (0, 0)
    return sum(product.rank for product in products) * (m + n) > m * n


def _dense_sum(products: Sequence[LowRank], weights: Sequence[float]) -> Tensor:
    """``sum_i w_i B_i A_i``, ``(m, n)``, added one product at a time.

    Raises ``ValueError`` if shapes differ, or if the numbers of products and weights differ.
    """
    m, n = products[0].shape
    if {product.shape for product in products} != {(m, n)} or len(weights) != len(products):
        return LowRank.weighted_sum(products, weights).dense()  # raises the error
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
    """Weighted mean of one layer's plain tensors: a single factor, or full weight matrices."""
    return _mean(tensors_of(uploads, name), counts)


def products(update: Mapping[str, LowRank | Tensor]) -> dict[str, LowRank]:
    """An update whose values are all products.

    Raises ``TypeError`` with the name of the layer if a value is a plain tensor.
    """
    return {name: products_of([update], name)[0] for name in update}


def tensors_of(uploads: Sequence[Mapping[str, LowRank | Tensor]], name: str) -> list[Tensor]:
    """One layer's plain tensor of every upload.

    Raises ``TypeError`` if an upload has a product for that layer.
    """
    found = [upload[name] for upload in uploads]
    for tensor in found:
        if not isinstance(tensor, Tensor):
            raise TypeError(f"layer {name}: expected a plain tensor; got {type(tensor).__name__}")
    return found  # type: ignore[return-value]


def products_of(uploads: Sequence[Mapping[str, LowRank | Tensor]], name: str) -> list[LowRank]:
    """One layer's product of every upload.

    Raises ``TypeError`` if an upload has a plain tensor for that layer.
    """
    found = [upload[name] for upload in uploads]
    for product in found:
        if not isinstance(product, LowRank):
            raise TypeError(f"layer {name}: expected a low-rank product; got {type(product).__name__}")
    return found  # type: ignore[return-value]
