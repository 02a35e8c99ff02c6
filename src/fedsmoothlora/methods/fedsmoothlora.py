"""FedSmoothLoRA (arXiv 2605.29460): merged full-rank averages, round matching, gradient-aligned starts.

Client ``c`` in round ``t``, for every adapted layer, ``W^t`` its global weight and ``s`` the LoRA scale:

1. Round-Matching: ``R = zeta_t rho^(t-1-tau) (U_c - (S^tau + ... + S^{t-1}))``;
2. calibration gradient ``G`` at ``W^t + s R``;
3. Gradient-Aligned: ``B_ga = c P[:, r:2r]``, ``A_ga = c Q[:, :r]^T``, ``c = m^(1/4) / sqrt(gamma)``, of
   ``G = P diag(sigma) Q^T``;
4. start: LoRA ``SVD_r(GA + R)``, backbone ``W^t + s * shift``;
5. local training;
6. upload ``U_c = SVD_r(B A + shift)``.

Server: ``S^t = SVD_r(sum_c p_c U_c)``, merged: ``W^{t+1} = W^t + s S^t``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from annotated_types import Ge, Gt, Interval
from torch import Tensor

from fedsmoothlora.averaging import mean_tensor, products, products_of, truncated_mean
from fedsmoothlora.diagnostics import StartDiagnosis
from fedsmoothlora.lowrank import Balance, LowRank
from fedsmoothlora.methods import ClientView, Layer, ServerUpdate, ServerView, Start, Traits, Update, Upload
from fedsmoothlora.schedules import ZetaSchedule, zeta_at
from fedsmoothlora.seeds import generator_for
from fedsmoothlora.sketches import Sketch, SketchSize
from fedsmoothlora.spectral import leading_singular_vectors

StartMode = Literal["truncated", "exact"]
GradientMode = Literal["exact", "sketch"]
GradientSource = Literal["client", "shared", "shuffled", "weight", "random", "none"]

TRAITS = Traits(client_ranks=True, keeps_upload=True)

# Below this share of sigma_1 a gradient's 2r-th singular value counts as zero.
_NO_GRADIENT = 1e-6


FACTS = {
    "down": "r*(m + n)",
    "cannot": "align with gradients of rank below `2r`, such as a softmax head's of few classes; "
    "hold more than `r` directions of a round's mean, unless `server_feedback` or `server_rank`",
}


@dataclass(frozen=True, kw_only=True)
class Options:
    """The keys of ``[method]``.

    Attributes:
        gamma: stabiliser of the gradient-aligned matrix: all its singular values are ``sqrt(m)/gamma``,
            so a larger gamma starts smaller. Published: 256 (images), 64 (text).
        gradient_aligned: in which directions clients start: ``client`` (the paper's), those of their own
            calibration gradient; ``none``. Ablations: ``shared``, of the mean of all clients' gradients;
            ``shuffled``, of another client's (for both, gradients leave the clients); ``weight``, of the
            pretrained weight; ``random`` ones. All of the same size.
        round_matching: whether clients continue from their own last upload.
        zeta: round-matching coefficient; published: 1.
        zeta_schedule: how zeta changes by round. Published: constant for IID clients, cosine for others.
        zeta_floor: what cosine and linear schedules approach. Published: 0 (images), 0.5 (text).
        staleness: ``rho``, fades the match of a client that missed rounds; 1 is the literal formula.
        start: ``truncated`` is the paper's; ``exact`` moves what the truncation cuts into the backbone.
        balance: SVD factors balanced (``sqrt``, the published image code) or left-heavy (``left``, text).
        server_feedback: error feedback (beyond the paper): what the server's truncation cuts away is added to
            the next average, as far as the clients do not carry it in their round match.
        feedback_rank: rank at which that memory is cut off; never unless set.
        server_rank: rank of the server's update, at least ``r`` (beyond the paper); ``r`` unless set.
        calibration_batches: batches of the client's training data for its calibration gradient.
        calibration_batch_size: their size; that of training unless set.
        gradient: ``exact`` sums a layer's calibration gradient, ``m n`` numbers; ``sketch`` sums products of
            it with thin matrices (`sketches`), less memory for high ``m`` and ``n``. A layer whose sketch
            would be no smaller than its gradient has the gradient.
        sketch_width: columns of a sketch, times ``r``; 8 unless set. Wider is closer to the exact vectors.
        sketch_passes: how often a sketch goes over the calibration batches; 2 unless set. 3 add a power step:
            closer, for the time of one more pass. 1 takes a sketch that is twice as wide on one side.
    """

    gamma: Annotated[float, Gt(0)] = 256.0
    gradient_aligned: GradientSource = "client"
    round_matching: bool = True
    zeta: Annotated[float, Interval(ge=0, le=1)] = 1.0
    zeta_schedule: ZetaSchedule = "constant"
    zeta_floor: Annotated[float, Interval(ge=0, le=1)] = 0.0
    staleness: Annotated[float, Interval(ge=0, le=1)] = 0.5
    start: StartMode = "truncated"
    balance: Balance = "sqrt"
    server_feedback: bool = False
    feedback_rank: Annotated[int, Ge(1)] | None = None
    server_rank: Annotated[int, Ge(1)] | None = None
    calibration_batches: Annotated[int, Ge(1)] = 8
    calibration_batch_size: Annotated[int, Ge(1)] | None = None
    gradient: GradientMode = "exact"
    sketch_width: Annotated[int, Ge(2)] | None = None
    sketch_passes: Annotated[int, Interval(ge=1, le=3)] | None = None


def check(layers: Mapping[str, Layer], options: Options, partial: bool) -> None:
    """Refuse options that clash, and layers whose gradients have fewer than ``2r`` directions by shape."""
    if options.feedback_rank is not None and not options.server_feedback:
        raise ValueError(
            f"method.feedback_rank = {options.feedback_rank} belongs to method.server_feedback = true"
        )
    _check_sketches(layers, options)
    for layer in layers.values():
        if options.server_rank is not None and options.server_rank < layer.rank:
            raise ValueError(
                f"method.server_rank = {options.server_rank} is below the rank {layer.rank} of layer "
                f"{layer.name}; the server's rank is at least the clients'"
            )
    # A schedule may rise from zeta to its floor.
    highest = max(options.zeta, 0.0 if options.zeta_schedule == "constant" else options.zeta_floor)
    matches = options.round_matching and highest > 0
    if options.server_feedback and partial and matches:
        raise ValueError(
            "method.server_feedback with clients that miss rounds ([participation]) needs method.zeta = 0 "
            "throughout: "
            "who comes back would carry what the server has fed back meanwhile"
        )
    if options.gradient_aligned in ("none", "random"):
        return
    for layer in layers.values():
        source = "weight" if options.gradient_aligned == "weight" else "gradient"
        most = min(layer.m, layer.n) if source == "weight" else layer.gradient_rank
        if 2 * layer.rank > most:
            raise ValueError(
                f"layer {layer.name} has rank {layer.rank}, and a gradient-aligned start needs "
                f"{2 * layer.rank} directions of its {source}, which has at most {most} "
                f"(weight {layer.m} x {layer.n}): lower its rank to {most // 2} or less "
                "(lora.r, or lora.head_r for the head), or set method.gradient_aligned = 'none'"
            )


def _check_sketches(layers: Mapping[str, Layer], options: Options) -> None:
    """Refuse sketches where they would do nothing, and their keys without them."""
    if options.gradient == "exact":
        for key in ("sketch_width", "sketch_passes"):
            if (value := getattr(options, key)) is not None:
                raise ValueError(f"method.{key} = {value} belongs to method.gradient = 'sketch'")
        return
    if options.gradient_aligned != "client":
        why = (
            "sends whole gradients from client to client"
            if exchanges_gradients(options)
            else "takes no calibration gradient"
        )
        raise ValueError(
            f"method.gradient = 'sketch' is for method.gradient_aligned = 'client'; "
            f"{options.gradient_aligned!r} {why}: leave method.gradient out"
        )
    if layers and all(sketch_size(layer, options) is None for layer in layers.values()):
        raise ValueError(
            "method.gradient = 'sketch' saves no memory here: no layer's sketch would be smaller than its "
            "gradient; lower method.sketch_width or lora.r, or leave method.gradient out"
        )


def sketch_size(layer: Layer, options: Options) -> SketchSize | None:
    """The sketch of a layer's calibration gradient; None where the gradient itself is taken."""
    if options.gradient == "exact":
        return None
    size = SketchSize.of(
        layer.m, layer.n, layer.rank, width=options.sketch_width or 8, passes=options.sketch_passes or 2
    )
    return size if size.pays else None


def start(client: ClientView, options: Options) -> Start:
    """Steps 1 to 4: the LoRA factors and the backbone shift from which a client trains."""
    matches = _matches(client, options)  # step 1
    gradients = _gradients(client, matches, options)  # step 2

    loras: dict[str, LowRank] = {}
    shifts: dict[str, LowRank] = {}
    notes: list[str] = []
    diagnosis = StartDiagnosis()
    for name, layer in client.layers.items():
        rm = matches[name]
        ga = LowRank.zeros(layer.m, layer.n)
        if options.gradient_aligned == "random":
            ga = randomly_aligned(layer.m, layer.n, layer.rank, options.gamma, client.generator(name))
        elif options.gradient_aligned != "none":
            ga = gradient_aligned(gradients[name], layer.rank, options.gamma)  # step 3
            if ga.rank == 0:
                notes.append(
                    f"layer {name}: the calibration gradient has fewer than {2 * layer.rank} directions; "
                    "no gradient-aligned start in this round"
                )
        ga = ga.to(device=client.device)  # drawn ones, and zeros, are on the CPU
        lora, shifts[name] = start_factors(ga, rm, layer.rank, options.start, options.balance)
        loras[name] = trainable(lora, layer.rank, client.generator(name))
        diagnosis.add(lora, ga, rm)
    return Start(lora=loras, shift=shifts, figures=diagnosis.figures(), notes=notes)


def _matches(client: ClientView, options: Options) -> dict[str, LowRank]:
    """``R`` of every layer."""
    zeta = _zeta(client.round, client.rounds, options)
    matches: dict[str, LowRank] = {}
    for name, layer in client.layers.items():
        upload_kept = client.kept.get(name)
        matches[name] = (
            round_matching(
                upload_kept,
                [client.received[name]] if name in client.received else [],
                zeta,
                staleness=options.staleness,
                missed=client.round - 1 - client.kept_round,
            )
            if options.round_matching and isinstance(upload_kept, LowRank)
            else LowRank.zeros(layer.m, layer.n)
        )
    return matches


def _gradients(
    client: ClientView, matches: Mapping[str, LowRank], options: Options
) -> Mapping[str, Tensor | Sketch]:
    """The matrices, or their sketches, in whose leading directions the client starts."""
    if not matches or options.gradient_aligned in ("none", "random"):
        return {}
    if options.gradient == "sketch":
        sizes = {name: sketch_size(layer, options) for name, layer in client.layers.items()}
        sketches = {
            name: Sketch(size, generator_for("sketch", client.generator(name).initial_seed()))
            for name, size in sizes.items()
            if size is not None
        }
        return {**client.sketch(matches, sketches), **sketches}
    if options.gradient_aligned == "client":
        return client.gradients(matches)
    if options.gradient_aligned == "weight":
        return {name: client.pretrained(name) for name in matches}
    return client.given


def exchanges_gradients(options: Options) -> bool:
    """Whether starts need other clients' gradients."""
    return options.gradient_aligned in ("shared", "shuffled")


def calibrate(client: ClientView, options: Options) -> Mapping[str, Tensor]:
    """Steps 1 and 2 alone: the client's own calibration gradient, sent ahead of the round."""
    return client.gradients(_matches(client, options))


def exchange(
    gradients: Sequence[Mapping[str, Tensor]],
    weights: Sequence[float],
    generator: torch.Generator,
    options: Options,
) -> Sequence[Mapping[str, Tensor]]:
    """What each client gets: the weighted mean (``shared``), or another client's gradient (``shuffled``).

    Shuffled, the clients stand in a random circle and each gets its neighbour's, so nobody gets its own
    unless it is alone.
    """
    if options.gradient_aligned == "shared":
        mean = {name: mean_tensor([one[name] for one in gradients], weights) for name in gradients[0]}
        return [mean] * len(gradients)
    circle = torch.randperm(len(gradients), generator=generator).tolist()
    neighbour = dict(zip(circle, circle[1:] + circle[:1], strict=True))
    return [gradients[neighbour[index]] for index in range(len(gradients))]


def upload(trained: Update, start: Start, client: ClientView, options: Options) -> Upload:
    """Step 6: ``U_c = SVD_r(B A + shift)``, sent, and kept for the next round's matching."""
    factors = products(trained)
    uploads = {
        name: upload_product(factors[name], start.shift[name], layer.rank, options.balance)
        for name, layer in client.layers.items()
    }
    return Upload(sent=uploads, kept=uploads)


def aggregate(
    uploads: Sequence[Update], weights: Sequence[float], server: ServerView, options: Options
) -> ServerUpdate:
    """Full-rank aggregation: ``S^t = SVD_r(sum_c p_c U_c)``, to be merged and sent down.

    With server feedback ``S^t = SVD_r(avg + E^t)``, ``E^{t+1} = E^t + (1 - zeta_{t+1}) (avg - S^t)``, since
    the clients carry ``zeta_{t+1} (avg - S^t)``, the mean of their round matches. ``S^t`` is as it is sent:
    ``E`` takes up what coding it lost too.
    """
    merge: dict[str, LowRank] = {}
    memory: dict[str, LowRank] = {}
    carried = _zeta(server.round + 1, server.rounds, options)
    for name, layer in server.layers.items():
        rank = options.server_rank or layer.rank
        uploaded = products_of(uploads, name)
        if not options.server_feedback:
            merge[name] = average(uploaded, weights, rank, options.balance)
            continue
        left = server.memory.get(name)
        mean = average(uploaded, weights, None, options.balance)
        total = mean + left if isinstance(left, LowRank) else mean
        merge[name] = server.as_sent(total.truncate(rank, options.balance))
        memory[name] = feedback(
            left if isinstance(left, LowRank) else None, mean, merge[name], carried, options.feedback_rank
        )
    return ServerUpdate(merge=merge, memory=memory)


def feedback(left: LowRank | None, mean: LowRank, merged: LowRank, zeta: float, rank: int | None) -> LowRank:
    """``E^{t+1} = E^t + (1 - zeta_{t+1}) (avg - S^t)``, at most of rank ``rank``.

    Args:
        left: ``E^t``; None for 0.
        mean: ``avg``, not truncated.
        merged: ``S^t``.
        zeta: ``zeta_{t+1}``.
        rank: where the memory is cut off; ``None`` keeps all.
    """
    parts, factors = [mean, merged], [1 - zeta, zeta - 1]
    if left is not None:
        parts, factors = [left, *parts], [1.0, *factors]
    total = LowRank.weighted_sum(parts, factors)
    # Directions that only rounding made would fill the memory up with nothing.
    return total.truncate(rank, tolerance=8 * torch.finfo(total.dtype).eps)


def _zeta(round: int, rounds: int, options: Options) -> float:
    """``zeta_t``, 0 where round matching is off."""
    if not options.round_matching:
        return 0.0
    return zeta_at(round, rounds, schedule=options.zeta_schedule, zeta=options.zeta, floor=options.zeta_floor)


def gradient_aligned(gradient: Tensor | Sketch, rank: int, gamma: float) -> LowRank:
    """Step 3: ``B_ga = c P[:, r:2r]``, ``A_ga = c Q[:, :r]^T``, ``c = m^(1/4) / sqrt(gamma)``.

    ``G = P diag(sigma) Q^T``; the singular values are not used (LoRA-GA, arXiv 2407.05000, direction
    "ArB2r", scale "stable"). Signs are fixed: the entry of largest magnitude of each column of
    ``P[:, r:2r]`` and of ``Q[:, :r]`` is positive. All ``r`` singular values of the product equal
    ``sqrt(m) / gamma``.

    Args:
        gradient: ``G``, ``(m, n)``, or what a sketch of it knows.
        rank: ``r``; ``2r <= min(m, n)``.
        gamma: stabiliser, above 0.

    Returns:
        The product, rank ``r``; the zero product (rank 0) where ``G`` has fewer than ``2r`` directions,
        ``sigma_2r < 1e-6 sigma_1``.

    Raises:
        ValueError: ``2r > min(m, n)``, gamma is not above 0, or the gradient is not finite.
    """
    m, n = gradient.shape
    if rank < 1 or 2 * rank > min(m, n):
        raise ValueError(
            f"a gradient-aligned start of rank {rank} needs {2 * rank} singular vectors; "
            f"a {m} x {n} gradient has {min(m, n)}: choose a rank from 1 to {min(m, n) // 2}"
        )
    if not gamma > 0:
        raise ValueError(f"gamma must be above 0; got {gamma}")
    if isinstance(gradient, Sketch):
        P, sigma, Q = gradient.leading_singular_vectors(2 * rank)
    else:
        P, sigma, Q = leading_singular_vectors(gradient, 2 * rank)
    if not sigma[-1] >= _NO_GRADIENT * sigma[0] or sigma[0] == 0:
        return LowRank.zeros(m, n, dtype=P.dtype, device=str(P.device))
    scale = m**0.25 / math.sqrt(gamma)
    return LowRank(scale * P[:, rank:], scale * Q[:, :rank].mT.contiguous())


def randomly_aligned(m: int, n: int, rank: int, gamma: float, generator: torch.Generator) -> LowRank:
    """The ablation of step 3: random orthonormal directions, all singular values ``sqrt(m) / gamma`` too."""
    P = torch.linalg.qr(torch.randn(m, rank, generator=generator)).Q
    Q = torch.linalg.qr(torch.randn(n, rank, generator=generator)).Q
    scale = m**0.25 / math.sqrt(gamma)
    return LowRank(scale * P, scale * Q.mT.contiguous())


def round_matching(
    upload: LowRank,
    server_updates: Sequence[LowRank],
    zeta: float,
    *,
    staleness: float = 0.5,
    missed: int | None = None,
) -> LowRank:
    """Step 1: ``R = zeta rho^k (U_c - (S^tau + ... + S^{t-1}))``, exactly, never as a dense matrix.

    Args:
        upload: ``U_c``, the client's last accepted upload, from round ``tau``.
        server_updates: ``S^tau ... S^{t-1}``, or their sum as one product.
        zeta: ``zeta_t``.
        staleness: ``rho``, in [0, 1].
        missed: ``k = t - 1 - tau``, the rounds that the client missed; the number of updates less one
            unless given.

    Returns:
        ``R``, of rank at most the sum of all ranks; the zero product (rank 0) where the factor is 0, or
        where upload and updates differ by rounding only.

    Raises:
        ValueError: ``missed`` is negative, ``zeta`` or ``staleness`` is outside [0, 1], or shapes differ.
    """
    if missed is None:
        missed = max(len(server_updates) - 1, 0)
    if missed < 0:
        raise ValueError(f"a client cannot have missed {missed} rounds")
    if not (0 <= zeta <= 1 and 0 <= staleness <= 1):
        raise ValueError(f"zeta and staleness must be from 0 to 1; got {zeta} and {staleness}")
    difference = LowRank.weighted_sum([upload, *server_updates], [1.0] + [-1.0] * len(server_updates))
    factor = zeta * staleness**missed
    size = sum(math.sqrt(max(product.inner(product), 0.0)) for product in (upload, *server_updates))
    # What rounding leaves of equal products is no direction to start in; it would displace the aligned start.
    if factor == 0 or _is_rounding(difference, size):
        return LowRank.zeros(*upload.shape, dtype=difference.dtype, device=str(upload.device))
    return difference if factor == 1 else difference * factor


def _is_rounding(difference: LowRank, size: float) -> bool:
    """Whether a difference of products with norms that sum to ``size`` is what rounding leaves of equal ones.

    By Gram matrices where these can tell (they err by rounding times ``size``), since QRs cost far more.
    """
    if difference.inner(difference) > 1e-4 * size**2:
        return False
    return difference.norm() <= 16 * torch.finfo(difference.dtype).eps * size


def start_factors(
    ga: LowRank,
    rm: LowRank,
    rank: int | None,
    mode: StartMode = "truncated",
    balance: Balance = "sqrt",
) -> tuple[LowRank, LowRank]:
    """Step 4: the LoRA product and the shift of the backbone, ``W^t + s * shift``.

    ``truncated`` (the paper): ``L = SVD_r(GA + R)``, shift ``-GA``. ``exact``: the same ``L``, shift
    ``R - L``, so that training begins at exactly ``W^t + s R``. Wherever ``R = 0`` the factors are GA's
    own: all its singular values are equal, so that an SVD would rotate them arbitrarily.

    Args:
        ga: ``B_ga A_ga``, or a product of zero.
        rm: ``R``, or a product of zero.
        rank: ``r``; ``None`` never truncates.
        mode: ``truncated`` or ``exact``.
        balance: of the SVD's factors.

    Returns:
        ``(lora, shift)``; ``lora`` has fewer than ``r`` columns where ``GA + R`` has lower rank.

    Raises:
        ValueError: unknown mode, or shapes differ.
    """
    if mode not in ("truncated", "exact"):
        raise ValueError(f"start must be 'truncated' or 'exact'; got {mode!r}")
    if rm.rank == 0 or (rm.inner(rm) <= 0 and rm.norm() == 0.0):
        return ga, -ga
    # A direction that only rounding made is dropped, so that `trainable` can give it a row that moves.
    dtype = torch.promote_types(torch.promote_types(ga.dtype, rm.dtype), torch.float32)
    rounding = 0.0 if rank is None else 8 * torch.finfo(dtype).eps
    lora = LowRank.truncated_sum([ga, rm], [1.0, 1.0], rank, balance, tolerance=rounding)
    return lora, (-ga if mode == "truncated" else rm - lora)


def trainable(lora: LowRank, rank: int, generator: torch.Generator) -> LowRank:
    """``lora`` with ``rank`` columns: missing directions get a zero column in ``B``, a random row in ``A``.

    The product is unchanged and training can move (a direction that is zero in both factors has no
    gradient in either). Rows are drawn as PEFT draws ``lora_A``: uniform within ``1/sqrt(n)``.
    """
    missing = rank - lora.rank
    if missing <= 0:
        return lora
    m, n = lora.shape
    rows = (torch.rand(missing, n, generator=generator) * 2 - 1) / math.sqrt(n)
    return LowRank(
        torch.cat([lora.B, lora.B.new_zeros(m, missing)], dim=1),
        torch.cat([lora.A, rows.to(lora.A)], dim=0),
    )


def upload_product(lora: LowRank, shift: LowRank, rank: int | None, balance: Balance = "sqrt") -> LowRank:
    """Step 6: ``U_c = SVD_r(B A + shift)``; ``rank=None`` never truncates."""
    return LowRank.truncated_sum([lora, shift], [1.0, 1.0], rank, balance)


def average(
    uploads: Sequence[LowRank],
    weights: Sequence[float],
    rank: int | None,
    balance: Balance = "sqrt",
) -> LowRank:
    """The server's ``S^t = SVD_r(sum_c p_c U_c)``, ``p_c = weights_c / sum(weights)``.

    Products are averaged, not factors. ``rank=None`` never truncates.

    Raises:
        ValueError: nothing to average, a weight below 0 or not finite, weights that sum to 0, or shapes
            that differ.
    """
    return truncated_mean(uploads, weights, rank, balance)
