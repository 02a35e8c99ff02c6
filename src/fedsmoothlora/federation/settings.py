"""The keys of the sections that concern the federation, its evaluation and the machine."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Interval
from pydantic import AllowInfNan

from fedsmoothlora.errors import ConfigError
from fedsmoothlora.modeling.settings import KeepWeights

Bits = Literal[32, 16, 8, 4, 3]

# ``privacy.clip_norm`` of the first round with ``privacy.clip_quantile``, as published (arXiv 1905.03871).
FIRST_CLIP_NORM = 0.1
# The fewest clients of a round with ``privacy.secure_aggregation``.
_FEWEST_MASKED = 3


@dataclass(frozen=True, kw_only=True)
class ParticipationSettings:
    """The keys of ``[participation]``. All clients take part in every round unless one of the keys is set.

    Attributes:
        clients: number of clients that take part in a round, drawn by the run's seed; with ``buffer``, of
            clients that train at the same time.
        fraction: fraction of the clients that take part in a round, at least one client. Excludes
            ``clients``.
        sampling: ``fixed`` draws as many clients in every round. ``poisson``, for ``privacy.unit =
            "client"``, draws each client by itself with probability ``fraction``, in secret and not by the
            run's seed, so a round may have more clients, fewer, or none.
        buffer: asynchronous rounds (FedBuff, arXiv 2106.06639): ``clients`` or ``fraction`` is the number of
            clients that train at the same time. A round ends as soon as this many uploads are there, and the
            other clients train on. A client that has finished makes room for another one at once. Rounds are
            synchronous unless set.
        staleness_weight: the weight ``w(k)`` of an upload whose client began ``k`` rounds ago:
            ``inverse_sqrt`` is FedBuff's ``1/sqrt(1 + k)``, ``constant`` is 1. The change that the upload
            makes is multiplied by it; the other uploads of the round get no larger weight in return.
        max_staleness: the largest ``k``; older uploads are dropped. No limit unless set.
        speeds: how fast clients are in the simulation, in optimiser steps per unit of simulated time.
            ``equal`` is 1 for all. ``uniform`` draws each client's speed by the run's seed between 0.5 and
            1.5, and ``lognormal:SIGMA`` draws ``exp(SIGMA z)``, ``z`` standard normal. A list has one speed
            for each client, in the clients' order; a table has one by client id. Speeds are between 1e-6 and
            1e6. ``equal`` unless set.
        replay: the folder of an asynchronous run whose order of arrivals is repeated, in place of ``speeds``.
            With the same configuration the result is the same to the bit.
    """

    clients: Annotated[int, Ge(1)] | None = None
    fraction: Annotated[float, Gt(0), Interval(le=1)] | None = None
    sampling: Literal["fixed", "poisson"] = "fixed"
    buffer: Annotated[int, Ge(1)] | None = None
    staleness_weight: Literal["inverse_sqrt", "constant"] = "inverse_sqrt"
    max_staleness: Annotated[int, Ge(0)] | None = None
    speeds: str | tuple[float, ...] | Mapping[str, float] | None = None
    replay: str | None = None

    @property
    def asynchronous(self) -> bool:
        """Whether the server merges as soon as ``buffer`` uploads are there."""
        return self.buffer is not None

    def weight(self, staleness: int) -> float:
        """``w(k)``, the factor of the change by an upload whose client began ``k`` rounds ago."""
        return 1.0 if self.staleness_weight == "constant" else 1 / math.sqrt(1 + staleness)

    def count(self, clients: int) -> int:
        """The number of clients that train at the same time, out of ``clients``: those of a round.

        With Poisson sampling, it is the expected number. In asynchronous rounds, a round has the uploads of
        `merged` clients.
        """
        if self.clients is not None:
            return min(self.clients, clients)
        if self.fraction is not None:
            return max(1, round(self.fraction * clients))
        return clients

    def merged(self, clients: int) -> int:
        """The number of uploads that a round merges, if all of them are accepted."""
        return self.count(clients) if self.buffer is None else self.buffer

    def partial(self, clients: int) -> bool:
        """Whether some of ``clients`` may miss a round."""
        return self.asynchronous or self.sample_rate < 1 or self.count(clients) < clients

    @property
    def sample_rate(self) -> float:
        """The probability with which Poisson sampling draws a client; 1 with fixed draws."""
        return 1.0 if self.sampling == "fixed" or self.fraction is None else float(self.fraction)

    def check(self, clients: int, min_clients: int) -> None:
        """Raise ``ConfigError`` if a round has too few clients even if every upload is accepted."""
        count = self.count(clients)
        if self.buffer is not None:
            if self.buffer > count:
                raise ConfigError(
                    f"participation.buffer = {self.buffer} uploads, but only {count} of {clients} clients "
                    "train at the same time (participation.clients or .fraction): set it to at most "
                    f"{count}, or let more clients train"
                )
            if min_clients > self.buffer:
                raise ConfigError(
                    f"uploads.min_clients = {min_clients}, but a round ends with participation.buffer = "
                    f"{self.buffer} uploads; set at most {self.buffer}"
                )
        if min_clients > count:
            raise ConfigError(
                f"uploads.min_clients = {min_clients}, but only {count} of {clients} clients take part in a "
                f"round, so no round would be valid; set at most {count}, or use more clients per round"
            )

    def check_speeds(self, clients: Sequence[str]) -> None:
        """Raise ``ConfigError`` if ``speeds`` does not have one speed for each client."""
        speeds = self.speeds
        if isinstance(speeds, Mapping):
            if unknown := [client for client in speeds if client not in clients]:
                raise ConfigError(f"participation.speeds: there is no client {unknown[0]!r}")
            if missing := [client for client in clients if client not in speeds]:
                raise ConfigError(
                    f"participation.speeds has no speed for client {missing[0]!r}; a table needs one for "
                    f"each of the {len(clients)} clients"
                )
        elif isinstance(speeds, tuple) and len(speeds) != len(clients):
            raise ConfigError(
                f"participation.speeds lists {len(speeds)} speeds for {len(clients)} clients; list one for "
                "each client, in the clients' order"
            )


def lognormal_sigma(speeds: str) -> float | None:
    """``SIGMA`` of ``lognormal:SIGMA``; None if ``speeds`` is not of that form."""
    rule, _, sigma = speeds.partition(":")
    try:
        value = float(sigma)
    except ValueError:
        return None
    return value if rule == "lognormal" and 0 < value <= 10 else None


@dataclass(frozen=True, kw_only=True)
class UploadSettings:
    """The keys of ``[uploads]``.

    Attributes:
        max_norm_factor: refuse an upload, or a change of the head, whose norm is above this multiple of the
            round's median norm; ``inf`` refuses none.
        clip_to_median: scale uploads and changes of the head down to the round's median norm if theirs is
            larger.
        max_weight: largest weight of one client in the average; the excess is shared by the others in
            proportion to their samples. If fewer than ``1 / max_weight`` uploads are accepted, all have the
            same weight. It has no effect on one or two uploads. No limit unless set.
        min_clients: smallest number of accepted uploads in a round; with fewer, the round is repeated.
    """

    max_norm_factor: Annotated[float, Gt(1), AllowInfNan(True)] = 10.0
    clip_to_median: bool = False
    max_weight: Annotated[float, Interval(gt=0, le=1)] | None = None
    min_clients: Annotated[int, Ge(1)] = 1


@dataclass(frozen=True, kw_only=True)
class TransportSettings:
    """The keys of ``[transport]``.

    Attributes:
        bits: bits of each number of a factor on the way: 32 (float32), 16 (bfloat16), or 8, 4 or 3, which are
            integers with one scale per direction. bfloat16 has 8 significant bits, so methods that average
            factors and keep training them lose changes of a value below about 1/512 of it in a round. With 8
            bits or fewer they send changes of the factors, a head that is trained whole is sent as its change
            in bfloat16, and what coding lost is added to the next change (error feedback). FedSmoothLoRA
            sends changes only, and has ``method.server_feedback`` for it.
    """

    bits: Bits = 32


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """The keys of ``[server]``.

    Attributes:
        optimizer: optimiser that the server applies to a round's update. ``none`` uses the update unchanged,
            ``momentum`` is FedAvgM; ``adagrad``, ``adam`` and ``yogi`` are the adaptive federated optimisers.
        aggregation: the mean of a round's uploads. ``mean`` is weighted by samples. ``geometric_median``
            weighs clients by samples and by the distances between their uploads. ``multi_krum`` leaves out
            the ``f`` uploads that are farthest from the others, and weighs the rest equally. ``trimmed_mean``
            and ``median`` are computed for each coordinate and weigh all clients equally; they form the
            dense matrices of all clients, one layer at a time.
        byzantine: the largest number of malicious clients, for ``multi_krum`` (needs ``2 f + 3`` uploads) and
            ``trimmed_mean`` (needs ``2 f + 1``).
        lr: the server's learning rate; unless set, 1 for ``momentum`` and 0.1 for the adaptive optimisers.
        beta1: decay of the first moment; 0.9 unless set, and 0 for ``adagrad``.
        beta2: decay of the second moment, for ``adam`` and ``yogi``; 0.99 unless set.
        epsilon: degree of adaptivity of the adaptive optimisers, called tau in the paper; 0.001 unless set.
    """

    aggregation: Literal["mean", "geometric_median", "multi_krum", "trimmed_mean", "median"] = "mean"
    byzantine: Annotated[int, Ge(1)] | None = None
    optimizer: Literal["none", "momentum", "adagrad", "adam", "yogi"] = "none"
    lr: Annotated[float, Gt(0)] | None = None
    beta1: Annotated[float, Interval(ge=0, lt=1)] | None = None
    beta2: Annotated[float, Ge(0), Interval(lt=1)] | None = None
    epsilon: Annotated[float, Gt(0)] | None = None

    @property
    def fewest(self) -> int:
        """The fewest uploads for which ``aggregation`` is defined."""
        byzantine = self.byzantine or 0
        return {"multi_krum": 2 * byzantine + 3, "trimmed_mean": 2 * byzantine + 1}.get(self.aggregation, 1)

    def check(self, clients: int) -> None:
        """Raise ``ConfigError`` if rounds of ``clients`` clients have too few uploads for ``aggregation``."""
        if clients < self.fewest:
            raise ConfigError(
                f"server.aggregation = {self.aggregation!r} with server.byzantine = {self.byzantine} needs "
                f"{self.fewest} uploads, but {clients} clients take part in a round: use more clients "
                "per round, or server.aggregation = 'geometric_median'"
            )


@dataclass(frozen=True, kw_only=True)
class PrivacySettings:
    """The keys of ``[privacy]``: differential privacy and secure aggregation (docs/privacy.md).

    Attributes:
        unit: whose data the released models hide. ``client`` hides a client with all its data from everyone
            but the server, which clips uploads and adds noise to their mean (DP-FedAvg, arXiv 1710.06963).
            ``sample`` hides each row of a client from the server too: the client trains with DP-SGD (arXiv
            1607.00133). ``none`` is off.
        clip_norm: ``C``, the norm to which a contribution is scaled down if it is larger. With ``client``,
            the change of the model by an upload, over all layers (products without the LoRA scale) and the
            head together; with ``sample``, the gradient of a row, over all trained parameters together.
        clip_quantile: with ``client``, ``clip_norm`` follows this quantile of the norms of uploads (arXiv
            1905.03871), and ``clip_norm`` is its value in the first round, 0.1 unless set.
        quantile_noise: with ``clip_quantile``, the standard deviation of the noise that is added to the
            number of uploads whose norm is below ``clip_norm``; a twentieth of a round's expected number of
            clients unless set. It must be above half of ``noise_multiplier``.
        noise_multiplier: ``z``; with ``client``, the noise of every released number has the standard
            deviation ``z C / (q N)`` for ``N`` clients that take part with probability ``q``. With
            ``sample``, that of a sum of clipped gradients has ``z C``. Epsilon is in the hundreds at 0.1.
        target_epsilon: the largest epsilon, instead of ``noise_multiplier``: the noise is computed from it,
            and the run, or the client, ends before it would be passed.
        delta: the delta of (epsilon, delta)-differential privacy, well below 1 over the number of clients, or
            of a client's rows.
        sample_rate: with ``sample``, the probability with which each row is in a batch. Needed unless
            ``public_counts`` is set.
        public_counts: with ``sample``, the clients' numbers of training rows are no secret. They then weigh
            the clients, and a row is in a batch with probability ``training.batch_size`` over the client's
            number of rows.
        accountant: the accountant of Opacus that computes epsilon. ``rdp`` is fast; ``prv`` is tighter.
        seed: a seed for noise and sampling, for tests. Anybody who knows it can remove the noise, so a run
            with a seed is not private.
        secure_aggregation: sites mask their uploads, so that the coordinator learns their sum and no upload.
            For federations through Flower, whose sites know each other's keys.
        threshold: with secure aggregation, the fewest sites whose sum the coordinator may learn; with fewer
            left, the round is repeated. More than half of the clients of a round, and two thirds of them
            unless set.
        mask_range: with secure aggregation, the largest absolute value of an uploaded number; larger ones are
            cut to it and counted. With ``unit = "client"`` it is ``clip_norm``.
        most_rows: with secure aggregation, a client with ``n`` training rows has the weight
            ``min(1, n / most_rows)``, of which the coordinator learns the sum. All clients weigh the same
            unless set.
    """

    unit: Literal["none", "client", "sample"] = "none"
    clip_norm: Annotated[float, Gt(0)] | None = None
    clip_quantile: Annotated[float, Interval(gt=0, lt=1)] | None = None
    quantile_noise: Annotated[float, Gt(0)] | None = None
    noise_multiplier: Annotated[float, Ge(0.1)] | None = None
    target_epsilon: Annotated[float, Interval(gt=0, le=100)] | None = None
    delta: Annotated[float, Interval(gt=0, lt=1)] | None = None
    sample_rate: Annotated[float, Interval(gt=0, le=1)] | None = None
    public_counts: bool = False
    accountant: Literal["rdp", "prv"] = "rdp"
    seed: Annotated[int, Ge(0)] | None = None
    secure_aggregation: bool = False
    threshold: Annotated[int, Ge(2)] | None = None
    mask_range: Annotated[float, Gt(0)] = 16.0
    most_rows: Annotated[int, Ge(1)] | None = None

    @property
    def on(self) -> bool:
        """Whether the released models hide clients or rows."""
        return self.unit != "none"

    @property
    def uploads_only(self) -> bool:
        """Whether nothing but uploads leaves a client: no metric, no number of rows and no progress."""
        return self.on or self.secure_aggregation

    @property
    def key(self) -> str:
        """The key because of which nothing but uploads leaves a client, with its value, for messages."""
        return f"privacy.unit = {self.unit!r}" if self.on else "privacy.secure_aggregation = true"

    @property
    def hides_clients(self) -> bool:
        """Whether the server's releases hide clients."""
        return self.unit == "client"

    @property
    def hides_rows(self) -> bool:
        """Whether the clients' uploads hide their rows."""
        return self.unit == "sample"

    @property
    def clips_at_clients(self) -> bool:
        """Whether clients clip their uploads themselves, because the server does not see them."""
        return self.hides_clients and self.secure_aggregation

    @property
    def largest_number(self) -> float:
        """The largest absolute value of a number under a mask: no change is longer than ``clip_norm``."""
        return self.first_clip_norm if self.clips_at_clients else self.mask_range

    @property
    def hides_counts(self) -> bool:
        """Whether a client's number of rows stays with it."""
        return self.uploads_only and not self.public_counts

    def weight_of(self, rows: int) -> float:
        """A client's weight in a sum under a mask, above 0 and at most 1."""
        return 1.0 if self.most_rows is None else min(1.0, rows / self.most_rows)

    def threshold_of(self, clients: int) -> int:
        """The threshold of a round of ``clients`` clients, with secure aggregation."""
        return max(clients // 2 + 1, -(-2 * clients // 3)) if self.threshold is None else self.threshold

    def check_session(self, clients: int) -> None:
        """Raise ``ConfigError`` if rounds of ``clients`` clients cannot be summed under a mask."""
        if not self.secure_aggregation:
            return
        if clients < _FEWEST_MASKED:
            raise ConfigError(
                f"privacy.secure_aggregation = true with {clients} clients in a round: each of two can "
                f"subtract its own upload from the sum; let at least {_FEWEST_MASKED} take part"
            )
        if not clients // 2 < self.threshold_of(clients) <= clients:
            raise ConfigError(
                f"privacy.threshold = {self.threshold} with {clients} clients in a round: it must be more "
                "than half of them, so that no two groups of sites can be summed apart, and at most all: "
                f"from {clients // 2 + 1} to {clients}"
            )

    @property
    def first_clip_norm(self) -> float:
        """``C`` in the first round."""
        return FIRST_CLIP_NORM if self.clip_norm is None else float(self.clip_norm)

    def check(self, clients: int, sample_rate: float = 1.0, noise_multiplier: float = 0.0) -> None:
        """Raise ``ConfigError`` if the keys do not fit a federation of ``clients`` clients.

        Args:
            clients: ``N``.
            sample_rate: ``q``.
            noise_multiplier: ``z``, as set or as computed from ``target_epsilon``.
        """
        if not self.hides_clients:
            return
        if self.delta is not None and self.delta >= 1 / clients:
            raise ConfigError(
                f"privacy.delta = {self.delta:g} with {clients} clients: a release that shows one client's "
                f"upload as it is would be allowed; set it well below 1/{clients}, for instance to "
                f"{0.01 / clients:.0e}"
            )
        if self.clip_quantile is None:
            return
        noise = self.noise_of_quantile(clients, sample_rate)
        if noise <= noise_multiplier / 2:
            key = f"privacy.quantile_noise = {noise:g}"
            if self.quantile_noise is None:
                key += f" (a twentieth of the {sample_rate * clients:g} clients of a round)"
            raise ConfigError(
                f"{key} is not above half of the noise multiplier {noise_multiplier:.4g}: the quantile alone "
                "would take more privacy than both releases together may; draw more clients in a round, set "
                "privacy.quantile_noise higher, or leave privacy.clip_quantile out"
            )

    def noise_of_quantile(self, clients: int, sample_rate: float) -> float:
        """The standard deviation of the noise of the number of uploads below ``clip_norm``."""
        return sample_rate * clients / 20 if self.quantile_noise is None else float(self.quantile_noise)

    def check_rows(self, client: str, rows: int) -> None:
        """Raise ``ConfigError`` if ``delta`` is too large for a client of ``rows`` training rows."""
        if self.hides_rows and self.delta is not None and self.delta >= 1 / rows:
            raise ConfigError(
                f"privacy.delta = {self.delta:g}, and client {client} has {rows} rows: an upload that shows "
                f"a row as it is would be allowed; set it well below 1/{rows}, for instance to "
                f"{0.01 / rows:.0e}"
            )


@dataclass(frozen=True, kw_only=True)
class PersonalSettings:
    """The keys of ``[personal]``: a personal model of each client beside the global one (docs/personal.md).

    Attributes:
        ditto: ``lambda`` of Ditto (arXiv 2012.04221): after its upload, a client trains its personal model
            with ``lambda/2 ||V - W||^2`` added to the loss, where ``V`` are the personal and ``W`` the global
            weights at the start of the round. 0 trains without the term. No personal models unless set.
        steps: optimiser steps of the personal model in a round; as many as in local training unless set.
    """

    ditto: Annotated[float, Ge(0)] | None = None
    steps: Annotated[int, Ge(1)] | None = None

    @property
    def on(self) -> bool:
        """Whether clients train personal models."""
        return self.ditto is not None


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
    """The keys of ``[evaluation]``.

    Attributes:
        batch_size: rows in each evaluation batch; it can change the last bits of a metric.
        clients: also evaluate each client's own model on its validation rows, after its training.
        test: evaluate on the test set. If false, or if there is no test set, metrics are means over the
            clients' validation rows, as in `fedsmoothlora tune`.
        diagnostics: also record diagnostics, which help to explain the metrics.
        personal_steps: after the last round, train a copy of the final global model for that many steps at
            every client that keeps validation rows, and evaluate it on these (``tuned_`` metrics). The global
            model does not change. The copy has a fresh LoRA of its own, and the learning rate is
            ``training.lr``. Off unless set.
    """

    batch_size: Annotated[int, Ge(1)] = 256
    clients: bool = False
    test: bool = True
    diagnostics: bool = False
    personal_steps: Annotated[int, Ge(1)] | None = None


@dataclass(frozen=True, kw_only=True)
class MachineSettings:
    """The keys of ``[machine]``.

    Attributes:
        threads: number of threads of torch's operations; it can change the last bits of a sum.
        jobs: number of clients that train at the same time, each in its own process with ``threads`` threads.
            It does not change results. More than one requires Linux and training on the CPU.
        batch_clients: number of clients that train together with one forward and one backward pass in each
            step. Sums are computed in another order, so results agree within rounding errors only, and
            dropout draws other masks. For methods that train LoRA factors, with float32 weights.
        device: the device that clients train on: ``auto``, which is this machine's GPU if torch finds one
            with CUDA or ROCm, otherwise the CPU; ``cpu``; ``cuda`` for torch's current GPU; or ``cuda:N`` for
            the GPU with the number ``N``. Apple's GPUs lack float64, in which norms and losses are summed.
        keep_weights: the place of the pretrained copies of adapted weights that are rewritten for each
            client: the ``device``, the ``host``'s memory, or a file on ``disk``. ``auto`` is the disk for the
            CPU. For an accelerator it is the first of the three with room: free memory of three times their
            size. It does not change results.
        deterministic: on a GPU, use deterministic algorithms only, so that the same run gives the same bits
            on the same machine with the same software; slower. On the CPU results are so without it.
        tf32: on a GPU, whether products and convolutions of float32 tensors round their inputs to TF32, which
            has 10 bits after the point: faster, and less exact. Unless set, torch's own setting holds, which
            is TF32 for convolutions only.
        compile: compile the forward and backward passes of training with ``torch.compile``. The first step
            takes longer, by up to minutes, and results change by rounding. Evaluations and calibration are
            not compiled.
    """

    threads: Annotated[int, Ge(1)] = 2
    jobs: Annotated[int, Ge(1)] = 1
    batch_clients: Annotated[int, Ge(1)] = 1
    device: str = "auto"
    keep_weights: KeepWeights = "auto"
    deterministic: bool = False
    tf32: bool | None = None
    compile: bool = False
