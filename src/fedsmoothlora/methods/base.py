"""The interface of a federated method.

Importing this module imports no torch: files of methods import torch, and the formulas that they call, inside
their functions, so that a configuration is read and methods are listed without it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, ClassVar, Literal

from fedsmoothlora.algebra.update import Coded, Layer, Part, Products, Sent, Update

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from fedsmoothlora.algebra.coding import Packed
    from fedsmoothlora.algebra.lowrank import LowRank
    from fedsmoothlora.algebra.sketches import Sketch


# The metric of a client's start that counts the layers whose gradient had too few directions for all of it.
PARTIAL_STARTS = "partial_starts"


@dataclass(frozen=True, kw_only=True)
class Traits:
    """Properties of a method that the rest of the program asks for.

    Attributes:
        averages_factors: the server averages ``B`` and ``A`` apart, so all ranks must be the same.
        client_ranks: clients may have LoRA of different ranks.
        global_model: there is a global model; without one, metrics are means of the clients' models.
        shares_head: a head that is trained whole is averaged too; otherwise each client keeps its own.
        keeps_upload: a client keeps its own last upload, so that its own model can be exported.
        step_on: the quantity that a federated optimiser at the server steps on: the merged update, the
            averaged factors, or the product of the averaged LoRA; None where no optimiser applies.
        no_step_reason: the reason, in that case.
        no_robust_reason: why uploads cannot be combined otherwise than by their weighted mean; empty where
            they can.
        no_coordinates_reason: why uploads cannot be combined by coordinates; empty where they can.
        coordinates_last: trained parameters keep their meaning from round to round, so that SCAFFOLD's
            control variates do too.
        float32_reason: why uploads cannot be sent in fewer bits; empty where they can.
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
    coordinates_last: bool = False
    float32_reason: str = ""


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Batches of a client's training data that its start reads in every round.

    Attributes:
        batches: how many; 0 for methods that need no gradient to start.
        batch_size: rows in each; those of a training batch unless set.
    """

    batches: int = 0
    batch_size: int | None = None


def _uncoded(matrix: LowRank | Tensor, truncated: LowRank) -> LowRank | Packed:
    return truncated


def _no_weights(name: str) -> Tensor:
    raise RuntimeError(f"the pretrained weight of layer {name} is not at hand here")


def _no_lora(name: str) -> LowRank:
    raise RuntimeError(f"the initial LoRA of layer {name} is not at hand here")


def _no_sketches(at: Products, sketches: Mapping[str, Sketch]) -> Mapping[str, Tensor]:
    raise RuntimeError("gradients cannot be sketched here")


@dataclass(frozen=True, kw_only=True)
class ClientView:
    """The state of a client at the beginning of a round, as ``start`` and ``upload`` see it.

    Attributes:
        round: ``t``, counted from 0.
        rounds: ``T``.
        layers: the adapted layers, by name.
        server_lora: the LoRA that the server sent: products, or one factor where the client has the
            other; empty before the first aggregation, and always for methods that merge the whole average.
        kept: ``Upload.kept`` of the last round whose upload was accepted; empty for a newcomer.
        kept_round: that round, ``tau``; -1 for a newcomer.
        received: sum of the server's merged updates ``S^tau + ... + S^{t-1}``, by layer.
        gradients: ``gradients(at)`` is the calibration gradient ``(m, n)`` of every layer at the weights
            ``W^t + s * at``, on this client's data, without LoRA.
        sketch: ``sketch(at, sketches)`` completes sketches of that gradient, by layer, and returns the
            gradients of the other layers.
        given: gradients by layer that the server sent ahead of the round, for methods that exchange them.
        device: the device of all tensors here; None is the CPU. Generators are the CPU's, so that every
            device draws the same.
        initial: PEFT's initialisation of one layer (``B = 0``, random ``A``), the same for all clients.
        generator: a seeded generator for one layer, this client's own in this round.
        pretrained: the pretrained weight of one layer, ``(m, n)``.
        prepared: the result of `Method.prepare`.
        code, packs: as in `ServerView`, for what the client sends.
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
    sketch: Callable[[Products, Mapping[str, Sketch]], Mapping[str, Tensor]] = _no_sketches
    pretrained: Callable[[str], Tensor] = _no_weights
    prepared: Products = field(default_factory=dict)
    given: Mapping[str, Tensor] = field(default_factory=dict)
    device: torch.device | None = None
    code: Callable[[LowRank | Tensor, LowRank], LowRank | Packed] = _uncoded
    packs: bool = False


@dataclass(frozen=True, kw_only=True)
class Start:
    """The start of local training: LoRA factors ``lora``, backbone ``W^t + s * shift``.

    ``trains`` lists the trained parts, all others are frozen; ``("W",)`` trains the weights themselves,
    without LoRA. ``metrics`` are diagnostics to record, by name; ``notes`` are sentences for the log.
    """

    lora: Products
    shift: Products = field(default_factory=dict)
    trains: Sequence[Part] = ("B", "A")
    metrics: Mapping[str, float] = field(default_factory=dict)
    notes: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True)
class Upload:
    """The update that goes to the server (``sent``), and the one that the client keeps (``kept``).

    ``metrics`` are diagnostics to record, by name.
    """

    sent: Coded
    kept: Update = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class ServerView:
    """The state of the server as ``aggregate`` sees it.

    Attributes:
        round: ``t``, counted from 0.
        rounds: ``T``.
        layers: the adapted layers, with the server's own rank.
        memory: ``ServerUpdate.memory`` of the last round; it never leaves the server.
        model: ``ServerUpdate.model`` of the last round.
        initial, pretrained, prepared: as in `ClientView`.
        code: ``code(matrix, truncated)`` is ``truncated = SVD_r(matrix)`` as it will be sent. A method that
            needs what clients receive, for error feedback, puts it into ``merge`` or ``lora`` as it is, and
            reads it with `fedsmoothlora.algebra.coding.unpacked`. All else is coded after ``aggregate``.
        packs: whether products are sent in few bits, as `fedsmoothlora.algebra.coding.Packed`.
    """

    round: int
    rounds: int
    layers: Mapping[str, Layer]
    memory: Update = field(default_factory=dict)
    model: Products = field(default_factory=dict)
    initial: Callable[[str], LowRank] = _no_lora
    pretrained: Callable[[str], Tensor] = _no_weights
    prepared: Products = field(default_factory=dict)
    code: Callable[[LowRank | Tensor, LowRank], LowRank | Packed] = _uncoded
    packs: bool = False


@dataclass(frozen=True, kw_only=True)
class ServerUpdate:
    """The result of aggregating a round.

    Attributes:
        merge: is merged into the backbone, and sent to every client.
        model: the LoRA that the global model has on top of the backbone, and that clients start from.
        lora: the part of ``model`` that is sent to clients of this round, where one factor is enough for
            them. All of ``model`` unless given; other clients always get all of it. Without a ``model``
            it is sent to all clients.
        memory: stays at the server.
        metrics: diagnostics to record, by name.
    """

    merge: Coded = field(default_factory=dict)
    model: Products = field(default_factory=dict)
    lora: Coded | None = None
    memory: Update = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Method(ABC):
    """A federated method; a subclass is one method, and needs no more than ``name`` and ``aggregate``.

    A subclass is a dataclass too, ``@dataclass(frozen=True, kw_only=True)``. Its fields are its options, the
    keys of ``[method]`` in a configuration: values that TOML can hold, with ranges as ``annotated_types``
    (``gamma: Annotated[float, Gt(0)] = 256.0``). Where a key has the name of an attribute of this class, the
    field has another name, and ``field(default=..., metadata={"key": "start"})`` says the key. The first line
    of the class's docstring is shown by `fedsmoothlora list methods`; it names the paper in parentheses.

    Methods are pure: all randomness comes from the generators that they are given. The global weight of a
    layer is ``W^t + s * model``, with ``W^{t+1} = W^t + s * merge`` (`ServerUpdate`).

    Attributes:
        name: by which a configuration names the method.
        traits: properties that the rest of the program asks for.
        numbers_down: numbers that a client is sent per layer in a round, as a formula of ``m``, ``n``, rank
            ``r`` and ``C`` clients, for docs/methods.md; ``/`` stands between even and odd rounds.
        cannot: the method's limitation, for docs/methods.md.
        presets: named settings that ``method.preset`` can choose, if the class has that option: values of
            keys of ``[method]`` and ``[transport]``, by dotted key, for what a configuration leaves out.
    """

    name: ClassVar[str] = ""
    traits: ClassVar[Traits] = Traits()
    numbers_down: ClassVar[str] = ""
    cannot: ClassVar[str] = ""
    presets: ClassVar[Mapping[str, Mapping[str, object]]] = {}

    @classmethod
    def summary(cls) -> str:
        """One line about the method: the first of its docstring."""
        return (cls.__doc__ or "").strip().partition("\n")[0]

    @classmethod
    def option_names(cls) -> dict[str, str]:
        """Names of the fields by their keys in ``[method]``, in order."""
        return {part.metadata.get("key", part.name): part.name for part in fields(cls)}

    def options(self) -> dict[str, object]:
        """Values by their keys in ``[method]``, in order."""
        return {key: getattr(self, name) for key, name in self.option_names().items()}

    # -- the algorithm

    def prepare(self, layers: Mapping[str, Layer], pretrained: Callable[[str], Tensor]) -> Products:
        """Products of the pretrained weights that all rounds use; nothing by default.

        Called once before the first round, and again where a run is resumed and at every Flower site, so it
        must give the same at each call. Clients and server see it as ``prepared``.

        Args:
            layers: the adapted layers, by name.
            pretrained: the pretrained weight of a layer, ``(m, n)``.
        """
        return {}

    def start(self, client: ClientView) -> Start:
        """The start of ``client``'s local training: the server's LoRA, at first PEFT's initialisation."""
        from fedsmoothlora.algebra.averaging import products

        lora = products(client.server_lora) or {name: client.initial(name) for name in client.layers}
        return Start(lora=lora)

    def upload(self, trained: Update, start: Start, client: ClientView) -> Upload:
        """The upload of ``client``: both trained factors.

        Args:
            trained: the trained LoRA of every layer; if the start trains ``W``, the change of the weights
                over ``s``.
            start: from which the client trained.
            client: as ``start`` saw it.
        """
        return Upload(sent=trained)

    @abstractmethod
    def aggregate(
        self, uploads: Sequence[Update], weights: Sequence[float], server: ServerView
    ) -> ServerUpdate:
        """The server's update of a round.

        Args:
            uploads: ``Upload.sent`` of every client whose upload is accepted, sorted by client id.
            weights: numbers of their training samples, to which ``p_c`` is proportional.
            server: the server's state.
        """

    # -- hooks for methods that differ from most

    def sends(self, round: int) -> Sent:
        """The part of every layer that clients upload in ``round``: products by default."""
        return "product"

    def check(self, layers: Mapping[str, Layer], *, partial: bool) -> None:  # noqa: B027 - refuses nothing
        """Raise ``ConfigError`` that names the key to change, for options that do not fit the federation.

        Args:
            layers: the adapted layers, by name.
            partial: whether clients miss rounds.
        """

    @property
    def calibration(self) -> Calibration:
        """The batches that ``ClientView.gradients`` and ``sketch`` read; none by default."""
        return Calibration()

    def calibration_numbers(self, layer: Layer) -> float:
        """Numbers in memory for the calibration gradient of a layer: all ``m n`` by default."""
        return layer.m * layer.n

    @property
    def exchanges_gradients(self) -> bool:
        """Whether clients send gradients ahead of every round and receive those that `exchange` returns."""
        return False

    def calibrate(self, client: ClientView) -> Mapping[str, Tensor]:
        """Gradients by layer that ``client`` sends ahead of the round, if the method exchanges gradients."""
        return client.gradients({})

    def exchange(
        self,
        gradients: Sequence[Mapping[str, Tensor]],
        weights: Sequence[float],
        generator: torch.Generator,
    ) -> Sequence[Mapping[str, Tensor]]:
        """Gradients that each client is given in exchange for its own, if the method exchanges gradients.

        Args:
            gradients: those of every client, by layer, sorted by client id.
            weights: numbers of their training samples.
            generator: seeded for this round.
        """
        raise NotImplementedError(f"method {self.name!r} exchanges gradients and does not say how")

    @property
    def clients_feed_back(self) -> bool:
        """Whether a client adds to its upload what coding and truncating earlier ones lost."""
        return False

    @property
    def feeds_back(self) -> bool:
        """Whether the server adds to a round's average what earlier rounds truncated (error feedback)."""
        return False

    def divergence_advice(self) -> Sequence[str]:
        """Changes of options against divergence, such as "a larger method.gamma than 256"."""
        return ()
