"""Image classifiers of several architectures: pixels of their own processors, runs, exports."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from peft import PeftModel
from PIL import Image
from rich.console import Console
from transformers import AutoImageProcessor, AutoModelForImageClassification

from fedsmoothlora import export, load_adapter
from fedsmoothlora.config import read
from fedsmoothlora.logs import quiet_libraries
from fedsmoothlora.modeling.versions import image_processor_class
from fedsmoothlora.runs.planning import plan
from fedsmoothlora.runs.session import run

SIZE = 16
_SEEN = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 24}
_PATCHES = {**_SEEN, "image_size": SIZE, "patch_size": 8}
_PAIR = {"vision_config": _PATCHES, "text_config": {**_SEEN, "vocab_size": 49408}}
_STAGES = {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2}
_WINDOWS = {"image_size": SIZE, "patch_size": 4, "embed_dim": 8, "window_size": 2}
# By the first part of its classes' names: sizes of the model, and the class of its image processor.
FAMILIES: dict[str, tuple[dict[str, Any], str]] = {
    "ConvNext": (_STAGES, "ConvNext"),
    "ConvNextV2": (_STAGES, "ConvNext"),
    "Swin": ({**_WINDOWS, "depths": [1, 1], "num_heads": [1, 2]}, "ViT"),
    "CLIP": (_PAIR, "CLIP"),
    "Siglip": (_PAIR, "Siglip"),
    "Beit": ({**_PATCHES, "use_relative_position_bias": True}, "Beit"),
    "DeiT": (_PATCHES, "DeiT"),
}
_SQUARE = {"height": SIZE, "width": SIZE}
_SIZES: dict[str, dict[str, Any]] = {
    "ConvNext": {"size": {"shortest_edge": SIZE}},
    "CLIP": {"size": {"shortest_edge": SIZE}, "crop_size": _SQUARE},
    "DeiT": {"size": _SQUARE, "crop_size": _SQUARE},
}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Dark, grey and bright images of 24×20 pixels."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for name, level in (("bright", 150), ("dark", 0), ("grey", 75)):
        (root / name).mkdir()
        for number in range(8):
            pixels = (level + rng.integers(0, 100, (24, 20, 3))).astype(np.uint8)
            Image.fromarray(pixels).save(root / name / f"{number}.png")
    return root


def saved(family: str, folder: Path) -> Path:
    """A tiny classifier of four other classes with random weights, and its own image processor."""
    sizes, processor = FAMILIES[family]
    config = getattr(transformers, f"{family}Config")(**sizes, initializer_range=0.2, num_labels=4)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        getattr(transformers, f"{family}ForImageClassification")(config).save_pretrained(folder)
    own = image_processor_class(processor)(**_SIZES.get(processor, {"size": _SQUARE}))
    own.save_pretrained(folder)
    return folder


def table_of(model: Path, images: Path, method: str) -> dict[str, Any]:
    return {
        "name": "family",
        "model": {"source": str(model)},
        "lora": {"r": 1, "alpha": 2, "target_modules": ["all-linear"]},
        "data": {"source": str(images), "validation": 0.25},
        "partition": {"kind": "iid", "clients": 2},
        "method": {"name": method, **({"calibration_batches": 1} if method == "fedsmoothlora" else {})},
        "training": {"rounds": 1, "steps": 2, "batch_size": 4, "lr": 0.05},
        "machine": {"threads": 1, "device": "cpu"},
    }


@pytest.mark.parametrize("method", ["fedsmoothlora", pytest.param("fedit", marks=pytest.mark.slow)])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_trains_every_layer_and_its_exports_have_equal_outputs(
    family: str, method: str, images: Path, tmp_path: Path
) -> None:
    model = saved(family, tmp_path / "model")
    config = read(table_of(model, images, method))
    planned = plan(config)
    assert planned.head == ("classifier",)
    pixels = planned.task_data.train.batch([0, 15])["pixel_values"]
    own = AutoImageProcessor.from_pretrained(model, backend="pil")
    places = [planned.task_data.data.train.places[row] for row in (0, 15)]
    with quiet_libraries():
        wanted = own([Image.open(place).convert("RGB") for place in places], return_tensors="pt")
    torch.testing.assert_close(pixels, wanted["pixel_values"], rtol=1e-5, atol=1e-5)

    result = run(config, out=tmp_path / "run", console=Console(file=io.StringIO()))
    for as_ in ("merged", "adapter"):
        export(result.folder, as_, out=tmp_path / as_, console=Console(file=io.StringIO()))
    auto = AutoModelForImageClassification
    with quiet_libraries(), torch.no_grad():
        merged = auto.from_pretrained(tmp_path / "merged").eval()
        base = auto.from_pretrained(model, num_labels=3, ignore_mismatched_sizes=True)
        before = {name: base.get_submodule(name).weight.clone() for name in planned.layers}
        adapted = PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
        logits = merged(pixels).logits
        for other in (adapted, load_adapter(tmp_path / "adapter")):
            torch.testing.assert_close(other(pixels).logits, logits, rtol=1e-4, atol=1e-4)
    assert merged.config.id2label == {0: "bright", 1: "dark", 2: "grey"}
    for name, weight in before.items():
        # SigLIP's classifier reads the mean of the patches, and not the output of this head.
        is_read = not name.startswith("vision_model.head.")
        assert torch.equal(merged.get_submodule(name).weight, weight) != is_read, name
