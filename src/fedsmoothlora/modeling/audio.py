"""Load audio classifiers and feature extractors with transformers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from fedsmoothlora.errors import ConfigError, FedSmoothLoRAError
from fedsmoothlora.modeling.loading import (
    head_modules,
    label_names,
    load_classifier,
    model_config,
    model_files,
)
from fedsmoothlora.modeling.settings import ModelSettings

# Models whose outputs do not depend on masked padding, unless they normalise over time. WavLM is not among
# them, because its attention passes torch masks of two types, which torch deprecates.
_MASKED = ("wav2vec2", "hubert", "unispeech", "unispeech-sat")
# SpecAugment draws from NumPy's global generator, so a resumed run would differ; dropped layers would have no
# gradient.
_TRAINING = {"apply_spec_augment": False, "layerdrop": 0.0}


@dataclass(frozen=True)
class AudioClassifier:
    """A loaded model.

    Attributes:
        model: the model with pretrained weights and a head for the wanted classes.
        head: names of the head's modules.
        drawn: names of the parameters that differ from the checkpoint's: those that the checkpoint lacks,
            drawn from the run's seed, and those whose rows were put into the order of the wanted classes.
        notes: messages that users should read before training.
    """

    model: nn.Module
    head: tuple[str, ...]
    drawn: frozenset[str] = frozenset()
    notes: tuple[str, ...] = ()


class FeatureExtractor:
    """The feature extractor of a checkpoint.

    Args:
        extractor: the feature extractor of transformers.

    Attributes:
        rate: sampling rate in Hz.
        name: name of the model's input.
    """

    def __init__(self, extractor: Any) -> None:
        self._extractor = extractor
        self.rate = int(extractor.sampling_rate)
        self.name = str(extractor.model_input_names[0])

    def __call__(self, samples: NDArray[np.float32]) -> NDArray[np.float32]:
        """The model's input of one recording, ``(time, ...)``; ``samples`` is ``(samples,)``."""
        found = self._extractor(samples, sampling_rate=self.rate, return_tensors="np")[self.name]
        return np.asarray(found[0], dtype=np.float32)

    def save(self, folder: Path) -> None:
        """Write ``preprocessor_config.json``, from which transformers loads the same feature extractor."""
        self._extractor.save_pretrained(folder)


def load_feature_extractor(settings: ModelSettings) -> FeatureExtractor:
    """The feature extractor of a checkpoint.

    Raises ``ConfigError`` if there is none, or if it is not one of recordings.
    """
    from transformers import AutoFeatureExtractor

    try:
        found = AutoFeatureExtractor.from_pretrained(**model_files(settings), trust_remote_code=False)
        extractor = FeatureExtractor(found)
        extractor(np.zeros(extractor.rate, dtype=np.float32))
    except FedSmoothLoRAError:
        raise
    except Exception as error:  # the error's class depends on the content of the file
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]
        raise ConfigError(
            f"model.source = {settings.source!r}: its feature extractor (preprocessor_config.json) is "
            f"missing or cannot be used: {first}"
        ) from None
    return extractor


def load_audio_classifier(
    settings: ModelSettings, classes: Sequence[str], seed: int, *, empty: bool = False
) -> AudioClassifier:
    """Load a model with a head for ``classes``, drawn from the run's seed unless the checkpoint has one.

    SpecAugment and dropped layers of the checkpoint's own training are switched off.

    Args:
        settings: ``[model]``.
        classes: names of the classes, in the order of their labels.
        seed: the run's seed.
        empty: build the model on the meta device, without weights: its layers and shapes only.

    Raises:
        ConfigError: the source is wrong.
    """
    from transformers import AutoModelForAudioClassification

    config = model_config(settings, **label_names(classes))
    for key, value in _TRAINING.items():
        if hasattr(config, key):
            setattr(config, key, value)
    try:
        model, drawn, notes = load_classifier(
            AutoModelForAudioClassification, settings, config, seed, empty=empty
        )
    except FedSmoothLoRAError:
        raise
    except ValueError as error:  # transformers lists all architectures that it knows
        raise ConfigError(f"model.source = {settings.source!r}: {str(error).splitlines()[0][:200]}") from None
    return AudioClassifier(model, head_modules(model), drawn, notes)


def takes_padding(model: nn.Module) -> bool:
    """Whether the outputs of a model for a row do not depend on padding that ``attention_mask`` hides.

    Models with ``feat_extract_norm = "group"``, such as wav2vec2-base, normalise over the padding too.
    """
    config: Any = getattr(model, "config", None)
    return (
        getattr(config, "model_type", None) in _MASKED
        and getattr(config, "feat_extract_norm", None) == "layer"
        and not getattr(config, "add_adapter", False)
    )


def shortest_input(config: Any) -> int:
    """The smallest number of samples from which the convolutions of a model compute a vector."""
    field = 1
    sizes = zip(getattr(config, "conv_kernel", ()), getattr(config, "conv_stride", ()), strict=True)
    for kernel, stride in reversed(list(sizes)):
        field = (field - 1) * stride + kernel
    return field
