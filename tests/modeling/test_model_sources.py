"""Sources of pretrained models, and their heads."""

import io
import socket
import time
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from rich.console import Console
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)
from transformers.image_processing_base import ImageProcessingMixin

from fedsmoothlora.config import ConfigError, read
from fedsmoothlora.modeling.loading import (
    image_processor,
    load_image_classifier,
    model_config,
    model_files,
)
from fedsmoothlora.modeling.settings import ModelSettings
from fedsmoothlora.runs.planning import plan
from fedsmoothlora.runs.session import run

CLASSES = ("rows", "columns", "checks", "plain")


def vit_config(**changes: Any) -> ViTConfig:
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 8,
        "initializer_range": 0.2,
    }
    return ViTConfig(**{**sizes, **changes})


def saved(model: Any, folder: Path, **changes: Any) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model(vit_config(**changes)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny ViT for images of 16 pixels, without a head."""
    return saved(ViTModel, tmp_path_factory.mktemp("vit"))


@pytest.fixture(scope="module")
def vit_with_head(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with a head for four classes."""
    return saved(ViTForImageClassification, tmp_path_factory.mktemp("vit-head"), num_labels=4)


def settings(source: Path | str, **more: Any) -> ModelSettings:
    return ModelSettings(source=str(source), **{"image_size": 16, **more})


def head(source: Path, seed: int = 0, classes: tuple[str, ...] = CLASSES) -> dict[str, torch.Tensor]:
    return dict(load_image_classifier(settings(source), classes, seed).model.classifier.state_dict())


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


# -- sources -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("revision", "asked"), [(None, "main"), ("v1.2", "v1.2")])
def test_a_hub_id_goes_to_transformers_with_its_revision(
    vit: Path, monkeypatch: pytest.MonkeyPatch, revision: str | None, asked: str
) -> None:
    calls = []

    def at_the_boundary(real: Any) -> Any:
        def instead(pretrained_model_name_or_path: str, revision: str, **more: Any) -> Any:
            calls.append((pretrained_model_name_or_path, revision))
            return real(str(vit), **more)

        return instead

    monkeypatch.setattr(AutoConfig, "from_pretrained", at_the_boundary(AutoConfig.from_pretrained))
    real = AutoModelForImageClassification.from_pretrained
    monkeypatch.setattr(AutoModelForImageClassification, "from_pretrained", at_the_boundary(real))
    boundary = at_the_boundary(lambda folder, **more: ({"image_mean": [0.1] * 3, "image_std": [0.2] * 3}, {}))
    monkeypatch.setattr(ImageProcessingMixin, "get_image_processor_dict", boundary)

    mine = settings("someone/tiny-vit", revision=revision)
    assert model_files(mine) == {
        "pretrained_model_name_or_path": "someone/tiny-vit",
        "revision": asked,
    }
    image_processor(mine)
    loaded = load_image_classifier(mine, CLASSES, 0)
    assert loaded.processor.normalised(torch.full((1, 3, 1, 1), 255)).flatten().tolist() == [4.5] * 3
    assert len(calls) >= 4
    assert set(calls) == {("someone/tiny-vit", asked)}


def test_without_a_hub_the_error_is_clear_and_quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(*arguments: Any) -> None:
        raise AssertionError("a connection was tried")

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # read when it was imported
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(socket.socket, "connect", fail)
    mine = settings("someone/no-such-vit")
    began = time.monotonic()
    for work in (model_config, image_processor, lambda s: load_image_classifier(s, CLASSES, 0)):
        with pytest.raises(ValueError, match="hub did not provide it") as error:
            work(mine)
        assert "model.source = 'someone/no-such-vit'" in str(error.value)
        assert "no such folder" in str(error.value)
        assert "\n" not in str(error.value)
    assert time.monotonic() - began < 5


def test_a_revision_is_only_accepted_for_hub_models(vit: Path) -> None:
    for source in (str(vit), "pkg:dinov2-small"):
        with pytest.raises(ValueError, match=r"model\.revision = 'main' belongs to a hub model") as error:
            model_files(settings(source, revision="main"))
        assert source in str(error.value)


def test_a_folder_without_a_configuration_is_not_a_model(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no config\.toml|no config\.json") as error:
        model_files(settings(tmp_path))
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize(
    "source",
    [
        "/no/such/folder",
        pytest.param("./gone"),
        "a/b/c",
        "two words",
    ],
)
def test_a_source_that_is_neither_folder_nor_hub_id_is_refused_offline(
    source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(socket.socket, "connect", None)
    with pytest.raises(ValueError, match="no hub id") as error:
        model_files(settings(source))
    assert source in str(error.value)
    assert "pkg:dinov2-small" in str(error.value)


def test_a_tilde_is_the_home_folder(vit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(vit.parent))
    assert model_files(settings(f"~/{vit.name}")) == {"pretrained_model_name_or_path": str(vit)}


def test_a_folder_without_a_processor_has_pixels_from_minus_one_to_one(vit: Path) -> None:
    pixels = torch.tensor([0, 255], dtype=torch.uint8).view(1, 1, 1, 2)
    assert image_processor(settings(vit)).normalised(pixels)[0, :, 0].tolist() == [[-1, 1]] * 3


# -- image size --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "near"), [(20, "16 or 24"), (7, "as 8"), (23, "16 or 24")])
def test_an_image_size_that_patches_do_not_fill_is_refused_with_sizes_that_they_do(
    vit: Path, size: int, near: str
) -> None:
    with pytest.raises(ValueError, match=f"model.image_size = {size}: .*{near}"):
        image_processor(settings(vit, image_size=size))
    image_processor(settings(vit, image_size=24))


@pytest.mark.parametrize(("size", "arguments"), [(16, {}), (24, {"interpolate_pos_encoding": True})])
def test_a_vit_of_another_size_interpolates_its_position_embeddings(
    vit: Path, size: int, arguments: dict[str, bool]
) -> None:
    for empty in (False, True):
        loaded = load_image_classifier(settings(vit, image_size=size), CLASSES, 0, empty=empty)
        assert loaded.arguments == arguments
    loaded = load_image_classifier(settings(vit, image_size=size), CLASSES, 0)
    pixels = torch.zeros(2, 3, size, size)
    assert loaded.model(pixel_values=pixels, **loaded.arguments).logits.shape == (2, 4)
    if arguments:
        with pytest.raises(ValueError, match="size"):
            loaded.model(pixel_values=pixels)


def test_a_vit_of_another_size_learns(vit: Path, toy_table: dict[str, Any], tmp_path: Path) -> None:
    toy_table["model"] = {"source": str(vit), "image_size": 24}
    toy_table["training"] |= {"rounds": 4, "lr": 0.05}
    result = run(toy_table, out=tmp_path / "run", console=Console(file=io.StringIO()))
    accuracies = result.values("accuracy")
    assert accuracies[-1] > accuracies[0] + 0.2
    assert result.values("loss")[-1] < result.values("loss")[0]


def test_the_plan_refuses_an_image_size_by_its_key(vit: Path, toy_table: dict[str, Any]) -> None:
    toy_table["model"] = {"source": str(vit), "image_size": 20}
    with pytest.raises(ConfigError, match=r"model\.image_size = 20"):
        plan(read(toy_table))


# -- head --------------------------------------------------------------------------------------------


def test_a_head_is_drawn_from_the_seed_alone_without_the_global_generator(vit: Path) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = head(vit)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert same(head(vit), first)
    other = head(vit, seed=1)
    assert not torch.equal(other["weight"], first["weight"])
    assert float(first["weight"].std()) > 0


def test_the_backbone_is_the_checkpoints_whatever_the_seed(vit: Path) -> None:
    wanted = ViTModel.from_pretrained(vit, add_pooling_layer=False).state_dict()
    for seed in (0, 1):
        found = load_image_classifier(settings(vit), CLASSES, seed).model.vit.state_dict()
        assert same(found, wanted)


def test_a_checkpoints_head_of_the_same_size_is_kept(vit_with_head: Path) -> None:
    wanted = ViTForImageClassification.from_pretrained(vit_with_head).classifier.state_dict()
    for seed in (0, 1):
        assert same(head(vit_with_head, seed), dict(wanted))


def test_a_checkpoints_head_of_another_size_is_drawn_anew_from_the_seed(vit_with_head: Path) -> None:
    names = tuple("abcdefg")
    first = head(vit_with_head, classes=names)
    assert first["weight"].shape == (7, 16)
    assert same(head(vit_with_head, classes=names), first)
    assert not torch.equal(head(vit_with_head, seed=1, classes=names)["weight"], first["weight"])
    assert bool(torch.isfinite(first["weight"]).all())
    loaded = load_image_classifier(settings(vit_with_head), names, 0)
    assert loaded.model.config.id2label == dict(enumerate(names))
    wanted = ViTForImageClassification.from_pretrained(vit_with_head).vit.state_dict()
    assert same(dict(loaded.model.vit.state_dict()), dict(wanted))


def test_an_empty_model_has_the_shapes_and_no_weights(vit_with_head: Path) -> None:
    before = torch.get_rng_state()
    empty = load_image_classifier(settings(vit_with_head), CLASSES, 0, empty=True)
    real = load_image_classifier(settings(vit_with_head), CLASSES, 0)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(parameter.is_meta for parameter in empty.model.parameters())
    shapes = {name: parameter.shape for name, parameter in real.model.named_parameters()}
    assert {name: parameter.shape for name, parameter in empty.model.named_parameters()} == shapes
    assert empty.head == real.head == ("classifier",)
    assert {parameter.dtype for parameter in real.model.parameters()} == {torch.float32}


def test_weights_stored_in_half_precision_are_loaded_in_float32(vit: Path, tmp_path: Path) -> None:
    ViTModel.from_pretrained(vit).half().save_pretrained(tmp_path / "half")
    loaded = load_image_classifier(settings(tmp_path / "half"), CLASSES, 0)
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {torch.float32}
