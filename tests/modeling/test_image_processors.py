from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import transformers as T
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fedsmoothlora.config import read
from fedsmoothlora.data.images import ImageExamples
from fedsmoothlora.data.raw import RawImages
from fedsmoothlora.data.stored_images import StoredImages
from fedsmoothlora.errors import ConfigError
from fedsmoothlora.modeling.image_processors import load_image_processor
from fedsmoothlora.modeling.settings import ModelSettings
from fedsmoothlora.modeling.versions import image_processor_class
from fedsmoothlora.runs.planning import plan
from fedsmoothlora.tasks.image_classification import ImageClassification

SQUARE = {"height": 32, "width": 32}
EDGE = {"shortest_edge": 32}

# A processor of each kind, and whether its pixels are kept as bytes.
KINDS: dict[str, tuple[Any, bool]] = {
    "vit": (image_processor_class("ViT")(size=SQUARE), True),
    "not normalised": (image_processor_class("ViT")(size=SQUARE, do_normalize=False), True),
    "not rescaled": (
        image_processor_class("ViT")(size=SQUARE, do_rescale=False, image_mean=[128.0, 1, 2]),
        True,
    ),
    "another factor": (image_processor_class("ViT")(size=SQUARE, rescale_factor=1 / 127.5), True),
    "one mean a channel": (image_processor_class("ViT")(size=SQUARE, image_mean=[0.1, 0.5, 0.7]), True),
    "nearest": (image_processor_class("ViT")(size=SQUARE, resample=0), True),
    "channels flipped": (image_processor_class("MobileViT")(size=EDGE, crop_size=SQUARE), True),
    "cropped": (image_processor_class("Bit")(size={"shortest_edge": 40}, crop_size=SQUARE), True),
    "cropped only": (image_processor_class("Bit")(do_resize=False, crop_size=SQUARE), True),
    "crop_pct": (image_processor_class("ConvNext")(size=EDGE, crop_pct=0.875), True),
    "levit": (image_processor_class("Levit")(size=EDGE, crop_size=SQUARE), True),
    "clip": (image_processor_class("CLIP")(size=EDGE, crop_size=SQUARE), True),
    "siglip": (image_processor_class("Siglip")(size=SQUARE), True),
    "beit": (image_processor_class("Beit")(size=SQUARE, do_center_crop=False), True),
    "deit": (image_processor_class("DeiT")(size={"height": 36, "width": 36}, crop_size=SQUARE), True),
    "offset": (image_processor_class("EfficientNet")(size=SQUARE, rescale_offset=True), False),
    "normalised twice": (image_processor_class("EfficientNet")(size=SQUARE, include_top=True), False),
    "not square": (image_processor_class("ViT")(size={"height": 32, "width": 48}), True),
}  # fmt: skip


def checkpoint(folder: Path, processor: Any = None) -> Path:
    """A folder with a model's configuration and a processor; weights are not needed."""
    T.ViTConfig(hidden_size=32, num_hidden_layers=1, image_size=32, patch_size=8).save_pretrained(folder)
    if processor is not None:
        processor.save_pretrained(folder)
    return folder


def loaded(folder: Path, size: int | None = None) -> Any:
    files = {"pretrained_model_name_or_path": str(folder)}
    return load_image_processor(ModelSettings(source=str(folder), image_size=size), files)


def noise(height: int, width: int, seed: int = 0) -> Image.Image:
    levels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(levels)


def stored(*images: Image.Image) -> StoredImages:
    contents = []
    for image in images:
        file = io.BytesIO()
        image.save(file, "PNG")
        contents.append({"bytes": file.getvalue(), "path": None})
    features = datasets.Features({"image": datasets.Image(decode=False)})
    rows = datasets.Dataset.from_dict({"image": contents}, features=features)
    places = tuple(f"image {row}" for row in range(len(images)))
    return StoredImages(rows, Path(), np.zeros(len(images), dtype=np.int64), ("a",), places)


IMAGES = [noise(32, 32), noise(50, 41), noise(33, 90), noise(20, 24)]


def own_pixels(folder: Path, image: Image.Image) -> Any:
    return T.AutoImageProcessor.from_pretrained(folder)(images=image, return_tensors="pt")["pixel_values"]


@pytest.mark.parametrize("kind", KINDS)
def test_training_and_the_export_use_the_pixels_of_the_checkpoints_processor(
    kind: str, tmp_path: Path
) -> None:
    processor, as_bytes = KINDS[kind]
    folder = checkpoint(tmp_path / "model", processor)
    made = loaded(folder)
    assert made.dtype == (torch.uint8 if as_bytes else torch.float32)
    assert made.size == ((32, 48) if kind == "not square" else (32, 32))
    kept, anew = (ImageExamples(stored(*IMAGES), made, memory=memory) for memory in (10**9, 0))
    (tmp_path / "out").mkdir()
    ImageClassification().write_processor(ModelSettings(source=str(folder)), tmp_path / "out")
    for row, image in enumerate(IMAGES):
        found = kept.batch([row])["pixel_values"]
        assert torch.equal(found, anew.batch([row])["pixel_values"])
        for there in (folder, tmp_path / "out"):
            torch.testing.assert_close(found, own_pixels(there, image), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "not square"])
@pytest.mark.parametrize("grey", [True, False])
def test_packaged_images_have_these_pixels_too(kind: str, grey: bool, tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, KINDS[kind][0])
    for size in (32, 44):
        image = noise(size, size).convert("L" if grey else "RGB")
        raw = RawImages(np.asarray(image)[None], np.zeros(1, dtype=np.int64), ("a",))
        found = ImageExamples(raw, loaded(folder)).batch([0])["pixel_values"]
        torch.testing.assert_close(found, own_pixels(folder, image.convert("RGB")), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_image_size_replaces_the_sizes_of_the_processor(kind: str, tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "model", KINDS[kind][0])
    made = loaded(folder, 24)
    assert made.size == (24, 24)
    (tmp_path / "out").mkdir()
    made.save(tmp_path / "out")
    examples = ImageExamples(stored(*IMAGES), made)
    for row, image in enumerate(IMAGES):
        found = examples.batch([row])["pixel_values"]
        torch.testing.assert_close(found, own_pixels(tmp_path / "out", image), rtol=1e-5, atol=1e-5)
    if kind in ("cropped", "vit", "clip", "siglip", "channels flipped"):
        square = ImageExamples(stored(noise(24, 24)), made).batch([0])["pixel_values"]
        shown = made.normalised(torch.from_numpy(np.array(noise(24, 24))).permute(2, 0, 1)[None])
        torch.testing.assert_close(square, shown.flip(1) if kind == "channels flipped" else shown)


@settings(max_examples=30)
@given(size=st.integers(8, 40), height=st.integers(8, 60), width=st.integers(8, 60), seed=st.integers(0, 99))
def test_without_a_processor_the_exported_one_makes_the_same_pixels(
    tmp_path_factory: pytest.TempPathFactory, size: int, height: int, width: int, seed: int
) -> None:
    folder = checkpoint(tmp_path_factory.mktemp("model"))
    made = loaded(folder, size)
    made.save(folder)
    image = noise(height, width, seed)
    found = ImageExamples(stored(image), made).batch([0])["pixel_values"]
    torch.testing.assert_close(found, own_pixels(folder, image), rtol=1e-5, atol=1e-5)
    assert -1 <= float(found.min()) <= float(found.max()) <= 1
    square = noise(size, size, seed)
    exact = torch.from_numpy(np.asarray(square).copy()).permute(2, 0, 1).float()
    got = ImageExamples(stored(square), made).batch([0])["pixel_values"][0]
    assert torch.equal(got, (exact - torch.tensor(0.5) * 255) / (torch.tensor(0.5) * 255))


def test_images_that_the_processor_does_not_bring_to_one_size_are_named(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, image_processor_class("ViT")(do_resize=False))
    with pytest.raises(ConfigError, match=r"model\.image_size is missing: ViTImageProcessor"):
        loaded(folder)
    images = stored(noise(32, 32), noise(32, 40))
    examples = ImageExamples(images, loaded(folder, 32), memory=0)
    examples.batch([0])
    with pytest.raises(ValueError, match=r"^image 1: .* makes 32×40 pixels of this image; should be 32×32"):
        examples.batch([1])


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("{", "its image processor cannot be read"),
        ('{"image_processor_type": "VivitImageProcessor"}', r"returns an array of shape \(1, 3, 224, 224\)"),
        ('{"image_processor_type": "NoSuch"}', "transformers cannot load its image processor"),
        ('{"image_processor_type": "ViTImageProcessor", "size": {"height": -1, "width": 2}}', "be used"),
        ('{"image_processor_type": "ViTImageProcessor", "image_mean": [0.5]}', "cannot be used"),
        ('{"image_processor_type": "ViTImageProcessor", "image_std": [0, 1, 1, 1]}', "cannot be used"),
        ('{"image_processor_type": "ViTImageProcessor", "rescale_factor": 0}', "cannot be used"),
        ('{"image_processor_type": "Siglip2ImageProcessor"}', "cannot be used"),
        ('{"image_processor_type": "Qwen2VLImageProcessor"}', "cannot be used"),
        ('{"auto_map": {"AutoImageProcessor": "own.Own"}, "image_processor_type": "Own"}', "cannot load"),
    ],
)  # fmt: skip
def test_a_processor_that_cannot_be_run_is_refused(content: str, text: str, tmp_path: Path) -> None:
    folder = checkpoint(tmp_path)
    (folder / "preprocessor_config.json").write_text(content)
    with pytest.raises(ConfigError, match=text) as caught:
        loaded(folder)
    assert "\n" not in str(caught.value)


def test_the_processor_inside_processor_config_is_used(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path)
    table = image_processor_class("ViT")(size=SQUARE, do_normalize=False).to_dict()
    (folder / "processor_config.json").write_text(json.dumps({"image_processor": table}))
    assert float(ImageExamples(stored(noise(32, 32)), loaded(folder)).batch([0])["pixel_values"].min()) >= 0


def test_a_plan_feeds_the_pixels_of_the_checkpoints_processor(tmp_path: Path) -> None:
    config = T.MobileViTConfig(
        hidden_sizes=[32, 32, 32],
        neck_hidden_sizes=[8, 16, 16, 32, 32, 32, 64],
        image_size=32,
        num_attention_heads=2,
    )
    folder = tmp_path / "model"
    T.MobileViTForImageClassification(config).save_pretrained(folder)
    image_processor_class("MobileViT")(size=EDGE, crop_size=SQUARE).save_pretrained(folder)
    for name, colour in (("a", (200, 30, 10)), ("b", (30, 30, 200))):
        (tmp_path / "img" / name).mkdir(parents=True)
        for number in range(4):
            Image.new("RGB", (32, 32), (*colour[:2], colour[2] + number)).save(
                tmp_path / "img" / name / f"{number}.png"
            )
    planned = plan(
        read(
            {
                "name": "x",
                "model": {"source": str(folder)},
                "data": {"source": str(tmp_path / "img"), "validation": 0.25},
                "lora": {"target_modules": ["all-linear"], "r": 2},
                "partition": {"kind": "iid", "clients": 2},
            }
        )
    )
    found = planned.task_data.train.batch([0])["pixel_values"].mean((0, 2, 3))
    torch.testing.assert_close(found, torch.tensor([10, 30, 200]) / 255)
    assert planned.task_data.widest_batch(3)["pixel_values"].shape == (3, 3, 32, 32)
