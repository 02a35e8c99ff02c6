"""Weighted means over clients against numpy, float64."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsmoothlora.algebra.averaging import client_weights, mean_tensor, products_of
from fedsmoothlora.algebra.lowrank import LowRank

MODERATE = settings(max_examples=60, deadline=None)
COUNTS = st.lists(st.integers(0, 10_000), min_size=1, max_size=8).filter(any)
BAD_COUNTS = [[], [0], [0, 0.0], [3, -1], [math.nan, 1], [math.inf, 1], [1, -math.inf]]


def random(*shape: int, seed: int = 0, dtype=torch.float64) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype)


@given(COUNTS)
@MODERATE
def test_client_weights_are_shares_of_the_samples(counts):
    weights = client_weights(counts)
    assert math.fsum(weights) == pytest.approx(1, rel=1e-14)
    assert np.allclose(weights, np.array(counts) / np.sum(counts), rtol=1e-14)


@given(COUNTS, st.floats(1e-3, 1e3))
@MODERATE
def test_client_weights_do_not_depend_on_the_unit_of_the_counts(counts, unit):
    assert client_weights([unit * count for count in counts]) == pytest.approx(
        client_weights(counts), rel=1e-12
    )


@pytest.mark.parametrize("counts", BAD_COUNTS)
def test_counts_without_valid_weights_are_refused(counts):
    with pytest.raises(ValueError, match=r"client weights must be|fsum"):
        client_weights(counts)
    with pytest.raises(ValueError, match=r"client weights must be|fsum"):
        mean_tensor([torch.zeros(2) for _ in counts], counts)


@given(COUNTS, st.lists(st.integers(0, 4), max_size=3), st.integers(0, 2**20))
@MODERATE
def test_the_mean_is_the_weighted_mean(counts, shape, seed):
    tensors = [random(*shape, seed=seed + i) for i in range(len(counts))]
    kept = [tensor.clone() for tensor in tensors]
    want = np.average(np.stack([t.numpy() for t in tensors]), axis=0, weights=counts)
    got = mean_tensor(tensors, counts)
    assert got.dtype == torch.float64
    assert got.shape == torch.Size(shape)
    assert np.allclose(got.numpy(), want, rtol=1e-12, atol=1e-12)
    assert all(torch.equal(a, b) for a, b in zip(tensors, kept, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_mean_keeps_the_dtype_and_accumulates_in_float32(dtype):
    # 300 clients: a bfloat16 running sum would stop growing long before the last of them.
    tensors = [1 + random(6, seed=i, dtype=torch.float32).abs().to(dtype) for i in range(300)]
    want = np.mean([t.double().numpy() for t in tensors], axis=0)
    got = mean_tensor(tensors, [1] * 300)
    assert got.dtype == dtype
    assert np.allclose(got.double().numpy(), want, rtol=max(torch.finfo(dtype).eps, 1e-5), atol=0)


def test_the_mean_of_one_client_is_that_client():
    x = random(3, 4, dtype=torch.float32)
    mean = mean_tensor([x], [17])
    assert torch.equal(mean, x)
    mean.zero_()
    assert x.abs().sum() > 0  # and not the same memory


def test_a_client_of_weight_zero_does_not_count():
    x, y = random(3, seed=1), random(3, seed=2)
    assert torch.equal(mean_tensor([x, y], [0, 5]), y)


@pytest.mark.parametrize(("shapes", "counts"), [([(2,), (3,)], [1, 1]), ([(2,)], [1, 1]), ([], [1])])
def test_tensors_that_do_not_match_are_refused_with_their_shapes(shapes, counts):
    with pytest.raises(ValueError, match="cannot average tensors of shapes"):
        mean_tensor([torch.zeros(shape) for shape in shapes], counts)


def test_products_of_a_layer_come_in_the_order_of_the_uploads():
    uploads = [{"a": LowRank.zeros(2, 3), "b": LowRank.zeros(4, 5)} for _ in range(3)]
    found = products_of(uploads, "b")
    assert len(found) == 3
    assert all(product is upload["b"] for product, upload in zip(found, uploads, strict=True))


def test_a_plain_tensor_instead_of_a_product_is_refused_with_the_layer():
    with pytest.raises(TypeError, match="layer q: expected a low-rank product; got Tensor"):
        products_of([{"q": LowRank.zeros(2, 3)}, {"q": torch.zeros(2, 3)}], "q")
