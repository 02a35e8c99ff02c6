"""Computations with factors and hooks against the dense reference of the benchmark."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import GPT2Config, GPT2LMHeadModel

from benchmarks import dense
from fedsmoothlora.algebra.alignment import (
    average,
    gradient_aligned,
    round_matching,
    start_factors,
    upload_product,
)
from fedsmoothlora.algebra.lowrank import LowRank
from fedsmoothlora.training.calibration import calibration_gradients

SHAPES = [(48, 32), (32, 48), (150, 130), (200, 40)]
RANK, GAMMA = 3, 16.0


def products(m: int, n: int, count: int) -> list[LowRank]:
    generator = torch.Generator().manual_seed(m + n)
    return [
        LowRank(
            torch.randn(m, RANK, generator=generator, dtype=torch.float64),
            torch.randn(RANK, n, generator=generator, dtype=torch.float64),
        )
        for _ in range(count)
    ]


def same(ours: LowRank, wanted: Tensor) -> None:
    torch.testing.assert_close(ours.dense(), wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_round_with_factors_matches_the_round_with_dense_matrices(shape: tuple[int, int]) -> None:
    upload, first, second, trained, *others = products(*shape, 7)
    gradient = torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    match = round_matching(upload, [first, second], 0.7, staleness=0.5)
    wanted_match = dense.round_match(upload.dense(), [first.dense(), second.dense()], 0.7, 0.5)
    same(match, wanted_match)

    ga = gradient_aligned(gradient, RANK, GAMMA)
    wanted_ga = dense.gradient_aligned(gradient, RANK, GAMMA)
    # The subspace is iterated until its residual is small, not to the last digit.
    torch.testing.assert_close(ga.dense(), wanted_ga, rtol=1e-5, atol=1e-5)

    lora, shift = start_factors(ga, match, RANK)
    wanted_lora, wanted_shift = dense.start(ga.dense(), wanted_match, RANK)
    same(lora, wanted_lora)
    same(shift, wanted_shift)

    same(upload_product(trained, shift, RANK), dense.upload(trained.B, trained.A, shift.dense(), RANK))
    samples = [3, 1, 6]
    factors = [(product.B, product.A) for product in others]
    same(average(others, samples, RANK), dense.average(factors, samples, RANK))


def test_gradients_from_hooks_are_those_of_autograd() -> None:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(
            n_embd=32, n_layer=2, n_head=2, vocab_size=50, n_positions=16, bos_token_id=1, eos_token_id=1
        )
    )
    modules: dict[str, nn.Module] = {
        name: module for name, module in model.named_modules() if name.endswith(("c_attn", "c_proj"))
    }
    modules["lm_head"] = nn.Linear(32, 50, bias=False)
    model.lm_head = modules["lm_head"]
    batches = [torch.randint(50, (3, 9)) for _ in range(2)]

    def loss(ids: Tensor) -> Tensor:
        return functional.cross_entropy(model(input_ids=ids).logits.flatten(0, 1), ids.roll(-1).flatten())

    ours = calibration_gradients(model, modules, batches, loss)
    wanted = dense.gradients(model, modules, batches, loss)
    assert ours.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-6)
