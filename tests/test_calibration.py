from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import GPT2Config, GPT2LMHeadModel, ViTConfig, ViTForImageClassification

from fedsmoothlora.calibration import calibration_gradients
from fedsmoothlora.training import DivergedError

Loss = Callable[[Tensor], Tensor]
Case = tuple[nn.Module, dict[str, nn.Module], list[Tensor], Loss]


class Fused(nn.Module):
    """One attention block with a fused ``qkv``, after batch normalisation and an in-place operation."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(16)
        self.qkv = nn.Linear(16, 48)
        self.out = nn.Linear(16, 5)
        self.unused = nn.Linear(16, 7)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = self.dropout(self.norm(x.mT).mT)
        q, k, v = self.qkv(x).mul_(0.5).chunk(3, dim=-1)
        return self.out(functional.scaled_dot_product_attention(q, k, v).mean(dim=1))


def fused(dropout: float = 0.0) -> Case:
    torch.manual_seed(1)
    model = Fused(dropout)
    batches = [torch.randn(rows, 6, 16) for rows in (4, 4, 3)]
    return model, {"qkv": model.qkv, "out": model.out}, batches, lambda x: model(x).square().mean()


def separate() -> Case:
    torch.manual_seed(2)
    model = ViTForImageClassification(
        ViTConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            image_size=16,
            patch_size=8,
            num_labels=4,
            hidden_dropout_prob=0.3,
            attention_probs_dropout_prob=0.3,
        )
    )
    chosen = {
        name: module
        for name, module in model.named_modules()
        if name.endswith(("q_proj", "k_proj", "v_proj", "classifier"))
    }
    assert len(chosen) == 7
    labels = torch.tensor([0, 1, 2])
    batches = [torch.randn(3, 3, 16, 16) for _ in range(2)]
    return model, chosen, batches, lambda x: functional.cross_entropy(model(x).logits, labels)


def transposed() -> Case:
    torch.manual_seed(3)
    model = GPT2LMHeadModel(
        GPT2Config(
            n_embd=32, n_layer=2, n_head=2, vocab_size=50, n_positions=16, bos_token_id=1, eos_token_id=1
        )
    )
    chosen = {name: module for name, module in model.named_modules() if name.endswith(("c_attn", "c_proj"))}
    batches = [torch.randint(0, 50, (2, 8)) for _ in range(2)]
    return model, chosen, batches, lambda ids: model(input_ids=ids, labels=ids).loss


def dense(model: nn.Module, modules: dict[str, nn.Module], batches: list[Tensor], loss: Loss) -> dict:
    """Autograd's own weight gradients, as the weights are stored."""
    model.eval()
    weights = [module.weight for module in modules.values()]
    sums = [torch.zeros_like(weight) for weight in weights]
    for batch in batches:
        for total, gradient in zip(sums, torch.autograd.grad(loss(batch), weights), strict=True):
            total += gradient
    return dict(zip(modules, (total / len(batches) for total in sums), strict=True))


def assert_near(got: Tensor, wanted: Tensor) -> None:
    assert got.dtype == torch.float32
    assert float(wanted.norm()) > 0
    assert float((got - wanted).norm()) <= 1e-5 * float(wanted.norm())


@pytest.mark.parametrize("case", [fused, separate])
def test_the_gradient_is_autograds_own(case: Callable[[], Case]) -> None:
    model, modules, batches, loss = case()
    wanted = dense(*case())
    model.train()
    got = calibration_gradients(model, modules, batches, loss)
    assert got.keys() == modules.keys()
    for name in modules:
        assert_near(got[name], wanted[name])


def test_weights_stored_transposed_give_out_by_in_gradients() -> None:
    wanted = dense(*transposed())
    got = calibration_gradients(*transposed())
    for name in wanted:
        assert_near(got[name], wanted[name].mT)


def test_a_layer_that_is_used_twice_counts_both_uses() -> None:
    torch.manual_seed(4)
    layer = nn.Linear(6, 6)
    x = torch.randn(5, 6)

    def loss(batch: Tensor) -> Tensor:
        return layer(torch.tanh(layer(batch))).square().mean()

    wanted = torch.autograd.grad(loss(x), layer.weight)[0]
    assert_near(calibration_gradients(layer, {"": layer}, [x], loss)[""], wanted)


def test_dropout_is_off() -> None:
    model, modules, batches, loss = fused(dropout=0.5)
    wanted = dense(*fused(dropout=0.0))
    model.train()
    assert_near(calibration_gradients(model, modules, batches, loss)["qkv"], wanted["qkv"])


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_exactly_as_it_was(fails: bool) -> None:
    model, modules, batches, loss = fused(dropout=0.5)
    model.train()
    model.dropout.eval()
    model.unused.weight.requires_grad_(False)
    model.qkv.bias.requires_grad_(False)
    modes = {name: module.training for name, module in model.named_modules()}
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    state = {name: value.clone() for name, value in model.state_dict().items()}

    def failing(batch: Tensor) -> Tensor:
        model.norm.running_mean.add_(1)  # what a model that updates buffers in evaluation mode would do
        value = loss(batch)
        if fails and len(batch) == 3:
            raise KeyError("in the last batch")
        return value

    if fails:
        with pytest.raises(KeyError):
            calibration_gradients(model, modules, batches, failing)
    else:
        calibration_gradients(model, modules, batches, failing)
    assert modes == {name: module.training for name, module in model.named_modules()}
    assert flags == {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(not m._forward_hooks and not m._backward_hooks for m in model.modules())


def test_autograd_forms_no_weight_gradient() -> None:
    model, modules, batches, loss = fused()
    seen: list[bool] = []

    def watching(batch: Tensor) -> Tensor:
        seen.append(any(parameter.requires_grad for parameter in model.parameters()))
        return loss(batch)

    calibration_gradients(model, modules, batches, watching)
    assert seen == [False] * len(batches)


def test_a_layer_that_is_never_reached_has_gradient_zero() -> None:
    model, modules, batches, loss = fused()
    got = calibration_gradients(model, {**modules, "unused": model.unused}, batches, loss)
    assert torch.equal(got["unused"], torch.zeros(7, 16))
    assert float(got["qkv"].norm()) > 0


@pytest.mark.parametrize("names", [[], ["unused"]])
def test_no_layer_that_is_reached_is_no_error(names: list[str]) -> None:
    model, _, batches, loss = fused()
    got = calibration_gradients(model, {name: model.get_submodule(name) for name in names}, batches, loss)
    assert {name: float(gradient.norm()) for name, gradient in got.items()} == dict.fromkeys(names, 0.0)


@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad")
def test_a_loss_that_is_not_finite_is_an_error_that_names_the_batch() -> None:
    model, modules, batches, loss = fused()
    batches[1] = batches[1] * float("nan")
    with pytest.raises(DivergedError, match=r"batch 2 is nan"):
        calibration_gradients(model, modules, batches, loss)


def test_a_loss_that_is_not_finite_is_told_without_a_warning() -> None:
    model, modules, batches, loss = fused()
    always = torch.is_warn_always_enabled()
    torch.set_warn_always(True)  # torch gives this warning once a process otherwise
    try:
        with pytest.raises(DivergedError):
            calibration_gradients(model, modules, [batches[0] * float("nan")], loss)
    finally:
        torch.set_warn_always(always)


def test_no_batches_is_an_error() -> None:
    model, modules, _, loss = fused()

    def nothing() -> Iterator[Tensor]:
        yield from ()

    with pytest.raises(ValueError, match="at least one batch"):
        calibration_gradients(model, modules, nothing(), loss)
