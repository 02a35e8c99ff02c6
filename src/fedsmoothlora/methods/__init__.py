"""The methods, each one file with the same three functions.

``start``
    what a client starts its local training from;
``upload``
    what it sends after training, and what it keeps for its next round;
``aggregate``
    what the server makes of the uploads.

Beside them a file holds ``Options`` (a frozen dataclass: the method's keys in the ``[method]`` section of
a configuration) and a docstring whose first line `fedsmoothlora list methods` shows. Where a method cannot
adapt every layer, its file also has ``check(layers, options)``, which raises ``ValueError`` before any
training, and where the server averages factors apart, ``AVERAGES_FACTORS = True``. A file in this folder
is a method; nothing else needs to be told of it.

All three are pure functions of their arguments and work on plain tensors. An ``Update`` maps layer names
to `LowRank` products, or to plain tensors where a method exchanges a single factor or whole weights. The
global weight of a layer is ``W^t + s * (server.lora)``, with ``W^{t+1} = W^t + s * merge``.
"""

from __future__ import annotations

import difflib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fedsmoothlora.lowrank import LowRank

Update = Mapping[str, LowRank | Tensor]
Products = Mapping[str, LowRank]


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
class ClientView:
    """All that ``start`` may use: what a client knows as round ``round`` begins.

    Attributes:
        round: ``t``, counted from 0.
        rounds: ``T``.
        layers: the adapted layers, by name.
        server_lora: the LoRA that the server sent; empty before the first aggregation, and always for
            methods that merge all they average.
        kept: what ``upload`` returned as ``kept`` in the last round whose upload was accepted; empty for
            a newcomer.
        kept_round: that round, ``tau``; -1 for a newcomer.
        received: sum of the server's merged updates ``S^tau + ... + S^{t-1}``, by layer.
        gradients: ``gradients(at)`` is the calibration gradient ``(m, n)`` of every layer at the weights
            ``W^t + s * at``, on this client's data, without LoRA.
        initial: PEFT's initialisation of one layer (``B = 0``, random ``A``), the same for all clients.
        generator: a seeded generator for one layer, this client's own in this round.
    """

    round: int
    rounds: int
    layers: Mapping[str, Layer]
    server_lora: Products
    kept: Update
    kept_round: int
    received: Products
    gradients: Callable[[Products], Mapping[str, Tensor]]
    initial: Callable[[str], LowRank]
    generator: Callable[[str], torch.Generator]


@dataclass(frozen=True, kw_only=True)
class Start:
    """Where local training begins: factors ``lora``, and backbone ``W^t + s * shift``.

    ``figures`` are diagnostics to record, by name; ``notes`` are sentences for the log.
    """

    lora: Products
    shift: Products = field(default_factory=dict)
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
    """

    round: int
    rounds: int
    layers: Mapping[str, Layer]
    memory: Update = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class ServerUpdate:
    """What the server makes of a round: ``merge`` goes into the backbone, ``lora`` is the next LoRA of all.

    Both are sent down; ``memory`` stays at the server.
    """

    merge: Products = field(default_factory=dict)
    lora: Products = field(default_factory=dict)
    memory: Update = field(default_factory=dict)
    figures: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Method:
    """A method's three functions with its options filled in."""

    name: str
    module: ModuleType
    options: Any

    @property
    def averages_factors(self) -> bool:
        """Whether the server averages ``B`` and ``A`` apart (``AVERAGES_FACTORS`` in the method's file)."""
        return bool(getattr(self.module, "AVERAGES_FACTORS", False))

    def check(self, layers: Mapping[str, Layer]) -> None:
        """Raise ``ValueError``, naming the layer and the key to change, if the method cannot adapt one."""
        if hasattr(self.module, "check"):
            self.module.check(layers, self.options)

    def start(self, client: ClientView) -> Start:
        """What ``client`` starts from; see the method's file."""
        return self.module.start(client, self.options)

    def upload(self, trained: Products, start: Start, client: ClientView) -> Upload:
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


def module_of(name: str) -> ModuleType:
    """A method's file.

    Raises ``ValueError`` that lists the methods there are.
    """
    if name not in names():
        close = difflib.get_close_matches(name, names(), n=1)
        hint = f"; did you mean {close[0]!r}?" if close else "."
        raise ValueError(f"unknown method {name!r}{hint} There are: {', '.join(names())}")
    return import_module(f"{__name__}.{name}")
