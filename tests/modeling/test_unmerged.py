"""The unmerged backbone trains like the merged one."""

import copy
from collections.abc import Callable
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from families import level
from fedsmoothlora import methods
from fedsmoothlora.algebra.lowrank import LowRank
from fedsmoothlora.callbacks import Callback
from fedsmoothlora.federation.rounds import run_rounds
from fedsmoothlora.federation.simulation import Simulation
from fedsmoothlora.methods import Layer
from fedsmoothlora.modeling import adapters
from fedsmoothlora.modeling.backbone import MergedBackbone
from fedsmoothlora.modeling.unmerged import UnmergedBackbone, compute_alike, dequantised
from fedsmoothlora.training.calibration import calibration_gradients

Federation = Callable[..., Simulation]
SCALE = 1.7


def layer_of(m: int, n: int) -> dict[str, Layer]:
    return {"layer": Layer(name="layer", m=m, n=n, rank=2, scale=SCALE, gradient_rank=min(m, n))}


def product(m: int, n: int, rank: int, generator: torch.Generator) -> LowRank:
    return LowRank(torch.randn(m, rank, generator=generator), torch.randn(rank, n, generator=generator))


def linear(m: int, n: int, seed: int = 0) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(n, m)


def quantised(kind: str, m: int, n: int) -> nn.Module:
    plain = linear(m, n)
    if kind == "nf4":
        made: nn.Module = bnb.nn.LinearNF4(n, m, compute_dtype=torch.float32)
    else:
        made = bnb.nn.Linear8bitLt(n, m, has_fp16_weights=False)
    made.load_state_dict(plain.state_dict(), strict=False)
    made = made.to("cpu").requires_grad_(False)
    compute_alike(made)
    return made


@given(
    m=st.integers(1, 24),
    n=st.integers(1, 24),
    merges=st.integers(0, 4),
    rank=st.integers(1, 3),
    shifted=st.booleans(),
    transposed=st.booleans(),
    seed=st.integers(0, 1000),
)
@settings(deadline=None, max_examples=60)
def test_outputs_and_gradients_are_those_of_the_merged_weight(
    m: int, n: int, merges: int, rank: int, shifted: bool, transposed: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    module: nn.Module = linear(m, n, seed)
    if transposed:
        module = Conv1D(m, n)
    pair = {MergedBackbone: copy.deepcopy(module), UnmergedBackbone: copy.deepcopy(module)}
    updates = [{"layer": product(m, n, rank, generator)} for _ in range(merges)]
    shift = {"layer": product(m, n, rank, generator)} if shifted else {}
    inputs = torch.randn(2, 3, n, generator=generator)
    found = []
    for kind, own in pair.items():
        before = own.weight.detach().clone()
        backbone = kind({"layer": own}, layer_of(m, n))
        for update in updates:
            backbone.merge(update)
        backbone.set_shift(shift)
        x = inputs.clone().requires_grad_()
        y = own(x)
        y.square().sum().backward()
        assert x.grad is not None
        found.append((y.detach(), x.grad, backbone.weight("layer", shift.get("layer"))))
        if kind is UnmergedBackbone:
            assert torch.equal(own.weight, before)
            assert torch.equal(backbone.pretrained("layer"), before.mT if transposed else before)
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-4, atol=2e-4 * float(1 + one.abs().max()))


def test_merging_becomes_effective_at_the_next_set_shift_which_replaces_the_shift() -> None:
    module, generator = linear(6, 8), torch.Generator().manual_seed(1)
    backbone = UnmergedBackbone({"layer": module}, layer_of(6, 8))
    x = torch.randn(3, 8)
    before = module(x)
    backbone.merge({"layer": product(6, 8, 2, generator)})
    assert torch.equal(module(x), before)
    backbone.set_shift()
    merged = module(x)
    assert not torch.allclose(merged, before)
    backbone.set_shift({"layer": product(6, 8, 2, generator)})
    assert not torch.allclose(module(x), merged)
    backbone.set_shift()
    assert torch.equal(module(x), merged)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_quantised_weights_keep_their_bits_and_carry_the_branch(kind: str) -> None:
    m, n = 32, 64
    module, generator = quantised(kind, m, n), torch.Generator().manual_seed(2)
    W = dequantised(module)
    assert W.shape == (m, n)
    assert W.dtype == torch.float32
    backbone = UnmergedBackbone({"layer": module}, layer_of(m, n))
    update, shift = product(m, n, 2, generator), product(m, n, 2, generator)
    backbone.merge({"layer": update})
    backbone.set_shift({"layer": shift})
    bits = module.weight.detach().clone()
    wanted = W + SCALE * (update.dense() + shift.dense())
    torch.testing.assert_close(backbone.weight("layer", shift), wanted, rtol=1e-5, atol=1e-4)
    for mode in (True, False):
        module.train(mode)
        x = torch.randn(5, n, requires_grad=True)
        y = module(x)
        assert y.dtype == torch.float32
        torch.testing.assert_close(y, x @ wanted.mT + module.bias, rtol=1e-3, atol=1e-3)
        y.square().sum().backward()
        torch.testing.assert_close(x.grad, 2 * y.detach() @ wanted, rtol=1e-3, atol=1e-2)
    with torch.inference_mode():
        module.eval()(x)
    assert torch.equal(module.weight, bits)
    # Dequantising between forward passes leaves the layer able to compute.
    assert torch.equal(dequantised(module), W)
    assert torch.equal(module(x), y)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_the_calibration_gradient_of_quantised_weights_is_that_of_the_dequantised_ones(kind: str) -> None:
    module = quantised(kind, 16, 64)
    plain = nn.Linear(64, 16)
    with torch.no_grad():
        plain.weight.copy_(dequantised(module))
        plain.bias.copy_(module.bias)
    batches = [torch.randn(4, 64) for _ in range(3)]
    (G,) = calibration_gradients(
        module, {"layer": module}, batches, lambda x: module(x).square().mean()
    ).values()
    for x in batches:
        (plain(x).square().mean() / 3).backward()
    assert plain.weight.grad is not None
    torch.testing.assert_close(G, plain.weight.grad, rtol=1e-3, atol=1e-5)


def test_a_layer_that_no_batch_reaches_has_a_gradient_of_its_true_shape() -> None:
    module, other = quantised("nf4", 16, 64), nn.Linear(3, 3)
    found = calibration_gradients(
        other, {"layer": module}, [torch.ones(1, 3)], lambda x: other(x).square().mean()
    )
    assert torch.equal(found["layer"], torch.zeros(16, 64))


def test_in_bfloat16_the_sum_is_not_rounded_into_the_weight() -> None:
    module, generator = linear(32, 32).bfloat16(), torch.Generator().manual_seed(3)
    W = module.weight.detach().clone()
    backbone = UnmergedBackbone({"layer": module}, layer_of(32, 32))
    updates = [1e-3 * product(32, 32, 2, generator) for _ in range(20)]
    for update in updates:
        backbone.merge({"layer": update})
    backbone.set_shift()
    change = SCALE * sum(update.dense() for update in updates)
    assert torch.equal(module.weight, W)
    torch.testing.assert_close(backbone.weight("layer"), W.float() + change, rtol=1e-6, atol=1e-6)
    y = module(torch.eye(32, dtype=torch.bfloat16))
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(
        y.mT.float(), W.float() + change + module.bias.float()[:, None], rtol=0.02, atol=0.02
    )


@pytest.mark.parametrize("autocast", [False, True])
def test_a_start_s_lora_and_its_shift_cancel(autocast: bool) -> None:
    """In a round without a match, LoRA is GA and the shift is -GA, so the model is unchanged."""
    model = nn.Sequential(linear(32, 32))
    peft_model = get_peft_model(model, LoraConfig(r=2, lora_alpha=2 * SCALE, target_modules=["0"]))
    lora = peft_model.get_submodule("base_model.model.0")
    GA = product(32, 32, 2, torch.Generator().manual_seed(4))
    backbone = UnmergedBackbone({"layer": lora.get_base_layer()}, layer_of(32, 32))
    x = torch.randn(8, 32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        before = peft_model(x)
    with torch.no_grad():
        lora.lora_B["default"].weight.copy_(GA.B)
        lora.lora_A["default"].weight.copy_(GA.A)
    backbone.set_shift({"layer": -GA})
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        after = peft_model(x)
    rounding = 2**-8 * float(SCALE * (x @ GA.A.mT @ GA.B.mT).abs().max()) if autocast else 1e-5
    torch.testing.assert_close(after, before, rtol=0, atol=rounding)


def test_other_types_of_weights_and_other_shapes_are_refused_by_layer() -> None:
    with pytest.raises(ValueError, match=r"layer layer: its weights are torch\.float64; float32, bfloat16"):
        UnmergedBackbone({"layer": linear(4, 4).double()}, layer_of(4, 4))
    with pytest.raises(ValueError, match=r"layer layer: weight \(4, 4\), expected \(4, 6\)"):
        UnmergedBackbone({"layer": linear(4, 4)}, layer_of(4, 6))
    with pytest.raises(ValueError, match="use a method that trains LoRA"):
        UnmergedBackbone({"layer": linear(4, 4)}, layer_of(4, 4)).delta("layer")


TRAINING_LORA = [name for name in methods.names() if name != "full"]
VARIANTS: list[Any] = [
    *(pytest.param({"method.name": name}, marks=level(name)) for name in TRAINING_LORA),
    {"method.start": "exact"},
    {"method.gradient_aligned": "weight"},
    {"method.zeta": 0.5, "participation.clients": 2},
    {"training.precision": "bf16"},
]


def outcome(simulation: Simulation) -> tuple[list[float], list[Any], dict[str, Tensor]]:
    """Losses by round, the updates merged, and the global model's weights with its LoRA at the end."""
    losses = [record.value("loss") for record in run_rounds(simulation, Callback())]
    model, server = simulation.learner.model, simulation.server
    weights = {name: model.backbone.weight(name, server.model.get(name)) for name in model.layers}  # type: ignore[arg-type]
    return losses, list(server.updates), weights | dict(server.head)


@pytest.mark.parametrize("changes", VARIANTS, ids=lambda changes: ",".join(map(str, changes.values())))
def test_a_run_gives_the_same_result_as_with_the_merged_backbone(
    changes: dict[str, Any], toy_federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    rewritten = outcome(toy_federation(changes))
    monkeypatch.setattr(adapters, "are_rewritten", lambda modules: False)
    simulation = toy_federation(changes)
    assert isinstance(simulation.learner.model.backbone, UnmergedBackbone)
    before = {name: module.weight.clone() for name, module in simulation.learner.model.modules.items()}
    branch = outcome(simulation)
    if "training.precision" in changes:  # a sum is rounded to bfloat16 in one, its parts in the other
        assert branch[0] == pytest.approx(rewritten[0], rel=3e-2)
        return
    rounding = 2e-3
    assert branch[0] == pytest.approx(rewritten[0], rel=rounding)
    for name, weight in branch[2].items():
        wanted = rewritten[2][name]
        moved = wanted - before[name] if name in before else wanted
        assert float((weight - wanted).norm()) <= rounding * float(moved.norm()) + 1e-6, name
    for name, module in simulation.learner.model.modules.items():
        assert torch.equal(module.weight, before[name])


def test_4_bit_weights_that_bitsandbytes_computes_wrongly_are_refused_by_layer() -> None:
    with pytest.raises(ValueError, match=r"4-bit weights in blocks of 64, but 48 inputs"):
        quantised("nf4", 16, 48)
