"""Products ``B @ A`` of thin factors and their algebra, without forming the dense matrix.

The quantities of one layer in federated LoRA are such products: a client's upload, the server's update, the
Round-Matching and Gradient-Aligned matrices.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedsmoothlora.algebra.finite import all_finite
from fedsmoothlora.algebra.stacks import in_stacks, stacks_on
from fedsmoothlora.algebra.update import Balance
from fedsmoothlora.errors import NotFiniteError


@dataclass(frozen=True, slots=True, eq=False)
class LowRank:
    """The matrix ``B @ A``, shape ``(m, n)``, stored as its factors.

    Sums are exact: they concatenate factors, so ranks add up. ``truncate`` compresses. Results are computed
    in float32 or better, whatever the factors' dtype.

    Args:
        B: left factor, ``(m, r)``; LoRA's ``lora_B``.
        A: right factor, ``(r, n)``; LoRA's ``lora_A``.

    Raises:
        ValueError: the factors are not matrices with the same inner size, or differ in dtype or device.
    """

    B: Tensor
    A: Tensor

    def __post_init__(self) -> None:
        B, A = self.B, self.A
        if B.ndim != 2 or A.ndim != 2 or B.shape[1] != A.shape[0]:
            raise ValueError(
                f"LowRank needs B (m, r) and A (r, n); got B {tuple(B.shape)} and A {tuple(A.shape)}"
            )
        if B.dtype != A.dtype or B.device != A.device:
            raise ValueError(
                f"LowRank needs factors of one dtype on one device; got B {B.dtype} on {B.device} "
                f"and A {A.dtype} on {A.device}"
            )

    @classmethod
    def zeros(cls, m: int, n: int, *, dtype: torch.dtype = torch.float32, device: str = "cpu") -> LowRank:
        """The zero matrix ``(m, n)``, as a product of rank 0."""
        return cls(
            torch.zeros(m, 0, dtype=dtype, device=device), torch.zeros(0, n, dtype=dtype, device=device)
        )

    @classmethod
    def from_dense(cls, matrix: Tensor, rank: int | None = None, *, balance: Balance = "sqrt") -> LowRank:
        """The best rank-``rank`` approximation of a dense ``(m, n)`` matrix (Eckart-Young), by its SVD.

        ``rank=None`` keeps every direction. Raises ``NotFiniteError`` if the matrix is not finite.
        """
        P, sigma, Qt = _svd(_working(matrix))
        return _from_svd(P, sigma, Qt, rank, balance)

    @staticmethod
    def of(update: LowRank | Tensor) -> LowRank:
        """A product unchanged, or a dense ``(m, n)`` matrix as its exact product with the identity."""
        if isinstance(update, LowRank):
            return update
        m, n = update.shape
        identity = torch.eye(min(m, n), dtype=update.dtype, device=update.device)
        return LowRank(identity, update) if m < n else LowRank(update, identity)

    @staticmethod
    def weighted_sum(products: Sequence[LowRank], weights: Iterable[float]) -> LowRank:
        """``sum_i w_i B_i A_i`` exactly: ``B = [w_i B_i]``, ``A = [A_i]`` stacked; the ranks add up.

        Raises ``ValueError`` if there are no products, or if lengths or shapes differ.
        """
        weights = list(weights)
        if not products or len(products) != len(weights):
            raise ValueError(
                f"a weighted sum needs as many weights as products and at least one; "
                f"got {len(products)} products and {len(weights)} weights"
            )
        shapes = {product.shape for product in products}
        if len(shapes) > 1:
            raise ValueError(f"cannot add products of different shapes: {sorted(shapes)}")
        if len(products) == 1 and weights[0] == 1.0:
            return products[0]
        B = torch.cat([_working(p.B) for p in products], dim=1)  # (m, sum r), a copy
        for block, weight in zip(B.split([p.rank for p in products], dim=1), weights, strict=True):
            if weight != 1.0:
                block.mul_(weight)
        A = torch.cat([_working(p.A) for p in products], dim=0)  # (sum r, n)
        dtype = torch.promote_types(B.dtype, A.dtype)
        return LowRank(B.to(dtype), A.to(dtype))

    @property
    def shape(self) -> tuple[int, int]:
        """``(m, n)`` of the product."""
        return self.B.shape[0], self.A.shape[1]

    @property
    def rank(self) -> int:
        """Number of columns of ``B``, an upper bound of the product's rank."""
        return self.B.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """The factors' dtype."""
        return self.B.dtype

    @property
    def device(self) -> torch.device:
        """The factors' device."""
        return self.B.device

    @property
    def nbytes(self) -> int:
        """Bytes of both factors: ``r (m + n)`` numbers."""
        return self.B.nbytes + self.A.nbytes

    def __add__(self, other: LowRank) -> LowRank:
        return LowRank.weighted_sum([self, other], [1.0, 1.0])

    def __sub__(self, other: LowRank) -> LowRank:
        return LowRank.weighted_sum([self, other], [1.0, -1.0])

    def __mul__(self, scale: float) -> LowRank:
        return LowRank(_working(self.B) * scale, _working(self.A))

    __rmul__ = __mul__

    def __neg__(self) -> LowRank:
        return LowRank(-self.B, self.A)

    def dense(self) -> Tensor:
        """The matrix ``B @ A`` itself, ``(m, n)``, float32 or better."""
        return _working(self.B) @ _working(self.A)

    def truncate(
        self, rank: int | None = None, balance: Balance = "sqrt", *, tolerance: float = 0.0
    ) -> LowRank:
        """``SVD_r``: the best approximation of rank ``rank`` (Eckart-Young), as singular factors.

        Computed by thin QR of ``B = Q_L R_L`` and ``A^T = Q_R R_R`` and the SVD of the small core
        ``R_L R_R^T``, at a cost of ``O((m + n) q^2 + q^3)`` for ``q`` columns. If ``q >= min(m, n)``, the
        dense matrix is smaller, and its SVD is computed instead.

        Args:
            rank: number of directions to keep. ``None`` keeps all: the product stays the same, and its
                factors become singular factors (at most ``min(q, m, n)`` directions).
            balance: ``"sqrt"`` gives ``P sqrt(sigma)`` and ``sqrt(sigma) Q^T``; ``"left"`` gives
                ``P sigma`` and ``Q^T``. The product is the same.
            tolerance: directions with ``sigma_i <= tolerance * sigma_1`` are dropped too.

        Raises:
            ValueError: ``rank`` is negative, or ``balance`` is unknown.
            NotFiniteError: the product is not finite.
        """
        return LowRank.truncated_sum([self], [1.0], rank, balance, tolerance=tolerance)

    @staticmethod
    def truncated_sum(
        products: Sequence[LowRank],
        weights: Iterable[float],
        rank: int | None = None,
        balance: Balance = "sqrt",
        *,
        tolerance: float = 0.0,
    ) -> LowRank:
        """``SVD_r(sum_i w_i B_i A_i)``: `weighted_sum`, then `truncate`, with only one copy of the factors.

        The factors are copied into one matrix, on which QR works in place. Beside arguments and result, this
        needs memory for ``q (m + n)`` numbers and for the columns that are kept.

        Raises:
            ValueError, NotFiniteError: as in `weighted_sum` and `truncate`.
        """
        return LowRank.truncated_sum_with_error(products, weights, rank, balance, tolerance=tolerance)[0]

    @staticmethod
    def truncated_sum_with_error(
        products: Sequence[LowRank],
        weights: Iterable[float],
        rank: int | None = None,
        balance: Balance = "sqrt",
        *,
        tolerance: float = 0.0,
    ) -> tuple[LowRank, float]:
        """`truncated_sum`, and the squared norm of what it drops, ``sum_{i > rank} sigma_i^2``."""
        weights = list(weights)
        q = sum(product.rank for product in products)
        alike = len({product.shape for product in products}) == 1 and len(weights) == len(products)
        if not alike or q >= min(products[0].shape):
            total = LowRank.weighted_sum(products, weights)  # raises the error if they cannot be added
            P, sigma, Qt = _svd(total.dense())
            found = _cut(_from_svd(P, sigma, Qt, rank, balance), tolerance, balance)
            return found, float(sigma[found.rank :].double().square().sum())
        left = _reflectors([product.B.mT for product in products], weights)  # of (m, q)
        right = _reflectors([product.A for product in products], [1.0] * len(products))  # of (n, q)
        dtype = torch.promote_types(left[0].dtype, right[0].dtype)
        core = left[0][:q].triu() @ right[0][:q].triu().mT  # (q, q)
        if not all_finite(core):
            raise NotFiniteError("cannot truncate a product that is not finite (NaN, infinity or overflow)")
        # The small factors are truncated before they are multiplied by Q, which saves the dropped columns.
        P, sigma, Qt = torch.linalg.svd(core)
        small = _cut(_from_svd(P, sigma, Qt, rank, balance), tolerance, balance)
        B = _times(left, small.B)  # (m, rank)
        del left
        A = _times(right, small.A.mT).mT  # (rank, n)
        found = LowRank(B.to(dtype).contiguous(), A.to(dtype).contiguous())
        return found, float(sigma[found.rank :].double().square().sum())

    @staticmethod
    def truncated_sums(
        sums: Sequence[Sequence[LowRank]],
        ranks: Sequence[int | None],
        balance: Balance = "sqrt",
        *,
        tolerance: float = 0.0,
    ) -> list[tuple[LowRank, float]]:
        """`truncated_sum_with_error` of many unweighted sums, each with its own rank.

        On devices that stack (`stacks`), sums of the same shape, rank and number of columns are decomposed
        together, with equal results up to rounding. On other devices each is computed by itself.

        Raises:
            ValueError, NotFiniteError: as in `truncated_sum`.
        """

        def alone(one: tuple[Sequence[LowRank], int | None]) -> tuple[LowRank, float]:
            products, rank = one
            return LowRank.truncated_sum_with_error(
                products, [1.0] * len(products), rank, balance, tolerance=tolerance
            )

        def alike(one: tuple[Sequence[LowRank], int | None]) -> tuple[object, ...]:
            products, rank = one
            q = sum(product.rank for product in products)
            return products[0].shape, q, rank, products[0].device, *(p.dtype for p in products)

        def together(items: Sequence[tuple[Sequence[LowRank], int | None]]) -> list[tuple[LowRank, float]]:
            products, rank = items[0]
            q, (m, n) = sum(product.rank for product in products), products[0].shape
            if not stacks_on(products[0].device) or not 0 < q < min(m, n) or rank == 0:
                return [alone(one) for one in items]
            return _stacked_sums([products for products, _ in items], rank, balance, tolerance)

        items = list(zip(sums, ranks, strict=True))
        return in_stacks(items, alike, lambda one: sum(p.B.numel() + p.A.numel() for p in one[0]), together)

    def norm(self) -> float:
        """Frobenius norm ``||B A||_F = ||R_L R_R^T||_F``, by thin QR of both factors.

        Gram matrices are faster, but lose half the digits for a difference of nearly equal products. They
        are used for float64 factors whose directions do not cancel, where they keep 12 digits or more, and on
        devices where QR is slow (`stacks`) for all factors, in float64.
        """
        if self.rank == 0:
            return 0.0
        if self.dtype == torch.float64 or stacks_on(self.device):
            B, A = self.B.double(), self.A.double()
            left, right = B.mT @ B, A @ A.mT  # (r, r)
            square = float((left * right).sum())
            size = float((left.diagonal() * right.diagonal()).sqrt().sum())  # sum_i ||b_i|| ||a_i||
            if square > 1e-4 * size**2:
                return math.sqrt(square)
        if self.rank >= min(self.shape):
            return float(torch.linalg.matrix_norm(self.dense()))
        R_left = torch.linalg.qr(_working(self.B), mode="r").R
        R_right = torch.linalg.qr(_working(self.A).mT, mode="r").R
        return float(torch.linalg.matrix_norm(R_left @ R_right.mT))

    def inner(self, other: LowRank) -> float:
        """Frobenius inner product ``<B A, D C> = sum((B^T D) * (A C^T))``; cost ``O((m + n) r q)``.

        Raises ``ValueError`` if the shapes differ.
        """
        if self.shape != other.shape:
            raise ValueError(f"inner product of different shapes: {self.shape} and {other.shape}")
        left = _working(self.B).mT @ _working(other.B)  # (r, q)
        right = _working(self.A) @ _working(other.A).mT  # (r, q)
        return float((left * right).sum())

    def to(self, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> LowRank:
        """The same product with factors of another dtype, on another device, or both."""
        return LowRank(self.B.to(device=device, dtype=dtype), self.A.to(device=device, dtype=dtype))

    def is_finite(self) -> bool:
        """Whether every entry of both factors is finite."""
        return all_finite(self.B) and all_finite(self.A)


def with_core(core: Tensor, A: Tensor) -> Tensor:
    """``diag(R_1, ..., R_h) A``, ``(r, n)``: each block multiplies its own rows of ``A``.

    Args:
        core: the square blocks below each other, ``(r, r / h)``; a single block is ``(r, r)``.
        A: ``(r, n)``.
    """
    (r, size), n = core.shape, A.shape[1]
    return (core.reshape(r // size, size, size) @ A.reshape(r // size, size, n)).reshape(r, n)


def _working(tensor: Tensor) -> Tensor:
    """The tensor in float32, or in its own dtype if that is wider."""
    if tensor.dtype in (torch.float32, torch.float64):
        return tensor
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _stacked_sums(
    sums: Sequence[Sequence[LowRank]], rank: int | None, balance: Balance, tolerance: float
) -> list[tuple[LowRank, float]]:
    """`LowRank.truncated_sum_with_error` of sums with as many columns ``q < min(m, n)`` each, in stacks."""
    left = torch.stack([torch.cat([_working(p.B) for p in products], dim=1) for products in sums])
    right = torch.stack([torch.cat([_working(p.A).mT for p in products], dim=1) for products in sums])
    (left, L), (right, R) = torch.linalg.qr(left), torch.linalg.qr(right)
    core = L @ R.mT  # (sums, q, q)
    if not all_finite(core):
        raise NotFiniteError("cannot truncate a product that is not finite (NaN, infinity or overflow)")
    U, sigma, Vt = torch.linalg.svd(core)
    values = sigma.double().cpu()  # read once
    found = []
    for place, (P, Q, of_one) in enumerate(zip(left @ U, right @ Vt.mT, values, strict=True)):
        kept = len(of_one[:rank])
        if tolerance > 0.0:
            kept = int((of_one[:kept] > tolerance * of_one[0]).sum())
        product = _from_svd(P[:, :kept], sigma[place, :kept], Q[:, :kept].mT, rank, balance)
        found.append((product, float(of_one[kept:].square().sum())))
    return found


def _reflectors(blocks: Sequence[Tensor], weights: Sequence[float]) -> tuple[Tensor, Tensor]:
    """``geqrf`` of the ``(length, q)`` matrix whose columns are the weighted rows of the blocks.

    The result has R in its upper triangle and the reflectors of Q below. The blocks are copied once, by
    columns, and QR works in place.
    """
    dtype = torch.float32
    for block in blocks:
        dtype = torch.promote_types(dtype, block.dtype)
    rows = torch.empty(
        sum(block.shape[0] for block in blocks), blocks[0].shape[1], dtype=dtype, device=blocks[0].device
    )
    for part, block, weight in zip(
        rows.split([block.shape[0] for block in blocks]), blocks, weights, strict=True
    ):
        part.copy_(block)
        if weight != 1.0:
            part.mul_(weight)
    tau = rows.new_empty(min(rows.shape))
    torch.geqrf(rows.mT, out=(rows.mT, tau))
    return rows.mT, tau


def _times(reflectors: tuple[Tensor, Tensor], matrix: Tensor) -> Tensor:
    """``Q M``, ``(length, columns)``, with ``M (q, columns)`` and Q of a ``geqrf``, which is never formed."""
    factors, tau = reflectors
    padded = matrix.new_zeros(matrix.shape[1], factors.shape[0]).mT
    padded[: matrix.shape[0]] = matrix
    return torch.ormqr(factors, tau, padded)


def _svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if not all_finite(matrix):
        raise NotFiniteError("cannot take the SVD of a matrix that is not finite (NaN or infinity)")
    return torch.linalg.svd(matrix, full_matrices=False)


def _from_svd(P: Tensor, sigma: Tensor, Qt: Tensor, rank: int | None, balance: Balance) -> LowRank:
    if rank is not None and rank < 0:
        raise ValueError(f"rank must be None or at least 0; got {rank}")
    P, sigma, Qt = P[:, :rank], sigma[:rank], Qt[:rank]
    if balance == "sqrt":
        root = sigma.sqrt()
        return LowRank(P * root, root[:, None] * Qt)
    if balance == "left":
        return LowRank(P * sigma, Qt.contiguous())
    raise ValueError(f"balance must be 'sqrt' or 'left'; got {balance!r}")


def _cut(singular: LowRank, tolerance: float, balance: Balance) -> LowRank:
    """Drop the directions of singular factors that are negligible compared with the first."""
    if tolerance <= 0.0 or singular.rank == 0:
        return singular
    sizes = torch.linalg.vector_norm(singular.B, dim=0)  # sigma, or its root if the balance is "sqrt"
    sigma = sizes.square() if balance == "sqrt" else sizes
    keep = int((sigma > tolerance * sigma[0]).sum())
    return LowRank(singular.B[:, :keep], singular.A[:keep])
