"""FedSmoothLoRA's steps against golden vectors, dense float64 weights and the paper's algebra.

`tests/golden/README.md` says where the golden vectors come from.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from fedsmoothlora.algebra.alignment import (
    average,
    gradient_aligned,
    round_matching,
    start_factors,
    trainable,
    upload_product,
)
from fedsmoothlora.algebra.lowrank import LowRank
from fedsmoothlora.algebra.schedules import learning_rate_at, zeta_at
from fedsmoothlora.algebra.spectral import SIGN_TIE
from fedsmoothlora.methods import ClientView, Layer, ServerView, Start
from fedsmoothlora.methods.fedsmoothlora import FedSmoothLoRA

MODERATE = settings(max_examples=40, deadline=None)
SEEDS = st.integers(0, 2**31)
SIZES = st.integers(1, 14)
BALANCES = st.sampled_from(["sqrt", "left"])
MODES = st.sampled_from(["truncated", "exact"])
F64 = torch.float64

FOLDER = Path(__file__).parents[1] / "golden"
SETTINGS = json.loads((FOLDER / "iid_constant.json").read_text())
TENSORS = load_file(FOLDER / "iid_constant.safetensors")
ROUNDS, SLOTS = len(SETTINGS["rounds"]), len(SETTINGS["rounds"][0]["clients"])
LAYERS = ("blocks.0.attn.qkv", "blocks.1.attn.qkv", "head")
EVERY = [(t, slot, layer) for t in range(ROUNDS) for slot in range(SLOTS) for layer in LAYERS]
LATER = [key for key in EVERY if key[0] > 0]


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=rng(seed), dtype=F64)


def product(m: int, n: int, r: int, seed: int) -> LowRank:
    return LowRank(normal(m, r, seed=seed), normal(r, n, seed=seed + 1))


def dense(x: LowRank) -> Tensor:
    """The product in float64, by no method of `LowRank`."""
    return x.B.to(F64) @ x.A.to(F64)


def svd_r(matrix: Tensor, rank: int) -> Tensor:
    """The best approximation of a rank, dense, by numpy."""
    P, sigma, Qt = np.linalg.svd(matrix.to(F64).numpy(), full_matrices=False)
    return torch.from_numpy((P[:, :rank] * sigma[:rank]) @ Qt[:rank])


def assert_close(got: Tensor, want: Tensor, relative: float = 1e-10, floor: float = 0.0) -> None:
    """``||got - want|| <= relative (||want|| + floor)``."""
    assert got.shape == want.shape
    assert float((got - want).norm()) <= relative * (float(want.norm()) + floor)


# -- golden vectors: the published code's numbers --------------------------------------------------


def golden(*path: object) -> Tensor:
    return TENSORS["/".join(map(str, path))].to(F64)


def factors(*path: object) -> LowRank:
    return LowRank(golden(*path, "B"), golden(*path, "A"))


@pytest.mark.parametrize(("t", "slot", "layer"), EVERY)
def test_golden_gradients_give_the_published_gradient_aligned_matrices(t, slot, layer):
    gradient = golden(f"round{t}", f"slot{slot}", "gradient", layer)
    want = factors(f"round{t}", f"slot{slot}", "gradient_aligned", layer)
    got = gradient_aligned(gradient, SETTINGS["rank"], SETTINGS["gamma"])
    assert got.rank == SETTINGS["rank"]
    # Signs of columns are arbitrary in the published code: compare each column's projector.
    for k in range(SETTINGS["rank"]):
        assert_close(torch.outer(got.B[:, k], got.B[:, k]), torch.outer(want.B[:, k], want.B[:, k]), 2e-5)
        assert_close(torch.outer(got.A[k], got.A[k]), torch.outer(want.A[k], want.A[k]), 2e-5)
    assert_close(got.B @ got.B.mT, want.B @ want.B.mT, 2e-5)
    assert_close(got.A.mT @ got.A, want.A.mT @ want.A, 2e-5)


@pytest.mark.parametrize(("t", "slot", "layer"), LATER)
def test_golden_uploads_give_the_published_round_matching(t, slot, layer):
    upload = LowRank.from_dense(golden(f"round{t}", f"slot{slot}", "previous_upload_product", layer), 2)
    before = golden(f"round{t}", "server_before_product", layer)
    server = factors(f"round{t - 1}", "server_after", layer)
    assert_close(dense(server), before, 1e-5)
    for update in (LowRank.from_dense(before, 2), server):
        got = round_matching(upload, [update], SETTINGS["rounds"][t]["zeta"], missed=0)
        assert_close(dense(got), golden(f"round{t}", f"slot{slot}", "round_matching", layer), 1e-5)


@pytest.mark.parametrize("balance", ["sqrt", "left"])
@pytest.mark.parametrize(("t", "slot", "layer"), LATER)
def test_golden_matches_give_the_published_start(t, slot, layer, balance):
    ga = factors(f"round{t}", f"slot{slot}", "gradient_aligned", layer)
    rm = LowRank.from_dense(golden(f"round{t}", f"slot{slot}", "round_matching", layer))
    lora, shift = start_factors(ga, rm, SETTINGS["rank"], "truncated", balance)
    init = factors(f"round{t}", f"slot{slot}", "init", layer)
    assert_close(dense(lora), dense(init), 1e-5)
    assert_close(dense(shift), -dense(ga), 1e-12)
    if balance == "sqrt":  # the published image code's factors, up to a sign a column
        assert_close((lora.B * init.B).sum(dim=0).abs(), (init.B**2).sum(dim=0), 1e-4)
        assert_close((lora.A * init.A).sum(dim=1).abs(), (init.A**2).sum(dim=1), 1e-4)


@pytest.mark.parametrize(("t", "slot", "layer"), EVERY)
def test_golden_trained_factors_give_the_published_upload(t, slot, layer):
    trained = factors(f"round{t}", f"slot{slot}", "trained", layer)
    ga = factors(f"round{t}", f"slot{slot}", "gradient_aligned", layer)
    got = upload_product(trained, -ga, SETTINGS["rank"])
    assert got.rank == SETTINGS["rank"]
    assert_close(dense(got), dense(factors(f"round{t}", f"slot{slot}", "upload", layer)), 1e-5)


@pytest.mark.parametrize("t", range(ROUNDS))
@pytest.mark.parametrize("layer", LAYERS)
def test_golden_uploads_give_the_published_average_and_server_update(t, layer):
    uploads = [factors(f"round{t}", f"slot{slot}", "upload", layer) for slot in range(SLOTS)]
    counts = SETTINGS["rounds"][t]["counts"]
    assert_close(dense(average(uploads, counts, None)), golden(f"round{t}", "average_product", layer), 1e-5)
    server = average(uploads, counts, SETTINGS["rank"])
    assert server.rank == SETTINGS["rank"]
    assert_close(dense(server), dense(factors(f"round{t}", "server_after", layer)), 1e-5)


def test_golden_settings_are_those_of_the_schedules_and_of_rslora():
    assert SETTINGS["scale"] == pytest.approx(SETTINGS["alpha"] / math.sqrt(SETTINGS["rank"]))
    for t, record in enumerate(SETTINGS["rounds"]):
        assert record["lr"] == pytest.approx(learning_rate_at(t, ROUNDS, 0.01), rel=1e-12)
        assert record["zeta"] in (None, zeta_at(t, ROUNDS))


# -- Gradient-Aligned ------------------------------------------------------------------------------


@st.composite
def gradients_and_ranks(draw) -> tuple[Tensor, int]:
    m, n = draw(st.integers(2, 20)), draw(st.integers(2, 20))
    return normal(m, n, seed=draw(SEEDS)), draw(st.integers(1, min(m, n) // 2))


@given(gradients_and_ranks(), st.floats(0.01, 1e4))
@MODERATE
def test_all_singular_values_of_gradient_aligned_are_sqrt_m_over_gamma(case, gamma):
    gradient, rank = case
    ga = gradient_aligned(gradient, rank, gamma)
    assert ga.rank == rank
    sigma = np.linalg.svd(dense(ga).numpy(), compute_uv=False)
    want = np.zeros(min(gradient.shape))
    want[:rank] = math.sqrt(gradient.shape[0]) / gamma
    assert np.allclose(sigma, want, rtol=1e-9, atol=1e-9 * want[0])


@given(gradients_and_ranks(), st.floats(0.01, 1e4))
@MODERATE
def test_gradient_aligned_takes_the_second_r_left_and_the_first_r_right_directions(case, gamma):
    gradient, rank = case
    ga = gradient_aligned(gradient, rank, gamma)
    P, _, Qt = np.linalg.svd(gradient.numpy(), full_matrices=False)
    c2 = math.sqrt(gradient.shape[0]) / gamma  # c squared
    for k in range(rank):
        p, q = P[:, rank + k], Qt[k]
        assert_close(torch.outer(ga.B[:, k], ga.B[:, k]), c2 * torch.from_numpy(np.outer(p, p)), 1e-6)
        assert_close(torch.outer(ga.A[k], ga.A[k]), c2 * torch.from_numpy(np.outer(q, q)), 1e-6)


@given(gradients_and_ranks(), st.sampled_from([torch.float32, F64]))
@MODERATE
def test_the_largest_entry_of_each_gradient_aligned_direction_is_positive(case, dtype):
    gradient, rank = case
    for sign in (1, -1):  # whichever signs an SVD happens to return
        ga = gradient_aligned((sign * gradient).to(dtype), rank, 64.0)
        assert bool((ga.B.amax(dim=0) >= (1 - SIGN_TIE) * ga.B.abs().amax(dim=0)).all())
        assert bool((ga.A.amax(dim=1) >= (1 - SIGN_TIE) * ga.A.abs().amax(dim=1)).all())


@given(gradients_and_ranks(), st.floats(1e-6, 1e6))
@MODERATE
def test_gradient_aligned_does_not_depend_on_the_size_of_the_gradient(case, scale):
    gradient, rank = case
    want = gradient_aligned(gradient, rank, 16.0)
    assert_close(dense(gradient_aligned(scale * gradient, rank, 16.0)), dense(want), 1e-6)


@given(st.integers(2, 30), st.integers(2, 30), st.data())
@MODERATE
def test_a_gradient_with_fewer_than_2r_directions_gives_the_zero_product(m, n, data):
    rank = data.draw(st.integers(1, min(m, n) // 2), label="rank")
    directions = data.draw(st.integers(0, 2 * rank - 1), label="directions")
    gradient = dense(product(m, n, directions, data.draw(SEEDS)))
    for dtype in (torch.float32, F64):
        ga = gradient_aligned(gradient.to(dtype), rank, 64.0)
        assert (ga.shape, ga.rank, ga.dtype) == ((m, n), 0, dtype)


@given(st.integers(1, 30), st.integers(1, 30), st.integers(1, 12), st.data())
@MODERATE
def test_a_partial_start_takes_half_of_the_directions_that_there_are(m, n, rank, data):
    directions = data.draw(st.integers(0, min(m, n)), label="directions")
    gradient = dense(product(m, n, directions, data.draw(SEEDS)))
    P, sigma, Qt = np.linalg.svd(gradient.numpy())
    there = min(int((sigma >= 1e-6 * sigma[0]).sum()) if sigma[0] > 0 else 0, 2 * rank)
    k = there // 2
    ga = gradient_aligned(gradient, rank, 64.0, partial=True)
    assert ga.rank == k
    c2 = m**0.5 / 64.0
    assert_close(ga.B.mT @ ga.B, c2 * torch.eye(k, dtype=F64), 1e-8)
    assert_close(ga.A @ ga.A.mT, c2 * torch.eye(k, dtype=F64), 1e-8)
    if k:  # in the spaces of P[:, k:2k] and Q[:, :k], wherever these are determined
        gaps = sigma[:-1] - sigma[1:] > 1e-3 * sigma[0]
        if all(gaps[i - 1] for i in (k, 2 * k) if i < len(sigma)):
            left = torch.from_numpy(P[:, k : 2 * k] @ P[:, k : 2 * k].T)
            right = torch.from_numpy(Qt[:k].T @ Qt[:k])
            assert_close(ga.B @ ga.B.mT, c2 * left, 1e-4)
            assert_close(ga.A.mT @ ga.A, c2 * right, 1e-4)


def test_a_whole_gradient_gives_the_same_start_with_and_without_partial():
    gradient = normal(20, 16, seed=3)
    whole, partial = (gradient_aligned(gradient, 4, 64.0, partial=partial) for partial in (False, True))
    assert torch.equal(whole.B, partial.B)
    assert torch.equal(whole.A, partial.A)


@pytest.mark.parametrize("shape", [(400, 300), (300, 400), (1152, 384)])
@pytest.mark.parametrize("directions", [0, 1, 5, 7])
def test_a_big_gradient_with_fewer_than_2r_directions_gives_the_zero_product(shape, directions):
    gradient = dense(product(*shape, directions, 0))
    for dtype in (torch.float32, F64):
        assert gradient_aligned(gradient.to(dtype), 4, 64.0).rank == 0
    assert gradient_aligned(dense(product(*shape, 8, 0)), 4, 64.0).rank == 4


@pytest.mark.parametrize("classes", [4, 10])
def test_a_softmax_head_has_one_direction_less_than_classes(classes):
    logits = torch.softmax(normal(64, classes, seed=0), dim=1)
    targets = torch.eye(classes, dtype=F64)[torch.arange(64) % classes]
    gradient = (logits - targets).mT @ normal(64, 32, seed=1)  # columns of dY sum to zero
    for dtype in (torch.float32, F64):
        assert gradient_aligned(gradient.to(dtype), classes // 2, 64.0).rank == 0
        assert gradient_aligned(gradient.to(dtype), classes // 2 - 1, 64.0).rank == classes // 2 - 1


@pytest.mark.parametrize(("ratio", "rank"), [(2e-6, 1), (5e-7, 0)])
def test_the_threshold_on_the_last_singular_value_is_a_millionth_of_the_first(ratio, rank):
    gradient = torch.zeros(5, 4, dtype=F64)
    gradient[0, 0], gradient[1, 1] = 3.0, 3.0 * ratio
    assert gradient_aligned(gradient, 1, 64.0).rank == rank


@pytest.mark.parametrize(
    ("shape", "rank"), [((5, 9), 3), ((9, 5), 3), ((1, 1), 1), ((1, 50), 1), ((8, 8), 0), ((8, 8), -1)]
)
def test_a_rank_that_the_shape_cannot_serve_is_refused_with_those_it_can(shape, rank):
    with pytest.raises(ValueError, match=f"choose a rank from 1 to {min(shape) // 2}"):
        gradient_aligned(torch.ones(shape), rank, 64.0)


@pytest.mark.parametrize("gamma", [0.0, -1.0, math.nan])
def test_gamma_must_be_above_zero(gamma):
    with pytest.raises(ValueError, match="gamma must be above 0"):
        gradient_aligned(normal(6, 6, seed=0), 1, gamma)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_is_refused(bad):
    gradient = normal(6, 6, seed=0)
    gradient[0, 0] = bad
    with pytest.raises(ValueError, match="not finite"):
        gradient_aligned(gradient, 1, 64.0)


# -- Round-Matching --------------------------------------------------------------------------------


@st.composite
def histories(draw) -> tuple[LowRank, list[LowRank]]:
    m, n = draw(SIZES), draw(SIZES)
    ranks = draw(st.lists(st.integers(0, 4), min_size=1, max_size=5))
    return product(m, n, draw(st.integers(0, 4)), draw(SEEDS)), [
        product(m, n, rank, draw(SEEDS)) for rank in ranks
    ]


@given(histories(), st.floats(0, 1), st.floats(0, 1))
@MODERATE
def test_round_matching_is_its_formula_and_fades_by_the_rounds_missed(history, zeta, rho):
    upload, updates = history
    missed = len(updates) - 1
    want = zeta * rho**missed * (dense(upload) - sum(dense(update) for update in updates))
    floor = float(dense(upload).norm()) + sum(float(dense(update).norm()) for update in updates)
    listed = round_matching(upload, updates, zeta, staleness=rho)
    summed = LowRank.weighted_sum(updates, [1.0] * len(updates))
    as_one = round_matching(upload, [summed], zeta, staleness=rho, missed=missed)
    assert_close(dense(listed), want, 1e-12, floor)
    assert_close(dense(as_one), want, 1e-12, floor)
    assert listed.rank <= upload.rank + sum(update.rank for update in updates)


@given(histories())
@MODERATE
def test_the_fading_factor_is_rho_to_the_rounds_missed_and_a_half_by_default(history):
    upload, updates = history
    literal = dense(round_matching(upload, updates, 1.0, staleness=1.0))
    floor = sum(float(dense(x).norm()) for x in [upload, *updates])  # they may cancel
    for missed in range(4):
        faded = dense(round_matching(upload, updates, 1.0, missed=missed))
        assert_close(faded, 0.5**missed * literal, 1e-12, floor)
        for rho in (0.0, 0.3, 1.0):
            faded = dense(round_matching(upload, updates, 1.0, staleness=rho, missed=missed))
            assert_close(faded, rho**missed * literal, 1e-12, floor)  # 0 ** 0 is 1: nothing was missed


def test_a_match_of_factor_zero_is_a_product_of_rank_zero():
    upload, update = product(5, 4, 2, 0), product(5, 4, 2, 9)
    for zeta, rho, missed in [(0.0, 1.0, 0), (1.0, 0.0, 1), (0.0, 0.5, 3)]:
        match = round_matching(upload, [update], zeta, staleness=rho, missed=missed)
        assert (match.rank, match.shape, match.dtype) == (0, (5, 4), F64)


def test_a_match_without_updates_is_the_upload():
    upload = product(5, 4, 2, 0)
    assert_close(dense(round_matching(upload, [], 0.5)), 0.5 * dense(upload))


def test_round_matching_refuses_impossible_histories():
    with pytest.raises(ValueError, match="missed -1"):
        round_matching(product(5, 4, 2, 0), [], 1.0, missed=-1)
    with pytest.raises(ValueError, match="different shapes"):
        round_matching(product(5, 4, 2, 0), [product(4, 5, 2, 0)], 1.0)


# -- start -----------------------------------------------------------------------------------------


@st.composite
def starts(draw) -> tuple[LowRank, LowRank, int]:
    """GA (or none), R and a rank."""
    m, n = draw(st.integers(2, 14)), draw(st.integers(2, 14))
    rank = draw(st.integers(1, min(m, n) // 2))
    has_ga = draw(st.booleans())
    gamma = draw(st.sampled_from([0.2, 4.0, 256.0]))  # GA above, among and below R's singular values
    ga = gradient_aligned(normal(m, n, seed=draw(SEEDS)), rank, gamma)
    rm = product(m, n, draw(st.integers(1, 6)), draw(SEEDS))
    return (ga if has_ga else LowRank.zeros(m, n, dtype=F64)), rm, rank


@given(starts(), BALANCES)
@MODERATE
def test_a_truncated_start_trains_svd_r_over_a_backbone_less_ga(case, balance):
    ga, rm, rank = case
    lora, shift = start_factors(ga, rm, rank, "truncated", balance)
    both = dense(ga) + dense(rm)
    assert lora.rank <= rank
    # Eckart-Young, which holds where singular values repeat too.
    tail = np.linalg.svd(both.numpy(), compute_uv=False)[rank:]
    error = float((dense(lora) - both).norm())
    assert error == pytest.approx(float(np.linalg.norm(tail)), rel=1e-8, abs=1e-11 * float(both.norm()))
    assert_close(dense(shift), -dense(ga), 1e-12)
    # Effective start: W + s (SVD_r(GA + R) - GA).
    W, s = normal(*ga.shape, seed=5), 2.8
    assert_close(W + s * (dense(shift) + dense(lora)), W + s * (dense(lora) - dense(ga)), 1e-12)


@given(starts(), BALANCES)
@MODERATE
def test_an_exact_start_begins_at_the_match_itself(case, balance):
    ga, rm, rank = case
    lora, shift = start_factors(ga, rm, rank, "exact", balance)
    truncated, _ = start_factors(ga, rm, rank, "truncated", balance)
    floor = float(dense(ga).norm() + dense(lora).norm())
    assert_close(dense(lora) + dense(shift), dense(rm), 1e-12, floor)
    assert torch.equal(dense(lora), dense(truncated))


@given(starts(), MODES, BALANCES)
@MODERATE
def test_without_truncation_both_modes_begin_at_the_match(case, mode, balance):
    ga, rm, _ = case
    lora, shift = start_factors(ga, rm, None, mode, balance)
    assert_close(dense(lora) + dense(shift), dense(rm), 1e-11, float(dense(ga).norm()))
    assert_close(dense(lora), dense(ga) + dense(rm), 1e-11, float(dense(ga).norm() + dense(rm).norm()))


@given(starts(), MODES, BALANCES, st.booleans(), st.booleans())
@MODERATE
def test_a_match_of_zero_leaves_gradient_aligned_unrotated(case, mode, balance, with_columns, truncates):
    ga, rm, rank = case
    zero = LowRank(0 * rm.B, rm.A) if with_columns else LowRank.zeros(*rm.shape, dtype=F64)
    lora, shift = start_factors(ga, zero, rank if truncates else None, mode, balance)
    assert torch.equal(lora.B, ga.B)
    assert torch.equal(lora.A, ga.A)
    assert torch.equal(dense(shift), -dense(ga))


@pytest.mark.parametrize("balance", ["sqrt", "left"])
def test_a_client_whose_upload_is_the_server_update_starts_as_a_newcomer(balance):
    # The only client of a round: S = SVD_r(U) = U, so R = 0 but for rounding.
    upload = product(48, 36, 2, 0).to(dtype=torch.float32).truncate(2, balance)
    server = average([upload], [200], 2, balance)
    match = round_matching(upload, [server], 1.0, missed=0)
    ga = gradient_aligned(normal(48, 36, seed=4).float(), 2, 64.0)
    lora, _ = start_factors(ga, match, 2, "truncated", balance)
    assert_close(lora.B.double(), ga.B.double(), 1e-3)


def test_a_client_whose_upload_is_the_server_update_can_train_without_gradient_aligned():
    upload = product(48, 36, 2, 0).to(dtype=torch.float32).truncate(2)
    match = round_matching(upload, [average([upload], [200], 2)], 1.0, missed=0)
    lora, _ = start_factors(LowRank.zeros(48, 36), match, 2)
    ready = trainable(lora, 2, rng(0))
    assert float(ready.A.norm(dim=1).min()) > 0.1  # rows within 1/sqrt(n) have a norm of about 0.58


def test_an_unknown_start_is_refused():
    x = product(4, 4, 1, 0)
    with pytest.raises(ValueError, match="'truncated' or 'exact'; got 'warm'"):
        start_factors(x, x, 1, "warm")  # type: ignore[arg-type]


def test_a_match_of_another_shape_is_refused():
    with pytest.raises(ValueError, match="different shapes"):
        start_factors(product(4, 5, 1, 0), product(5, 4, 1, 0), 1)


@given(SIZES, SIZES, st.integers(0, 3), st.integers(1, 4), SEEDS)
@MODERATE
def test_trainable_keeps_the_product_and_lets_every_row_move(m, n, has, rank, seed):
    lora = product(m, n, has, seed).to(dtype=torch.float32)
    ready = trainable(lora, rank, rng(seed))
    assert ready.rank == max(rank, has)
    assert ready.dtype == lora.dtype
    assert torch.equal(ready.B[:, :has], lora.B)
    assert torch.equal(ready.A[:has], lora.A)
    assert not ready.B[:, has:].any()
    assert torch.equal(dense(ready), dense(LowRank(ready.B[:, :has], ready.A[:has])))
    # The gradient of <G, B A> in (B, A) is (G A^T, B^T G): no direction may have neither.
    gradient = torch.randn(m, n, generator=rng(seed + 2))
    in_B, in_A = gradient @ ready.A.mT, ready.B.mT @ gradient
    assert bool((in_B.abs().amax(dim=0) + in_A.abs().amax(dim=1) > 0).all())


def test_trainable_draws_rows_as_peft_does_and_from_its_generator_alone():
    empty = LowRank.zeros(3, 400)
    before = torch.get_rng_state()
    rows = trainable(empty, 50, rng(0)).A
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(rows, trainable(empty, 50, rng(0)).A)
    assert not torch.equal(rows, trainable(empty, 50, rng(1)).A)
    # kaiming_uniform_(a=sqrt(5)) is uniform within 1/sqrt(n): standard deviation 1/sqrt(3n).
    assert float(rows.abs().max()) <= 1 / math.sqrt(400)
    assert float(rows.std()) == pytest.approx(1 / math.sqrt(3 * 400), rel=0.03)
    assert float(rows.mean()) == pytest.approx(0, abs=1e-3)


@pytest.mark.parametrize("mode", ["truncated", "exact"])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_directions_beyond_the_rank_of_the_match_get_rows_that_move(mode, dtype):
    one = product(40, 30, 1, 0)
    # Rank 1 written with 3 columns, as U - S is where uploads share a direction.
    match = LowRank(torch.cat([one.B, 2 * one.B, -one.B], dim=1), torch.cat([one.A] * 3)).to(dtype=dtype)
    lora, shift = start_factors(LowRank.zeros(40, 30, dtype=dtype), match, 3, mode)
    assert lora.rank == 1
    ready = trainable(lora, 3, rng(0))
    assert float(ready.A.norm(dim=1).min()) > 0.1
    assert_close(dense(ready) + dense(shift), dense(match), 1e-5)


# -- upload and average ----------------------------------------------------------------------------


@given(starts(), MODES, BALANCES, SEEDS)
@MODERATE
def test_an_upload_is_the_best_approximation_of_what_moved(case, mode, balance, seed):
    ga, rm, rank = case
    _, shift = start_factors(ga, rm, rank, mode, balance)
    trained = product(*ga.shape, rank, seed)
    moved = dense(trained) + dense(shift)
    sigma = np.linalg.svd(moved.numpy(), compute_uv=False)
    upload = upload_product(trained, shift, rank, balance)
    assert upload.rank == min(rank, *ga.shape)
    error = float((dense(upload) - moved).norm())
    assert error == pytest.approx(float(np.linalg.norm(sigma[rank:])), rel=1e-8, abs=1e-11 * sigma[0])
    assert_close(dense(upload_product(trained, shift, None, balance)), moved, 1e-11, sigma[0])


@given(
    SIZES,
    SIZES,
    st.lists(st.tuples(st.integers(0, 5), st.integers(1, 900)), min_size=1, max_size=5),
    st.none() | st.integers(1, 6),
    SEEDS,
)
@MODERATE
def test_the_average_is_svd_r_of_the_mean_of_products(m, n, clients, rank, seed):
    uploads = [product(m, n, r, seed + 10 * i) for i, (r, _) in enumerate(clients)]
    counts = [count for _, count in clients]
    mean = sum(c / sum(counts) * dense(u) for u, c in zip(uploads, counts, strict=True))
    sigma = np.linalg.svd(mean.numpy(), compute_uv=False)
    tail = 0.0 if rank is None else float(np.linalg.norm(sigma[rank:]))
    floor = sum(float(u.B.norm() * u.A.norm()) for u in uploads)
    got = average(uploads, counts, rank)
    assert float((dense(got) - mean).norm()) == pytest.approx(tail, rel=1e-8, abs=1e-11 * floor)
    shares = average(uploads, [count / 7 for count in counts], rank)  # weights are normalised
    assert float((dense(shares) - mean).norm()) == pytest.approx(tail, rel=1e-8, abs=1e-11 * floor)
    backwards = average(uploads[::-1], counts[::-1], None)
    assert_close(dense(backwards), mean, 1e-11, floor)


def test_the_average_in_client_order_does_not_depend_on_the_order_of_arrival():
    uploads = {client: product(20, 15, 2, 3 * client).to(dtype=torch.float32) for client in range(5)}
    results = []
    for arrival in ([0, 1, 2, 3, 4], [3, 0, 4, 2, 1]):
        arrived = {client: uploads[client] for client in arrival}
        order = sorted(arrived)
        results.append(average([arrived[c] for c in order], [c + 1 for c in order], 2))
    assert torch.equal(results[0].B, results[1].B)
    assert torch.equal(results[0].A, results[1].A)


@pytest.mark.parametrize("weights", [[], [0, 0], [1, -1], [1, math.nan], [1, math.inf], [1], [1, 1, 1]])
def test_weights_that_cannot_average_are_refused(weights):
    with pytest.raises(ValueError, match=r"client weights|as many weights"):
        average([product(4, 3, 1, 0), product(4, 3, 1, 5)], weights, 1)


def test_uploads_of_different_shapes_are_refused():
    with pytest.raises(ValueError, match="different shapes"):
        average([product(4, 3, 1, 0), product(3, 4, 1, 5)], [1, 1], 1)


# -- the whole algorithm, without truncation, is independent training and averaging ----------------


def simulate(
    *, seed: int, s: float, zeta: float, mode, balance, participants: Sequence[Sequence[int]], merged: bool
):
    """FedSmoothLoRA by its pure functions, dense weights in float64, random local training.

    Yields ``(client, start, W^t, its own last local weight or None)`` for every visit.
    """
    m, n, rank = 7, 9, 2
    W = normal(m, n, seed=seed)
    counts = [100, 300, 50, 220]
    uploads: dict[int, LowRank] = {}
    since: dict[int, list[LowRank]] = {}
    local: dict[int, Tensor] = {}
    for t, clients in enumerate(participants):
        sent = []
        for c in clients:
            draw = seed + 1000 * (t + 1) + 10 * c
            rm = LowRank.zeros(m, n, dtype=F64)
            if c in uploads:
                history, missed = since[c], len(since[c]) - 1
                if merged:
                    history = [LowRank.weighted_sum(history, [1.0] * len(history))]
                rm = round_matching(uploads[c], history, zeta, staleness=1.0, missed=missed)
            ga = gradient_aligned(normal(m, n, seed=draw), rank, 4.0)
            lora, shift = start_factors(ga, rm, None, mode, balance)
            yield c, W + s * (dense(lora) + dense(shift)), W, local.get(c)
            trained = lora + product(m, n, rank, draw + 1)  # any local training
            local[c] = W + s * (dense(trained) + dense(shift))
            uploads[c] = upload_product(trained, shift, None, balance)
            since[c] = []
            sent.append(c)
        update = average([uploads[c] for c in sent], [counts[c] for c in sent], None, balance)
        W = W + s * dense(update)
        total = sum(counts[c] for c in sent)
        assert_close(W, sum(counts[c] / total * local[c] for c in sent), 1e-9)  # FedAvg of local weights
        for c in since:
            since[c].append(update)


@given(SEEDS, st.sampled_from([0.3, 1.0, 2.8284]), st.sampled_from([0.0, 0.37, 1.0]), MODES, BALANCES)
@settings(max_examples=25, deadline=None)
def test_full_participation_without_truncation_blends_global_and_own_weights(seed, s, zeta, mode, balance):
    visits = simulate(
        seed=seed, s=s, zeta=zeta, mode=mode, balance=balance, participants=[range(4)] * 4, merged=False
    )
    for _, start, W, own in visits:
        assert_close(start, W if own is None else (1 - zeta) * W + zeta * own, 1e-9)


@given(
    SEEDS,
    st.sampled_from([0.3, 1.0, 2.8284]),
    MODES,
    BALANCES,
    st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=4, unique=True), min_size=2, max_size=7),
    st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_a_returning_client_starts_at_its_own_last_weights_where_nothing_fades(
    seed, s, mode, balance, participants, merged
):
    visits = simulate(
        seed=seed, s=s, zeta=1.0, mode=mode, balance=balance, participants=participants, merged=merged
    )
    for _, start, W, own in visits:
        assert_close(start, W if own is None else own, 1e-8)


# -- the interface ---------------------------------------------------------------------------------


def adapted(name: str, m: int, n: int, rank: int, scale: float, classes: bool = False) -> Layer:
    return Layer(name, m, n, rank, scale, gradient_rank=min(m - classes, n))


SHAPES = {"qkv": adapted("qkv", 18, 12, 2, 1.7), "head": adapted("head", 8, 12, 3, 0.6, classes=True)}


class Quadratic:
    """``f(W) = ||W - target||^2 / 2`` a layer: its gradient at ``W^t + s R`` is ``W^t + s R - target``."""

    def __init__(self, weights: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> None:
        self.weights, self.target = weights, target
        self.asked: list[Mapping[str, LowRank]] = []

    def __call__(self, at: Mapping[str, LowRank]) -> dict[str, Tensor]:
        self.asked.append(dict(at))
        return {
            name: self.weights[name] + SHAPES[name].scale * dense(at[name]) - self.target[name] for name in at
        }


def weights(seed: int) -> dict[str, Tensor]:
    return {name: normal(layer.m, layer.n, seed=seed + i) for i, (name, layer) in enumerate(SHAPES.items())}


def products(seed: int, rank: int = 2) -> dict[str, LowRank]:
    return {
        name: product(layer.m, layer.n, rank, seed + 7 * i) for i, (name, layer) in enumerate(SHAPES.items())
    }


def refuse(name: str):
    raise AssertionError(f"FedSmoothLoRA has no use for this: {name}")


def view(round: int = 0, rounds: int = 10, gradients=refuse, **changes) -> ClientView:
    given = {
        "layers": SHAPES,
        "server_lora": {},
        "kept": {},
        "kept_round": -1,
        "received": {},
        "initial": refuse,
        "generator": lambda name: rng(len(name)),
    }
    return ClientView(round=round, rounds=rounds, gradients=gradients, **{**given, **changes})


def returning(round: int, missed: int = 0, **changes) -> ClientView:
    problem = changes.pop("gradients", Quadratic(weights(0), weights(50)))
    changes = {"kept": products(100), "received": products(200, 4), **changes}
    return view(round, gradients=problem, kept_round=round - 1 - missed, **changes)


def run(client: ClientView, **options) -> Start:
    return FedSmoothLoRA(**options).start(client)


@pytest.mark.parametrize("mode", ["truncated", "exact"])
@pytest.mark.parametrize("aligned", [True, False])
def test_round_zero_starts_at_the_pretrained_weights(mode, aligned):
    start = run(
        view(gradients=Quadratic(weights(0), weights(50))),
        start_mode=mode,
        gradient_aligned="client" if aligned else "none",
    )
    assert set(start.lora) == set(start.shift) == set(SHAPES)
    for name, layer in SHAPES.items():
        assert start.lora[name].rank == layer.rank
        moved = dense(start.lora[name]) + dense(start.shift[name])
        assert float(moved.abs().max()) <= 1e-15
        if aligned:
            assert float(dense(start.lora[name]).norm()) > 0


def test_round_zero_trains_the_gradient_aligned_factors_of_the_pretrained_weights():
    pretrained, target = weights(0), weights(50)
    problem = Quadratic(pretrained, target)
    start = run(view(gradients=problem), gamma=16.0)
    assert len(problem.asked) == 1
    assert all(float(dense(at).norm()) == 0 for at in problem.asked[0].values())
    for name, layer in SHAPES.items():
        want = gradient_aligned(pretrained[name] - target[name], layer.rank, 16.0)
        assert torch.equal(start.lora[name].B, want.B)
        assert torch.equal(start.lora[name].A, want.A)
    assert not start.notes


@pytest.mark.parametrize("schedule", ["constant", "cosine", "linear"])
@pytest.mark.parametrize("missed", [0, 1, 3])
def test_the_gradient_is_asked_for_at_the_faded_match_of_the_schedule(schedule, missed):
    t, T, top, floor, rho = 6, 10, 0.8, 0.2, 0.7
    zeta = {
        "constant": top,
        "cosine": floor + (top - floor) / 2 * (1 + math.cos(math.pi * t / T)),
        "linear": top - (top - floor) * t / T,
    }[schedule]
    client = returning(t, missed)
    run(client, zeta=top, zeta_floor=floor, zeta_schedule=schedule, staleness=rho)
    (asked,) = client.gradients.asked
    for name in SHAPES:
        want = zeta * rho**missed * (dense(client.kept[name]) - dense(client.received[name]))
        assert_close(dense(asked[name]), want, 1e-12)


@pytest.mark.parametrize("mode", ["truncated", "exact"])
def test_a_returning_client_starts_at_svd_r_of_ga_plus_match(mode):
    client = returning(4)
    start = run(client, start_mode=mode, gamma=8.0)
    for name, layer in SHAPES.items():
        match = dense(client.kept[name]) - dense(client.received[name])
        gradient = client.gradients.weights[name] + layer.scale * match - client.gradients.target[name]
        ga = dense(gradient_aligned(gradient, layer.rank, 8.0))
        assert_close(dense(start.lora[name]), svd_r(ga + match, layer.rank), 1e-8)
        if mode == "truncated":
            assert_close(dense(start.shift[name]), -ga, 1e-8)
        else:
            assert_close(dense(start.lora[name]) + dense(start.shift[name]), match, 1e-10)


def test_round_matching_off_forgets_the_own_upload():
    client = returning(4)
    start = run(client, round_matching=False)
    (asked,) = client.gradients.asked
    for name in SHAPES:
        assert float(dense(asked[name]).norm()) == 0
        assert float((dense(start.lora[name]) + dense(start.shift[name])).norm()) < 1e-12
    newcomer = run(view(4, gradients=Quadratic(weights(0), weights(50))))
    assert all(torch.equal(start.lora[name].B, newcomer.lora[name].B) for name in SHAPES)


def test_zeta_zero_is_round_matching_off():
    off, zero = run(returning(4), round_matching=False), run(returning(4), zeta=0.0)
    for name in SHAPES:
        assert torch.equal(off.lora[name].B, zero.lora[name].B)
        assert torch.equal(off.lora[name].A, zero.lora[name].A)
        assert torch.equal(dense(off.shift[name]), dense(zero.shift[name]))


@pytest.mark.parametrize("mode", ["truncated", "exact"])
def test_gradient_aligned_off_asks_for_no_gradient_and_starts_at_the_match(mode):
    client = returning(4, gradients=refuse)
    start = run(client, gradient_aligned="none", start_mode=mode)
    assert not start.notes
    for name, layer in SHAPES.items():
        match = dense(client.kept[name]) - dense(client.received[name])
        assert_close(dense(start.lora[name]), svd_r(match, layer.rank), 1e-9)
        shift = dense(start.shift[name])
        assert_close(
            shift, torch.zeros_like(match) if mode == "truncated" else match - svd_r(match, layer.rank)
        )


def test_everything_off_starts_as_lora_does():
    start = run(returning(4, gradients=refuse), gradient_aligned="none", round_matching=False)
    for name, layer in SHAPES.items():
        assert not start.lora[name].B.any()
        want = (torch.rand(layer.rank, layer.n, generator=rng(len(name))) * 2 - 1) / math.sqrt(layer.n)
        assert torch.equal(start.lora[name].A, want)  # the client's own generator of that layer
        assert not dense(start.shift[name]).any()


def test_a_gradient_of_too_few_directions_is_noted_with_its_layer_and_training_can_move():
    pretrained = weights(0)
    target = {**pretrained, "head": pretrained["head"] - dense(product(8, 12, 8, 3))}
    start = run(view(gradients=Quadratic(pretrained, target)))  # no gradient for qkv
    (note,) = start.notes
    assert "qkv" in note
    assert "4 directions" in note
    assert not start.lora["qkv"].B.any()
    assert float(start.lora["qkv"].A.norm(dim=1).min()) > 0.1
    assert start.lora["qkv"].rank == SHAPES["qkv"].rank
    assert not dense(start.shift["qkv"]).any()
    assert float(dense(start.lora["head"]).norm()) > 0


@pytest.mark.parametrize(
    ("m", "n", "classes", "highest"),
    [(8, 12, False, 4), (12, 8, False, 4), (9, 12, True, 4), (8, 12, True, 3)],
)
def test_a_rank_is_checked_against_the_directions_that_a_gradient_can_have(m, n, classes, highest):
    method = FedSmoothLoRA()
    method.check({**SHAPES, "it": adapted("it", m, n, highest, 1.0, classes)}, partial=False)
    too_high = {**SHAPES, "it": adapted("it", m, n, highest + 1, 1.0, classes)}
    with pytest.raises(ValueError, match="layer it has rank") as error:
        method.check(too_high, partial=False)
    assert f"to {highest} or less" in str(error.value)
    FedSmoothLoRA(gradient_aligned="none").check(too_high, partial=False)


def test_a_rank_impossible_by_shape_is_refused_at_the_start():
    layer = adapted("head", 5, 12, 3, 1.0)
    client = view(layers={"head": layer}, gradients=lambda at: {"head": normal(5, 12, seed=0)})
    with pytest.raises(ValueError, match="rank from 1 to 2"):
        run(client)


@pytest.mark.parametrize("balance", ["sqrt", "left"])
def test_an_upload_is_sent_and_kept_alike(balance):
    client = returning(4)
    method = FedSmoothLoRA(balance=balance)
    start = method.start(client)
    trained = {name: start.lora[name] + product(layer.m, layer.n, 1, 33) for name, layer in SHAPES.items()}
    upload = method.upload(trained, start, client)
    for name, layer in SHAPES.items():
        moved = dense(trained[name]) + dense(start.shift[name])
        sent = upload.sent[name]
        assert_close(dense(sent), svd_r(moved, layer.rank), 1e-8)
        gram = sent.A @ sent.A.mT
        want = torch.eye(layer.rank, dtype=F64) if balance == "left" else sent.B.mT @ sent.B
        assert_close(gram, want, 1e-9)
        assert torch.equal(upload.kept[name].B, sent.B)
        assert torch.equal(upload.kept[name].A, sent.A)


def test_the_server_merges_svd_r_of_the_average_at_its_own_rank():
    uploads, counts = [products(10), products(20), products(30, 5)], [10, 30, 60]
    layers = {**SHAPES, "head": adapted("head", 8, 12, 4, 0.6)}
    server = ServerView(round=2, rounds=10, layers=layers)
    update = FedSmoothLoRA(balance="left").aggregate(uploads, counts, server)
    assert set(update.merge) == set(SHAPES)
    assert not update.lora
    for name, layer in layers.items():
        mean = sum(c / 100 * dense(u[name]) for u, c in zip(uploads, counts, strict=True))
        assert update.merge[name].rank == layer.rank
        assert_close(dense(update.merge[name]), svd_r(mean, layer.rank), 1e-8)


def test_start_upload_and_aggregate_are_pure():
    client, method = returning(4), FedSmoothLoRA()
    torch.manual_seed(0)
    state = torch.get_rng_state()
    kept = {name: x.B.clone() for name, x in client.kept.items()}
    first, second = method.start(client), method.start(client)
    uploads = [method.upload(s.lora, s, client).sent for s in (first, second)]
    server = ServerView(round=4, rounds=10, layers=SHAPES)
    merges = [method.aggregate(uploads, [1, 2], server).merge for _ in range(2)]
    for name in SHAPES:
        assert torch.equal(first.lora[name].B, second.lora[name].B)
        assert torch.equal(uploads[0][name].B, uploads[1][name].B)
        assert torch.equal(merges[0][name].B, merges[1][name].B)
        assert torch.equal(client.kept[name].B, kept[name])
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("zeta", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("mode", ["truncated", "exact"])
def test_rounds_through_the_interface_blend_global_and_own_weights_where_nothing_is_cut(zeta, mode):
    # Rank min(m, n) cuts nothing; it leaves no room for GA (2r > min(m, n)), which is off.
    m, n, s = 6, 5, 1.7
    layers = {"a": adapted("a", m, n, 5, s)}
    method = FedSmoothLoRA(zeta=zeta, gradient_aligned="none", start_mode=mode, staleness=1.0)
    W, counts = normal(m, n, seed=0), [1, 3, 2]
    kept: list[Mapping] = [{}] * 3
    own: list[Tensor] = [W] * 3
    received: Mapping[str, LowRank] = {}
    for t in range(4):
        sent = []
        for c in range(3):
            client = view(t, layers=layers, kept=kept[c], kept_round=t - 1, received=received)
            start = method.start(client)
            begins = W + s * (dense(start.lora["a"]) + dense(start.shift["a"]))
            assert_close(begins, (1 - zeta) * W + zeta * own[c] if t else W, 1e-6)
            lora = start.lora["a"].to(dtype=F64)
            trained = LowRank(
                lora.B + normal(m, 5, seed=100 * t + c), lora.A + normal(5, n, seed=100 * t + c + 50)
            )
            own[c] = W + s * (dense(trained) + dense(start.shift["a"]))
            upload = method.upload({"a": trained}, start, client)
            kept[c] = upload.kept
            sent.append(upload.sent)
        update = method.aggregate(sent, counts, ServerView(round=t, rounds=4, layers=layers))
        received = update.merge
        W = W + s * dense(update.merge["a"])
        assert_close(W, sum(p * x for p, x in zip(counts, own, strict=True)) / sum(counts), 1e-6)


def test_descending_a_quadratic_from_the_start_lowers_its_loss():
    pretrained, target = weights(0), weights(50)
    start = run(view(gradients=Quadratic(pretrained, target)), gamma=16.0)
    for name, layer in SHAPES.items():
        B = start.lora[name].B.clone().requires_grad_()
        A = start.lora[name].A.clone().requires_grad_()
        losses = []
        for _ in range(60):
            W = pretrained[name] + layer.scale * (dense(start.shift[name]) + B @ A)
            loss = (W - target[name]).square().sum() / 2
            losses.append(float(loss.detach()))
            for tensor, slope in zip((B, A), torch.autograd.grad(loss, (B, A)), strict=True):
                tensor.data -= 0.02 * slope
        assert losses[0] == pytest.approx(float((pretrained[name] - target[name]).square().sum() / 2))
        assert losses[-1] < 0.9 * losses[0]
