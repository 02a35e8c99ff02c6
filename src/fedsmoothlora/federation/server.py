"""The server's part of a round: messages to clients, aggregation, and the merged update."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, MutableSequence, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from fedsmoothlora.algebra.averaging import mean_tensor
from fedsmoothlora.algebra.lowrank import LowRank
from fedsmoothlora.federation.aggregation import Aggregation
from fedsmoothlora.federation.devices import SERVER, placed
from fedsmoothlora.federation.initial_state import InitialState
from fedsmoothlora.federation.messages import Message, Reply
from fedsmoothlora.federation.server_optimizers import ServerOptimizer
from fedsmoothlora.federation.transport import Transport
from fedsmoothlora.federation.uploads import ReplySpec
from fedsmoothlora.methods import Layer, Method, Products, Sent, ServerUpdate, ServerView, Update
from fedsmoothlora.modeling.memmap import memmapped_update


@dataclass(kw_only=True)
class Server:
    """The server with its state between rounds, on the CPU.

    Attributes:
        method: the federated method, which aggregates.
        layers: the adapted layers, with the server's rank.
        rounds: ``T``, the number of rounds.
        head: the parameters of a fully trained head.
        experiment: the run's identity.
        round: the next round, ``t``.
        updates: ``S^0 ... S^{t-1}``, exactly as merged.
        initial_state: the state that server and clients share before round 0.
        model: the LoRA of the global model on top of the backbone, if the method keeps one.
        lora: the part of ``model`` that is sent to clients of the last round, if they need only a part.
        memory: ``ServerUpdate.memory`` of the last round.
        aggregation: the rule by which a round's uploads are combined.
        optimizer: the server's optimiser, which may change a round's update.
        transport: the number format of sent factors; ``updates``, ``model`` and ``lora`` are rounded to it.
        population: the number of clients of the federation.
        control: SCAFFOLD's ``c``, by trained parameter; None if SCAFFOLD is off.
        last_delta: the last change of the global weights, divided by ``s``, for diagnostics.
        received: by client, the number of ``updates`` that it has confirmed.
        accepted: by client, the last round in which its upload was accepted.
        samples: by client, the number of training samples that it first reported.
        oldest: by client, ``accepted`` of the oldest kept checkpoint, from which the server may be restored.
    """

    method: Method
    layers: Mapping[str, Layer]
    initial_state: InitialState
    rounds: int
    head: dict[str, Tensor]
    experiment: str = ""
    round: int = 0
    updates: MutableSequence[Update] = field(default_factory=list)
    model: Products = field(default_factory=dict)
    lora: Update | None = None
    memory: Update = field(default_factory=dict)
    aggregation: Aggregation = field(default_factory=Aggregation)
    optimizer: ServerOptimizer = field(default_factory=ServerOptimizer)
    transport: Transport = field(default_factory=Transport)
    population: int = 0
    control: dict[str, Tensor] | None = None
    last_delta: Update = field(default_factory=dict)
    received: dict[str, int] = field(default_factory=dict)
    accepted: dict[str, int] = field(default_factory=dict)
    samples: dict[str, int] = field(default_factory=dict)
    oldest: dict[str, int] | None = None
    _sums: dict[tuple[int, int], Update] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self.head = placed(self.head, SERVER)  # a model's own may be on an accelerator

    def message(self, client: str, attempt: int = 0) -> Message:
        """The message to ``client`` for this round: the updates that it lacks, the LoRA and the head."""
        first = self.received.get(client, 0)
        accepted = self.accepted.get(client, -1)
        return Message(
            experiment=self.experiment,
            round=self.round,
            attempt=attempt,
            accepted_round=accepted,
            forget_before=accepted if self.oldest is None else self.oldest.get(client, -1),
            first_update=first,
            updates=self._missed(first),
            lora=self.transport.coded(self._lora_for(accepted)),
            # If every client has its own head, the initial one is sent to new clients only.
            head=self.head if self.method.traits.shares_head or accepted < 0 else {},
            control=self.control or {},
        )

    def _missed(self, first: int) -> Update:
        """The sum of updates from ``first`` on, computed once a round and memory-mapped for all clients."""
        if (first, self.round) not in self._sums:
            missed = (self.updates[t] for t in range(first, self.round))
            self._sums[first, self.round] = memmapped_update(catch_up(missed, self.layers))
        return self._sums[first, self.round]

    def _lora_for(self, accepted: int) -> Update:
        """The LoRA for a client: all of it, or only ``lora`` if the client took part in the last round.

        Without a global LoRA, all clients receive ``lora``.
        """
        if self.lora is None or (self.model and accepted != self.round - 1):
            return self.model
        return self.lora

    def reply_spec(self, samples: Mapping[str, int], attempt: int = 0) -> ReplySpec:
        """The properties that replies of this round must have.

        Args:
            samples: number of training samples of each client that was asked.
            attempt: how often the round was repeated.
        """
        sent = self.method.sends(self.round)
        return ReplySpec(
            experiment=self.experiment,
            round=self.round,
            attempt=attempt,
            clients={client: self.samples.get(client, count) for client, count in samples.items()},
            products=self.layers if sent == "product" else {},
            factors_apart=self.method.traits.averages_factors,
            tensors={name: _shape(layer, sent) for name, layer in self.layers.items() if sent in "BAW"},
            head=self.head if self.method.traits.shares_head else {},
            control={} if self.control is None else control_shapes(self.layers, sent, self.head),
            dtype=self.transport.number,
        )

    def delivered(self, client: str) -> None:
        """Record that the client has replied to its message, so it has all updates so far."""
        self.received[client] = self.round

    def aggregate(self, replies: Sequence[Reply]) -> ServerUpdate:
        """Finish the round with the accepted replies: compute and record ``S^t``, and average the head.

        Replies are sorted by client, so that the order of arrival changes no result. Their tensors must be on
        the CPU.

        Raises ``ValueError`` if there is no reply.
        """
        replies = sorted(replies, key=lambda reply: reply.client)
        if not replies:
            raise ValueError("a round without replies has no client weights")
        shared = self.head if self.method.traits.shares_head else {}
        combined = self.aggregation.combine(replies, self.layers, shared)
        view = ServerView(
            round=self.round,
            rounds=self.rounds,
            layers=self.layers,
            memory=self.memory,
            model=self.model,
            initial=self.initial_state.initial,
            pretrained=lambda name: self.initial_state.pretrained(name).to(SERVER),
            prepared=placed(self.initial_state.prepared, SERVER),
            as_sent=self.transport.product,
        )
        method = self.method
        update = self.optimizer.apply(
            method.aggregate(combined.uploads, combined.weights, view),
            method.traits,
            method.sends(self.round),
            lambda name: self.model[name] if name in self.model else self.initial_state.initial(name),
            self.lora,
        )
        update = self._as_sent(update)
        update = replace(update, metrics={**update.metrics, **combined.metrics})
        if method.traits.shares_head:
            self.head = self.optimizer.head(combined.head, self.head)
        if self.control is not None:
            self.control = self._next_control(replies, combined.weights)
        self.updates.append(update.merge)
        self.model, self.lora, self.memory = update.model, update.lora, update.memory
        for reply in replies:
            self.accepted[reply.client] = self.round
            self.samples[reply.client] = reply.samples
        self.round += 1
        self._sums.clear()
        return update

    def _as_sent(self, update: ServerUpdate) -> ServerUpdate:
        """The update as rounded for clients, so that server and clients continue from the same numbers."""
        transport = self.transport
        return replace(
            update,
            merge=transport.coded(update.merge),  # stored in the format in which it is sent
            model=transport.received(update.model),
            lora=None if update.lora is None else transport.decoded(transport.coded(update.lora)),
        )

    def _next_control(self, replies: Sequence[Reply], counts: Sequence[float]) -> dict[str, Tensor]:
        """``c + |S|/N sum_c p_c (change of c_c)``, the mean of all ``c_c`` if all clients take part."""
        share = len(replies) / max(self.population, len(replies))
        control: dict[str, Tensor] = dict(self.control or {})
        for name in replies[0].control:
            change = mean_tensor([reply.control[name] for reply in replies], counts)
            control[name] = control[name] + share * change if name in control else share * change
        return control


def control_shapes(
    layers: Mapping[str, Layer], sent: Sent, head: Mapping[str, Tensor]
) -> dict[str, tuple[int, ...]]:
    """Shapes of SCAFFOLD's control variates: of every trained parameter, by its name in `AdaptedModel`."""
    shapes: dict[str, tuple[int, ...]] = {name: tuple(value.shape) for name, value in head.items()}
    for name, layer in layers.items():
        parts: dict[str, tuple[int, ...]] = {
            "B": (layer.m, layer.rank),
            "A": (layer.rank, layer.n),
            "W": (layer.m, layer.n),
        }
        names = {"B": f"{name}.lora_B", "A": f"{name}.lora_A", "W": f"{name}.weight"}
        for part in ("B", "A") if sent == "product" else (sent,):
            shapes[names[part]] = parts[part]
    return shapes


def _shape(layer: Layer, sent: Sent) -> tuple[int, int]:
    """The shape of a layer's upload if it is a plain tensor."""
    return {"B": (layer.m, layer.rank), "A": (layer.rank, layer.n)}.get(sent, (layer.m, layer.n))


# Relative singular values up to this are directions that rounding added to a sum.
_ROUNDING = 8 * torch.finfo(torch.float32).eps


def catch_up(updates: Iterable[Update], layers: Mapping[str, Layer]) -> Update:
    """The sum of server updates, for each layer in the smallest of three forms.

    The forms are concatenated factors (``sum of ranks * (m + n)`` numbers), exactly compressed factors
    (``rank of the sum * (m + n)``, float32), and the dense matrix (``m n``, float32). Memory holds one update
    at a time and a few matrices of that size, however many updates there are.
    """
    total: dict[str, LowRank | Tensor] = {}
    terms: Counter[str] = Counter()
    for update in updates:
        for name, value in update.items():
            total[name] = _beside(total[name], value) if name in total else value
            terms[name] += 1
    return {
        name: _smallest(total[name], layer, summed=terms[name] > 1)
        for name, layer in layers.items()
        if name in total
    }


def _beside(total: LowRank | Tensor, value: LowRank | Tensor) -> LowRank | Tensor:
    """The sum of both: dense if one is, otherwise concatenated factors, compressed if there are too many."""
    if isinstance(total, Tensor) or isinstance(value, Tensor):
        one, other = (part.dense() if isinstance(part, LowRank) else part for part in (total, value))
        return one + other
    # Factors keep their own dtype: they are only concatenated, so nothing is rounded.
    dtype = torch.promote_types(total.dtype, value.dtype)
    both = [part.to(dtype=dtype) for part in (total, value)]
    whole = LowRank(torch.cat([part.B for part in both], dim=1), torch.cat([part.A for part in both]))
    return whole.truncate(None, tolerance=_ROUNDING) if whole.rank > 2 * min(whole.shape) else whole


def _smallest(total: LowRank | Tensor, layer: Layer, *, summed: bool) -> LowRank | Tensor:
    """The sum in the form that has the fewest bytes."""
    if isinstance(total, Tensor):
        return total
    forms = [total]
    if summed:  # updates may share directions, or have more of them than the layer
        forms.append(total.truncate(None, tolerance=_ROUNDING))
    smallest = min(forms, key=lambda form: form.nbytes)
    return total.dense() if 4 * layer.m * layer.n < smallest.nbytes else smallest
