"""The interface of a federated method.

Importing this module does not import torch. Method files import torch and formulas inside their functions, so
that reading a configuration and listing the methods do not import torch either.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, ClassVar, Literal

from fedsmoothlora.algebra.update import Coded, Layer, Part, Products, Sent, Update
from fedsmoothlora.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from fedsmoothlora.algebra.coding import Packed
    from fedsmoothlora.algebra.lowrank import LowRank
    from fedsmoothlora.algebra.sketches import Sketch
    from fedsmoothlora.algebra.sums import Matrix


# The metric of a client's start that counts the layers whose gradient had too few directions for all of it.
PARTIAL_STARTS = "partial_starts"

# How the server combines uploads: their exact mean is what clients continue from; factors are averaged apart;
# means of products are merged or truncated, and rounds restart; or clients keep models of their own.
Family = Literal["exact", "factor-averaging", "merged", "personal"]


@dataclass(frozen=True, kw_only=True)
class Traits:
    """Properties of a method that other parts of the program use.

    Attributes:
        averages_factors: the server averages ``B`` and ``A`` separately, so all ranks must be the same.
        client_ranks: clients may have LoRA of different ranks.
        global_model: there is a global model; without one, metrics are means of the clients' models.
        shares_head: a fully trained head is averaged too; otherwise each client keeps its own.
        keeps_upload: clients keep their last upload, so that each client's own model can be exported.
        step_on: the quantity that a federated optimiser at the server changes: the merged update, the
            averaged factors, or the product of the averaged LoRA; None if server optimisers do not apply.
        no_step_reason: why server optimisers do not apply, if ``step_on`` is None.
        no_robust_reason: why uploads can only be combined by their weighted mean; empty if other means apply.
        no_coordinates_reason: why coordinate-wise means of uploads do not apply; empty if they do.
        stable_parameters: trained parameters mean the same in all rounds, so that SCAFFOLD's control variates
            apply.
        float32_reason: why uploads must be sent as float32; empty if fewer bits are allowed.
        packed_reason: why uploads cannot be sent in 8 bits or fewer; empty if they can, or if the form of the
            upload says it.
        uses_mean_only: ``aggregate`` depends on uploads only through their weighted mean: of the products, or
            of both factors with ``averages_factors``. A single upload that is the mean then gives the same
            result, as client-level privacy needs.
        no_privacy_reason: why client-level privacy does not apply, if ``uses_mean_only`` is false.
        sums_tensors: ``aggregate`` depends on uploads only through the weighted mean of each tensor that
            clients send, and all clients send tensors of the same shapes. A sum of masked tensors then is
            enough, as secure aggregation needs.
        no_sum_reason: why secure aggregation does not apply, if ``sums_tensors`` is false.
        asynchronous: an upload that began in an earlier round counts by its change, its difference from
            `Method.unchanged` of that round, which is added to `Method.unchanged` of this round
            (``participation.buffer``).
        no_async_reason: why that is wrong, if ``asynchronous`` is false.
    """

    averages_factors: bool = False
    client_ranks: bool = False
    global_model: bool = True
    shares_head: bool = True
    keeps_upload: bool = False
    step_on: Literal["merge", "factors", "product"] | None = "merge"
    no_step_reason: str = ""
    no_robust_reason: str = ""
    no_coordinates_reason: str = ""
    stable_parameters: bool = False
    float32_reason: str = ""
    packed_reason: str = ""
    uses_mean_only: bool = False
    no_privacy_reason: str = ""
    sums_tensors: bool = False
    no_sum_reason: str = ""
    asynchronous: bool = False
    no_async_reason: str = ""


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """The batches of a client's training data that its start uses in every round.

    Attributes:
        batches: number of batches; 0 for methods that need no gradient at the start.
        batch_size: rows in each batch; ``training.batch_size`` unless set.
    """

    batches: int = 0
    batch_size: int | None = None


def _uncoded(matrix: Matrix, truncated: LowRank) -> LowRank | Packed:
    return truncated


def _float32_bytes(layer: Layer, rank: int) -> int:
    return 4 * rank * (layer.m + layer.n)


def _no_weights(name: str) -> Tensor:
    raise RuntimeError(f"the pretrained weight of layer {name} is not available here")


def _no_lora(name: str) -> LowRank:
    raise RuntimeError(f"the initial LoRA of layer {name} is not available here")


def _no_generator(name: str, purpose: str) -> torch.Generator:
    raise RuntimeError(f"there is no generator for layer {name} here")


def _no_sketches(at: Products, sketches: Mapping[str, Sketch]) -> Mapping[str, Tensor]:
    raise RuntimeError("gradients cannot be sketched here")


@dataclass(frozen=True, kw_only=True)
class ClientView:
    """The state of a client at the beginning of a round, the argument of ``start`` and ``upload``.

    Attributes:
        round: ``t``, counted from 0.
        rounds: ``T``, the number of rounds.
        layers: the adapted layers, by name.
        server_lora: the LoRA that the server sent: products, or one factor if the client has the other.
            Empty before the first aggregation, and always for methods that merge the whole average.
        kept: ``Upload.kept`` of the last round in which the client's upload was accepted; empty if there is
            none.
        kept_round: that round, ``tau``; -1 if there is none.
        received: sum of the server's merged updates ``S^tau + ... + S^{t-1}``, by layer.
        gradients: ``gradients(at)`` returns the calibration gradient ``(m, n)`` of every layer at the weights
            ``W^t + s * at``, on this client's data, without LoRA.
        sketch: ``sketch(at, sketches)`` fills sketches of that gradient, by layer, and returns the gradients
            of all other layers.
        exchanged: gradients by layer that the server sent before the round, for methods that exchange
            gradients.
        device: the device of all tensors; None is the CPU. Generators are on the CPU, so that draws are the
            same on every device.
        initial: ``initial(name)`` is PEFT's initialisation of a layer (``B = 0``, random ``A``), the same for
            all clients.
        orthonormal: ``orthonormal(name)`` has random orthonormal columns of ``B`` and rows of ``A``, the same
            for the server and all clients.
        generator: ``generator(name)`` is a seeded generator for a layer, this client and this round.
        pretrained: ``pretrained(name)`` is the pretrained weight of a layer, ``(m, n)``.
        prepared: the result of `Method.prepare`.
        basis: ``Q_t (n, r)`` of the shared subspace, by layer, if the method uploads in two exchanges.
        code, packs, nbytes: as in `ServerView`, for what the client sends.
    """

    round: int
    rounds: int
    layers: Mapping[str, Layer]
    server_lora: Update
    kept: Update
    kept_round: int
    received: Products
    gradients: Callable[[Products], Mapping[str, Tensor]]
    initial: Callable[[str], LowRank]
    generator: Callable[[str], torch.Generator]
    orthonormal: Callable[[str], LowRank] = _no_lora
    sketch: Callable[[Products, Mapping[str, Sketch]], Mapping[str, Tensor]] = _no_sketches
    pretrained: Callable[[str], Tensor] = _no_weights
    prepared: Products = field(default_factory=dict)
    exchanged: Mapping[str, Tensor] = field(default_factory=dict)
    device: torch.device | None = None
    basis: Mapping[str, Tensor] = field(default_factory=dict)
    code: Callable[[Matrix, LowRank], LowRank | Packed] = _uncoded
    packs: bool = False
    nbytes: Callable[[Layer, int], int] = _float32_bytes


@dataclass(frozen=True, kw_only=True)
class Start:
    """The start of local training: LoRA factors ``lora`` on the backbone ``W^t + s * shift``.

    ``trains`` lists the trained parts of each layer, all others are frozen. ``("W",)`` trains the weights
    themselves, without LoRA. ``("R",)`` trains a matrix between the factors, so that the LoRA is ``B R A``,
    with the values in ``cores``, ``(r, r)``. With the shape ``(r, r / h)`` it is the diagonal of ``h`` square
    blocks ``g_i R_i``, of which the blocks ``R_i`` and the numbers ``g_i``, 1 at first, are trained.

    ``gradients`` are those of the factors at the start, ``dLoss/dB`` and ``dLoss/dA`` of each layer; if there
    are any, the optimiser makes its first step with them.

    ``metrics`` are diagnostics to record, by name; ``notes`` are sentences for the log.
    """

    lora: Products
    cores: Mapping[str, Tensor] = field(default_factory=dict)
    shift: Products = field(default_factory=dict)
    gradients: Products = field(default_factory=dict)
    trains: Sequence[Part] = ("B", "A")
    metrics: Mapping[str, float] = field(default_factory=dict)
    notes: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True)
class Upload:
    """The update that goes to the server (``sent``), and the one that the client keeps (``kept``).

    ``metrics`` are diagnostics to record, by name. ``pending`` is what `Method.second_upload` needs, if the
    method uploads in two exchanges; it is kept until the client's next round.
    """

    sent: Coded
    kept: Update = field(default_factory=dict)
    pending: Update = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class ServerView:
    """The state of the server, an argument of ``aggregate``.

    Attributes:
        round: ``t``, counted from 0.
        rounds: ``T``, the number of rounds.
        layers: the adapted layers, with the server's own rank.
        memory: ``ServerUpdate.memory`` of the last round; it leaves the server only through `Method.whole`.
            ``aggregate`` may overwrite it, because nothing reads it later.
        model: ``ServerUpdate.model`` of the last round.
        lora: ``ServerUpdate.lora`` of the last round, as clients receive it; empty if there was none.
        initial, orthonormal, pretrained, prepared: as in `ClientView`.
        generator: ``generator(name, purpose)`` is seeded for a layer, a purpose, this round and its attempt.
        code: ``code(matrix, truncated)`` is ``truncated = SVD_r(matrix)`` as it will be sent. A method that
            needs what clients receive, for error feedback, puts it into ``merge`` or ``lora`` as it is, and
            reads it with `fedsmoothlora.algebra.coding.unpacked`. All else is coded after ``aggregate``.
        packs: whether products are sent in few bits, as `fedsmoothlora.algebra.coding.Packed`.
        nbytes: ``nbytes(layer, rank)`` is the number of bytes of a layer's product as it is sent.
    """

    round: int
    rounds: int
    layers: Mapping[str, Layer]
    memory: Update = field(default_factory=dict)
    model: Products = field(default_factory=dict)
    lora: Update = field(default_factory=dict)
    initial: Callable[[str], LowRank] = _no_lora
    orthonormal: Callable[[str], LowRank] = _no_lora
    pretrained: Callable[[str], Tensor] = _no_weights
    prepared: Products = field(default_factory=dict)
    generator: Callable[[str, str], torch.Generator] = _no_generator
    code: Callable[[Matrix, LowRank], LowRank | Packed] = _uncoded
    packs: bool = False
    nbytes: Callable[[Layer, int], int] = _float32_bytes


@dataclass(frozen=True, kw_only=True)
class ServerUpdate:
    """The result of aggregating a round.

    Attributes:
        merge: the update that is merged into the backbone and sent to every client.
        model: the LoRA of the global model on top of the backbone, from which clients start.
        lora: the part of ``model`` that is sent to clients of this round, for methods in which they need only
            one factor. All of ``model`` unless given; other clients always receive all of it. Without a
            ``model``, ``lora`` is sent to all clients.
        memory: state for the next rounds that stays at the server.
        metrics: diagnostics to record, by name.
    """

    merge: Coded = field(default_factory=dict)
    model: Products = field(default_factory=dict)
    lora: Coded | None = None
    memory: Update = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Method(ABC):
    """The base class of federated methods. A subclass must define ``name`` and ``aggregate``.

    A subclass is a dataclass too, ``@dataclass(frozen=True, kw_only=True)``. Its fields are its options, the
    keys of ``[method]`` in a configuration. Their values are those of TOML, with ranges as
    ``annotated_types`` (``gamma: Annotated[float, Gt(0)] = 256.0``). If a key has the same name as an
    attribute of this class, the field needs another name, and ``field(default=..., metadata={"key":
    "start"})`` sets the key. The first line of the class's docstring is shown by `fedsmoothlora list
    methods`; it names the paper in parentheses.

    Methods are deterministic: all randomness comes from the generators of `ClientView`. The global weight of
    a layer is ``W^t + s * model``, with ``W^{t+1} = W^t + s * merge`` (`ServerUpdate`).

    Attributes:
        name: the name of the method in configurations.
        family: the group in which `fedsmoothlora list methods` shows the method; empty for "other".
        traits: properties of the method that other parts of the program use.
        numbers_up: as ``numbers_down``, if `sends` does not tell it.
        numbers_down: how many numbers a client receives per layer in a round, as a formula of ``m``, ``n``,
            rank ``r`` and ``C`` clients, for docs/methods.md; ``/`` separates even and odd rounds, and ``k``
            is a rank that depends on the uploads, ``d`` that of a head of ``B R A``.
        limitation: the method's limitation, for docs/methods.md.
        presets: named settings that ``method.preset`` can choose, if the class has that option: values of
            keys of ``[method]`` and ``[transport]``, by dotted key, for what a configuration leaves out.
    """

    name: ClassVar[str] = ""
    family: ClassVar[Family | Literal[""]] = ""
    traits: ClassVar[Traits] = Traits()
    numbers_up: ClassVar[str] = ""
    numbers_down: ClassVar[str] = ""
    limitation: ClassVar[str] = ""
    presets: ClassVar[Mapping[str, Mapping[str, object]]] = {}

    @classmethod
    def summary(cls) -> str:
        """The first line of the class's docstring."""
        return (cls.__doc__ or "").strip().partition("\n")[0]

    @classmethod
    def option_names(cls) -> dict[str, str]:
        """The name of the field of each key in ``[method]``, in order."""
        return {part.metadata.get("key", part.name): part.name for part in fields(cls)}

    def options(self) -> dict[str, object]:
        """The value of each key in ``[method]``, in order."""
        return {key: getattr(self, name) for key, name in self.option_names().items()}

    # -- the algorithm

    def prepare(self, layers: Mapping[str, Layer], pretrained: Callable[[str], Tensor]) -> Products:
        """Compute products from the pretrained weights for use in all rounds; nothing by default.

        This is called before the first round, when a run is resumed, and at every Flower site, so it must
        return the same result in each call. Clients and server receive it as ``prepared``.

        Args:
            layers: the adapted layers, by name.
            pretrained: the pretrained weight of a layer, ``(m, n)``.
        """
        return {}

    def start(self, client: ClientView) -> Start:
        """The start of local training: by default the server's LoRA, or PEFT's initialisation in round 0."""
        from fedsmoothlora.algebra.averaging import products

        lora = products(client.server_lora) or {name: client.initial(name) for name in client.layers}
        return Start(lora=lora)

    def upload(self, trained: Update, start: Start, client: ClientView) -> Upload:
        """The upload after local training: by default both trained factors.

        Args:
            trained: the trained LoRA of every layer; if the start trains ``R``, that matrix; if it trains
                ``W``, the change of the weights divided by ``s``; no layer if the round does not train.
            start: the start of this training.
            client: the same view as in ``start``.
        """
        return Upload(sent=trained)

    @abstractmethod
    def aggregate(
        self, uploads: Sequence[Update], weights: Sequence[float], server: ServerView
    ) -> ServerUpdate:
        """The server's update of a round.

        Args:
            uploads: ``Upload.sent`` of every client whose upload was accepted, sorted by client id.
            weights: the clients' numbers of training samples, to which ``p_c`` is proportional.
            server: the server's state.
        """

    # -- hooks with defaults that fit most methods

    def sends(self, round: int) -> Sent:
        """The part of every layer that clients upload in ``round``; products by default."""
        return "product"

    def upload_rank(self, layer: Layer) -> int:
        """The highest rank of a layer's uploaded product; its LoRA rank by default.

        All products of an upload together have at most as many bytes as products of LoRA rank.
        """
        return layer.rank

    @property
    def rank_step(self) -> int:
        """The number of which every LoRA rank is a multiple, where `check` refuses others; 1 by default."""
        return 1

    @property
    def widest(self) -> Method:
        """The method whose messages have the most bytes that this one's can have; itself by default.

        A method whose ranks depend on the uploads overrides it, so that `fedsmoothlora check` can tell their
        bytes.
        """
        return self

    def core_shape(self, layer: Layer) -> tuple[int, int]:
        """The shape of the matrix ``R`` of a layer, for methods that send it; see `Start`."""
        return layer.rank, layer.rank

    @property
    def trains_weights(self) -> bool:
        """Whether clients train the weights of the adapted layers, without LoRA."""
        return self.sends(0) == "W"

    @property
    def weights_setting(self) -> str:
        """The setting by which clients train weights, as messages name it."""
        return f"method {self.name!r}"

    def trains_in(self, round: int) -> bool:
        """Whether clients train in ``round``; a first round without training can exchange what starts need.

        In such a round clients only make their upload, and the head and SCAFFOLD's variates do not change.
        """
        return True

    def holds_rest(self, accepted: int, round: int) -> bool:
        """Whether a client needs only ``ServerUpdate.lora`` in ``round``, since it holds the other parts.

        Args:
            accepted: the last round whose upload by this client was accepted.
            round: ``t``.
        """
        return accepted == round - 1

    def whole(self, last: ServerUpdate) -> Coded:
        """The LoRA for clients that need more than ``ServerUpdate.lora``: ``ServerUpdate.model`` by default.

        Args:
            last: ``model``, ``lora`` and ``memory`` of the last round.
        """
        return last.model or last.lora or {}

    def check(self, layers: Mapping[str, Layer], *, partial: bool) -> None:  # noqa: B027 - refuses nothing
        """Raise ``ConfigError``, with the key to change, if options do not fit the federation.

        Args:
            layers: the adapted layers, by name.
            partial: whether clients may miss rounds.
        """

    @property
    def calibration(self) -> Calibration:
        """The batches that ``ClientView.gradients`` and ``ClientView.sketch`` use; none by default."""
        return Calibration()

    def calibration_numbers(self, layer: Layer) -> float:
        """How many numbers a layer's calibration gradient keeps in memory; ``m n`` by default."""
        return layer.m * layer.n

    @property
    def exchanges_gradients(self) -> bool:
        """Whether clients send gradients before every round and receive those that `exchange` returns."""
        return False

    def calibrate(self, client: ClientView) -> Mapping[str, Tensor]:
        """The gradients by layer that a client sends before the round, if the method exchanges gradients."""
        return client.gradients({})

    def exchange(
        self,
        gradients: Sequence[Mapping[str, Tensor]],
        weights: Sequence[float],
        generator: torch.Generator,
    ) -> Sequence[Mapping[str, Tensor]]:
        """The gradients that each client receives before the round, if the method exchanges gradients.

        Args:
            gradients: the gradients of every client, by layer, sorted by client id.
            weights: the clients' numbers of training samples.
            generator: a generator seeded for this round.
        """
        raise NotImplementedError(f"method {self.name!r} exchanges gradients but does not define exchange()")

    # -- two exchanges, for methods of which the server uses sums only

    @property
    def two_exchanges(self) -> bool:
        """Whether clients upload twice in a round, plain tensors of which the server uses the sums only.

        `upload` then returns the first part and what is pending. The server makes `left_factors` from the
        mean of these parts, `second_upload` answers them, and `aggregate_means` replaces `aggregate`.
        """
        return False

    def second_upload(self, left: Mapping[str, Tensor], pending: Update, limit: float = math.inf) -> Upload:
        """A client's second part of a round.

        Args:
            left: the result of `left_factors`, by layer.
            pending: ``Upload.pending`` of the first part.
            limit: numbers whose absolute value is larger arrive as this limit (``privacy.mask_range``). With
                feedback, the client keeps what that loses.
        """
        raise NotImplementedError(f"method {self.name!r} does not upload in two exchanges")

    def left_factors(self, means: Mapping[str, Tensor], server: ServerView) -> Mapping[str, Tensor]:
        """The tensors that all clients of the round receive between the exchanges, by layer.

        Args:
            means: the weighted means of the first parts, by layer.
            server: the server's state.
        """
        raise NotImplementedError(f"method {self.name!r} does not upload in two exchanges")

    def aggregate_means(
        self, left: Mapping[str, Tensor], means: Mapping[str, Tensor], server: ServerView
    ) -> ServerUpdate:
        """The server's update of a round with two exchanges, whose ``merge`` are products with ``B = left``.

        Args:
            left: the result of `left_factors`.
            means: the weighted means of the second parts, by layer.
            server: the server's state.
        """
        raise NotImplementedError(f"method {self.name!r} does not upload in two exchanges")

    def basis(self, memory: Update, right: Products) -> Mapping[str, Tensor]:
        """``Q_t`` of the layers for which a client cannot compute it from the last update.

        Args:
            memory: ``ServerUpdate.memory`` of the last round.
            right: the last update, for a client that holds it; otherwise empty.
        """
        return {}

    def computed_basis(self, name: str, last: LowRank) -> Tensor:
        """``Q_t`` of a layer, computed from the last update by a client that holds it."""
        raise NotImplementedError(f"method {self.name!r} does not upload in two exchanges")

    def unchanged(self, server: ServerView) -> Update:
        """The upload of a client whose training changed nothing; 0 for layers that are missing.

        Client-level privacy clips how far an upload is from it, and asynchronous rounds measure from it how
        an upload of an earlier round changes the model. By default it is the LoRA of the global model, or the
        part of it that is uploaded in this round.

        Args:
            server: the server's state before the round.
        """
        part = self.sends(server.round)
        if part == "product" and not self.traits.averages_factors:
            return server.model
        if part not in ("product", "B", "A"):
            return {}
        held = {name: server.model.get(name) or server.initial(name) for name in server.layers}
        return held if part == "product" else {name: getattr(lora, part) for name, lora in held.items()}

    @property
    def clients_feed_back(self) -> bool:
        """Whether a client adds to its upload what coding and truncating earlier ones lost."""
        return False

    @property
    def feeds_back(self) -> bool:
        """Whether the server adds earlier rounds' truncation errors to a round's mean (error feedback)."""
        return False

    @property
    def no_sample_privacy_reason(self) -> str:
        """Why sample-level privacy does not apply with these options; empty if it does.

        DP-SGD protects what local training learns of a client's rows. All else that a client computes must
        follow from trained parameters, from messages and from public values.
        """
        if not self.traits.global_model:
            return "it has no global model, so its metrics are the clients', which do not leave them"
        if self.calibration.batches:
            return "its start follows from a gradient of the client's rows, which is computed without noise"
        if any(self.sends(round) == "R" for round in (0, 1)):
            return (
                "it trains a matrix between fixed factors, of which Opacus computes no gradient for each row"
            )
        return ""

    def divergence_advice(self) -> Sequence[str]:
        """Changes of options against divergence, such as "a larger method.gamma than 256"."""
        return ()


def energy_share(server_rank: str) -> float:
    """The share in a ``server_rank`` of the form ``energy:SHARE``.

    Raises ``ConfigError`` for another text, and for a share that is not above 0 and at most 1.
    """
    kind, _, number = server_rank.partition(":")
    try:
        share = float(number) if kind == "energy" else math.nan
    except ValueError:
        share = math.nan
    if not 0 < share <= 1:
        raise ConfigError(
            f"method.server_rank = {server_rank!r}: write energy:SHARE with a share above 0 and at most 1, "
            "such as energy:0.95"
        )
    return share
