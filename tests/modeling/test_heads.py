"""The head is found in every architecture, and the layers that cannot be adapted are refused."""

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_families import DECODERS, ENCODERS, VISION, tiny
from torch import nn
from transformers.pytorch_utils import Conv1D

from fedsmoothlora.errors import ConfigError
from fedsmoothlora.modeling.adapters import AdaptedModel, avoid_fast_path, check_not_shared, find_layers
from fedsmoothlora.modeling.loading import class_dimensions, head_modules
from fedsmoothlora.modeling.settings import LoraSettings

HEADS = {
    **dict.fromkeys([*ENCODERS, *VISION], ("classifier",)),
    **dict.fromkeys(DECODERS, ("score",)),
    "DistilBert": ("pre_classifier", "classifier"),
    "Deberta": ("pooler", "classifier"),
    "DebertaV2": ("pooler", "classifier"),
    "HGNetV2": ("fc",),
    "XLNet": ("sequence_summary", "logits_proj"),
}


def classifier(family: str) -> nn.Module:
    return tiny(family, "ForImageClassification" if family in VISION else "ForSequenceClassification")


@pytest.mark.parametrize("family", HEADS)
def test_the_head_is_the_layers_on_top_of_the_base_model(family: str) -> None:
    model = classifier(family)
    head = head_modules(model)
    assert head == HEADS[family]
    in_head = {name for name, _ in model.named_parameters() if name.startswith(tuple(f"{h}." for h in head))}
    assert class_dimensions(model).keys() <= in_head
    linear = {n for n, m in model.named_modules() if type(m) in (nn.Linear, Conv1D)}
    if family != "HGNetV2":
        settings = LoraSettings(r=1, target_modules=("all-linear",))
        layers = find_layers(model, settings, head, head_is_trained_whole=True)
        assert layers.keys() == {n for n in linear if not n.startswith(head)} != set()


@given(classes=st.integers(1, 12))
@settings(max_examples=5, deadline=None)
def test_the_dimension_of_the_classes_is_found_for_any_number(classes: int) -> None:
    config = transformers.BertConfig(
        vocab_size=8, hidden_size=4, num_hidden_layers=1, num_attention_heads=1, intermediate_size=4
    )
    config.num_labels = classes
    with torch.device("meta"):
        model = transformers.BertForSequenceClassification(config)
    assert class_dimensions(model) == {"classifier.weight": 0, "classifier.bias": 0}


def test_a_model_without_a_classification_head_is_refused() -> None:
    config = transformers.ResNetConfig(embedding_size=4, hidden_sizes=[4], depths=[1])
    with pytest.raises(ConfigError, match=r"ResNetModel: .*no head"):
        head_modules(transformers.ResNetModel(config))


def test_all_linear_without_a_linear_layer_is_refused_with_the_key_to_set() -> None:
    model, lora = classifier("HGNetV2"), LoraSettings(r=1, target_modules=("all-linear",))
    with pytest.raises(ConfigError, match=r"'all-linear' matches no layer.*set target_modules = \[\]"):
        find_layers(model, lora, ("fc",), head_is_trained_whole=True)


@pytest.mark.parametrize(("entry", "kind"), [("wte", "Embedding"), ("ln_1", "LayerNorm")])
def test_modules_that_are_not_linear_are_refused_with_their_class(entry: str, kind: str) -> None:
    model, lora = classifier("GPT2"), LoraSettings(r=1, target_modules=(entry,))
    with pytest.raises(ConfigError, match=f"'{entry}' is not a linear layer.*{kind}"):
        find_layers(model, lora, ("score",), head_is_trained_whole=True)


def test_a_convolution_is_refused_as_such() -> None:
    model, lora = classifier("ConvNext"), LoraSettings(r=1, target_modules=("dwconv",))
    wanted = r"'dwconv' is a convolution \(Conv2d\), and convolutions are not adapted.*pwconv1, pwconv2"
    with pytest.raises(ConfigError, match=wanted):
        find_layers(model, lora, ("classifier",), head_is_trained_whole=True)


def test_a_layer_whose_weight_is_read_past_its_lora_is_not_adapted() -> None:
    """SigLIP pools by ``nn.MultiheadAttention``, whose output layer is never called."""
    model, name = classifier("Siglip"), "vision_model.head.attention.out_proj"
    for entry in ("all-linear", "out_proj"):
        lora = LoraSettings(r=1, target_modules=(entry,))
        layers = find_layers(model, lora, ("classifier",), head_is_trained_whole=True)
        assert name not in layers
        assert "vision_model.encoder.layers.0.self_attn.out_proj" in layers
    with pytest.raises(ConfigError, match="reads its weight and never calls it"):
        find_layers(
            model, LoraSettings(r=1, target_modules=(name,)), ("classifier",), head_is_trained_whole=True
        )


def test_lora_acts_in_evaluation_as_in_training_where_pytorch_has_a_fast_path() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    model = AdaptedModel(nn.Sequential(layer), LoraSettings(r=2, target_modules=("linear1",)))
    with torch.no_grad():
        for parameter in model.trained_parameters().values():
            parameter.normal_()
        inputs = torch.randn(2, 3, 8)
        torch.testing.assert_close(model.model.eval()(inputs), model.model.train()(inputs))


def test_the_fast_path_is_switched_off_only_for_models_that_have_one() -> None:
    """As `load_adapter` does in a process that has not trained."""
    before = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(True)
        avoid_fast_path(nn.Sequential(nn.Linear(4, 4)))
        assert torch.backends.mha.get_fastpath_enabled()
        avoid_fast_path(nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)))
        assert not torch.backends.mha.get_fastpath_enabled()
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


class Scaled(nn.Linear):
    """Its output is not linear in an update of its weight as LoRA's is."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(input, 3 * self.weight, self.bias)


class Written(nn.Linear):
    """A linear layer that is written in another way."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        assert self.bias is not None
        return input @ self.weight.T + self.bias


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (Scaled(4, 4), r"layer 0 \(Scaled\) does not compute x W\^T \+ b"),
        (nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), "layer 0 is computed from other parameters"),
    ],
    ids=["forward", "weight"],
)
def test_layers_that_compute_something_else_are_refused(layer: nn.Module, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        AdaptedModel(nn.Sequential(layer), LoraSettings(r=1, target_modules=("0",)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_linear_layer_may_be_written_in_another_way(dtype: torch.dtype) -> None:
    layer = Written(64, 8).to(dtype)
    assert AdaptedModel(nn.Sequential(layer), LoraSettings(r=1, target_modules=("0",))).layers
    assert layer.training


class Shared(nn.Module):
    """Two linear layers whose weights are related in some way."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        if how == "parameter":
            self.second.weight = self.first.weight
        if how == "memory":
            self.second.weight.data = self.first.weight.data
        if how == "part":
            self.second = nn.Linear(4, 2)
            self.second.weight = nn.Parameter(self.first.weight.data[1:3])
        if how == "embedding":
            self.second = nn.Embedding(4, 4)  # type: ignore[assignment]
            self.second.weight = self.first.weight
        if how == "module":
            self.second = self.first
        if how == "one buffer":  # side by side, without an overlap
            both = torch.randn(8, 4)
            self.first.weight, self.second.weight = (nn.Parameter(half) for half in both.split(4))


@pytest.mark.parametrize("how", ["parameter", "memory", "part", "embedding", "module"])
def test_a_layer_whose_weight_another_module_uses_is_refused(how: str) -> None:
    with pytest.raises(ConfigError, match=r"layer first shares its weight with second.*target_modules"):
        AdaptedModel(Shared(how), LoraSettings(r=1, target_modules=("first",)))


@pytest.mark.parametrize("how", ["parameter", "embedding", "module"])
def test_tied_weights_are_found_before_they_are_loaded(how: str) -> None:
    with torch.device("meta"):
        model = Shared(how)
    with pytest.raises(ConfigError, match=r"layer first shares its weight with second"):
        check_not_shared(model, ["first"])


@pytest.mark.parametrize("how", ["apart", "one buffer"])
def test_layers_with_weights_of_their_own_are_adapted(how: str) -> None:
    assert AdaptedModel(Shared(how), LoraSettings(r=1, target_modules=("first",))).layers


def test_the_other_name_of_a_module_is_reported() -> None:
    lora = LoraSettings(r=1, target_modules=("second",))
    with pytest.raises(ConfigError, match="'second' is another name of the module first"):
        find_layers(Shared("module"), lora, (), head_is_trained_whole=False)


@pytest.mark.parametrize(
    ("family", "layer"), [("Bert", "classifier"), ("Roberta", "classifier.out_proj"), ("Llama", "score")]
)
@pytest.mark.parametrize(
    "problem", ["single_label_classification", "multi_label_classification", "regression"]
)
def test_the_rank_of_the_heads_gradient_is_that_of_the_loss(family: str, layer: str, problem: str) -> None:
    """The oracle is the numerical rank of the gradient, with transformers' own loss."""
    torch.manual_seed(0)
    model = tiny(family, "ForSequenceClassification", labels=4).double()
    model.config.problem_type = problem
    words = torch.randint(3, model.config.vocab_size, (32, 6))
    labels = torch.rand(32, 4).double()
    if problem != "regression":
        labels = labels.argmax(dim=1) if problem.startswith("single") else (labels > 0.5).double()
    model(input_ids=words, labels=labels).loss.backward()
    gradient = model.get_submodule(layer).get_parameter("weight").grad
    lora = LoraSettings(r=1, target_modules=(layer,))
    [found] = find_layers(model, lora, head_modules(model), head_is_trained_whole=False).values()
    assert int(torch.linalg.matrix_rank(gradient, rtol=1e-9)) == found.gradient_rank
    assert found.gradient_rank == (3 if problem == "single_label_classification" else 4)
