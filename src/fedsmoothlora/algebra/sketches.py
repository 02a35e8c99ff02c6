"""Leading singular vectors of a gradient that is only ever seen as a sum ``G = sum dY^T X``.

Only products of ``G`` with thin matrices are summed, so ``G`` itself never exists:
``G V = sum dY^T (X V)`` and ``G^T U = sum X^T (dY U)``.

With two passes over the data, or three, they alternate as subspace iteration does (Halko, Martinsson and
Tropp 2011, algorithms 4.4 and 5.1; the first pass meets random numbers in place of a basis), and the last is
``G V``. So ``P`` has been refined once more than ``Q``: the gradient-aligned start wants ``P[:, r:2r]`` and
``Q[:, :r]``, and the weaker directions are the harder ones.

With one pass both sides are summed at once, against test matrices of different width, and what ``G V`` would
be is solved for by least squares (Tropp, Yurtsever, Udell and Cevher 2017, algorithm 4, for ``G^T``).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fedsmoothlora.algebra.spectral import fix_signs

_FLOAT = 4


@dataclass(frozen=True, kw_only=True)
class SketchSize:
    """How large the sketch of an ``(m, n)`` gradient is.

    Attributes:
        m, n: of the gradient.
        passes: over the data: 1, 2, or 3 for a power step.
        width: ``w``, columns of the basis ``V`` in which the gradient's rows are sought.
        second: with one pass, columns of the test matrix that ``G`` meets on the right: ``2w - 1``.
    """

    m: int
    n: int
    passes: int
    width: int
    second: int = 0

    @classmethod
    def of(cls, m: int, n: int, rank: int, *, width: int, passes: int) -> SketchSize:
        """For starts of rank ``r``: ``w = width r``, with one pass ``width r + 2``; at most ``min(m, n)``.

        Raises ``ValueError`` if there are not 1 to 3 passes, or fewer columns than the ``2r`` vectors.
        """
        if passes not in (1, 2, 3):
            raise ValueError(f"a sketch takes 1, 2 or 3 passes over the data; got {passes}")
        if rank < 1 or width < 2:
            raise ValueError(
                f"a sketch for 2r singular vectors has at least 2r columns; got {width} r, r = {rank}"
            )
        most = min(m, n)
        if passes > 1:
            return cls(m=m, n=n, passes=passes, width=min(width * rank, most))
        columns = min(width * rank + 2, most)
        return cls(m=m, n=n, passes=1, width=columns, second=2 * columns - 1)

    @property
    def numbers(self) -> float:
        """Most numbers that are held between two batches, random ones (a byte each) as a quarter."""
        w, l = self.width, self.second  # noqa: E741
        if self.passes == 1:
            return w * self.n + l * self.m + (w * self.m + l * self.n) / _FLOAT
        return w * (self.m + self.n)  # the second pass: a basis and a sum

    @property
    def pays(self) -> bool:
        """Whether that is less than the gradient itself."""
        return self.numbers < self.m * self.n


class Sketch:
    """The sketch of one gradient.

    Every pass `add` s all batches, then `turn` is called; after ``size.passes`` of them there are the
    `leading_singular_vectors`. Sums are float32, whatever came in. What comes of it is a function of the
    gradient, the size and the generator's seed.

    Args:
        size: how wide it is, and how many passes it takes.
        generator: draws the test matrices.
    """

    def __init__(self, size: SketchSize, generator: torch.Generator) -> None:
        self.size = size
        self.passes_left = size.passes
        # What G meets on the right in this pass (n, columns), what G^T does (m, columns), and the sums.
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
        """``(m, n)``, of the gradient."""
        return self.size.m, self.size.n

    def add(self, dY: Tensor, X: Tensor) -> None:
        """Add a batch's part: ``dY (tokens, m)``, ``X (tokens, n)``."""
        dY, X = dY.float(), X.float()
        if self._right is not None:
            self._right = self._right.to(X.device)
            self._on_right = _sum(self._on_right, dY, X @ self._right.float())
        if self._left is not None:
            self._left = self._left.to(X.device)
            self._on_left = _sum(self._on_left, X, dY @ self._left.float())

    @property
    def finite(self) -> bool:
        """Whether what this pass has summed is finite."""
        sums = (self._on_right, self._on_left)
        return all(bool(torch.isfinite(total).all()) for total in sums if total is not None)

    def turn(self) -> None:
        """End a pass: what it found is the basis of the next, and what that does not need is let go."""
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
            # G ~ (G V) V^T, so on_right = G Omega ~ (G V) (V^T Omega), more equations than unknowns.
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
        """As `spectral.leading_singular_vectors` of the gradient, as far as the sketch knows it.

        They are those of ``G V V^T``, with one pass of an estimate of it. Exact up to rounding where the
        gradient's rank is at most the sketch's width.

        Raises ``ValueError`` if ``count`` is above the width, ``RuntimeError`` before the last `turn`.
        """
        if self._found is None:
            raise RuntimeError(f"a sketch has its vectors after its last pass; {self.passes_left} to go")
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
    """Gaussian numbers, rounded to a byte each; their scale does not matter.

    Signs would be as short, but those of few columns are now and then dependent, and a gradient may well lie
    along a few axes.
    """
    drawn = torch.randn(rows, columns, generator=generator)
    return drawn.mul_(32).round_().clamp_(-127, 127).to(torch.int8)


def _sum(total: Tensor | None, one: Tensor, other: Tensor) -> Tensor:
    """``total + one^T other``; a total of None is 0."""
    return one.mT @ other if total is None else total.addmm_(one.mT, other)


def _or_zeros(total: Tensor | None, rows: int, met: Tensor) -> Tensor:
    """The sum of a pass; of one without any batch, zeros."""
    return torch.zeros(rows, met.shape[1], device=met.device) if total is None else total


def _basis(image: Tensor) -> Tensor:
    """Orthonormal columns that span those of ``image``."""
    return torch.linalg.qr(image / _size(image)).Q


def _size(matrix: Tensor) -> Tensor:
    """Its largest magnitude: gradients can be tiny, and squares of their entries must not underflow."""
    return matrix.abs().max().clamp(min=torch.finfo(matrix.dtype).tiny)
