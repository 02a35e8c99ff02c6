"""Load pretrained models with transformers: from a local folder, a hub or a PyPI package."""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
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
    """A loaded model and its image processor.

    Attributes:
        model: the model with pretrained weights and a head for the wanted classes.
        head: names of the head's modules.
        processor: the image processor.
        arguments: arguments of the forward pass beside the pixels.
        drawn: names of the parameters that differ from the checkpoint's: those that the checkpoint lacks,
            drawn from the run's seed, and those whose rows were put into the order of the wanted classes.
        notes: messages that users should read before training.
    """

    model: nn.Module
    head: tuple[str, ...]
    processor: ImageProcessor
    arguments: Mapping[str, Any] = field(default_factory=dict)
    drawn: frozenset[str] = frozenset()
    notes: tuple[str, ...] = ()


def is_hub_model(source: str) -> bool:
    """Whether a source is a hub id: neither a packaged model nor a local folder."""
    return not source.startswith(registry.PREFIX) and not Path(source).expanduser().exists()


def model_files(settings: ModelSettings) -> dict[str, Any]:
    """The arguments of ``from_pretrained`` that name the model: a local folder, or a hub id and its revision.

    A packaged model is converted to a folder on first use.

    Raises:
        ConfigError: there is no such packaged model or folder, or ``revision`` does not belong to the source.
        PackageError: the package cannot be fetched.
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
            f"packaged models are {known}"
        )
    return {"pretrained_model_name_or_path": source, "revision": settings.revision or "main"}


def model_config(settings: ModelSettings, **changes: Any) -> Any:
    """The model's configuration, without its weights.

    Raises ``ConfigError`` if the hub cannot be reached or has no such model, if transformers does not know
    the model, and as `model_files` does.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(**model_files(settings), trust_remote_code=False, **changes)
    except OSError as error:
        raise ConfigError(
            f"model.source = {settings.source!r}: there is no such folder, and the hub did not provide it: "
            f"{str(error).splitlines()[0]}"
        ) from None
    except ValueError as error:  # transformers lists all models that it knows
        raise ConfigError(
            f"model.source = {settings.source!r}: transformers does not know the model of its config.json: "
            f"{str(error).splitlines()[0][:200]}"
        ) from None


def image_processor(settings: ModelSettings) -> ImageProcessor:
    """The image processor of the model; see `load_image_processor`.

    Raises ``ConfigError`` if ``model.image_size`` is not a multiple of the model's patch size.
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
    settings: ModelSettings,
    classes: Sequence[str],
    seed: int,
    *,
    problem_type: str | None = None,
    empty: bool = False,
) -> ImageClassifier:
    """Load a model with a head for ``classes``, drawn from the run's seed unless the checkpoint has one.

    Args:
        settings: ``[model]``.
        classes: names of the classes, in the order of their labels.
        seed: the run's seed.
        problem_type: ``config.problem_type``, from which a user's own code takes the loss; the checkpoint's
            own unless given.
        empty: build the model on the meta device, without weights: its layers and shapes only.

    Raises:
        ConfigError: the source is wrong, or the image size is not a multiple of the patch size.
    """
    from transformers import AutoModelForImageClassification

    problem = {} if problem_type is None else {"problem_type": problem_type}
    config = model_config(settings, **label_names(classes), **problem)
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
    """Load a classifier whose head's rows are in the order of the classes in ``config``.

    If a checkpoint's trained head has the wanted classes in another order, its rows are reordered.

    Args:
        auto: the class to load with, such as ``AutoModelForImageClassification``.
        settings: ``[model]``.
        config: the model's configuration, with the wanted classes as its ``id2label``.
        seed: the run's seed.
        empty: build the model on the meta device, without weights.

    Returns:
        The model, the names of the parameters that differ from the checkpoint's, and notes for users.

    Raises:
        ConfigError, PrecisionError: as in `load_weights`.
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
    """Build the model of `load_weights` on the meta device, without weights and not quantised.

    Raises:
        ConfigError: the model does not have the implementation ``model.attention``.
        PrecisionError: as `precision.check` and `precision.left_out` do.
    """
    precision.check(settings, config)
    with torch.device("meta"), _attends(settings):
        model = auto.from_config(
            config, dtype=precision.dtype_of(settings), trust_remote_code=False, **_attention(settings)
        )
    model.tie_weights()  # transformers 5.0 does not do so on the meta device
    precision.left_out(model, settings, head_modules(model))
    return model


def load_weights(auto: Any, settings: ModelSettings, config: Any, seed: int) -> tuple[Any, frozenset[str]]:
    """Load a model in the precision of ``settings``; draw parameters that the checkpoint lacks from the seed.

    Args:
        auto: the class to load with, such as ``AutoModelForImageClassification``.
        settings: ``[model]``.
        config: the model's configuration.
        seed: the run's seed.

    Returns:
        The model, and the names of the parameters that were drawn.

    Raises:
        ConfigError: there are no weights, or they cannot be read.
        PrecisionError: as in `empty_model`.
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
                **_attention(settings),
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
        # The file is missing, truncated or not readable; torch raises the last two for its own format.
        except (OSError, SafetensorError, RuntimeError, EOFError) as error:
            raise ConfigError(
                f"model.source = {settings.source!r}: its weights cannot be loaded: "
                f"{(str(error).splitlines() or [type(error).__name__])[0]}"
            ) from None
    # Some versions report a mismatched key alone, others with both shapes.
    mismatched = {key if isinstance(key, str) else key[0] for key in report["mismatched_keys"]}
    drawn = frozenset({*report["missing_keys"], *mismatched})
    if drawn and drawn >= {name for name, _ in model.named_parameters()}:
        other = sorted(report["unexpected_keys"])[:1] or ["none"]
        raise ConfigError(
            f"model.source = {settings.source!r}: its weights have no parameter of {type(model).__name__}, "
            f"such as {min(drawn)!r}; the first of their names is {other[0]!r}. Save the model by "
            "save_pretrained, without a wrapper"
        )
    return model, drawn


def _attention(settings: ModelSettings) -> dict[str, str]:
    """The argument of transformers for ``model.attention``; none for its own choice."""
    return {} if settings.attention == "auto" else {"attn_implementation": settings.attention}


@contextmanager
def _attends(settings: ModelSettings) -> Iterator[None]:
    """Raise ``ConfigError`` if transformers cannot give the model its attention."""
    try:
        yield
    except (ImportError, ValueError) as error:
        if settings.attention == "auto":
            raise
        raise ConfigError(
            f"model.attention = {settings.attention!r}: {settings.source} cannot use it here: "
            f"{str(error).splitlines()[0][:200]}"
        ) from None


def _size_arguments(model: nn.Module, size: tuple[int, int]) -> dict[str, Any]:
    """The argument that makes a ViT interpolate its position embeddings, if its own size is not ``size``."""
    # CLIP's classifier passes the argument on to its base model.
    accepts = any(
        "interpolate_pos_encoding" in inspect.signature(module.forward).parameters
        for module in (model, *model.children())
    )
    own = getattr(_vision(model.config), "image_size", size)
    own = (own, own) if isinstance(own, int) else tuple(own)
    return {"interpolate_pos_encoding": True} if accepts and own != size else {}


def _vision(config: Any) -> Any:
    """The configuration of a model's image encoder; models such as CLIP have another one for texts."""
    return getattr(config, "vision_config", config)


def head_modules(model: nn.Module) -> tuple[str, ...]:
    """The head of a transformers model: its modules with parameters beside the base model.

    The base model is the child named ``base_model_prefix``, or a pretrained model under another name (CLIP's
    and SigLIP's classifiers have a ``vision_model``). If there is no such child, or no module beside it, the
    head consists of the modules whose shapes depend on the number of classes.

    Raises ``ConfigError`` if there is no such module either.
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
        raise ConfigError(
            f"{type(model).__name__}: no layer depends on the number of classes, so it has no head"
        )
    return head


def class_dimensions(model: Any) -> dict[str, int]:
    """The parameters whose shapes depend on the number of classes, each with the dimension that does.

    They are found by comparing two models on the meta device, with one and with two more classes.
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
