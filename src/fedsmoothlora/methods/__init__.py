"""The methods, each one file with the same three functions.

``start``
    what a client starts its local training from;
``upload``
    what it sends after training, and what it keeps for its next round;
``aggregate``
    what the server makes of the uploads.

Beside them a file holds ``Options`` (a frozen dataclass: the method's keys in the ``[method]`` section of
a configuration), a docstring whose first line `fedsmoothlora list methods` shows and, where the method is
not like most, its ``TRAITS``. More functions are there where they are needed: ``check(layers, options,
partial)`` raises ``ValueError`` before any training for what the method cannot do, ``sends(round)`` says what
is uploaded where that is not a low-rank product, ``calibrate(client, options)`` and ``exchange(gradients,
weights, generator, options)`` say what clients send ahead of a round and get of each other's. ``FACTS`` is
for the table in docs/methods.md: the numbers that are sent ``down`` per layer and client, as a formula, and
what the method ``cannot`` do. A file in this folder is a method; nothing else needs to be told of it.

All are pure functions of their arguments and work on plain tensors. An ``Update`` maps layer names to
`LowRank` products, or to plain tensors where a method exchanges a single factor or whole weights. The
global weight of a layer is ``W^t + s * model``, with ``W^{t+1} = W^t + s * merge``; ``model`` is the LoRA
that methods which keep one have on top.
"""

from __future__ import annotations

import difflib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor

from fedsmoothlora.lowrank import LowRank
from fedsmoothlora.sketches import Sketch

Update = Mapping[str, LowRank | Tensor]
Products = Mapping[str, LowRank]

# What is trained of a layer: LoRA's factors, or the weight itself.
Part = Literal["B", "A", "W"]
# What is uploaded of a layer.
Sent = Literal["product", "B", "A", "W", "nothing"]

_CPU = torch.device("cpu")


def _no_weights(name: str) -> Tensor:
    raise RuntimeError(f"the pretrained weight of layer {name} is not at hand here")


def _no_lora(name: str) -> LowRank:
    raise RuntimeError(f"the initial LoRA of layer {name} is not at hand here")


def _no_sketches(at: Products, sketches: Mapping[str, Sketch]) -> Mapping[str, Tensor]:
    raise RuntimeError("gradients cannot be sketched here")


class LostStateError(RuntimeError):
    """A client cannot start without what it kept, and that is lost; it sits out until it is sent all."""


@dataclass(frozen=True)
class Layer:
    """One adapted linear layer: weight ``(m, n)`` = (out, in features), LoRA rank, scale ``s``.

    ``gradient_rank`` is the highest rank that its gradient can have: ``min(m, n)``, and one less than the
    classes for the head of a softmax, whose gradient's rows sum to zero.
    """

    name: str
    m: int
    n: int
    rank: int
    scale: float
    gradient_rank: int


@dataclass(frozen=True, kw_only=True)
class Traits:
    """How a method differs from most.

    Attributes:
        averages_factors: the server averages ``B`` and ``A`` apart, so all ranks must be the same.
        client_ranks: clients may have LoRA of different ranks.
        global_model: there is a global model; without one, figures are means of the clients' models.
        shares_head: a head that is trained whole is averaged too, rather than each client's own.
        keeps_upload: what a client keeps is its own last upload, so that its own model can be had.
        step_on: what a federated optimiser at the server steps on: what is merged, the averaged factors, or
            the product of the averaged LoRA; None where none applies.
        no_step_because: why, in that case.
        coordinates_last: what is trained keeps its meaning from round to round, so that SCAFFOLD's control
            variates do too.
        float32_because: why what is sent cannot be coded in fewer bits; empty where it can.
    """

    averages_factors: bool = False
    client_ranks: bool = False
    global_model: bool = True
    shares_head: bool = True
    keeps_upload: bool = False
    step_on: Literal["merge", "factors", "product"] | None = "merge"
    no_step_because: str = ""
    coordinates_last: bool = False
    float32_because: str = ""


@dataclass(frozen=True, kw_only=True)
class ClientView:
    """All that ``start`` may use: what a client knows as round ``round`` begins.

    Attributes:
        round: ``t``, counted from 0.
        rounds: ``T``.
        layers: the adapted layers, by name.
        device: where all tensors below are. Generators are the CPU's, so that every device draws the same.
        server_lora: what the server sent of its LoRA: products, or one factor where the client has the
            other; empty before the first aggregation, and always for methods that merge all they average.
        kept: what ``upload`` returned as ``kept`` in the last round whose upload was accepted; empty for
            a newcomer.
        kept_round: that round, ``tau``; -1 for a newcomer.
        received: sum of the server's merged updates ``S^tau + ... + S^{t-1}``, by layer.
        gradients: ``gradients(at)`` is the calibration gradient ``(m, n)`` of every layer at the weights
            ``W^t + s * at``, on this client's data, without LoRA.
        sketch: ``sketch(at, sketches)`` completes sketches of that gradient, by layer, and returns the
            gradients of the other layers.
        given: gradients by layer that the server sent ahead of the round, for methods that `exchange` them.
        initial: PEFT's initialisation of one layer (``B = 0``, random ``A``), the same for all clients.
        generator: a seeded generator for one layer, this client's own in this round.
        pretrained: the pretrained weight of one layer, ``(m, n)``.
        once: ``once(key, compute)`` computes a value that never changes in a run at its first use only.
    """

    round: int
    rounds: int
    layers: Mapping[str, Layer]
    device: torch.device = _CPU
    server_lora: Update
    kept: Update
    kept_round: int
    received: Products
    gradients: Callable[[Products], Mapping[str, Tensor]]
    initial: Callable[[str], LowRank]
    generator: Callable[[str], torch.Generator]
    sketch: Callable[[Products, Mapping[str, Sketch]], Mapping[str, Tensor]] = _no_sketches
    pretrained: Callable[[str], Tensor] = _no_weights
    once: Callable[[str, Callable[[], LowRank]], LowRank] = lambda key, compute: compute()
    given: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Start:
    """Where local training begins: factors ``lora``, and backbone ``W^t + s * shift``.

    ``trains`` says which parts are trained, the rest is frozen; ``("W",)`` trains the weights themselves,
    without any LoRA. ``figures`` are diagnostics to record, by name; ``notes`` are sentences for the log.
    """

    lora: Products
    shift: Products = field(default_factory=dict)
    trains: Sequence[Part] = ("B", "A")
    figures: Mapping[str, float] = field(default_factory=dict)
    notes: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True)
class Upload:
    """What goes to the server (``sent``) and what the client keeps for its next round (``kept``)."""

    sent: Update
    kept: Update = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class ServerView:
    """All that ``aggregate`` may use beside the uploads.

    Attributes:
        round: ``t``, counted from 0.
        rounds: ``T``.
        layers: the adapted layers, with the server's own rank.
        memory: what the last ``aggregate`` returned as ``memory``; it never leaves the server.
        model: what the last ``aggregate`` returned as ``model``.
        initial, pretrained, once: as in `ClientView`.
        as_sent: a product as clients have it once it was sent down: where its factors are coded on the way,
            what coding leaves of it.
    """

    round: int
    rounds: int
    layers: Mapping[str, Layer]
    memory: Update = field(default_factory=dict)
    model: Products = field(default_factory=dict)
    initial: Callable[[str], LowRank] = _no_lora
    pretrained: Callable[[str], Tensor] = _no_weights
    once: Callable[[str, Callable[[], LowRank]], LowRank] = lambda key, compute: compute()
    as_sent: Callable[[LowRank], LowRank] = lambda product: product


@dataclass(frozen=True, kw_only=True)
class ServerUpdate:
    """What the server makes of a round.

    Attributes:
        merge: goes into the backbone, and down to every client.
        model: the LoRA that the global model has on top of the backbone, and that clients start from.
        lora: what is sent of ``model`` to clients who took part in this round, where that is less: one
            factor. All of ``model`` unless given; others always get all of it. Without a ``model`` it is
            sent to all.
        memory: stays at the server.
        figures: diagnostics to record, by name.
    """

    merge: Update = field(default_factory=dict)
    model: Products = field(default_factory=dict)
    lora: Update | None = None
    memory: Update = field(default_factory=dict)
    figures: Mapping[str, float] = field(default_factory=dict)


_LIKE_MOST = Traits()


@dataclass(frozen=True)
class Method:
    """A method's three functions with its options filled in."""

    name: str
    module: ModuleType
    options: Any

    @property
    def traits(self) -> Traits:
        """How the method differs from most."""
        traits: Traits = getattr(self.module, "TRAITS", _LIKE_MOST)
        return traits

    def sends(self, round: int) -> Sent:
        """What a client uploads of every layer in a round."""
        sent: Sent = self.module.sends(round) if hasattr(self.module, "sends") else "product"
        return sent

    @property
    def calibration_batches(self) -> int:
        """Batches of a client's data that its start reads in every round."""
        reads = getattr(self.options, "gradient_aligned", "none") in ("client", "shared", "shuffled")
        return int(self.options.calibration_batches) if reads else 0

    @property
    def exchanges_gradients(self) -> bool:
        """Whether clients send calibration gradients ahead of every round and get others' back."""
        return hasattr(self.module, "exchange") and bool(self.module.exchanges_gradients(self.options))

    def calibrate(self, client: ClientView) -> Mapping[str, Tensor]:
        """The gradients that ``client`` sends ahead of a round; see the method's file."""
        return self.module.calibrate(client, self.options)

    def exchange(
        self,
        gradients: Sequence[Mapping[str, Tensor]],
        weights: Sequence[float],
        generator: torch.Generator,
    ) -> Sequence[Mapping[str, Tensor]]:
        """What each client gets of the ``gradients`` that all sent ahead; see the method's file."""
        return self.module.exchange(gradients, weights, generator, self.options)

    def check(self, layers: Mapping[str, Layer], *, partial: bool) -> None:
        """Raise ``ValueError``, naming the key to change, for what the method cannot do.

        Args:
            layers: to be adapted.
            partial: whether clients miss rounds.
        """
        if hasattr(self.module, "check"):
            self.module.check(layers, self.options, partial)

    def start(self, client: ClientView) -> Start:
        """What ``client`` starts from; see the method's file."""
        return self.module.start(client, self.options)

    def upload(self, trained: Update, start: Start, client: ClientView) -> Upload:
        """What ``client`` sends after training ``start`` to ``trained``; see the method's file."""
        return self.module.upload(trained, start, client, self.options)

    def aggregate(
        self, uploads: Sequence[Update], weights: Sequence[float], server: ServerView
    ) -> ServerUpdate:
        """What the server makes of ``uploads``, client weights ``p_c``; see the method's file."""
        return self.module.aggregate(uploads, weights, server, self.options)


@cache
def names() -> tuple[str, ...]:
    """The methods there are, alphabetically."""
    return tuple(sorted(module.name for module in pkgutil.iter_modules(__path__)))


def with_trait(trait: str) -> list[str]:
    """Names of the methods that have one of `Traits`, for errors that say what would do."""
    return [name for name in names() if getattr(Method(name, module_of(name), None).traits, trait)]


def module_of(name: str) -> ModuleType:
    """A method's file.

    Raises ``ValueError`` that lists the methods there are.
    """
    if name not in names():
        close = difflib.get_close_matches(name, names(), n=1)
        hint = f"; did you mean {close[0]!r}?" if close else "."
        raise ValueError(f"unknown method {name!r}{hint} There are: {', '.join(names())}")
    return import_module(f"{__name__}.{name}")
