"""Checks of ``[privacy]``: keys that would make its guarantee false are refused with the reason."""

from __future__ import annotations

import math
from collections.abc import Iterator

from fedsmoothlora.config.model import Config, Sections
from fedsmoothlora.errors import ConfigError
from fedsmoothlora.federation.settings import PrivacySettings, UploadSettings

_CLIENT, _SAMPLE = "privacy.unit = 'client'", "privacy.unit = 'sample'"
_MASKED = "privacy.secure_aggregation = true"


def privacy_contradictions(settings: Sections) -> Iterator[str]:
    """A sentence for every key that does not go with ``[privacy]``, and for every key that it lacks."""
    yield from _masked(settings)
    if settings.privacy.uploads_only:
        yield from _leaves_clients(settings)
    if not settings.privacy.on:
        yield from _without_unit(settings)
        return
    yield from _keys(settings.privacy)
    if settings.privacy.hides_rows:
        yield from _for_rows(settings)
    else:
        yield from _for_clients(settings)


def _on(privacy: PrivacySettings) -> str:
    return _SAMPLE if privacy.hides_rows else _CLIENT


def _without_unit(settings: Sections) -> Iterator[str]:
    yield from _belong(settings.privacy, ("clip_quantile", "quantile_noise"), _CLIENT)
    yield from _belong(settings.privacy, ("sample_rate", "public_counts"), _SAMPLE)
    others = ("clip_norm", "noise_multiplier", "target_epsilon", "delta", "accountant", "seed")
    yield from _belong(settings.privacy, others, f"{_CLIENT} or 'sample'")
    yield from _no_poisson(settings)


def _belong(privacy: PrivacySettings, keys: tuple[str, ...], unit: str) -> Iterator[str]:
    unset = PrivacySettings()
    for key in keys:
        value = getattr(privacy, key)
        if value != getattr(unset, key):
            shown = str(value).lower() if isinstance(value, bool) else repr(value)
            yield f"privacy.{key} = {shown} belongs to {unit}"


def _no_poisson(settings: Sections) -> Iterator[str]:
    if settings.participation.sampling == "poisson":
        yield f"participation.sampling = 'poisson' belongs to {_CLIENT}; leave it out, or choose that"


def _keys(privacy: PrivacySettings) -> Iterator[str]:
    on = _on(privacy)
    what, number = ("gradients", "rows of a client") if privacy.hides_rows else ("uploads", "clients")
    if privacy.clip_norm is None and privacy.clip_quantile is None:
        yield f"{on} needs privacy.clip_norm, the norm to which {what} are clipped, for instance 1.0"
    if privacy.delta is None:
        yield f"{on} needs privacy.delta, well below 1 over the number of {number}, for instance 1e-5"
    both = (privacy.noise_multiplier, privacy.target_epsilon)
    if None not in both:
        yield (
            f"privacy.noise_multiplier = {both[0]:g} and privacy.target_epsilon = {both[1]:g}: give one of "
            "them; the other follows from it"
        )
    if both == (None, None):
        yield f"{on} needs privacy.noise_multiplier, for instance 1.0, or privacy.target_epsilon"


# -- secure_aggregation


def _masked(settings: Sections) -> Iterator[str]:
    """Keys for which the coordinator would have to see single uploads, or that do not go with a sum."""
    privacy = settings.privacy
    if not privacy.secure_aggregation:
        yield from _belong(privacy, ("threshold", "mask_range", "most_rows"), _MASKED)
        return
    yield from _masked_method(settings)
    yield from _masked_checks(settings)
    if privacy.hides_clients:
        yield from _masked_clients(settings)
    if settings.transport.bits != 32:
        yield (
            f"transport.bits = {settings.transport.bits} with {_MASKED}: masked numbers are integers of 32 "
            "bits with one scale for all clients; use 32"
        )
    if settings.training.scaffold:
        yield f"training.scaffold = true with {_MASKED}: control variates leave clients beside the uploads"
    if settings.participation.asynchronous:
        yield (
            f"participation.buffer = {settings.participation.buffer} with {_MASKED}: the sites of a sum mask "
            "their uploads together, so they begin in the same round; leave it out"
        )
    if isinstance(settings, Config) and settings.flower.clients:
        try:
            privacy.check_session(settings.participation.count(len(settings.flower.clients)))
        except ConfigError as error:
            yield str(error)


def _masked_clients(settings: Sections) -> Iterator[str]:
    """Keys that do not go with both protections at once: sites clip, and the coordinator adds noise."""
    privacy, both = settings.privacy, f"{_MASKED} and {_CLIENT}"
    if settings.participation.sampling == "poisson":
        yield (
            f"participation.sampling = 'poisson' with {both}: the sites of a sum know each other, so nobody "
            "is drawn in secret; let all clients take part"
        )
    if privacy.clip_quantile is not None:
        yield (
            f"privacy.clip_quantile = {privacy.clip_quantile:g} with {both}: the coordinator sees no norm of "
            "an upload; use a fixed privacy.clip_norm"
        )
    if privacy.most_rows is not None:
        yield f"privacy.most_rows = {privacy.most_rows} with {both}: all clients weigh the same; leave it out"
    if privacy.mask_range != PrivacySettings().mask_range:
        yield (
            f"privacy.mask_range = {privacy.mask_range:g} with {both}: privacy.clip_norm bounds every "
            "number; leave it out"
        )


def _masked_method(settings: Sections) -> Iterator[str]:
    method = settings.method
    refused = f"method {method.name!r} does not work with {_MASKED}"
    if method.two_exchanges:  # of sums
        return
    if not method.traits.sums_tensors:
        reason = method.traits.no_sum_reason or (
            "it is not known whether it needs sums of tensors only (Traits.sums_tensors)"
        )
        yield f"{refused}: {reason}"
    elif not method.traits.global_model:
        yield f"{refused}: without a global model, its metrics would be those of the clients' own models"


def _masked_checks(settings: Sections) -> Iterator[str]:
    uploads, single = settings.uploads, "it needs single uploads, and the coordinator learns their sum only"
    if settings.server.aggregation != "mean":
        yield f"server.aggregation = {settings.server.aggregation!r} with {_MASKED}: {single}; use 'mean'"
    if uploads.clip_to_median:
        yield f"uploads.clip_to_median = true with {_MASKED}: {single}; leave it out"
    if uploads.max_norm_factor != UploadSettings().max_norm_factor:
        yield (
            f"uploads.max_norm_factor = {uploads.max_norm_factor:g} with {_MASKED}: {single}; leave it out, "
            "privacy.mask_range bounds every number"
        )
    if uploads.max_weight is not None:
        yield (
            f"uploads.max_weight = {uploads.max_weight:g} with {_MASKED}: clients weigh themselves; leave it "
            "out, or set privacy.most_rows, above which more rows do not count"
        )
    if uploads.min_clients > 1:
        yield (
            f"uploads.min_clients = {uploads.min_clients} with {_MASKED}: set privacy.threshold instead, "
            "which sites check too"
        )


# -- unit = "client"


def _for_clients(settings: Sections) -> Iterator[str]:
    yield from _belong(settings.privacy, ("sample_rate", "public_counts"), _SAMPLE)
    yield from _quantile(settings)
    yield from _sampling(settings)
    yield from _uploads(settings.uploads)
    yield from _method(settings)
    if settings.training.scaffold:
        yield (
            f"training.scaffold = true with {_CLIENT}: control variates leave the clients beside the uploads"
        )
    if settings.server.aggregation != "mean":
        yield (
            f"server.aggregation = {settings.server.aggregation!r} does not work with {_CLIENT}: one client "
            "can change how all others count; use 'mean', whose clipping bounds every client too"
        )


def _quantile(settings: Sections) -> Iterator[str]:
    privacy, method = settings.privacy, settings.method
    if privacy.clip_quantile is None:
        if privacy.quantile_noise is not None:
            yield f"privacy.quantile_noise = {privacy.quantile_noise:g} belongs to privacy.clip_quantile"
        return
    if settings.transport.bits <= 8 and method.traits.averages_factors:
        yield (
            f"privacy.clip_quantile = {privacy.clip_quantile:g} with transport.bits = "
            f"{settings.transport.bits} and method {method.name!r}: clients clip changes of factors before "
            "they code them, so the server cannot see whose norm was above privacy.clip_norm; use 16 or 32 "
            "bits, or a fixed privacy.clip_norm"
        )


def _sampling(settings: Sections) -> Iterator[str]:
    participation = settings.participation
    if participation.sampling == "poisson":
        if participation.fraction is None:
            yield "participation.sampling = 'poisson' needs participation.fraction, each client's probability"
        if participation.clients is not None:
            yield (
                f"participation.clients = {participation.clients} is a fixed number, and "
                "participation.sampling = 'poisson' draws each client by itself: give participation.fraction"
            )
        return
    for key in ("clients", "fraction"):
        if (value := getattr(participation, key)) is not None:
            yield (
                f"participation.{key} = {value} with {_CLIENT}: accountants know clients that are drawn each "
                "by itself, not a fixed number of them, and not by the run's seed; use "
                "participation.sampling = 'poisson' with participation.fraction, or let all clients take part"
            )


def _uploads(uploads: UploadSettings) -> Iterator[str]:
    others = "what becomes of an upload would depend on other clients' uploads"
    if uploads.clip_to_median:
        yield f"uploads.clip_to_median = true with {_CLIENT}: {others}; privacy.clip_norm clips instead"
    if uploads.max_norm_factor not in (UploadSettings().max_norm_factor, math.inf):
        yield (
            f"uploads.max_norm_factor = {uploads.max_norm_factor:g} with {_CLIENT}: {others}; leave it out, "
            "privacy.clip_norm bounds every upload"
        )
    if uploads.max_weight is not None:
        yield (
            f"uploads.max_weight = {uploads.max_weight:g} with {_CLIENT}: all clients weigh the same; leave "
            "it out"
        )
    if uploads.min_clients > 1:
        yield (
            f"uploads.min_clients = {uploads.min_clients} with {_CLIENT}: to repeat a round with few uploads "
            "would show how many there were; leave it out, an empty round releases noise"
        )


def _method(settings: Sections) -> Iterator[str]:
    method = settings.method
    refused = f"method {method.name!r} does not work with {_CLIENT}"
    if not method.traits.uses_mean_only:
        reason = method.traits.no_privacy_reason or (
            "its aggregate is not known to depend on uploads through their mean only (Traits.uses_mean_only)"
        )
        yield f"{refused}: {reason}"
    elif not method.traits.global_model:
        yield f"{refused}: without a global model, its metrics would be those of the clients' own models"
    if method.exchanges_gradients:
        yield f"{refused} with these options: gradients leave the clients before the round, without noise"
    if method.clients_feed_back and not method.two_exchanges:  # which has a reason of its own
        yield (
            f"method.client_feedback = true with {_CLIENT}: a client would feed back what the server's "
            "clipping removes of its upload; switch it off"
        )


# -- unit = "sample"


def _for_rows(settings: Sections) -> Iterator[str]:
    yield from _belong(settings.privacy, ("clip_quantile", "quantile_noise"), _CLIENT)
    yield from _no_poisson(settings)
    yield from _batches(settings)
    if reason := settings.method.no_sample_privacy_reason:
        yield f"method {settings.method.name!r} does not work with {_SAMPLE}: {reason}"
    training, uploads, privacy = settings.training, settings.uploads, settings.privacy
    if settings.lora.dropout:
        yield (
            f"lora.dropout = {settings.lora.dropout:g} with {_SAMPLE}: a further row would shift the masks "
            "of other rows, so clipping would not bound what a single row changes; leave it out"
        )
    if privacy.most_rows is not None and not privacy.public_counts:
        yield (
            f"privacy.most_rows = {privacy.most_rows} with {_SAMPLE}: the sum of the weights would show "
            "the number of rows exactly; leave it out, or set privacy.public_counts = true"
        )
    if training.gradient_checkpointing:
        yield (
            f"training.gradient_checkpointing = true with {_SAMPLE}: Opacus keeps the layers' inputs, and "
            "computing them twice would count each row twice; training.accumulation needs less memory too"
        )
    if training.tokens_per_batch is not None:
        yield (
            f"training.tokens_per_batch = {training.tokens_per_batch} with {_SAMPLE}: batches are cut by "
            "their number of rows only; use training.accumulation"
        )
    if training.class_weights is not None:
        yield (
            f"training.class_weights with {_SAMPLE}: the weights are relative to the other rows of a batch, "
            "and a row's own gradient must not depend on them; leave it out"
        )
    if uploads.max_weight is not None and not privacy.public_counts:
        yield (
            f"uploads.max_weight = {uploads.max_weight:g} with {_SAMPLE}: all clients weigh the same unless "
            "privacy.public_counts = true; leave it out"
        )
    if isinstance(settings, Config):
        yield from _task(settings)


def _batches(settings: Sections) -> Iterator[str]:
    privacy, training = settings.privacy, settings.training
    if privacy.public_counts:
        if privacy.sample_rate is not None:
            yield (
                f"privacy.sample_rate = {privacy.sample_rate:g} and privacy.public_counts = true: the rate "
                "is then training.batch_size over a client's number of rows; give one of them"
            )
        return
    secret = "a client's number of rows is private unless privacy.public_counts = true"
    if privacy.sample_rate is None:
        yield f"{_SAMPLE} needs privacy.sample_rate, the probability of a row to be in a batch: {secret}"
    if training.steps is None:
        yield (
            f"{_SAMPLE} needs training.steps: with training.epochs, the number of steps would follow from "
            f"the number of rows, and {secret}"
        )


def _task(config: Config) -> Iterator[str]:
    if getattr(config.task, "packing", False):
        yield (
            f"task.packing = true with {_SAMPLE}: several rows would share a sequence, and each row's own "
            "gradient is needed; leave it out"
        )
    if config.task.kind == "preference":
        yield (
            f"task.kind = 'preference' with {_SAMPLE}: a row is a pair of two sequences, whose gradients "
            "Opacus keeps apart, and adding them up is not built"
        )


# -- both


def _leaves_clients(settings: Sections) -> Iterator[str]:
    evaluation, privacy, on = settings.evaluation, settings.privacy, settings.privacy.key
    kept = "nothing but uploads leaves a client"
    for key in ("clients", "diagnostics"):
        if getattr(evaluation, key):
            yield f"evaluation.{key} = true with {on}: {kept}; leave it out"
    if settings.personal.on:
        yield (
            f"personal.ditto = {settings.personal.ditto:g} with {on}: {kept}, so personal models could be "
            "neither measured nor exported; leave it out"
        )
    if evaluation.personal_steps is not None:
        yield f"evaluation.personal_steps = {evaluation.personal_steps} with {on}: {kept}; leave it out"
    if not evaluation.test:
        yield f"evaluation.test = false with {on}: {kept}, so only a test set can be evaluated on"
    if settings.lora.client_ranks == "by_size" and privacy.hides_counts:
        yield f"lora.client_ranks = 'by_size' with {on}: a rank shows how many rows a client has; list ranks"
    if isinstance(settings, Config) and settings.data.validation:
        yield (
            f"data.validation = {settings.data.validation:g} with {on}: {kept}, so rows that a client "
            "keeps for validation are lost; leave it out, and give a test set"
        )
