"""Load text models with transformers: sequence classifiers, causal language models, tokenizers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from fedsmoothlora.data import registry
from fedsmoothlora.errors import ConfigError, FedSmoothLoRAError
from fedsmoothlora.modeling.loading import (
    PACKAGED,
    empty_model,
    head_modules,
    label_names,
    load_classifier,
    load_weights,
    model_config,
    model_files,
)
from fedsmoothlora.modeling.padding import first_position
from fedsmoothlora.modeling.settings import ModelSettings


@dataclass(frozen=True)
class TextModel:
    """A loaded model.

    Attributes:
        model: the model with pretrained weights.
        head: names of the head's modules.
        drawn: names of the parameters that differ from the checkpoint's: those that the checkpoint lacks,
            drawn from the run's seed, and those whose rows were put into the order of the wanted classes.
        notes: messages that users should read before training.
    """

    model: nn.Module
    head: tuple[str, ...]
    drawn: frozenset[str] = frozenset()
    notes: tuple[str, ...] = ()


def load_tokenizer(settings: ModelSettings, chat_template: str | None = None) -> Any:
    """The model's tokenizer.

    Args:
        settings: ``[model]``.
        chat_template: a chat template in place of the tokenizer's own.

    Raises ``ConfigError`` if there is none.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(**model_files(settings), trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"model.source = {settings.source!r}: its tokenizer is missing or cannot be read: "
            f"{str(error).splitlines()[0]}"
        ) from None
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    return tokenizer


def load_word_tokenizer(settings: ModelSettings) -> Any:
    """The model's tokenizer for texts that are given word by word.

    A byte-level tokenizer such as RoBERTa's puts a space before every word then, as within a text.

    Raises ``ConfigError`` if there is no tokenizer, or if it does not tell which word a token belongs to.
    """
    from transformers import AutoTokenizer

    tokenizer = load_tokenizer(settings)
    if not tokenizer.is_fast:
        raise ConfigError(
            f"model.source = {settings.source!r}: its tokenizer ({type(tokenizer).__name__}) does not tell "
            "which word a token belongs to; use a model with a fast tokenizer (tokenizer.json)"
        )
    if getattr(tokenizer, "add_prefix_space", True):
        return tokenizer
    return AutoTokenizer.from_pretrained(
        **model_files(settings), trust_remote_code=False, add_prefix_space=True
    )


def pad_token(tokenizer: Any) -> int:
    """The padding token: the tokenizer's own, or its end-of-sequence token, or token 0.

    Attention masks hide padding.
    """
    if tokenizer.pad_token_id is not None:
        return int(tokenizer.pad_token_id)
    return int(tokenizer.eos_token_id or 0)


def has_segments(settings: ModelSettings, tokenizer: Any) -> bool:
    """Whether tokenizer and model tell the two texts of a pair apart by segment ids.

    BERT and XLNet do. RoBERTa has one segment only, and DeBERTa-v3 none, whatever the tokenizer returns.
    """
    config = model_config(settings)
    segments = 2 if config.model_type == "xlnet" else getattr(config, "type_vocab_size", None)
    return "token_type_ids" in tokenizer.model_input_names and (segments or 0) >= 2


def check_length(settings: ModelSettings, max_length: int) -> None:
    """Raise ``ConfigError`` if rows may have more tokens than the model has positions."""
    _check_positions(settings, max_length, getattr(model_config(settings), "max_position_embeddings", None))


def check_tokens(
    settings: ModelSettings, model: nn.Module, tokenizer: Any, rows: Iterable[Sequence[int]], max_length: int
) -> None:
    """Check the tokens and the length of rows against the embeddings of a model.

    Args:
        settings: ``[model]``.
        model: the model (its parameters may be on the meta device).
        tokenizer: the model's tokenizer.
        rows: tokens of each row.
        max_length: ``task.max_length``.

    Raises:
        ConfigError: a token of a row, or the padding token, has no embedding; or rows may have more tokens
            than the model has positions (RoBERTa has two fewer positions than position embeddings).
    """
    first = first_position(model)
    if first:
        most = getattr(model.config, "max_position_embeddings", None)
        _check_positions(settings, max_length, most - first if isinstance(most, int) else None)
    known = model.get_input_embeddings().num_embeddings  # type: ignore[operator]
    largest = max((max(ids, default=0) for ids in rows), default=0)
    for what, token in (("the padding token", pad_token(tokenizer)), ("the token", largest)):
        if token >= known:
            name = tokenizer.convert_ids_to_tokens(token)
            raise ConfigError(
                f"model.source = {settings.source!r}: {what} {name!r} of its tokenizer has the number "
                f"{token}, and the model has embeddings for the numbers 0 to {known - 1} only; resize them "
                "(model.resize_token_embeddings(len(tokenizer))) and save the model, or use the "
                "tokenizer that the model was trained with"
            )


def pooler_notes(settings: ModelSettings, frozen_features: str | None) -> list[str]:
    """A sentence if a packaged model's pooler was never trained, and a head gets its vectors.

    Args:
        settings: ``[model]``.
        frozen_features: ``task.frozen_features``; the mean of the tokens needs no pooler.
    """
    name = settings.source.removeprefix(registry.PREFIX)
    module = registry.packaged(PACKAGED).get(name) if name != settings.source else None
    better = getattr(module, "FOR_CLASSIFICATION", None)
    if better is None or frozen_features == "mean":
        return []
    return [
        f"model.source = {settings.source!r}: its pooler was never trained, and makes the head learn slowly; "
        f"'{registry.PREFIX}{better}' is the same model with the first token's vector in its place"
    ]


def _check_positions(settings: ModelSettings, max_length: int, most: int | None) -> None:
    if isinstance(most, int) and max_length > most:
        raise ConfigError(
            f"task.max_length = {max_length}: {settings.source} takes {most} tokens at most; "
            f"set task.max_length = {most} or less"
        )


def load_sequence_classifier(
    settings: ModelSettings,
    classes: Sequence[str],
    pad: int,
    seed: int,
    *,
    problem_type: str = "single_label_classification",
    empty: bool = False,
) -> TextModel:
    """Load a model with a head for ``classes``, drawn from the run's seed unless the checkpoint has one.

    Args:
        settings: ``[model]``.
        classes: names of the classes, in the order of their labels; the one name of a regression's output.
        pad: the padding token. It becomes ``config.pad_token_id``, by which decoders find the last token of a
            row, unless the model's positions depend on that key.
        seed: the run's seed.
        problem_type: ``config.problem_type``, from which a user's own code takes the loss.
        empty: build the model on the meta device, without weights: its layers and shapes only.

    Raises:
        ConfigError: the source is wrong.
    """
    from transformers import AutoModelForSequenceClassification

    config = model_config(settings, **label_names(classes), problem_type=problem_type)
    if getattr(config, "pad_token_id", None) is None:
        config.pad_token_id = pad
    with _readable(settings):
        model, drawn, notes = load_classifier(
            AutoModelForSequenceClassification, settings, config, seed, empty=empty
        )
    if problem_type == "regression" and model_config(settings).num_labels == 1:
        notes = ()  # about the order of classes, and there is one output
    if not first_position(model) and not config.is_encoder_decoder:
        model.config.get_text_config().pad_token_id = pad
    return TextModel(model, head_modules(model), drawn, notes)


def load_token_classifier(
    settings: ModelSettings, tags: Sequence[str], seed: int, *, empty: bool = False
) -> TextModel:
    """Load a model with a head for the tags of words.

    The head is drawn from the run's seed unless the checkpoint has one.

    Args:
        settings: ``[model]``.
        tags: names of the tags, in the order of their numbers.
        seed: the run's seed.
        empty: build the model on the meta device, without weights: its layers and shapes only.

    Raises:
        ConfigError: the source is wrong.
    """
    from transformers import AutoModelForTokenClassification

    config = model_config(settings, **label_names(tags))
    with _readable(settings):
        model, drawn, notes = load_classifier(
            AutoModelForTokenClassification, settings, config, seed, empty=empty
        )
    return TextModel(model, head_modules(model), drawn, notes)


def load_causal_language_model(settings: ModelSettings, *, empty: bool = False) -> TextModel:
    """Load a causal language model; its head is the layer that computes the logits.

    Args:
        settings: ``[model]``.
        empty: build the model on the meta device, without weights: its layers and shapes only.

    Raises:
        ConfigError: the source is wrong, or its checkpoint has no language-model head.
    """
    from transformers import AutoModelForCausalLM

    return _language_model(AutoModelForCausalLM, settings, empty=empty)


def load_sequence_to_sequence_model(settings: ModelSettings, *, empty: bool = False) -> TextModel:
    """Load a model with an encoder and a decoder; its head is the layer that computes the logits.

    Args, Raises: as of `load_causal_language_model`.
    """
    from transformers import AutoModelForSeq2SeqLM

    return _language_model(AutoModelForSeq2SeqLM, settings, empty=empty)


def _language_model(auto: Any, settings: ModelSettings, *, empty: bool) -> TextModel:
    config = model_config(settings)
    drawn: frozenset[str] = frozenset()
    with _readable(settings):
        if empty:
            model = empty_model(auto, settings, config)
        else:
            model, drawn = load_weights(auto, settings, config, 0)
    head = model.get_output_embeddings()
    return TextModel(model, tuple(name for name, module in model.named_modules() if module is head), drawn)


@contextmanager
def _readable(settings: ModelSettings) -> Iterator[None]:
    """Raise ``ConfigError`` if transformers has no model of this architecture for the task."""
    try:
        yield
    except FedSmoothLoRAError:
        raise
    except ValueError as error:  # transformers lists all architectures that it knows
        raise ConfigError(f"model.source = {settings.source!r}: {str(error).splitlines()[0][:200]}") from None
