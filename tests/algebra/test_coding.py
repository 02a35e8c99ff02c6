"""Coding in few bits against dense NumPy, and everything that must be refused."""

from dataclasses import replace
from typing import Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsmoothlora.algebra.coding import (
    Packed,
    bytes_for,
    code_factor,
    code_product,
    coded_product,
    decoded,
    unpacked,
)
from fedsmoothlora.algebra.lowrank import LowRank
from fedsmoothlora.errors import NotFiniteError

BITS = (3, 4, 8)
bits_drawn = st.sampled_from(range(2, 9))
sizes = st.integers(1, 40)


def drawn(m: int, n: int, rank: int, seed: int, scale: float = 1.0) -> LowRank:
    generator = torch.Generator().manual_seed(seed)
    return LowRank(
        scale * torch.randn(m, rank, generator=generator), torch.randn(rank, n, generator=generator)
    )


def dense(product: Any) -> np.ndarray:
    product = unpacked(product)
    return (product.B.double() @ product.A.double()).numpy()


def q(columns: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Rounding by column in NumPy: integers and scales."""
    L = 2 ** (bits - 1) - 1
    scales = np.abs(columns).max(axis=0, initial=0.0) / L
    safe = np.where(scales > 0, scales, 1.0)
    return np.clip(np.rint(columns / safe), -L, L) * (scales > 0), scales


def coded_densely(matrix: np.ndarray, rank: int, bits: int) -> np.ndarray:
    """``dec(code(M))`` from the formulas, with dense matrices in float64."""
    U, sigma, _ = np.linalg.svd(matrix, full_matrices=False)
    U = U[:, :rank][:, sigma[:rank] > 1e-6 * sigma[0]]
    integers, scales = q(U, bits)
    B = integers * scales
    A = np.linalg.solve(B.T @ B + 1e-6 * np.eye(B.shape[1]), B.T @ matrix)
    right, right_scales = q(A.T, bits)
    return np.asarray(B @ (right * right_scales).T)


def unpacked_by_hand(codes: torch.Tensor, count: int, bits: int) -> list[int]:
    """The integers as one stream of bits, the lowest first."""
    stream = int.from_bytes(bytes(codes.tolist()), "little")
    return [stream >> bits * place & (2**bits - 1) for place in range(count)]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("balance", ["sqrt", "left"])
def test_a_coded_product_is_that_of_the_dense_formulas(bits: int, balance: Literal["sqrt", "left"]) -> None:
    matrix = drawn(24, 17, 9, seed=bits)
    packed = code_product(matrix, matrix.truncate(4, balance), bits)
    right = coded_densely(dense(matrix), 4, bits)
    # An entry near the middle between two integers may be rounded the other way in float32.
    assert np.linalg.norm(dense(packed) - right) < 0.02 * np.linalg.norm(right)
    of_dense = code_product(matrix.dense(), matrix.truncate(4, balance), bits)
    assert np.allclose(dense(of_dense), dense(packed), atol=0.05)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(sizes, sizes, st.integers(0, 12), bits_drawn, st.integers(0, 99), st.sampled_from([1e-12, 1.0, 1e8]))
def test_the_error_is_within_the_bound_of_the_bits(
    m: int, n: int, rank: int, bits: int, seed: int, scale: float
) -> None:
    matrix = drawn(m, n, rank, seed, scale)
    packed = coded_product(matrix, bits)
    M, L = dense(matrix), 2 ** (bits - 1) - 1
    U, sigma, _ = np.linalg.svd(M, full_matrices=False)
    r = packed.rank
    # ||M - B_q A_q|| <= ||M - B_q S V^T|| + sum_j ||b_j|| sqrt(n) max|a_j| / 2L: the fit is the best one.
    error = np.linalg.norm(dense(packed) - M)
    left = sum(np.sqrt(m) * np.abs(U[:, j]).max() / (2 * L) * sigma[j] for j in range(r))
    right = sum(np.sqrt(n) * (1 + np.sqrt(m) / L) * 2 * sigma[0] / (2 * L) for _ in range(r)) if r else 0.0
    assert error <= 1.01 * (left + right) + 1e-4 * np.linalg.norm(M) + np.linalg.norm(sigma[r:])
    assert packed.nbytes <= -(-r * (m + n) * bits // 8) + 4 * r
    assert r <= min(m, n, rank)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(0, 30), bits_drawn, st.data())
def test_integers_are_packed_as_one_stream_and_no_other_bit_is_set(
    length: int, bits: int, data: st.DataObject
) -> None:
    values = data.draw(st.lists(st.floats(-9, 9, width=32), min_size=3 * length, max_size=3 * length))
    factor = torch.tensor(values, dtype=torch.float32).view(3, length)
    packed = code_factor(factor, "A", bits)
    count, L = 3 * length, 2 ** (bits - 1) - 1
    assert packed.codes.dtype == torch.uint8
    assert packed.codes.shape == (bytes_for(count, bits),)
    integers = unpacked_by_hand(packed.codes, count, bits)
    assert max(integers, default=0) <= 2 * L  # 2^b - 1 is never written
    right = torch.tensor(integers, dtype=torch.float32).view(3, length) - L
    assert torch.equal(unpacked(packed), right * packed.scales.float()[:, None])
    stream = int.from_bytes(bytes(packed.codes.tolist()), "little")
    assert stream >> count * bits == 0


@settings(max_examples=40, deadline=None, derandomize=True)
@given(sizes, sizes, st.integers(1, 6), st.sampled_from(BITS), st.integers(0, 99), st.integers(-60, 60))
def test_decoded_factors_are_balanced_and_their_product_is_exactly_the_coded_one(
    m: int, n: int, rank: int, bits: int, seed: int, power: int
) -> None:
    packed = coded_product(drawn(m, n, rank, seed, 2.0**power), bits)
    product = unpacked(packed)
    assert isinstance(product, LowRank)
    integers = torch.tensor(unpacked_by_hand(packed.codes, packed.rank * (m + n), bits)).view(-1, m + n)
    plain = integers - (2 ** (bits - 1) - 1)
    exact = plain[:, :m].double().mT @ (plain[:, m:].float() * packed.scales[:, None]).double()
    assert torch.equal(product.B.double() @ product.A.double(), exact)
    for b, a in zip(product.B.mT, product.A, strict=True):
        if float(a.norm()):
            assert 0.499 < float(b.norm() / a.norm()) < 2.001


def test_ties_are_rounded_to_even_and_zeros_have_scale_zero() -> None:
    row = torch.tensor([[7.0, 0.5, 1.5, 2.5, -0.5, -1.5], [0.0] * 6])
    packed = code_factor(row, "A", 4)
    assert unpacked(packed).tolist() == [[7.0, 0.0, 2.0, 2.0, 0.0, -2.0], [0.0] * 6]
    assert packed.scales.tolist() == [1.0, 0.0]
    assert unpacked(code_factor(row.mT, "B", 4)).tolist() == unpacked(packed).mT.tolist()


@pytest.mark.parametrize("bits", BITS)
def test_a_product_of_zero_and_one_of_lower_rank_have_the_directions_that_they_have(bits: int) -> None:
    zero = coded_product(LowRank(torch.zeros(6, 3), torch.randn(3, 5)), bits)
    assert (zero.rank, zero.nbytes) == (0, 0)
    assert unpacked(zero).shape == (6, 5)
    twice = drawn(6, 5, 1, 0)
    assert coded_product(twice + twice, bits).rank == 1
    assert coded_product(LowRank.zeros(6, 5), bits).rank == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused_before_coding(value: float) -> None:
    product = drawn(6, 5, 2, 0)
    product.B[0, 0] = value
    with pytest.raises(NotFiniteError):
        coded_product(product, 4)
    with pytest.raises(NotFiniteError):
        code_factor(product.B, "B", 4)
    good = drawn(6, 5, 2, 1)
    with pytest.raises(NotFiniteError):
        code_product(product, good, 4)


@pytest.mark.parametrize(
    "damage",
    [
        {"scales": torch.tensor([1.0, float("nan")])},
        {"scales": torch.tensor([1.0, float("inf")])},
        {"scales": torch.tensor([1.0, -1.0])},
        {"codes": torch.zeros(3, dtype=torch.uint8)},
        {"codes": torch.full((9,), 255, dtype=torch.uint8)},  # the value that is never written
        {"shape": (9, 5)},
        {"bits": 8},
    ],
)
def test_a_malformed_packed_product_is_refused_on_decoding(damage: dict[str, Any]) -> None:
    packed = coded_product(drawn(6, 5, 2, 0), 3)
    assert packed.codes.shape == (9,)
    with pytest.raises(ValueError, match=r"scale|take|above"):
        replace(packed, **damage).decoded()


def test_an_unused_bit_that_is_set_is_refused() -> None:
    packed = coded_product(drawn(6, 5, 2, 0), 3)  # 66 of 72 bits
    packed.codes[-1] |= 128
    with pytest.raises(ValueError, match="unused bit"):
        packed.decoded()


@settings(max_examples=30, deadline=None, derandomize=True)
@given(sizes, sizes, st.sampled_from(BITS), st.integers(1, 4))
def test_packed_products_are_joined_to_the_bit(m: int, n: int, bits: int, count: int) -> None:
    products = [coded_product(drawn(m, n, 1 + seed % 3, seed), bits) for seed in range(count)]
    joined = unpacked(Packed.joined(products))
    apart = [unpacked(product) for product in products]
    assert isinstance(joined, LowRank)
    assert torch.equal(joined.B, torch.cat([one.B for one in apart], dim=1))
    assert torch.equal(joined.A, torch.cat([one.A for one in apart]))
    assert Packed.joined(products).nbytes <= sum(product.nbytes for product in products)


def test_an_update_is_decoded_one_value_at_a_time() -> None:
    packed = coded_product(drawn(6, 5, 2, 0), 4)
    plain = {"w": torch.zeros(2)}
    assert decoded(plain) is plain
    update = decoded({"a": packed, "w": plain["w"]})
    assert list(update) == ["a", "w"]
    assert len(update) == 2
    assert isinstance(update["a"], LowRank)
    assert update["w"] is plain["w"]
    with pytest.raises(KeyError):
        update["b"]


def test_a_scaled_packed_product_is_the_scaled_product() -> None:
    packed = coded_product(drawn(6, 5, 2, 0), 4)
    assert np.allclose(dense(packed * 0.25), 0.25 * dense(packed))


@pytest.mark.parametrize("bits", BITS)
def test_bytes_at_the_shapes_of_a_llama_are_the_computed_ones(bits: int) -> None:
    """At most ``r (m + n) bits / 8 + 4 r`` for each layer."""
    for m, n, r in ((2048, 2048, 32), (512, 2048, 32), (8192, 64, 8)):
        packed = coded_product(drawn(m, n, r, 0), bits)
        assert packed.nbytes == r * (m + n) * bits // 8 + 4 * r
        factors = code_factor(torch.randn(m, r), "B", bits), code_factor(torch.randn(r, n), "A", bits)
        assert sum(factor.nbytes for factor in factors) == packed.nbytes
