import copy
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import (
    AutoModelForImageClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    PreTrainedModel,
)

from fedsmoothlora.algebra.lowrank import LowRank
from fedsmoothlora.methods import Part
from fedsmoothlora.modeling.adapters import AdaptedModel, find_layers
from fedsmoothlora.modeling.settings import LoraSettings
from layer_names import KEY, NOT_QUERY, QKV, QUERY, VALUE, attention

HEAD = ("classifier",)


@pytest.fixture
def model(tiny_folder: Path) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForImageClassification.from_pretrained(tiny_folder, num_labels=6).eval()


@pytest.fixture
def pixels() -> Tensor:
    return torch.randn(3, 3, 28, 28, generator=torch.Generator().manual_seed(1))


def gpt2() -> PreTrainedModel:
    torch.manual_seed(3)
    config = GPT2Config(
        n_embd=32,
        n_layer=2,
        n_head=2,
        vocab_size=50,
        n_positions=16,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
    )
    return GPT2ForSequenceClassification(config).eval()


def random_lora(adapted: AdaptedModel, seed: int = 2) -> dict[str, LowRank]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: LowRank(
            torch.randn(layer.m, layer.rank, generator=generator),
            torch.randn(layer.rank, layer.n, generator=generator),
        )
        for name, layer in adapted.layers.items()
    }


def find(model: nn.Module, *, whole: bool = True, **settings: object) -> dict:
    return find_layers(model, LoraSettings(**settings), HEAD, head_is_trained_whole=whole)  # type: ignore[arg-type]


def test_layers_are_those_whose_names_end_in_an_entry(model: PreTrainedModel) -> None:
    layers = find(model, r=3, target_modules=(QUERY, attention(1, VALUE)))
    assert set(layers) == {
        attention(0, QUERY),
        attention(1, QUERY),
        attention(1, VALUE),
    }
    assert {(layer.m, layer.n, layer.rank, layer.gradient_rank) for layer in layers.values()} == {
        (32, 32, 3, 32)
    }


def test_an_entry_that_is_only_the_tail_of_a_name_does_not_match(model: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match="'proj' matches no layer"):
        find(model, target_modules=("proj",))


def test_every_entry_must_match_although_peft_accepts_one_match(model: PreTrainedModel) -> None:
    targets = (NOT_QUERY, QUERY)
    peft = inject_adapter_in_model(LoraConfig(target_modules=list(targets)), copy.deepcopy(model))
    assert sum(isinstance(module, LoraLayer) for module in peft.modules()) == 2  # and says nothing
    with pytest.raises(ValueError, match=rf"lora\.target_modules: '{NOT_QUERY}' matches no layer") as error:
        find(model, target_modules=targets)
    assert QUERY in str(error.value)


def test_a_misspelt_entry_is_answered_with_the_right_one(model: PreTrainedModel) -> None:
    misspelt = QUERY[:-2] + QUERY[-1]
    with pytest.raises(ValueError, match=rf"'{misspelt}' matches no layer; did you mean '{QUERY}'\?"):
        find(model, target_modules=(misspelt,))


def test_a_module_that_is_not_linear_is_refused(model: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match=rf"'norm1' is not a linear layer; the linear layers are .*{QUERY}"):
        find(model, target_modules=(QUERY, "norm1"))


def test_a_layer_cannot_be_a_target_and_fully_trained(model: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match=r"classifier is the head.*model.head = 'lora'"):
        find(model, r=2, target_modules=(QUERY, "classifier"))


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"r": 33, "target_modules": (QUERY,)}, r"^lora\.r: layer dinov2.*32 x 32.*at most 32; got 33"),
        ({"r": 7, "target_modules": ("classifier",)}, r"^lora\.r: layer classifier.*at most 6; got 7"),
        (
            {"r": 2, "head_r": 7, "target_modules": (QUERY, "classifier")},
            r"^lora\.head_r: layer classifier.*at most 6; got 7",
        ),
    ],
)
def test_a_rank_beyond_the_shape_is_refused_with_the_key_to_change(
    model: PreTrainedModel, settings: dict, key: str
) -> None:
    with pytest.raises(ValueError, match=key):
        find(model, whole=False, **settings)


def test_the_heads_rank_is_set_apart_and_its_gradient_lacks_one_direction(model: PreTrainedModel) -> None:
    layers = find(model, whole=False, r=4, head_r=2, target_modules=(QUERY, "classifier"))
    head = layers.pop("classifier")
    assert (head.rank, head.m, head.n, head.gradient_rank) == (2, 6, 64, 5)
    assert {layer.rank for layer in layers.values()} == {4}


@pytest.mark.parametrize("rslora", [False, True])
def test_every_layers_scale_is_pefts_own(model: PreTrainedModel, rslora: bool) -> None:
    settings = LoraSettings(r=4, alpha=6, use_rslora=rslora, head_r=1, target_modules=(QUERY, "classifier"))
    peft = inject_adapter_in_model(
        LoraConfig(
            r=4,
            lora_alpha=6,
            use_rslora=rslora,
            rank_pattern={"classifier": 1},
            target_modules=[QUERY, "classifier"],
        ),
        copy.deepcopy(model),
    )
    wanted = {
        name: module.scaling["default"]
        for name, module in peft.named_modules()
        if isinstance(module, LoraLayer)
    }
    adapted = AdaptedModel(model, settings, head=HEAD, head_is_trained_whole=False)
    assert {name: layer.scale for name, layer in adapted.layers.items()} == pytest.approx(wanted)
    assert wanted["classifier"] == 6.0


def test_lora_returns_copies_of_the_loaded_factors(model: PreTrainedModel) -> None:
    adapted = AdaptedModel(model, LoraSettings(r=2), head=HEAD)
    lora = random_lora(adapted)
    adapted.load_lora(lora)
    read = adapted.lora()
    assert read.keys() == lora.keys() == adapted.layers.keys()
    for name, factors in read.items():
        assert torch.equal(factors.B, lora[name].B)
        assert torch.equal(factors.A, lora[name].A)
        factors.B.zero_()
    assert all(float(factors.B.norm()) > 0 for factors in adapted.lora().values())


def test_factors_of_a_wrong_shape_are_refused_by_name(model: PreTrainedModel) -> None:
    adapted = AdaptedModel(model, LoraSettings(r=2), head=HEAD)
    lora = random_lora(adapted)
    wrong = attention(1, KEY)
    lora[wrong] = LowRank(torch.zeros(32, 3), torch.zeros(3, 32))
    with pytest.raises(
        ValueError, match=rf"layer {wrong}: .*\(32, 2\) and \(2, 32\) expected; got \(32, 3\)"
    ):
        adapted.load_lora(lora)


@pytest.mark.parametrize("rslora", [False, True])
def test_the_model_computes_with_w_plus_s_b_a(model: PreTrainedModel, pixels: Tensor, rslora: bool) -> None:
    reference = copy.deepcopy(model)
    settings = LoraSettings(r=2, alpha=3, use_rslora=rslora, head_r=1, target_modules=(*QKV, "classifier"))
    adapted = AdaptedModel(model, settings, head=HEAD, head_is_trained_whole=False)
    lora = random_lora(adapted)
    adapted.load_lora(lora)
    with torch.no_grad():
        for name, product in lora.items():
            rank = 1 if name == "classifier" else 2
            scale = 3 / rank**0.5 if rslora else 3 / rank
            reference.get_submodule(name).weight += scale * product.B @ product.A
        got, wanted = adapted.model(pixels).logits, reference(pixels).logits
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


def test_weights_stored_transposed_are_adapted_without_a_warning() -> None:
    AdaptedModel(gpt2(), LoraSettings(r=2, target_modules=("c_attn",)), head=("score",))


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False")
def test_weights_stored_transposed_are_adapted_alike() -> None:
    model = gpt2()
    reference = copy.deepcopy(model)
    adapted = AdaptedModel(model, LoraSettings(r=2, alpha=4, target_modules=("c_attn",)), head=("score",))
    assert {(layer.m, layer.n) for layer in adapted.layers.values()} == {(96, 32)}
    lora = random_lora(adapted)
    adapted.load_lora(lora)
    ids = torch.randint(1, 50, (2, 8), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for name, product in lora.items():
            reference.get_submodule(name).weight += 2 * (product.B @ product.A).mT
        got, wanted = adapted.model(input_ids=ids).logits, reference(input_ids=ids).logits
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


def test_without_lora_the_backbone_alone_computes_and_lora_is_back_afterwards(
    model: PreTrainedModel, pixels: Tensor
) -> None:
    reference = copy.deepcopy(model)
    adapted = AdaptedModel(model, LoraSettings(r=2), head=HEAD)
    adapted.load_lora(random_lora(adapted))
    trained = {id(parameter) for parameter in adapted.trained_parameters().values()}
    with torch.no_grad():
        with_lora = adapted.model(pixels).logits
        with adapted.without_lora():
            assert torch.equal(adapted.model(pixels).logits, reference(pixels).logits)
        with pytest.raises(KeyError), adapted.without_lora():
            raise KeyError
        assert torch.equal(adapted.model(pixels).logits, with_lora)
    assert {id(parameter) for parameter in adapted.trained_parameters().values()} == trained


@pytest.mark.parametrize("parts", [("B", "A"), ("B",), ("W",)])
def test_without_lora_does_not_change_which_parameters_are_trained(
    model: PreTrainedModel, parts: tuple[Part, ...]
) -> None:
    adapted = AdaptedModel(model, LoraSettings(r=2), head=HEAD)
    adapted.train_only(parts)
    trained = adapted.trained_parameters().keys()
    with adapted.without_lora():
        pass
    assert adapted.trained_parameters().keys() == trained


def trainable_names(adapted: AdaptedModel) -> set[str]:
    return {name for name, parameter in adapted.model.named_parameters() if parameter.requires_grad}


def test_only_factors_and_the_whole_head_are_trained(model: PreTrainedModel) -> None:
    adapted = AdaptedModel(model, LoraSettings(r=2, target_modules=(KEY,)), head=HEAD)
    factors = {f"{attention(layer, KEY)}.lora_{side}.default.weight" for layer in (0, 1) for side in "AB"}
    assert trainable_names(adapted) == factors | {"classifier.weight", "classifier.bias"}
    assert len(adapted.trained_parameters()) == 6


def test_a_head_adapted_by_lora_stays_frozen_itself(model: PreTrainedModel) -> None:
    settings = LoraSettings(r=2, head_r=1, target_modules=("classifier",))
    adapted = AdaptedModel(model, settings, head=HEAD, head_is_trained_whole=False)
    assert trainable_names(adapted) == {
        "classifier.lora_A.default.weight",
        "classifier.lora_B.default.weight",
    }
    assert adapted.head() == {}


def test_without_targets_exactly_the_head_is_trained(model: PreTrainedModel) -> None:
    adapted = AdaptedModel(model, LoraSettings(target_modules=()), head=HEAD)
    assert adapted.layers == {}
    assert trainable_names(adapted) == {"classifier.weight", "classifier.bias"}
    with adapted.without_lora():
        assert trainable_names(adapted) == {"classifier.weight", "classifier.bias"}


def test_head_returns_a_copy_of_the_loaded_head(model: PreTrainedModel) -> None:
    adapted = AdaptedModel(model, LoraSettings(r=2), head=HEAD)
    head = {"classifier.weight": torch.randn(6, 64), "classifier.bias": torch.randn(6)}
    adapted.load_head(head)
    for name, value in adapted.head().items():
        assert torch.equal(value, head[name])
        value.zero_()
    assert torch.equal(adapted.model.get_parameter("classifier.weight"), head["classifier.weight"])
