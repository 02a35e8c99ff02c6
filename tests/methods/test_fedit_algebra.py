"""FedIT: plain weighted means of factors, in numpy."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsmoothlora.algebra.lowrank import LowRank
from fedsmoothlora.methods import ClientView, Layer, ServerView
from fedsmoothlora.methods.fedit import FedIT

SEEDS = st.integers(0, 2**31)


def product(m: int, n: int, r: int, seed: int, dtype=torch.float64) -> LowRank:
    draw = torch.Generator().manual_seed(seed)
    B = torch.randn(m, r, generator=draw, dtype=torch.float64)
    return LowRank(B.to(dtype), torch.randn(r, n, generator=draw, dtype=torch.float64).to(dtype))


def initial(name: str) -> LowRank:
    A = product(1, 5, 2, len(name)).A
    return LowRank(torch.zeros(4, 2, dtype=A.dtype), A)


def refuse(*_):
    raise AssertionError("FedIT has no use for this")


def layer(name: str, m: int = 4, n: int = 5, rank: int = 2) -> Layer:
    return Layer(name, m, n, rank, scale=2.0, gradient_rank=min(m, n))


LAYERS = {name: layer(name) for name in ("query", "head")}
METHOD = FedIT()


def view(round: int, server_lora: dict[str, LowRank]) -> ClientView:
    return ClientView(
        round=round,
        rounds=5,
        layers=LAYERS,
        server_lora=server_lora,
        kept={},
        kept_round=round - 1,
        received={},
        gradients=refuse,
        initial=initial,
        generator=refuse,
    )


def test_round_zero_starts_at_the_pretrained_weights_and_alike_for_every_client():
    one, other = METHOD.start(view(0, {})), METHOD.start(view(0, {}))
    assert set(one.lora) == set(LAYERS)
    assert not one.shift
    for name in LAYERS:
        assert not one.lora[name].dense().any()
        assert torch.equal(one.lora[name].A, initial(name).A)
        assert torch.equal(one.lora[name].A, other.lora[name].A)


def test_a_client_continues_from_the_factors_of_the_server():
    server = {name: product(4, 5, 2, i) for i, name in enumerate(LAYERS)}
    start = METHOD.start(view(3, server))
    assert not start.shift
    for name in LAYERS:
        assert torch.equal(start.lora[name].B, server[name].B)
        assert torch.equal(start.lora[name].A, server[name].A)


def test_an_upload_is_the_trained_factors_and_nothing_is_kept():
    client = view(1, {})
    trained = {name: product(4, 5, 2, i) for i, name in enumerate(LAYERS)}
    upload = METHOD.upload(trained, METHOD.start(client), client)
    assert set(upload.sent) == set(LAYERS)
    assert not upload.kept
    for name in LAYERS:
        assert torch.equal(upload.sent[name].B, trained[name].B)
        assert torch.equal(upload.sent[name].A, trained[name].A)


@given(
    st.integers(1, 9),
    st.integers(1, 9),
    st.integers(0, 11),
    st.lists(st.integers(0, 500), min_size=1, max_size=6).filter(any),
    SEEDS,
)
@settings(max_examples=50, deadline=None)
def test_the_server_averages_factors_separately_and_merges_nothing(m, n, r, counts, seed):
    names = ("a", "b")
    layers = {name: layer(name, m, n, r) for name in names}
    uploads = [
        {name: product(m, n, r, seed + 10 * i + j) for j, name in enumerate(names)}
        for i in range(len(counts))
    ]
    update = METHOD.aggregate(uploads, counts, ServerView(round=0, rounds=1, layers=layers))
    assert set(update.model) == set(names)
    assert not update.merge
    for name in names:
        for factor in ("B", "A"):
            stacked = np.stack([getattr(upload[name], factor).numpy() for upload in uploads])
            want = np.average(stacked, axis=0, weights=counts)
            assert np.allclose(getattr(update.model[name], factor).numpy(), want, rtol=1e-12, atol=1e-12)


def test_identical_uploads_are_a_fixed_point():
    uploads = [{name: product(4, 5, 2, i) for i, name in enumerate(LAYERS)} for _ in range(3)]
    update = METHOD.aggregate(uploads, [1, 1, 2], ServerView(round=0, rounds=1, layers=LAYERS))
    for name in LAYERS:
        assert torch.allclose(update.model[name].B, uploads[0][name].B, rtol=1e-14)
        assert torch.allclose(update.model[name].A, uploads[0][name].A, rtol=1e-14)


def test_the_mean_of_factors_is_not_the_mean_of_products():
    # FedIT's known inexactness: B1 A1 and (-B1)(-A1) are one matrix, their factors average to 0.
    x = product(4, 5, 2, 0)
    uploads = [{"a": x}, {"a": LowRank(-x.B, -x.A)}]
    layers = {"a": layer("a")}
    update = METHOD.aggregate(uploads, [1, 1], ServerView(round=0, rounds=1, layers=layers))
    assert not update.model["a"].dense().any()


@pytest.mark.parametrize("counts", [[0, 0], [1, -1], [1, math.nan], [1]])
def test_weights_that_cannot_average_are_refused(counts):
    uploads = [{"a": product(4, 5, 2, i)} for i in range(2)]
    layers = {"a": layer("a")}
    with pytest.raises(ValueError, match=r"client weights|cannot average"):
        METHOD.aggregate(uploads, counts, ServerView(round=0, rounds=1, layers=layers))


def test_factors_of_different_ranks_do_not_average():
    uploads = [{"a": product(4, 5, rank, 0)} for rank in (1, 2)]
    layers = {"a": layer("a")}
    with pytest.raises(ValueError, match="cannot average tensors of shapes"):
        METHOD.aggregate(uploads, [1, 1], ServerView(round=0, rounds=1, layers=layers))


def test_a_plain_tensor_in_an_upload_is_refused_with_its_layer():
    layers = {"a": layer("a")}
    with pytest.raises(TypeError, match="layer a"):
        METHOD.aggregate([{"a": torch.zeros(4, 5)}], [1], ServerView(round=0, rounds=1, layers=layers))
