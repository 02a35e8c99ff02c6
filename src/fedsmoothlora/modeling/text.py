"""Pretrained text models through transformers: sequence classifiers, causal language models, tokenizers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from fedsmoothlora.errors import ConfigError, FedSmoothLoRAError
from fedsmoothlora.modeling.loading import empty_model, head_modules, load_weights, model_config, model_files
from fedsmoothlora.modeling.settings import ModelSettings


@dataclass(frozen=True)
class TextModel:
    """A loaded model.

    Attributes:
        model: its pretrained weights.
        head: names of the head's modules.
        drawn: names of the parameters that the checkpoint lacks, drawn from the run's seed.
    """

    model: nn.Module
    head: tuple[str, ...]
    drawn: frozenset[str] = frozenset()


def load_tokenizer(settings: ModelSettings) -> Any:
    """The model's tokenizer.

    Raises ``ConfigError`` where there is none.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(**model_files(settings), trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"model.source = {settings.source!r}: it has no tokenizer that can be read: "
            f"{str(error).splitlines()[0]}"
        ) from None


def pad_token(tokenizer: Any) -> int:
    """The token that fills batches; hidden by attention masks, so any will do where there is none for it."""
    if tokenizer.pad_token_id is not None:
        return int(tokenizer.pad_token_id)
    return int(tokenizer.eos_token_id or 0)


def check_length(settings: ModelSettings, max_length: int) -> None:
    """Raise ``ConfigError`` where rows may be longer than the model's positions go."""
    most = getattr(model_config(settings), "max_position_embeddings", None)
    if isinstance(most, int) and max_length > most:
        raise ConfigError(f"task.max_length = {max_length}: {settings.source} takes {most} tokens at most")


def load_sequence_classifier(
    settings: ModelSettings, classes: Sequence[str], pad: int, seed: int, *, empty: bool = False
) -> TextModel:
    """Load a model with a head for ``classes``, drawn from the run's seed unless the checkpoint has one.

    Args:
        settings: ``[model]``.
        classes: names of the classes, in the order of their labels.
        pad: the token that fills batches; decoders read a row at its last token before these.
        seed: of the run.
        empty: build the model on the meta device, without weights: its layers and shapes only.

    Raises:
        ConfigError: the source is wrong.
    """
    from transformers import AutoModelForSequenceClassification

    labels: dict[str, Any] = {
        "id2label": dict(enumerate(classes)),
        "label2id": {name: label for label, name in enumerate(classes)},
        "problem_type": "single_label_classification",
    }
    config = model_config(settings, **labels)
    if getattr(config, "pad_token_id", None) is None:
        config.pad_token_id = pad
    model, drawn = _load(AutoModelForSequenceClassification, settings, config, seed, empty=empty)
    return TextModel(model, head_modules(model), drawn)


def load_causal_language_model(settings: ModelSettings, *, empty: bool = False) -> TextModel:
    """Load a causal language model; its head is the layer that gives the logits.

    Args:
        settings: ``[model]``.
        empty: build the model on the meta device, without weights: its layers and shapes only.

    Raises:
        ConfigError: the source is wrong, or its checkpoint has no language model's head.
    """
    from transformers import AutoModelForCausalLM

    model, drawn = _load(AutoModelForCausalLM, settings, model_config(settings), 0, empty=empty)
    head = model.get_output_embeddings()
    return TextModel(model, tuple(name for name, module in model.named_modules() if module is head), drawn)


def _load(
    kind: Any, settings: ModelSettings, config: Any, seed: int, *, empty: bool
) -> tuple[Any, frozenset[str]]:
    try:
        if empty:
            return empty_model(kind, settings, config), frozenset()
        return load_weights(kind, settings, config, seed)
    except FedSmoothLoRAError:
        raise
    except ValueError as error:  # transformers lists all architectures that it knows
        raise ConfigError(f"model.source = {settings.source!r}: {str(error).splitlines()[0][:200]}") from None
