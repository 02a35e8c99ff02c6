"""FedSmoothLoRA: Algorithm 2 of arXiv 2605.29460; its formulas are in `alignment`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from annotated_types import Ge, Gt, Interval

from fedsmoothlora.algebra.schedules import ZetaSchedule, zeta_at
from fedsmoothlora.algebra.update import Balance, Layer, Update
from fedsmoothlora.methods.base import (
    PARTIAL_STARTS,
    Calibration,
    ClientView,
    Family,
    ServerUpdate,
    ServerView,
    Start,
    Traits,
    Upload,
    energy_share,
)
from fedsmoothlora.methods.fedsmoothlora import ranks
from fedsmoothlora.methods.fedsmoothlora.subspace import SharedSubspace, feedback_key

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from fedsmoothlora.algebra.coding import Packed
    from fedsmoothlora.algebra.lowrank import LowRank
    from fedsmoothlora.algebra.sketches import Sketch, SketchSize


_FEEDBACK_PRESET: Mapping[str, object] = {
    "method.train": "lora",
    "method.gradient_aligned": "client",
    "method.zeta": 0.0,
    "method.zeta_schedule": "constant",
    "method.server_feedback": True,
    "method.client_feedback": False,
    "method.partial_start": True,
    "transport.bits": 32,
}
_LOW_BIT_PRESET: Mapping[str, object] = {**_FEEDBACK_PRESET, "transport.bits": 4}


@dataclass(frozen=True, kw_only=True)
class FedSmoothLoRA(SharedSubspace):
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

    Attributes:
        preset: a named setting, which fills in keys that are not set. ``paper`` is the published method;
            ``feedback`` has no round matching, and error feedback at the server; ``low_bit`` is that with
            ``transport.bits = 4``, whose bytes buy nearly four times the rank of bfloat16; ``weights`` is
            ``low_bit`` with ``train = "weights"`` and error feedback at the clients, too.
        train: the parameters that clients train: their LoRA, as in the paper, or the ``weights`` of the
            adapted layers (beyond the paper). Then ``M_c`` is the whole change of a weight and travels as
            ``SVD_r(M_c)``, for the bytes of a LoRA. Local training takes the memory of full fine-tuning.
        gamma: stabiliser of the gradient-aligned matrix: all its singular values are ``sqrt(m)/gamma``,
            so a larger gamma starts smaller. Published: 256 (images), 64 (text).
        gradient_aligned: the directions in which clients start: ``client`` (the paper's), those of their own
            calibration gradient; ``none``. Ablations: ``shared``, of the mean of all clients' gradients;
            ``shuffled``, of another client's (for both, gradients leave the clients); ``weight``, of the
            pretrained weight; ``random`` ones. All of the same size.
        round_matching: whether clients continue from their own last upload.
        zeta: round-matching coefficient; published: 1.
        zeta_schedule: how zeta changes by round. Published: constant for IID clients, cosine for others.
        zeta_floor: the limit of cosine and linear schedules. Published: 0 (images), 0.5 (text).
        staleness: ``rho``, fades the match of a client that missed rounds; 1 is the literal formula.
        start_mode: the key ``start``. ``truncated`` is the paper's; ``exact`` moves the part that the
            truncation cuts away into the backbone.
        balance: SVD factors balanced (``sqrt``, the published image code) or left-heavy (``left``, text).
        server_feedback: error feedback (beyond the paper): the part that the server's truncation cuts away
            is added to the next average, as far as the clients do not carry it in their round match.
            With packed transport it takes up what coding loses, too.
        client_feedback: error feedback at the clients: each adds to its upload what truncating and coding its
            last accepted upload lost. Needs ``zeta = 0``, since round matching carries it already.
        feedback_rank: rank at which these memories are cut off; unless set, the server's is never cut off and
            a client's at ``r``, or not with ``exchange = "subspace"`` or ``train = "weights"``.
        server_rank: rank of the server's update, at least ``r`` (beyond the paper); ``r`` unless set.
            ``energy:SHARE``, such as ``energy:0.95``, takes for each layer the smallest rank, at least 1, at
            which the squared singular values hold that share of all.
        server_rank_cap: the highest rank that ``energy:SHARE`` may take; ``r`` unless set.
        upload_form: the key ``exchange``. ``product`` sends each client's update as a product of rank ``r``.
            ``subspace`` (beyond the paper) sends its coordinates in a subspace that all share, in two
            exchanges of which the server uses sums only, as secure aggregation needs. It has the same bytes
            and error feedback at the clients, and needs ``zeta = 0``.
        layer_ranks: the ranks at which layers travel (beyond the paper). ``fixed`` sends every layer at its
            LoRA rank (the server at ``server_rank``). ``energy`` shares the same bytes out anew in every
            round: server and clients, each for its own update, send the singular directions with the most
            energy per byte, ``(s sigma)^2 / bytes``, over all layers. A layer gets from none to twice as
            many as with ``fixed``. Clients train at their LoRA rank.
        partial_start: where a gradient has ``d < 2r`` directions, clients start in ``floor(d / 2)`` of them
            (beyond the paper); otherwise such a layer has no aligned start, and is refused where its shape
            allows no more.
        calibration_batches: batches of the client's training data for its calibration gradient.
        calibration_batch_size: their size; that of training unless set.
        calibration_step: the optimiser's first step of a round is one with the calibration gradient, which is
            the gradient at the start (beyond the paper), so that these batches train too. It reads no batch
            and changes only the LoRA. Needs a start where the gradient was taken, with ``zeta = 0`` or
            ``start = "exact"``.
        gradient: ``exact`` sums a layer's calibration gradient, ``m n`` numbers; ``sketch`` sums products of
            it with thin matrices (`sketches`), less memory for high ``m`` and ``n``. A layer whose sketch
            would be no smaller than its gradient has the gradient.
        sketch_width: columns of a sketch, times ``r``; 8 unless set. Wider is closer to the exact vectors.
        sketch_passes: how often a sketch goes over the calibration batches; 2 unless set. 3 add a power step:
            closer, for the time of one more pass. 1 takes a sketch that is twice as wide on one side.
    """

    preset: Literal["paper", "feedback", "low_bit", "weights"] | None = None
    train: Literal["lora", "weights"] = "lora"
    gamma: Annotated[float, Gt(0)] = 256.0
    gradient_aligned: Literal["client", "shared", "shuffled", "weight", "random", "none"] = "client"
    round_matching: bool = True
    zeta: Annotated[float, Interval(ge=0, le=1)] = 1.0
    zeta_schedule: ZetaSchedule = "constant"
    zeta_floor: Annotated[float, Interval(ge=0, le=1)] = 0.0
    staleness: Annotated[float, Interval(ge=0, le=1)] = 0.5
    start_mode: Literal["truncated", "exact"] = field(default="truncated", metadata={"key": "start"})
    balance: Balance = "sqrt"
    server_feedback: bool = False
    client_feedback: bool = False
    feedback_rank: Annotated[int, Ge(1)] | None = None
    server_rank: Annotated[int, Ge(1)] | str | None = None
    server_rank_cap: Annotated[int, Ge(1)] | None = None
    upload_form: Literal["product", "subspace"] = field(default="product", metadata={"key": "exchange"})
    layer_ranks: Literal["fixed", "energy"] = "fixed"
    partial_start: bool = False
    calibration_batches: Annotated[int, Ge(1)] = 8
    calibration_batch_size: Annotated[int, Ge(1)] | None = None
    calibration_step: bool = False
    gradient: Literal["exact", "sketch"] = "exact"
    sketch_width: Annotated[int, Ge(2)] | None = None
    sketch_passes: Annotated[int, Interval(ge=1, le=3)] | None = None

    name: ClassVar[str] = "fedsmoothlora"
    family: ClassVar[Family] = "merged"
    traits: ClassVar[Traits] = Traits(
        client_ranks=True,
        keeps_upload=True,
        uses_mean_only=True,
        asynchronous=True,
        no_sum_reason=(
            "it averages products, whose factors cannot be added up; set method.exchange = 'subspace'"
        ),
    )
    numbers_down: ClassVar[str] = "r*(m + n)"
    limitation: ClassVar[str] = (
        "does not align with gradients of rank below `2r`, such as a softmax head's of few classes; "
        "keeps `r` directions of a round's mean, unless `server_feedback` or `server_rank`"
    )

    presets: ClassVar[Mapping[str, Mapping[str, object]]] = {
        "paper": {
            "method.train": "lora",
            "method.gradient_aligned": "client",
            "method.round_matching": True,
            "method.zeta": 1.0,
            "method.start": "truncated",
            "method.server_feedback": False,
            "method.client_feedback": False,
            "method.partial_start": False,
            "transport.bits": 32,
        },
        "feedback": _FEEDBACK_PRESET,
        "low_bit": _LOW_BIT_PRESET,
        "weights": {
            **_LOW_BIT_PRESET,
            "method.train": "weights",
            "method.client_feedback": True,
            "method.gradient_aligned": "none",
            "method.partial_start": False,
        },
    }

    # -- clients, steps 1 to 6

    def start(self, client: ClientView) -> Start:
        """Steps 1 to 4: the LoRA factors and the backbone shift from which a client trains.

        If clients train the weights, these begin at ``W^t + s R``.
        """
        import torch

        from fedsmoothlora.algebra import alignment
        from fedsmoothlora.algebra.diagnostics import StartDiagnosis

        matches = self._round_matches(client)  # step 1
        if self.trains_weights:
            return Start(lora={}, shift=matches, trains=("W",))
        gradients = self._gradients(client, matches)  # step 2

        loras: dict[str, LowRank] = {}
        steps: dict[str, LowRank] = {}
        shifts: dict[str, LowRank] = {}
        without: list[str] = []
        diagnosis = StartDiagnosis()
        missing = 0
        aligned = self._gradient_aligned(gradients, client)  # step 3
        starts = alignment.starts_with_errors(  # step 4
            list(aligned.values()),
            [matches[name] for name in aligned],
            [layer.rank for layer in client.layers.values()],
            self.start_mode,
            self.balance,
        )
        for (name, layer), (lora, shift, error) in zip(client.layers.items(), starts, strict=True):
            ga, rm, r = aligned[name], matches[name], layer.rank
            missing += self.partial_start and self.gradient_aligned != "none" and ga.rank < r
            if ga.rank == 0 and self.gradient_aligned != "none" and not self.partial_start:
                without.append(name)
            shifts[name] = shift
            loras[name] = alignment.trainable(lora, r, client.generator(name))
            if self.calibration_step:
                gradient = gradients[name]
                assert isinstance(gradient, torch.Tensor)  # a sketch is refused
                steps[name] = alignment.factor_gradients(gradient, loras[name], layer.scale)
            diagnosis.add(lora, ga, rm, error)
        metrics = dict(diagnosis.metrics()) | ({PARTIAL_STARTS: float(missing)} if missing else {})
        notes = self._without_directions(without, client.layers)
        return Start(lora=loras, shift=shifts, gradients=steps, metrics=metrics, notes=notes)

    def _without_directions(self, names: Sequence[str], layers: Mapping[str, Layer]) -> list[str]:
        """One note for all layers whose gradient has too few directions for their rank."""
        if not names:
            return []
        wanted = " or ".join(map(str, sorted({2 * layers[name].rank for name in names})))
        return [
            f"no gradient-aligned start in {len(names)} of {len(layers)} layers ({names[0]} is the first): "
            f"their calibration gradient has fewer than {wanted} directions. A lower lora.r needs fewer, and "
            f"more batches than method.calibration_batches = {self.calibration_batches} may give more"
        ]

    def upload(self, trained: Update, start: Start, client: ClientView) -> Upload:
        """Step 6: ``U_c = SVD_r(B A + shift)``, sent, and kept for the next round's matching.

        With client feedback, ``M = B A + shift + E_c`` is sent at rank ``r``, and ``E_c = M - dec`` is kept,
        ``dec`` being what the server makes of it. With ``layer_ranks = "energy"`` the rank of a layer is that
        of `ranks.upload_ranks`.
        """
        from fedsmoothlora.algebra import alignment, sums
        from fedsmoothlora.algebra.coding import unpacked
        from fedsmoothlora.algebra.lowrank import LowRank

        changes = self._changes(trained, start)
        rank_of = ranks.upload_ranks(self, changes, client)
        own = self._own_uploads(trained, start, changes, rank_of)
        if self.two_exchanges:
            return self.first_upload(changes, own, client)
        sent: dict[str, LowRank | Packed] = {}
        kept: dict[str, LowRank | Tensor] = {}
        lost = total = 0.0
        for name, upload in own.items():
            kept[name] = sent[name] = upload
            if not (client.packs or self.client_feedback):
                continue
            matrix = changes[name]
            if self.client_feedback:
                matrix = sums.plus(matrix, client.kept.get(feedback_key(name)))
                upload = alignment.truncated(matrix, rank_of[name], self.balance, feeds_back=True)
            sent[name] = client.code(matrix, upload)
            if self.client_feedback:
                left = sums.remainder(matrix, LowRank.of(unpacked(sent[name])))
                kept[feedback_key(name)] = left
                if (limit := self._client_feedback_rank(client.layers[name])) is None:
                    continue
                kept[feedback_key(name)] = cut = alignment.truncated(left, limit)
                total += (size := alignment.squared_norm(left))
                lost += max(size - alignment.squared_norm(cut), 0.0)
        metrics = {"feedback_cut": (lost / total) ** 0.5} if total else {}
        return Upload(sent=sent, kept=kept, metrics=metrics)

    def _client_feedback_rank(self, layer: Layer) -> int | None:
        """The rank at which ``E_c`` is cut off; None if it is not."""
        return self.feedback_rank or (None if self.trains_weights else layer.rank)

    def _changes(self, trained: Update, start: Start) -> dict[str, LowRank | Tensor]:
        """``B A + shift``: the client's change of every layer's weight, divided by ``s``."""
        from fedsmoothlora.algebra.lowrank import LowRank
        from fedsmoothlora.algebra.sums import plus

        if self.trains_weights:
            return {
                name: plus(trained[name], shift if shift.rank else None)
                for name, shift in start.shift.items()
            }
        return {name: LowRank.of(trained[name]) + shift for name, shift in start.shift.items()}

    def _own_uploads(
        self,
        trained: Update,
        start: Start,
        changes: Mapping[str, LowRank | Tensor],
        rank_of: Mapping[str, int],
    ) -> dict[str, LowRank]:
        """``U_c``: the client's changes at these ranks."""
        from fedsmoothlora.algebra import alignment
        from fedsmoothlora.algebra.averaging import products

        if self.trains_weights:
            return {name: alignment.truncated(changes[name], r, self.balance) for name, r in rank_of.items()}
        lora = products(trained)
        found = alignment.upload_products(
            [lora[name] for name in rank_of],
            [start.shift[name] for name in rank_of],
            list(rank_of.values()),
            self.balance,
        )
        return dict(zip(rank_of, found, strict=True))

    def _round_matches(self, client: ClientView) -> dict[str, LowRank]:
        """Step 1: ``R`` of every layer."""
        from fedsmoothlora.algebra.alignment import round_matching
        from fedsmoothlora.algebra.lowrank import LowRank

        zeta = self._zeta(client.round, client.rounds)
        matches: dict[str, LowRank] = {}
        for name, layer in client.layers.items():
            upload = client.kept.get(name)
            matches[name] = (
                round_matching(
                    upload,
                    [client.received[name]] if name in client.received else [],
                    zeta,
                    staleness=self.staleness,
                    missed=client.round - 1 - client.kept_round,
                )
                if self.round_matching and isinstance(upload, LowRank)
                else LowRank.zeros(layer.m, layer.n)
            )
        return matches

    def _zeta(self, round: int, rounds: int) -> float:
        """``zeta_t``, 0 where round matching is off."""
        if not self.round_matching:
            return 0.0
        return zeta_at(round, rounds, schedule=self.zeta_schedule, zeta=self.zeta, floor=self.zeta_floor)

    def _gradients(self, client: ClientView, matches: Mapping[str, LowRank]) -> Mapping[str, Tensor | Sketch]:
        """Step 2: the matrices, or their sketches, in whose leading directions the client starts."""
        if not matches or self.gradient_aligned in ("none", "random"):
            return {}
        if self.gradient == "sketch":
            return self._sketched(client, matches)
        if self.gradient_aligned == "client":
            return client.gradients(matches)
        if self.gradient_aligned == "weight":
            return {name: client.pretrained(name) for name in matches}
        return client.exchanged

    def _sketched(self, client: ClientView, matches: Mapping[str, LowRank]) -> Mapping[str, Tensor | Sketch]:
        """Sketches of the gradients of large layers, the gradients themselves of small ones."""
        from fedsmoothlora.algebra.seeds import generator_for
        from fedsmoothlora.algebra.sketches import Sketch

        sizes = {name: self.sketch_size(layer) for name, layer in client.layers.items()}
        sketches = {
            name: Sketch(size, generator_for("sketch", client.generator(name).initial_seed()))
            for name, size in sizes.items()
            if size is not None
        }
        return {**client.sketch(matches, sketches), **sketches}

    def _gradient_aligned(
        self, gradients: Mapping[str, Tensor | Sketch], client: ClientView
    ) -> dict[str, LowRank]:
        """Step 3: ``B_ga A_ga`` of every layer; the zero product where nothing is aligned."""
        from fedsmoothlora.algebra import alignment
        from fedsmoothlora.algebra.lowrank import LowRank

        layers = client.layers
        if self.gradient_aligned == "none":
            found = [LowRank.zeros(layer.m, layer.n) for layer in layers.values()]
        elif self.gradient_aligned == "random":
            found = [
                alignment.randomly_aligned(layer.m, layer.n, layer.rank, self.gamma, client.generator(name))
                for name, layer in layers.items()
            ]
        else:
            found = alignment.gradients_aligned(
                [gradients[name] for name in layers],
                [layer.rank for layer in layers.values()],
                self.gamma,
                partial=self.partial_start,
            )
        # Random directions, and zeros, are made on the CPU.
        return {name: ga.to(device=client.device) for name, ga in zip(layers, found, strict=True)}

    # -- server

    def aggregate(
        self, uploads: Sequence[Update], weights: Sequence[float], server: ServerView
    ) -> ServerUpdate:
        """Full-rank aggregation: ``S^t = SVD_r(sum_c p_c U_c)``, to be merged and sent down.

        With server feedback ``S^t = SVD_r(avg + E^t)``, ``E^{t+1} = E^t + (1 - zeta_{t+1}) (avg - S^t)``,
        since the clients carry ``zeta_{t+1} (avg - S^t)``, the mean of their round matches. ``S^t`` is
        coded as it is sent, so that ``E`` takes up what coding loses too. Packed, ``S^t`` is fitted to all of
        ``avg + E^t``.
        """
        from fedsmoothlora.algebra import alignment, sums
        from fedsmoothlora.algebra.averaging import exact_mean, products_of
        from fedsmoothlora.algebra.coding import unpacked
        from fedsmoothlora.algebra.lowrank import LowRank

        merge: dict[str, LowRank | Packed] = {}
        memory: dict[str, LowRank | Tensor] = {}
        carried = self._zeta(server.round + 1, server.rounds)
        for name, rank in ranks.server_ranks(self, uploads, weights, server).items():
            uploaded = products_of(uploads, name)
            left = server.memory.get(name)
            if server.packs:
                mean = exact_mean(uploaded, weights)
                matrix = sums.unformed(mean, left)
                leading = alignment.truncated(matrix, rank, self.balance, feeds_back=self.server_feedback)
                merge[name] = server.code(matrix, leading)
                if self.server_feedback:
                    received = LowRank.of(unpacked(merge[name]))
                    lost = sums.remainder(matrix, received, overwrites=True)
                    if carried:  # E + (1 - zeta) (avg - S) = (avg + E - S) - zeta (avg - S)
                        lost = sums.plus(lost, -carried * LowRank.of(mean) + carried * received)
                    cut = self.feedback_rank
                    memory[name] = lost if cut is None else alignment.truncated(lost, cut)
                continue
            if not self.server_feedback:
                merge[name] = alignment.average(uploaded, weights, rank, self.balance)
                continue
            left = left if isinstance(left, LowRank) else None
            mean = alignment.average(uploaded, weights, None, self.balance)
            total = mean if left is None else mean + left
            truncated = total.truncate(rank, self.balance)
            merge[name] = server.code(total, truncated)
            memory[name] = alignment.feedback(
                left, mean, LowRank.of(unpacked(merge[name])), carried, self.feedback_rank
            )
        return ServerUpdate(merge=merge, memory=memory)

    @property
    def server_share(self) -> float | None:
        """The share of ``energy:SHARE``; None for other values of ``server_rank``."""
        return energy_share(self.server_rank) if isinstance(self.server_rank, str) else None

    # -- gradients of other clients, an ablation

    @property
    def exchanges_gradients(self) -> bool:
        """Whether starts need other clients' gradients."""
        return self.gradient_aligned in ("shared", "shuffled")

    def calibrate(self, client: ClientView) -> Mapping[str, Tensor]:
        """Steps 1 and 2 alone: the client's own calibration gradient, sent ahead of the round."""
        return client.gradients(self._round_matches(client))

    def exchange(
        self,
        gradients: Sequence[Mapping[str, Tensor]],
        weights: Sequence[float],
        generator: torch.Generator,
    ) -> Sequence[Mapping[str, Tensor]]:
        """For each client the weighted mean (``shared``), or another client's gradient (``shuffled``).

        Shuffled, the clients stand in a random circle and each gets its neighbour's, so no client gets its
        own unless it is alone.
        """
        import torch

        from fedsmoothlora.algebra.averaging import mean_tensor

        if self.gradient_aligned == "shared":
            mean = {name: mean_tensor([one[name] for one in gradients], weights) for name in gradients[0]}
            return [mean] * len(gradients)
        circle = torch.randperm(len(gradients), generator=generator).tolist()
        neighbour = dict(zip(circle, circle[1:] + circle[:1], strict=True))
        return [gradients[neighbour[index]] for index in range(len(gradients))]

    # -- what the options mean for the rest of the program

    @property
    def trains_weights(self) -> bool:
        """Whether ``train = "weights"``."""
        return self.train == "weights"

    @property
    def weights_setting(self) -> str:
        """The key ``train``."""
        return "method.train = 'weights'"

    def upload_rank(self, layer: Layer) -> int:
        """The highest rank of a layer's upload."""
        return layer.rank if self.layer_ranks == "fixed" else ranks.highest_rank(layer, layer.rank)

    @property
    def widest(self) -> FedSmoothLoRA:
        """The method with every rank at its highest."""
        if isinstance(self.server_rank, str):
            return replace(self, server_rank=self.server_rank_cap, server_rank_cap=None)
        return replace(self, layer_ranks="fixed")  # the same bytes

    @property
    def calibration(self) -> Calibration:
        """The batches of the calibration gradient, where one is taken."""
        if self.gradient_aligned not in ("client", "shared", "shuffled"):
            return Calibration()
        return Calibration(batches=self.calibration_batches, batch_size=self.calibration_batch_size)

    def calibration_numbers(self, layer: Layer) -> float:
        """Numbers in memory for a layer's gradient or its sketch."""
        size = self.sketch_size(layer)
        return super().calibration_numbers(layer) if size is None else size.numbers

    def sketch_size(self, layer: Layer) -> SketchSize | None:
        """The sketch of a layer's calibration gradient; None where the gradient itself is taken."""
        from fedsmoothlora.algebra.sketches import SketchSize

        if self.gradient == "exact":
            return None
        width, passes = self.sketch_width or 8, self.sketch_passes or 2
        size = SketchSize.of(layer.m, layer.n, layer.rank, width=width, passes=passes)
        return size if size.pays else None

    @property
    def two_exchanges(self) -> bool:
        """Whether ``exchange = "subspace"``."""
        return self.upload_form == "subspace"

    @property
    def feeds_back(self) -> bool:
        """Whether ``server_feedback`` is on."""
        return self.server_feedback

    @property
    def clients_feed_back(self) -> bool:
        """Whether ``client_feedback`` is on."""
        return self.client_feedback or self.two_exchanges

    @property
    def no_sample_privacy_reason(self) -> str:
        """Starts from a gradient of the client's rows are not protected by DP-SGD."""
        if reason := super().no_sample_privacy_reason:
            return (
                f"with method.gradient_aligned = {self.gradient_aligned!r} {reason}; take 'weight', 'random' "
                "or 'none'"
            )
        return ""

    def divergence_advice(self) -> Sequence[str]:
        """A larger gamma starts closer to the global model."""
        if self.gradient_aligned == "none":
            return super().divergence_advice()
        return [f"a larger method.gamma than {self.gamma} (a gentler start)"]

    def check(self, layers: Mapping[str, Layer], *, partial: bool) -> None:
        """Refuse options that clash, and layers whose shape gives gradients fewer than ``2r`` directions."""
        from fedsmoothlora.methods.fedsmoothlora import consistency

        consistency.check(self, layers, partial=partial)

    @property
    def matches(self) -> bool:
        """Whether zeta is above 0 in some round; a schedule may rise to its floor."""
        highest = max(self.zeta, 0.0 if self.zeta_schedule == "constant" else self.zeta_floor)
        return self.round_matching and highest > 0
