"""Options of FedSmoothLoRA that clash, or do nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from fedsmoothlora.algebra.update import Layer
from fedsmoothlora.errors import ConfigError

if TYPE_CHECKING:
    from fedsmoothlora.methods.fedsmoothlora.method import FedSmoothLoRA


def check(method: FedSmoothLoRA, layers: Mapping[str, Layer], *, partial: bool) -> None:
    """Refuse options that clash, and layers whose shape gives gradients fewer than ``2r`` directions."""
    _check_trained_weights(method)
    _check_server(method, layers, partial=partial)
    _check_subspace(method)
    _check_calibration_step(method)
    _check_sketches(method, layers)
    if method.gradient_aligned in ("none", "random") or method.partial_start:
        return
    for layer in layers.values():
        source = "weight" if method.gradient_aligned == "weight" else "gradient"
        most = min(layer.m, layer.n) if source == "weight" else layer.gradient_rank
        if 2 * layer.rank > most:
            lower = f"lower its rank to {most // 2} or less (lora.r, or lora.head_r for the head), or "
            raise ConfigError(
                f"layer {layer.name} has rank {layer.rank}, and a gradient-aligned start needs "
                f"{2 * layer.rank} directions of its {source}, which has at most {most} "
                f"(weight {layer.m} x {layer.n}): {lower if most > 1 else ''}set method.partial_start = "
                "true, which takes the directions that there are, or method.gradient_aligned = 'none'"
            )


def _check_trained_weights(method: FedSmoothLoRA) -> None:
    """Refuse options of a LoRA's start where clients have no LoRA."""
    if not method.trains_weights:
        return
    clash = "clients with method.train = 'weights' have no LoRA"
    if method.gradient_aligned != "none":
        raise ConfigError(
            f"{clash}, and method.gradient_aligned = {method.gradient_aligned!r} would do nothing: set "
            "method.gradient_aligned = 'none', or take method.preset = 'weights'"
        )
    for key, value, default in (
        ("start", method.start_mode, "truncated"),
        ("partial_start", method.partial_start, False),
    ):
        if value != default:
            raise ConfigError(f"{clash}, and method.{key} = {value!r} would do nothing: leave it out")


def _check_server(method: FedSmoothLoRA, layers: Mapping[str, Layer], *, partial: bool) -> None:
    """Refuse a rank below the clients', and a feedback that clients would carry too."""
    if method.feedback_rank is not None and not (method.server_feedback or method.clients_feed_back):
        raise ConfigError(
            f"method.feedback_rank = {method.feedback_rank} belongs to method.server_feedback = true or "
            "method.client_feedback = true"
        )
    _check_ranks(method, layers)
    for layer in layers.values():
        if isinstance(method.server_rank, int) and method.server_rank < layer.rank:
            raise ConfigError(
                f"method.server_rank = {method.server_rank} is below the rank {layer.rank} of layer "
                f"{layer.name}; the server's rank is at least the clients'"
            )
    matches = method.matches
    if method.client_feedback and matches:
        raise ConfigError(
            "method.client_feedback needs method.zeta = 0 throughout: round matching carries what a "
            "client's upload lost already, and it would count twice"
        )
    if method.server_feedback and partial and matches:
        raise ConfigError(
            "method.server_feedback with clients that miss rounds ([participation]) needs method.zeta = "
            "0 throughout: the round matching of a returning client would add what the server has fed back "
            "meanwhile"
        )


def _check_subspace(method: FedSmoothLoRA) -> None:
    """Refuse options that need single uploads, or that the shared subspace makes useless."""
    if not method.two_exchanges:
        return
    subspace = "method.exchange = 'subspace'"
    if method.matches:
        raise ConfigError(
            f"{subspace} needs method.zeta = 0 throughout: round matching carries what the subspace "
            "leaves of a client's change, and the client feeds it back already"
        )
    for key, reason in (
        ("client_feedback", "feeds back at the clients in any case"),
        (
            "server_feedback",
            "merges all of the sum, so that the server has nothing to feed back",
        ),
    ):
        if getattr(method, key):
            raise ConfigError(f"method.{key} = true does nothing here: {subspace} {reason}; set it to false")
    ranks = {"server_rank": method.server_rank, "server_rank_cap": method.server_rank_cap}
    if method.layer_ranks != "fixed":
        ranks["layer_ranks"] = method.layer_ranks
    for key, value in ranks.items():
        if value is not None:
            raise ConfigError(
                f"method.{key} = {value!r} does not work with {subspace}: all uploads and the server's "
                "update have the columns of one subspace, so they have one rank; leave it out"
            )
    if method.exchanges_gradients:
        raise ConfigError(
            f"method.gradient_aligned = {method.gradient_aligned!r} does not work with {subspace}: the "
            "server reads sums only, and not the gradient of each client; take 'client'"
        )


def _check_calibration_step(method: FedSmoothLoRA) -> None:
    """Refuse a first step without the gradient at the start."""
    if not method.calibration_step:
        return
    if method.gradient_aligned != "client" or method.gradient != "exact":
        raise ConfigError(
            "method.calibration_step = true needs the client's own calibration gradient: "
            "method.gradient_aligned = 'client' and method.gradient = 'exact'"
        )
    if method.matches and method.start_mode == "truncated":
        raise ConfigError(
            "method.calibration_step = true needs a start where the calibration gradient was taken, and "
            "a truncated start with round matching begins elsewhere: set method.zeta = 0 or method.start "
            "= 'exact'"
        )


def _check_ranks(method: FedSmoothLoRA, layers: Mapping[str, Layer]) -> None:
    """Refuse rules for ranks that contradict each other, or that would change nothing."""
    share = method.server_share  # raises for another text
    if method.server_rank_cap is not None and share is None:
        raise ConfigError(
            f"method.server_rank_cap = {method.server_rank_cap} belongs to method.server_rank = "
            "'energy:SHARE'"
        )
    if method.layer_ranks == "fixed":
        return
    if share is not None:
        raise ConfigError(
            f"method.server_rank = {method.server_rank!r} and method.layer_ranks = 'energy' are two rules "
            "for the ranks of the server's update; leave one out"
        )
    if len(layers) == 1:
        raise ConfigError(
            f"method.layer_ranks = 'energy' shares bytes out among layers, and {next(iter(layers))} is "
            "the only adapted one; leave it out"
        )


def _check_sketches(method: FedSmoothLoRA, layers: Mapping[str, Layer]) -> None:
    """Refuse sketches where they would do nothing, and their keys without them."""
    if method.gradient == "exact":
        for key, value in (("sketch_width", method.sketch_width), ("sketch_passes", method.sketch_passes)):
            if value is not None:
                raise ConfigError(f"method.{key} = {value} belongs to method.gradient = 'sketch'")
        return
    if method.gradient_aligned != "client":
        why = (
            "sends whole gradients from client to client"
            if method.exchanges_gradients
            else "takes no calibration gradient"
        )
        raise ConfigError(
            f"method.gradient = 'sketch' is for method.gradient_aligned = 'client'; "
            f"{method.gradient_aligned!r} {why}: leave method.gradient out"
        )
    if layers and all(method.sketch_size(layer) is None for layer in layers.values()):
        raise ConfigError(
            "method.gradient = 'sketch' saves no memory here: no layer's sketch would be smaller than "
            "its gradient; lower method.sketch_width or lora.r, or leave method.gradient out"
        )
