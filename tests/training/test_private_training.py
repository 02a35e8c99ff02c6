"""DP-SGD: gradients of rows against autograd, the clipping bound, the noise, and what is refused."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    ViTConfig,
    ViTForImageClassification,
)

from fedsmoothlora.data.examples import Batch, Vectors
from fedsmoothlora.data.tokens import Completions, Documents
from fedsmoothlora.errors import ConfigError
from fedsmoothlora.modeling.adapters import AdaptedModel
from fedsmoothlora.modeling.settings import LoraSettings
from fedsmoothlora.tasks.objectives import CausalLanguageModel, Classification
from fedsmoothlora.training.private import Mechanism, check_rows_apart, train_privately
from fedsmoothlora.training.settings import TrainingSettings
from tests.layer_names import parts

pytest.importorskip("opacus")

ROWS, CLIP = 6, 0.3
SIZE: dict[str, Any] = {
    **{"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
}


class Images:
    def __len__(self) -> int:
        return ROWS

    def batch(self, rows: Sequence[int]) -> Batch:
        pixels = torch.randn(ROWS, 3, 8, 8, generator=torch.Generator().manual_seed(1))
        chosen = torch.as_tensor(list(rows))
        return {"pixel_values": pixels[chosen], "labels": chosen % 3}


def words(longest: int = 7) -> list[list[int]]:
    draw = torch.Generator().manual_seed(2)
    lengths = [longest - row % 3 for row in range(ROWS)]
    return [torch.randint(3, 30, (length,), generator=draw).tolist() for length in lengths]


def vit() -> tuple[nn.Module, Any, Any, list[str]]:
    config = ViTConfig(
        **SIZE, image_size=8, patch_size=4, num_labels=3, hidden_dropout_prob=0.1, initializer_range=0.3
    )
    model = ViTForImageClassification(config)
    names = parts(model)
    return model, Images(), Classification(), [names[0], names[4]]


def bert() -> tuple[nn.Module, Any, Any, list[str]]:
    config = BertConfig(**SIZE, vocab_size=30, max_position_embeddings=16, num_labels=3)
    rows = Documents(ids=words(), labels=torch.arange(ROWS) % 3, pad=0)
    return BertForSequenceClassification(config), rows, Classification(), ["query", "dense"]


def language(model: PreTrainedModel) -> tuple[nn.Module, Any, Any]:
    ids = words()
    rows = Completions(prompts=[one[:3] for one in ids], answers=[one[3:] for one in ids], pad=0)
    return model, rows, CausalLanguageModel()


def llama() -> tuple[nn.Module, Any, Any, list[str]]:
    config = LlamaConfig(**SIZE, vocab_size=30, max_position_embeddings=16)
    return *language(LlamaForCausalLM(config)), ["q_proj", "down_proj"]


def gpt2() -> tuple[nn.Module, Any, Any, list[str]]:
    config = GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=30, n_positions=16)
    return *language(GPT2LMHeadModel(config)), ["c_attn", "c_fc"]


def adapted(kind: Any, trains: Sequence[Any] = ("B", "A")) -> tuple[AdaptedModel, Any, Any]:
    """A tiny model whose LoRA is not 0, with its rows and its objective."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, rows, objective, targets = kind()
        head = ["classifier"] if hasattr(model, "classifier") else []
        made = AdaptedModel(model, LoraSettings(r=2, alpha=4, target_modules=tuple(targets)), head=head)
        for parameter in made.trained_parameters().values():
            nn.init.normal_(parameter, std=0.3)
    made.train_only(trains)
    return made, rows, objective


def alone(model: nn.Module, losses: Any, rows: Any, row: int) -> Tensor:
    """The gradient of a row by itself, as one vector, by autograd without Opacus."""
    model.eval()
    model.zero_grad(set_to_none=True)
    losses(rows.batch([row])).sum().backward()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    found = torch.cat([one.grad.flatten().clone() for one in trained if one.grad is not None])
    model.zero_grad(set_to_none=True)
    return found


def no_noise(shape: Sequence[int], std: float, step: int, name: str) -> Tensor:
    return torch.zeros(tuple(shape), dtype=torch.float64)


def mechanism(**changes: Any) -> Mechanism:
    return Mechanism(
        **{"clip_norm": CLIP, "noise_multiplier": 1.0, "denominator": 4.0, "noise": no_noise, **changes}
    )


def stepped(
    model: nn.Module, rows: Any, losses: Any, batches: Sequence[Sequence[int]], **options: Any
) -> Tensor:
    """How one training changes the trained parameters, as one vector; they are restored."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    before = [parameter.detach().clone() for parameter in trained]
    chosen = {"batch_size": ROWS, "momentum": 0.0, **options.pop("settings", {})}
    train_privately(
        model,
        rows,
        batches,
        losses,
        TrainingSettings(**chosen),
        options.pop("mechanism", mechanism()),
        lr=1.0,
        accelerator=Accelerator(cpu=True),
        seed=0,
        **options,
    )
    change = torch.cat([(now.detach() - was).flatten() for now, was in zip(trained, before, strict=True)])
    with torch.no_grad():
        for now, was in zip(trained, before, strict=True):
            now.copy_(was)
    return change


def without_dropout(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0


@pytest.mark.parametrize("kind", [vit, bert, llama, gpt2])
@pytest.mark.parametrize("trains", [("B", "A"), ("B",), ("W",)], ids="-".join)
def test_a_step_is_the_sum_of_clipped_gradients_of_rows_alone(kind: Any, trains: Any) -> None:
    """Rows of different lengths in one padded batch, against autograd of every row alone."""
    made, rows, objective = adapted(kind, trains)
    without_dropout(made.model)
    losses = lambda batch: objective.losses(made.model, batch)  # noqa: E731
    gradients = [alone(made.model, losses, rows, row) for row in range(ROWS)]
    median = float(torch.stack([one.norm() for one in gradients]).median())  # some are clipped, some not
    clipped = [one * min(1.0, median / float(one.norm())) for one in gradients]
    expected = -torch.stack(clipped).sum(dim=0) / 4.0

    change = stepped(made.model, rows, losses, [range(ROWS)], mechanism=mechanism(clip_norm=median))

    assert float(expected.norm()) > 0
    torch.testing.assert_close(change, expected, rtol=1e-3, atol=1e-5 * float(expected.norm()))
    assert not any(hasattr(one, "grad_sample") for one in made.model.parameters())
    assert not any(module._forward_hooks or module._backward_hooks for module in made.model.modules())


@pytest.mark.parametrize("kind", [vit, gpt2])
def test_every_factor_moves_with_dropout_and_from_a_start_at_zero(kind: Any) -> None:
    """A wrapped model whose LoRA does not move would look healthy: loss and epsilon change all the same."""
    made, rows, objective = adapted(kind)
    factors = {name: one for name, one in made.trained_parameters().items() if "lora" in name}
    with torch.no_grad():
        for name, factor in factors.items():
            if name.endswith("lora_B"):
                factor.zero_()
    before = {name: factor.detach().clone() for name, factor in factors.items()}
    train_privately(
        made.model,
        rows,
        [range(ROWS)] * 3,
        lambda batch: objective.losses(made.model, batch),
        TrainingSettings(batch_size=ROWS),
        mechanism(),
        lr=1.0,
        accelerator=Accelerator(cpu=True),
        seed=0,
    )
    assert all(float((factor.detach() - before[name]).norm()) > 0 for name, factor in factors.items())


def linear() -> tuple[nn.Module, Vectors]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Linear(4, 3)
    draw = torch.Generator().manual_seed(1)
    return model, Vectors(torch.randn(ROWS, 4, generator=draw), torch.arange(ROWS) % 3)


@settings(max_examples=25, deadline=None)
@given(
    sizes=st.lists(
        st.sampled_from([0.0, 1e-20, 1e-3, 1.0, 1e3, 1e18, float("inf"), float("nan")]),
        min_size=ROWS,
        max_size=ROWS,
    ),
    left_out=st.integers(0, ROWS - 1),
    low=st.booleans(),
)
def test_one_row_changes_a_sum_by_at_most_the_clip_norm(sizes: list[float], left_out: int, low: bool) -> None:
    """Whatever its values are, in float32 and under bfloat16 autocast."""
    model, rows = linear()
    rows = Vectors(rows.inputs * torch.tensor(sizes)[:, None], rows.labels)

    def losses(batch: Batch) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=low):
            return Classification().losses(model, batch)

    every = list(range(ROWS))
    others = [row for row in every if row != left_out]
    with_it, without = (stepped(model, rows, losses, [chosen]) for chosen in (every, others))
    assert torch.isfinite(with_it).all()
    assert float((with_it - without).norm()) <= CLIP / 4.0 * (1 + 1e-5)


@pytest.mark.parametrize("kind", [vit, gpt2])
@pytest.mark.parametrize("left_out", [0, ROWS // 2])
def test_one_row_changes_a_sum_by_at_most_the_clip_norm_with_dropout(kind: Any, left_out: int) -> None:
    """The masks of a batch follow from the seed, so a row must not shift those of the rows after it."""
    made, rows, objective = adapted(kind)
    dropouts = [module for module in made.model.modules() if isinstance(module, nn.Dropout)]
    assert dropouts
    for module in dropouts:
        module.p = 0.3
    losses = lambda batch: objective.losses(made.model, batch)  # noqa: E731
    every = list(range(ROWS))
    others = [row for row in every if row != left_out]
    small = mechanism(clip_norm=1e-3)  # every gradient is clipped
    with_it, without = (
        stepped(made.model, rows, losses, [chosen], mechanism=small) for chosen in (every, others)
    )
    assert float((with_it - without).norm()) <= 1e-3 / 4.0 * (1 + 1e-3)


def test_accumulated_parts_of_a_batch_make_the_same_step() -> None:
    made, rows, objective = adapted(bert)
    without_dropout(made.model)
    losses = lambda batch: objective.losses(made.model, batch)  # noqa: E731
    whole, parts, uneven = (
        stepped(made.model, rows, losses, [range(ROWS)], settings={"accumulation": count})
        for count in (1, 6, 4)
    )
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(uneven, whole, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("batch", [[], [0, 1, 2]], ids=["empty", "rows"])
def test_the_noise_has_its_variance_in_steps_with_and_without_rows(batch: list[int]) -> None:
    model, rows = linear()
    asked: list[tuple[int, str, float]] = []

    def noise(shape: Sequence[int], std: float, step: int, name: str) -> Tensor:
        asked.append((step, name, std))
        draw = torch.Generator().manual_seed(len(asked))
        return std * torch.randn(tuple(shape), generator=draw, dtype=torch.float64)

    losses = lambda batch: Classification().losses(model, batch)  # noqa: E731
    noisy = mechanism(noise_multiplier=2.0, noise=noise)
    plain = stepped(model, rows, losses, [batch])
    draws = torch.stack([stepped(model, rows, losses, [batch], mechanism=noisy) - plain for _ in range(60)])
    assert float(draws.std()) == pytest.approx(2.0 * CLIP / 4.0, rel=0.1)
    assert {std for _, _, std in asked} == {2.0 * CLIP}
    assert asked[:2] == [(0, "weight", 2.0 * CLIP), (0, "bias", 2.0 * CLIP)]


def test_corrections_and_the_norm_limit_apply_to_the_noised_gradient() -> None:
    model, rows = linear()
    losses = lambda batch: Classification().losses(model, batch)  # noqa: E731
    big = mechanism(noise=lambda shape, *_: torch.full(tuple(shape), 40.0, dtype=torch.float64))
    limited = stepped(model, rows, losses, [[0]], mechanism=big, settings={"max_grad_norm": 0.5})
    assert float(limited.norm()) == pytest.approx(0.5, rel=1e-4)

    def correct() -> None:
        for parameter in model.parameters():
            assert parameter.grad is not None
            parameter.grad.fill_(0.25)

    corrected = stepped(model, rows, losses, [[0]], corrections=[correct])
    torch.testing.assert_close(corrected, torch.full_like(corrected, -0.25))


def test_the_head_has_its_own_learning_rate() -> None:
    model, rows = linear()
    losses = lambda batch: Classification().losses(model, batch)  # noqa: E731
    noisy = mechanism(noise=lambda shape, *_: torch.full(tuple(shape), 40.0, dtype=torch.float64))
    plain = stepped(model, rows, losses, [[0, 1]], mechanism=noisy)
    settings = {"lr": 0.5, "head_lr": 2.0}  # four times the learning rate of the rest
    head = [model.get_parameter("bias")]
    own = stepped(model, rows, losses, [[0, 1]], mechanism=noisy, settings=settings, head=head)
    torch.testing.assert_close(own, plain * torch.tensor([1.0] * 12 + [4.0] * 3))


class Mixing(nn.Module):
    """A model that mixes the rows of a batch."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.layer, self.how = nn.Linear(4, 3), how
        self.unused = nn.Linear(4, 3)
        self.norm = nn.BatchNorm1d(3)
        self.unused.requires_grad_(how == "unused")
        self.norm.requires_grad_(how == "trained normalisation")

    def forward(self, inputs: Tensor) -> Tensor:
        if self.how == "tokens first":
            pairs = torch.stack([inputs, inputs, inputs])  # (tokens, rows, width)
            return self.layer(pairs).sum(dim=0)  # type: ignore[no-any-return]
        if self.how == "called twice":
            return self.layer(inputs[:1].expand_as(inputs)) + self.layer(inputs)  # type: ignore[no-any-return]
        found: Tensor = self.layer(inputs)
        if self.how == "functional":
            return nn.functional.linear(inputs, self.layer.weight, self.layer.bias)
        if self.how == "centred":
            return found - found.mean(dim=0)
        return self.norm(found) if "normalisation" in self.how else found


@pytest.mark.parametrize(
    "how", ["tokens first", "called twice", "functional", "centred", "unused", "trained normalisation"]
)
def test_a_model_in_which_a_row_has_no_gradient_of_its_own_is_refused(how: str) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Mixing(how)
    _, rows = linear()
    with pytest.raises(ConfigError, match=r"privacy.unit = 'sample': "):
        check_rows_apart(model, rows, lambda batch: Classification().losses(model, batch))


def test_frozen_normalisation_does_not_mix_rows_in_evaluation_mode() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Mixing("frozen normalisation")
    _, rows = linear()
    losses = lambda batch: Classification().losses(model, batch)  # noqa: E731
    assert float(stepped(model, rows, losses, [range(ROWS)]).norm()) > 0


def test_an_objective_with_one_loss_for_the_batch_is_refused() -> None:
    model, rows = linear()
    with pytest.raises(ConfigError, match=r"one loss for each of 2 rows"):
        check_rows_apart(model, rows, lambda batch: Classification().loss(model, batch))
