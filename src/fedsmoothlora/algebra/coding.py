"""Products and factors in few bits: symmetric rounding with one scale per direction.

``b`` bits hold the integers ``-L ... L``, ``L = 2^(b-1) - 1``. A direction is a column of ``B`` or a row of
``A``; its scale is ``max|x| / L``, so a direction of zeros has the scale 0. Integers are rounded half to even
and packed as ``integer + L``; the value ``2^b - 1`` is never written, and refused where it is read.

Sender and receiver call the same `Packed.decoded` on the packed value, so both continue from the same bits.
Coding is not idempotent: a product is coded once, and the packed value is what is kept and sent.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from fedsmoothlora.algebra.lowrank import LowRank
from fedsmoothlora.algebra.sums import Matrix, Sum
from fedsmoothlora.algebra.update import Coded
from fedsmoothlora.errors import NotFiniteError

PackedPart = Literal["product", "B", "A"]

# Of the least squares problem for the second factor: coded directions may be dependent.
_RIDGE = 1e-6
# Directions that only rounding made, relative to the first singular value.
_ROUNDING = 8 * torch.finfo(torch.float32).eps


@dataclass(frozen=True, slots=True, eq=False)
class Packed:
    """A product ``B @ A``, or one factor, as integers of ``bits`` bits and one scale per direction.

    The integers of direction ``j`` are ``b_j`` and ``a_j``. A product is ``sum_j scale_j b_j a_j^T``; a
    factor has the columns ``scale_j b_j`` or the rows ``scale_j a_j``.

    Attributes:
        codes: the packed integers, direction after direction: ``ceil(r * length * bits / 8)`` bytes, with
            ``length = m + n`` for a product, ``m`` for ``B``, ``n`` for ``A``. Unused bits are 0.
        scales: ``(r,)``; float32 for a product, bfloat16 for a factor, so that the two factors of a LoRA
            cost as much as its product.
        shape: of the product ``(m, n)``, or of the factor, ``(m, r)`` or ``(r, n)``.
        bits: 2 to 8.
        part: the kind of matrix.
    """

    codes: Tensor
    scales: Tensor
    shape: tuple[int, int]
    bits: int
    part: PackedPart = "product"

    @property
    def rank(self) -> int:
        """Number of directions."""
        return int(self.scales.shape[0])

    @property
    def length(self) -> int:
        """Number of integers of each direction."""
        return {"product": sum(self.shape), "B": self.shape[0], "A": self.shape[1]}[self.part]

    @property
    def nbytes(self) -> int:
        """Bytes of integers and scales."""
        return self.codes.nbytes + self.scales.nbytes

    def __mul__(self, factor: float) -> Packed:
        return replace(self, scales=(self.scales.float() * factor).to(self.scales.dtype))

    def decoded(self) -> LowRank | Tensor:
        """The product or factor that both sides continue from, in float32.

        Factors of a product are balanced by powers of two, ``2^e b_j`` and ``2^-e scale_j a_j``, which
        rounds nothing.

        Raises:
            NotFiniteError: a scale is not finite.
            ValueError: the packed integers are not as many as shape and rank say, or one is out of range.
        """
        integers = self._integers()  # (r, length)
        scales = self.scales.to(torch.float32)
        if not bool(torch.isfinite(scales).all()) or bool((scales < 0).any()):
            raise NotFiniteError("a scale of a packed tensor is negative or not finite")
        if self.part == "B":
            return (integers * scales[:, None]).mT.contiguous()
        if self.part == "A":
            return integers * scales[:, None]
        left, right = integers.split(list(self.shape), dim=1)  # (r, m), (r, n)
        # Exact in float64, so that every machine finds the same exponents.
        energy = [part.square().sum(dim=1, dtype=torch.float64) for part in (left, right)]
        ratio = scales.double().square() * energy[1] / energy[0].clamp(min=1)
        shift = torch.where(ratio > 0, (torch.frexp(ratio).exponent + 1) // 4, 0)[:, None]
        up, down = (torch.ldexp(torch.ones_like(scales)[:, None], by) for by in (shift, -shift))  # (r, 1)
        return LowRank((left * up).mT.contiguous(), (right * scales[:, None]).mul_(down))

    def _integers(self) -> Tensor:
        """The integers ``-L ... L``, ``(r, length)`` in float32."""
        count, largest = self.rank * self.length, 2**self.bits - 2
        if self.codes.shape != (bytes_for(count, self.bits),):
            raise ValueError(
                f"{count} integers of {self.bits} bits take {bytes_for(count, self.bits)} bytes; "
                f"got {tuple(self.codes.shape)}"
            )
        codes, rest = _unpacked(self.codes, count, self.bits)
        if bool((codes > largest).any()) or bool(rest.any()):
            raise ValueError(f"a packed integer is above {largest}, or an unused bit is set")
        return (codes.to(torch.float32) - largest // 2).view(self.rank, self.length)

    @staticmethod
    def joined(products: Sequence[Packed]) -> Packed:
        """The sum of products: their directions one after the other, with the bytes of all."""
        first = products[0]
        if len(products) == 1:
            return first
        codes = torch.cat([_unpacked(p.codes, p.rank * p.length, p.bits)[0] for p in products])
        return replace(
            first,
            codes=_packed(codes, first.bits),
            scales=torch.cat([product.scales for product in products]),
        )


def code_product(matrix: Matrix, truncated: LowRank, bits: int) -> Packed:
    """A product of rank ``r`` near ``M``, in ``bits`` bits.

    With the left singular vectors ``U`` of ``SVD_r(M)``: ``B_q = q_b(U)`` by column, then the other factor
    is fitted to the coded one, ``A = (B_q^T B_q + 1e-6 I)^-1 B_q^T M``, and ``A_q = q_b(A)`` by row. The
    scales of ``B`` go into those of ``A``. ``M`` is not formed.

    Args:
        matrix: ``M``, ``(m, n)``.
        truncated: ``SVD_r(M)`` as singular factors, of either balance.
        bits: ``b``.

    Raises:
        NotFiniteError: the matrix is not finite.
    """
    m, n = truncated.shape
    U = truncated.B.mT.to(torch.float32)  # (r, m)
    U = U / torch.linalg.vector_norm(U, dim=1, keepdim=True).clamp(min=torch.finfo(U.dtype).tiny)
    left, left_scales = _rounded(U, bits)
    scaled = (left * left_scales[:, None]).double()
    gram = scaled @ scaled.mT
    gram.diagonal().add_(_RIDGE)
    fit = torch.linalg.solve(gram, scaled).to(U.dtype)  # (r, m), at last A (r, n)
    if isinstance(matrix, Sum):
        fit = matrix.under(fit)
    else:
        for part in [matrix.B, matrix.A] if isinstance(matrix, LowRank) else [matrix]:
            fit = fit @ part.to(fit)
    right, right_scales = _rounded(fit, bits)
    scales = left_scales * right_scales
    if not bool(torch.isfinite(scales).all()):
        raise NotFiniteError("cannot code a product that is not finite (NaN, infinity or overflow)")
    codes = torch.cat([left, right], dim=1)
    return Packed(_packed(_unsigned(codes, bits), bits), scales, (m, n), bits)


def code_factor(factor: Tensor, part: Literal["B", "A"], bits: int) -> Packed:
    """One factor in ``bits`` bits: ``B (m, r)`` by column, ``A (r, n)`` by row.

    Raises ``NotFiniteError`` if it is not finite.
    """
    rows = factor.mT if part == "B" else factor
    if not bool(torch.isfinite(rows).all()):
        raise NotFiniteError("cannot code a factor that is not finite (NaN or infinity)")
    codes, scales = _rounded(rows.to(torch.float32), bits, torch.bfloat16)
    shape = (factor.shape[0], factor.shape[1])
    return Packed(_packed(_unsigned(codes, bits), bits), scales, shape, bits, part)


def coded_product(product: LowRank, bits: int) -> Packed:
    """`code_product` of a product at its own rank, without directions that only rounding made."""
    return code_product(product, product.truncate(None, tolerance=_ROUNDING), bits)


def decoded(update: Coded) -> Mapping[str, LowRank | Tensor]:
    """An update whose packed values are decoded when they are read, one at a time."""
    # A lazy update is decoded already; looking at its values would decode all of them.
    if isinstance(update, Lazy) or not any(isinstance(value, Packed) for value in update.values()):
        return update  # type: ignore[return-value]
    return Lazy(update, lambda name: unpacked(update[name]))


def unpacked(value: LowRank | Tensor | Packed) -> LowRank | Tensor:
    """A value as its receiver continues from it."""
    return value.decoded() if isinstance(value, Packed) else value


class Lazy(Mapping[str, Any]):
    """A mapping whose values are computed whenever they are read, so that few are in memory at once.

    Args:
        keys: the keys, in order.
        compute: makes the value of a key.
    """

    def __init__(self, keys: Iterable[str], compute: Callable[[str], Any]) -> None:
        self._keys = dict.fromkeys(keys)
        self._compute = compute

    def __getitem__(self, key: str) -> Any:
        if key not in self._keys:
            raise KeyError(key)
        return self._compute(key)

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


def bytes_for(count: int, bits: int) -> int:
    """Bytes of ``count`` packed integers."""
    return -(-count * bits // 8)


def _rounded(rows: Tensor, bits: int, number: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """``q_b`` of every row: integers ``-L ... L`` in the rows' own dtype, and the scales as ``number``."""
    L = 2 ** (bits - 1) - 1
    peaks = rows.abs().amax(dim=1) if rows.numel() else rows.new_zeros(rows.shape[0])
    scales = (peaks / L).to(number)
    wide = scales.to(rows.dtype)[:, None]
    integers = torch.where(wide > 0, rows / wide, 0.0).round().clamp(-L, L)
    return integers, scales


def _unsigned(integers: Tensor, bits: int) -> Tensor:
    return (integers + (2 ** (bits - 1) - 1)).to(torch.uint8).flatten()


def _grouping(bits: int) -> tuple[int, int, torch.dtype]:
    """How many integers fill how many whole bytes, and a dtype that holds them."""
    common = math.gcd(bits, 8)
    size = bits // common
    return 8 // common, size, torch.uint8 if size == 1 else torch.int32 if size <= 3 else torch.int64


def _packed(codes: Tensor, bits: int) -> Tensor:
    """Integers ``0 ... 2^bits - 1`` (uint8, one each) as packed bytes, the first in the lowest bits."""
    if bits == 8:
        return codes
    count = codes.numel()
    per, size, word = _grouping(bits)
    padded = torch.zeros(-(-count // per) * per, dtype=torch.uint8, device=codes.device)
    padded[:count] = codes
    words = _joined(padded.view(-1, per), bits, word)
    return _split(words, size, 8)[: bytes_for(count, bits)].contiguous()


def _unpacked(packed: Tensor, count: int, bits: int) -> tuple[Tensor, Tensor]:
    """The inverse of `_packed`: ``count`` integers as uint8, and those of the unused bits."""
    if bits == 8:
        return packed, packed[:0]
    per, size, word = _grouping(bits)
    padded = torch.zeros(-(-count // per) * size, dtype=torch.uint8, device=packed.device)
    padded[: packed.numel()] = packed
    codes = _split(_joined(padded.view(-1, size), 8, word), per, bits)
    return codes[:count], codes[count:]


def _joined(parts: Tensor, bits: int, word: torch.dtype) -> Tensor:
    """The integers of each row as one word, the first in the lowest bits."""
    words = parts[:, 0].to(word)
    for place in range(1, parts.shape[1]):
        words |= parts[:, place].to(word) << (place * bits)
    return words


def _split(words: Tensor, count: int, bits: int) -> Tensor:
    """The inverse of `_joined`: ``count`` integers of each word, as uint8."""
    parts = torch.empty(len(words), count, dtype=torch.uint8, device=words.device)
    for place in range(count):
        parts[:, place] = (words >> (place * bits)) & (2**bits - 1)
    return parts.flatten()
