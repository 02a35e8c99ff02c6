"""Checks of ``[privacy]``: keys that would make its guarantee false are refused with the reason."""

from __future__ import annotations

import math
from collections.abc import Iterator

from fedsmoothlora.config.model import Config, Sections
from fedsmoothlora.federation.settings import PrivacySettings, UploadSettings

_ON = "privacy.unit = 'client'"


def privacy_contradictions(settings: Sections) -> Iterator[str]:
    """A sentence for every key that does not go with ``[privacy]``, and for every key that it lacks."""
    if not settings.privacy.on:
        yield from _without_unit(settings)
        return
    yield from _keys(settings.privacy)
    yield from _sampling(settings)
    yield from _uploads(settings.uploads)
    yield from _method(settings)
    yield from _leaves_clients(settings)
    if settings.server.aggregation != "mean":
        yield (
            f"server.aggregation = {settings.server.aggregation!r} does not work with {_ON}: one client can "
            "change how all others count; use 'mean', whose clipping bounds every client too"
        )


def _without_unit(settings: Sections) -> Iterator[str]:
    unset = PrivacySettings()
    for key in ("clip_norm", "noise_multiplier", "target_epsilon", "delta", "accountant", "seed"):
        value = getattr(settings.privacy, key)
        if value != getattr(unset, key):
            yield f"privacy.{key} = {value!r} belongs to {_ON}"
    if settings.participation.sampling == "poisson":
        yield f"participation.sampling = 'poisson' belongs to {_ON}; leave it out, or choose that"


def _keys(privacy: PrivacySettings) -> Iterator[str]:
    if privacy.clip_norm is None:
        yield f"{_ON} needs privacy.clip_norm, the norm to which uploads are clipped, for instance 1.0"
    if privacy.delta is None:
        yield f"{_ON} needs privacy.delta, well below 1 over the number of clients, for instance 1e-5"
    both = (privacy.noise_multiplier, privacy.target_epsilon)
    if None not in both:
        yield (
            f"privacy.noise_multiplier = {both[0]:g} and privacy.target_epsilon = {both[1]:g}: give one of "
            "them; the other follows from it"
        )
    if both == (None, None):
        yield f"{_ON} needs privacy.noise_multiplier, for instance 1.0, or privacy.target_epsilon"


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
                f"participation.{key} = {value} with {_ON}: accountants know clients that are drawn each by "
                "itself, not a fixed number of them, and not by the run's seed; use participation.sampling = "
                "'poisson' with participation.fraction, or let all clients take part"
            )


def _uploads(uploads: UploadSettings) -> Iterator[str]:
    others = "what becomes of an upload would depend on other clients' uploads"
    if uploads.clip_to_median:
        yield f"uploads.clip_to_median = true with {_ON}: {others}; privacy.clip_norm clips instead"
    if uploads.max_norm_factor not in (UploadSettings().max_norm_factor, math.inf):
        yield (
            f"uploads.max_norm_factor = {uploads.max_norm_factor:g} with {_ON}: {others}; leave it out, "
            "privacy.clip_norm bounds every upload"
        )
    if uploads.max_weight is not None:
        yield (
            f"uploads.max_weight = {uploads.max_weight:g} with {_ON}: all clients weigh the same; leave it "
            "out"
        )
    if uploads.min_clients > 1:
        yield (
            f"uploads.min_clients = {uploads.min_clients} with {_ON}: to repeat a round with few uploads "
            "would show how many there were; leave it out, an empty round releases noise"
        )


def _method(settings: Sections) -> Iterator[str]:
    method = settings.method
    refused = f"method {method.name!r} does not work with {_ON}"
    if not method.traits.uses_mean_only:
        reason = method.traits.no_privacy_reason or (
            "its aggregate is not known to depend on uploads through their mean only (Traits.uses_mean_only)"
        )
        yield f"{refused}: {reason}"
    elif not method.traits.global_model:
        yield f"{refused}: without a global model, its metrics would be those of the clients' own models"
    if method.exchanges_gradients:
        yield f"{refused} with these options: gradients leave the clients before the round, without noise"
    if method.clients_feed_back:
        yield (
            f"method.client_feedback = true with {_ON}: a client would feed back what the server's clipping "
            "removes of its upload; switch it off"
        )
    if settings.training.scaffold:
        yield f"training.scaffold = true with {_ON}: control variates leave the clients beside the uploads"


def _leaves_clients(settings: Sections) -> Iterator[str]:
    evaluation, kept = settings.evaluation, "nothing but uploads leaves a client"
    for key in ("clients", "diagnostics"):
        if getattr(evaluation, key):
            yield f"evaluation.{key} = true with {_ON}: {kept}; leave it out"
    if settings.personal.on:
        yield (
            f"personal.ditto = {settings.personal.ditto:g} with {_ON}: {kept}, so personal models could be "
            "neither measured nor exported; leave it out"
        )
    if evaluation.personal_steps is not None:
        yield f"evaluation.personal_steps = {evaluation.personal_steps} with {_ON}: {kept}; leave it out"
    if not evaluation.test:
        yield f"evaluation.test = false with {_ON}: {kept}, so only a test set can be evaluated on"
    if settings.lora.client_ranks == "by_size":
        yield f"lora.client_ranks = 'by_size' with {_ON}: a rank shows how many rows a client has; list ranks"
    if isinstance(settings, Config) and settings.data.validation:
        yield (
            f"data.validation = {settings.data.validation:g} with {_ON}: {kept}, so rows that a client "
            "keeps for validation are lost; leave it out, and give a test set"
        )
