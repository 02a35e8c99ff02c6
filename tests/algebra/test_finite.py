"""Finite values: against `torch.isfinite` of every value."""

import pytest
import torch

from fedsmoothlora.algebra.finite import all_finite


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(), (0, 3), (1,), (5, 7), (300, 200)], ids=str)
@pytest.mark.parametrize("value", [0.0, -3.0, float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("where", [0, -1])
def test_one_value_that_is_not_finite_is_found_wherever_it_is(dtype, shape, value, where):
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    if tensor.numel():
        tensor.view(-1)[where] = value
    assert all_finite(tensor) == bool(torch.isfinite(tensor).all())


def test_values_whose_sum_overflows_are_finite():
    assert all_finite(torch.full((10,), torch.finfo(torch.float32).max))


def test_a_parameter_and_a_tensor_that_is_not_contiguous():
    parameter = torch.nn.Parameter(torch.ones(4, 6))
    assert all_finite(parameter)
    assert all_finite(parameter.detach().mT[::2])
