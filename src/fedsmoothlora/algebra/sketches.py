"""Leading singular vectors of a gradient ``G = sum dY^T X`` that is never formed.

Only products of ``G`` with thin matrices are summed: ``G V = sum dY^T (X V)`` and ``G^T U = sum X^T (dY U)``.

With two or three passes over the data, the two products alternate, as in subspace iteration (Halko,
Martinsson and Tropp 2011, algorithms 4.4 and 5.1; the first pass multiplies by a random matrix). The last
product is ``G V``, so ``P`` is refined once more than ``Q``. The gradient-aligned start needs ``P[:, r:2r]``
and ``Q[:, :r]``, and the weaker directions of ``P`` are harder to find.

With one pass, both products are summed at the same time, with test matrices of different widths, and ``G V``
is computed from them by least squares (Tropp, Yurtsever, Udell and Cevher 2017, algorithm 4, for ``G^T``).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fedsmoothlora.algebra.finite import all_finite
from fedsmoothlora.algebra.spectral import fix_signs

_FLOAT = 4


@dataclass(frozen=True, kw_only=True)
class SketchSize:
    """The size of the sketch of an ``(m, n)`` gradient.

    Attributes:
        m, n: shape of the gradient.
        passes: passes over the data: 1, 2, or 3 for a power step.
        width: ``w``, the number of columns of ``V``, the basis that approximates the gradient's row space.
        second: with one pass, the number of columns of the test matrix to the right of ``G``: ``2w - 1``.
    """

    m: int
    n: int
    passes: int
    width: int
    second: int = 0

    @classmethod
    def of(cls, m: int, n: int, rank: int, *, width: int, passes: int) -> SketchSize:
        """The size for starts of rank ``r``: ``w = min(width r, m, n)``, or ``width r + 2`` with one pass.

        Raises ``ValueError`` if ``passes`` is not 1, 2 or 3, or ``width`` is below 2.
        """
        if passes not in (1, 2, 3):
            raise ValueError(f"a sketch takes 1, 2 or 3 passes over the data; got {passes}")
        if rank < 1 or width < 2:
            raise ValueError(
                f"a sketch for 2r singular vectors needs at least 2r columns; got {width} r, r = {rank}"
            )
        most = min(m, n)
        if passes > 1:
            return cls(m=m, n=n, passes=passes, width=min(width * rank, most))
        columns = min(width * rank + 2, most)
        return cls(m=m, n=n, passes=1, width=columns, second=2 * columns - 1)

    @property
    def numbers(self) -> float:
        """The most float32 numbers in memory between two batches; a random number takes a quarter of one."""
        w, l = self.width, self.second  # noqa: E741
        if self.passes == 1:
            return w * self.n + l * self.m + (w * self.m + l * self.n) / _FLOAT
        return w * (self.m + self.n)  # a basis and a sum, in the second pass

    @property
    def pays(self) -> bool:
        """Whether `numbers` is less than the size of the gradient itself."""
        return self.numbers < self.m * self.n


class Sketch:
    """The sketch of one gradient.

    In each pass, `add` is called with every batch, then `turn` once. After ``size.passes`` passes,
    `leading_singular_vectors` returns the result. Sums are float32, whatever the dtype of the batches. The
    result depends only on the gradient, the size and the generator's seed.

    Args:
        size: width and number of passes.
        generator: draws the test matrices.
    """

    def __init__(self, size: SketchSize, generator: torch.Generator) -> None:
        self.size = size
        self.passes_left = size.passes
        # The factors to the right of G (n, columns) and of G^T (m, columns) in this pass.
        self._right: Tensor | None = None
        self._left: Tensor | None = None
        if size.passes == 1:
            self._right = _test_matrix(size.n, size.second, generator)
        elif size.passes == 3:
            self._right = _test_matrix(size.n, size.width, generator)
        if size.passes < 3:
            self._left = _test_matrix(size.m, size.width, generator)
        self._on_right: Tensor | None = None  # G right, (m, columns)
        self._on_left: Tensor | None = None  # G^T left, (n, columns)
        self._found: tuple[Tensor, Tensor] | None = None  # V orthonormal (n, w), and G V (m, w)

    @property
    def shape(self) -> tuple[int, int]:
        """The shape ``(m, n)`` of the gradient."""
        return self.size.m, self.size.n

    def add(self, dY: Tensor, X: Tensor) -> None:
        """Add the gradient ``dY^T X`` of a batch, with ``dY (tokens, m)`` and ``X (tokens, n)``."""
        dY, X = dY.float(), X.float()
        if self._right is not None:
            self._right = self._right.to(X.device)
            self._on_right = _sum(self._on_right, dY, X @ self._right.float())
        if self._left is not None:
            self._left = self._left.to(X.device)
            self._on_left = _sum(self._on_left, X, dY @ self._left.float())

    @property
    def finite(self) -> bool:
        """Whether the sums of this pass are finite."""
        sums = (self._on_right, self._on_left)
        return all(all_finite(total) for total in sums if total is not None)

    def turn(self) -> None:
        """End a pass: compute the basis of the next one, and free the sums."""
        if self.passes_left == 0:
            raise RuntimeError(f"all {self.size.passes} passes of this sketch are over")
        self.passes_left -= 1
        right, left = self._right, self._left
        on_right, on_left = self._on_right, self._on_left
        self._right = self._left = self._on_right = self._on_left = None
        if self.size.passes == 1:
            assert right is not None
            assert left is not None
            on_right = _or_zeros(on_right, self.size.m, right)
            V = _basis(_or_zeros(on_left, self.size.n, left))  # (n, w)
            # G ~ (G V) V^T, so on_right = G Omega ~ (G V) (V^T Omega), an overdetermined system for G V.
            equations = right.mT.to(V) @ V  # (second, w)
            scale = _size(on_right)
            solved = torch.linalg.lstsq(equations, on_right.mT / scale, driver="gels").solution  # (w, m)
            self._found = V, solved.mT * scale
        elif left is not None:
            self._right = _basis(_or_zeros(on_left, self.size.n, left))
        else:
            assert right is not None
            on_right = _or_zeros(on_right, self.size.m, right)
            if self.passes_left == 0:
                self._found = right, on_right
            else:
                self._left = _basis(on_right)

    def leading_singular_vectors(self, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """An approximation of `spectral.leading_singular_vectors` of the gradient.

        The result is the vectors of ``G V V^T``, or, with one pass, of an estimate of it. It is exact up to
        rounding if the gradient's rank is at most the sketch's width.

        Raises ``ValueError`` if ``count`` is above the width, ``RuntimeError`` before the last `turn`.
        """
        if self._found is None:
            raise RuntimeError(
                f"a sketch has its vectors after its last pass; {self.passes_left} passes left"
            )
        if not 0 <= count <= self.size.width:
            raise ValueError(
                f"a sketch of width {self.size.width} cannot give {count} singular vectors: widen it"
            )
        V, image = self._found
        scale = _size(image)
        left, core = torch.linalg.qr(image / scale)  # (m, w), (w, w)
        U, sigma, Wt = torch.linalg.svd(core)
        P, Q = left @ U[:, :count], V @ Wt[:count].mT
        return fix_signs(P), sigma[:count] * scale, fix_signs(Q)


def _test_matrix(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """Gaussian numbers, each rounded to a byte; their scale does not matter.

    Random signs would need no more memory, but with few columns the rows are sometimes linearly dependent,
    and a gradient may be concentrated in a few rows.
    """
    drawn = torch.randn(rows, columns, generator=generator)
    return drawn.mul_(32).round_().clamp_(-127, 127).to(torch.int8)


def _sum(total: Tensor | None, one: Tensor, other: Tensor) -> Tensor:
    """``total + one^T other``; a total of None is 0."""
    return one.mT @ other if total is None else total.addmm_(one.mT, other)


def _or_zeros(total: Tensor | None, rows: int, met: Tensor) -> Tensor:
    """The sum of a pass, or zeros if the pass had no batch."""
    return torch.zeros(rows, met.shape[1], device=met.device) if total is None else total


def _basis(image: Tensor) -> Tensor:
    """An orthonormal basis of the columns of ``image``."""
    return torch.linalg.qr(image / _size(image)).Q


def _size(matrix: Tensor) -> Tensor:
    """The largest magnitude, as a scale: squares of the entries of tiny gradients must not underflow."""
    return matrix.abs().max().clamp(min=torch.finfo(matrix.dtype).tiny)
