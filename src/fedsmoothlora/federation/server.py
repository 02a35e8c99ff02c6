"""The server's part of a round: messages down, aggregation, and what is merged."""

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
    """Everything the server knows between rounds, on the CPU.

    Attributes:
        method: aggregates.
        layers: the adapted layers, with the server's rank.
        rounds: ``T``.
        head: the global head's parameters where it is trained whole.
        experiment: the run's identity.
        round: the round to come, ``t``.
        updates: ``S^0 ... S^{t-1}``, exactly as merged.
        initial_state: the state that server and clients share before round 0.
        model: the LoRA that the global model has on top of the backbone, where the method keeps one.
        lora: what clients of the last round are sent of it, where that is less.
        memory: what ``aggregate`` keeps for itself.
        aggregation: the rule by which a round's uploads are combined.
        optimizer: what is done with a round's update before it counts.
        transport: how factors travel; ``updates``, ``model`` and ``lora`` are what clients make of them.
        population: how many clients there are, of whom some take part.
        control: SCAFFOLD's ``c``, by trained parameter; None where that is off.
        last_delta: the last delta of the global weights, over ``s``, where rounds are diagnosed.
        received: by client, how many of ``updates`` it has confirmed.
        accepted: by client, the last round whose upload counted.
        samples: by client, the number of training samples that it first reported.
        oldest: by client, ``accepted`` as the oldest kept checkpoint has it: how far back the server may go.
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
        """The message with which ``client`` begins this round: the updates it lacks, the LoRA, the head."""
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
            # Where the head is each client's own, it is sent to newcomers only.
            head=self.head if self.method.traits.shares_head or accepted < 0 else {},
            control=self.control or {},
        )

    def _missed(self, first: int) -> Update:
        """The sum of updates from ``first`` on: made once a round for all who lack the same, kept on disk."""
        if (first, self.round) not in self._sums:
            missed = (self.updates[t] for t in range(first, self.round))
            self._sums[first, self.round] = memmapped_update(catch_up(missed, self.layers))
        return self._sums[first, self.round]

    def _lora_for(self, accepted: int) -> Update:
        """The LoRA for a client: all of it, or the one factor that a client of the last round lacks.

        Where there is no global LoRA to send in its place, what is sent is the same for all.
        """
        if self.lora is None or (self.model and accepted != self.round - 1):
            return self.model
        return self.lora

    def reply_spec(self, samples: Mapping[str, int], attempt: int = 0) -> ReplySpec:
        """The properties that replies of this round must have.

        Args:
            samples: the clients that were asked, with their numbers of training samples.
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
        """The client has answered its message, so it holds all updates so far."""
        self.received[client] = self.round

    def aggregate(self, replies: Sequence[Reply]) -> ServerUpdate:
        """Close the round with the accepted replies: ``S^t`` is recorded, the head averaged.

        Replies are put in client order first, so that the order of arrival changes nothing. Their tensors
        are on the CPU, as those of a file are.

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
        """The update as clients decode it, so that server and clients continue from the same numbers."""
        transport = self.transport
        return replace(
            update,
            merge=transport.coded(update.merge),  # coded, as it is kept and sent: half the bytes on disk too
            model=transport.received(update.model),
            lora=None if update.lora is None else transport.decoded(transport.coded(update.lora)),
        )

    def _next_control(self, replies: Sequence[Reply], counts: Sequence[float]) -> dict[str, Tensor]:
        """``c + |S|/N sum_c p_c (change of c_c)``: if all clients take part, the mean of their ``c_c``."""
        share = len(replies) / max(self.population, len(replies))
        control: dict[str, Tensor] = dict(self.control or {})
        for name in replies[0].control:
            change = mean_tensor([reply.control[name] for reply in replies], counts)
            control[name] = control[name] + share * change if name in control else share * change
        return control


def control_shapes(
    layers: Mapping[str, Layer], sent: Sent, head: Mapping[str, Tensor]
) -> dict[str, tuple[int, ...]]:
    """Shapes of SCAFFOLD's control variates: of all that is trained, by the names of `AdaptedModel`."""
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
    """The shape of a plain tensor that is uploaded of a layer."""
    return {"B": (layer.m, layer.rank), "A": (layer.rank, layer.n)}.get(sent, (layer.m, layer.n))


# Directions that rounding made of a sum, relative to its first singular value.
_ROUNDING = 8 * torch.finfo(torch.float32).eps


def catch_up(updates: Iterable[Update], layers: Mapping[str, Layer]) -> Update:
    """The sum of server updates in the smallest of three forms, layer by layer.

    As they are (their factors side by side: ``sum of ranks * (m + n)`` numbers), exactly compressed
    (``rank of the sum * (m + n)``, float32), or dense (``m n``, float32). One update is in memory at a time,
    and of the sum no more than a few such matrices, however many there are.
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
    """The sum of both: dense where one is, else factors side by side, compressed where they outgrow it."""
    if isinstance(total, Tensor) or isinstance(value, Tensor):
        one, other = (part.dense() if isinstance(part, LowRank) else part for part in (total, value))
        return one + other
    # In their own dtype: nothing is computed, so nothing is rounded.
    dtype = torch.promote_types(total.dtype, value.dtype)
    both = [part.to(dtype=dtype) for part in (total, value)]
    whole = LowRank(torch.cat([part.B for part in both], dim=1), torch.cat([part.A for part in both]))
    return whole.truncate(None, tolerance=_ROUNDING) if whole.rank > 2 * min(whole.shape) else whole


def _smallest(total: LowRank | Tensor, layer: Layer, *, summed: bool) -> LowRank | Tensor:
    """The form of a sum that has the fewest bytes."""
    if isinstance(total, Tensor):
        return total
    forms = [total]
    if summed:  # updates have directions in common, or more of them than the layer has
        forms.append(total.truncate(None, tolerance=_ROUNDING))
    smallest = min(forms, key=lambda form: form.nbytes)
    return total.dense() if 4 * layer.m * layer.n < smallest.nbytes else smallest
