import weakref
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GPT2Config, GPT2LMHeadModel, ViTConfig, ViTForImageClassification

from fedsmoothlora.algebra.sketches import Sketch, SketchSize
from fedsmoothlora.errors import DivergedError
from fedsmoothlora.training import calibration
from fedsmoothlora.training.calibration import calibration_gradients, calibration_sketches
from fedsmoothlora.training.loop import checkpointing
from fedsmoothlora.training.settings import TrainingSettings
from tests.layer_names import parts

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
        if name.endswith((*parts(model)[:3], "classifier"))
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


def test_an_unused_layer_has_gradient_zero() -> None:
    model, modules, batches, loss = fused()
    got = calibration_gradients(model, {**modules, "unused": model.unused}, batches, loss)
    assert torch.equal(got["unused"], torch.zeros(7, 16))
    assert float(got["qkv"].norm()) > 0


@pytest.mark.parametrize("names", [[], ["unused"]])
def test_a_loss_that_uses_no_layer_is_not_an_error(names: list[str]) -> None:
    model, _, batches, loss = fused()
    got = calibration_gradients(model, {name: model.get_submodule(name) for name in names}, batches, loss)
    assert {name: float(gradient.norm()) for name, gradient in got.items()} == dict.fromkeys(names, 0.0)


@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad")
def test_a_loss_that_is_not_finite_is_an_error_that_names_the_batch() -> None:
    model, modules, batches, loss = fused()
    batches[1] = batches[1] * float("nan")
    with pytest.raises(DivergedError, match=r"batch 2 is nan"):
        calibration_gradients(model, modules, batches, loss)


def test_a_loss_that_is_not_finite_is_reported_without_a_warning() -> None:
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


CHECKPOINTING = TrainingSettings(gradient_checkpointing=True)


@pytest.mark.parametrize("case", [separate, transposed])
def test_with_gradient_checkpointing_the_gradient_is_the_same(case: Callable[[], Case]) -> None:
    model, modules, batches, loss = case()
    wanted = calibration_gradients(model, modules, batches, loss)
    forwards: list[str] = []
    watch = next(iter(modules.values())).register_forward_hook(lambda *_: forwards.append("forward"))
    with checkpointing(model, CHECKPOINTING):
        got = calibration_gradients(model, modules, batches, loss)
    watch.remove()
    assert len(forwards) == 2 * len(batches)  # once more in each backward pass
    for name in modules:
        torch.testing.assert_close(got[name], wanted[name], rtol=1e-5, atol=1e-8)
    assert all("forward" not in vars(module) for module in model.modules())


def test_with_gradient_checkpointing_no_more_is_kept_than_in_training() -> None:
    model, modules, batches, loss = transposed()
    kept: list[int] = []

    def counting(batch: Tensor) -> Tensor:
        def pack(tensor: Tensor) -> Tensor:
            kept[-1] += tensor.nbytes
            return tensor

        kept.append(0)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            return loss(batch)

    calibration_gradients(model, modules, batches[:1], counting)
    with checkpointing(model, CHECKPOINTING):
        calibration_gradients(model, modules, batches[:1], counting)
        model.train().requires_grad_(False)
        modules["transformer.h.0.attn.c_attn"].weight.requires_grad_(True)
        counting(batches[0])
    plain, checkpointed, training = kept
    assert checkpointed <= training
    assert checkpointed < plain / 2


def test_an_input_is_freed_after_its_layers_backward_pass() -> None:
    """It is not kept until the end of the next batch's forward pass."""
    model, modules, batches, loss = fused()
    inputs: list[weakref.ref[Tensor]] = []
    alive: list[int] = []

    def watching(batch: Tensor) -> Tensor:
        alive.append(sum(ref() is not None for ref in inputs))
        return loss(batch)

    modules["out"].register_forward_pre_hook(lambda module, given: inputs.append(weakref.ref(given[0])))
    calibration_gradients(model, modules, batches, watching)
    assert alive == [0] * len(batches)


def sketched(case: Case, width: int, passes: int, names: set[str], parts: int = 1) -> dict[str, Sketch]:
    """Filled sketches of the named layers; the gradients of all others are compared with autograd's."""
    model, modules, batches, loss = case
    sketches = {}
    for seed, name in enumerate(sorted(names)):
        m, n = dense(model, {name: modules[name]}, batches, loss)[name].shape
        size = SketchSize.of(m, n, 2, width=width, passes=passes)
        sketches[name] = Sketch(size, torch.Generator().manual_seed(seed))
    wanted = dense(*case)
    taken: list[int] = []

    def again() -> Iterator[Tensor]:
        taken.append(len(batches))
        yield from batches

    def split(batch: Tensor) -> list[tuple[Tensor, float]]:
        return [(part, len(part) / len(batch)) for part in batch.tensor_split(parts)]

    rest = calibration_sketches(model, modules, sketches, again, loss, split)
    assert len(taken) == (passes if sketches else 1)
    assert rest.keys() == modules.keys() - names
    for name, gradient in rest.items():
        assert_near(gradient, wanted[name])
    return sketches


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("passes", [1, 2, 3])
@pytest.mark.parametrize("names", [set(), {"qkv"}, {"qkv", "out"}], ids=["none", "one", "all"])
def test_a_sketch_as_wide_as_the_layer_has_the_gradients_own_vectors(
    passes: int, names: set[str], parts: int
) -> None:
    found = sketched(fused(), 8, passes, names, parts)
    wanted = dense(*fused())
    for name, sketch in found.items():
        P, sigma, Qt = torch.linalg.svd(wanted[name], full_matrices=False)
        p, values, q = sketch.leading_singular_vectors(4)
        torch.testing.assert_close(values / values[0], sigma[:4] / sigma[0], rtol=1e-3, atol=1e-5)
        for vectors, reference in ((p, P[:, :4]), (q, Qt[:4].mT)):
            cosines = (vectors * reference).sum(dim=0).abs()
            torch.testing.assert_close(cosines, torch.ones(4), rtol=0, atol=1e-3)


def test_no_gradient_of_a_sketched_layer_exists_at_any_time() -> None:
    model, every, batches, loss = separate()
    query = parts(model)[0]
    modules = {name: module for name, module in every.items() if name.endswith(query)}
    sketches = {
        name: Sketch(SketchSize.of(32, 32, 2, width=3, passes=2), torch.Generator()) for name in modules
    }
    with Shapes() as sketching:
        calibration_sketches(model, modules, sketches, lambda: batches, loss)
    with Shapes() as exact:
        calibration_gradients(model, modules, batches, loss)
    assert (32, 6) in sketching.made
    assert (32, 32) not in sketching.made
    assert (32, 32) in exact.made


class Shapes(TorchDispatchMode):
    """The shapes of all tensors that are computed, rather than views of weights."""

    def __init__(self) -> None:
        super().__init__()
        self.made: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and not func.is_view:
            self.made.add(tuple(result.shape))
        return result


@pytest.mark.parametrize("passes", [1, 2, 3])
def test_a_sketch_that_is_not_finite_is_an_error_that_names_the_layer(passes: int) -> None:
    model, modules, batches, _ = fused()
    sketch = Sketch(SketchSize.of(48, 16, 2, width=4, passes=passes), torch.Generator())

    def edge(batch: Tensor) -> Tensor:
        return (model(batch) * 0).square().sum().sqrt()  # 0, and no derivative there

    with pytest.raises(DivergedError, match="layer qkv is not finite"):
        calibration_sketches(model, {"qkv": modules["qkv"]}, {"qkv": sketch}, lambda: batches, edge)


def test_sketches_need_a_batch_too() -> None:
    model, modules, _, loss = fused()
    with pytest.raises(ValueError, match="at least one batch"):
        calibration_sketches(model, modules, {}, list, loss)


@pytest.mark.parametrize("mixed", [False, True])
def test_bfloat16_products_are_summed_in_float32(mixed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """On devices that multiply bfloat16 with float32 sums, no float32 copy of the inputs is made."""
    draw = torch.Generator().manual_seed(0)
    batches = [
        (torch.randn(50, 4, generator=draw).bfloat16(), torch.randn(50, 3, generator=draw).bfloat16())
        for _ in range(3)
    ]
    real, calls = torch.mm, 0

    def mixed_mm(one: Tensor, other: Tensor, *, out_dtype: torch.dtype) -> Tensor:
        nonlocal calls
        calls += 1
        assert one.dtype == other.dtype == torch.bfloat16
        return real(one.to(out_dtype), other.to(out_dtype))

    assert not calibration.multiplies_mixed(*batches[0])  # the CPU rounds the sums
    if mixed:
        monkeypatch.setattr(calibration, "multiplies_mixed", lambda one, other: True)
        monkeypatch.setattr(torch, "mm", mixed_mm)
    total = calibration._Total()
    for dY, X in batches:
        total.add(dY, X)
    assert calls == (3 if mixed else 0)
    assert total.sum is not None
    assert total.sum.dtype == torch.float32
    want = sum(dY.double().mT @ X.double() for dY, X in batches)
    assert torch.allclose(total.sum.double(), want, rtol=0, atol=1e-4)
