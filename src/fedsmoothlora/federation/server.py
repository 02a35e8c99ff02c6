"""The server's part of a round: messages to clients, aggregation, and the merged update."""

from __future__ import annotations

import math
from collections.abc import Mapping, MutableSequence, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from fedsmoothlora.algebra.averaging import mean_tensor
from fedsmoothlora.algebra.coding import decoded
from fedsmoothlora.algebra.seeds import generator_for
from fedsmoothlora.algebra.update import Coded
from fedsmoothlora.federation import changes
from fedsmoothlora.federation.aggregation import Aggregation, Combined
from fedsmoothlora.federation.catch_up import catch_up
from fedsmoothlora.federation.contributions import Contribution, summed
from fedsmoothlora.federation.devices import SERVER, placed
from fedsmoothlora.federation.initial_state import InitialState
from fedsmoothlora.federation.messages import Message, Reply
from fedsmoothlora.federation.privacy import PrivateMean
from fedsmoothlora.federation.records import Metric
from fedsmoothlora.federation.serialization import products_in, unflatten
from fedsmoothlora.federation.server_changes import ServerChanges
from fedsmoothlora.federation.server_optimizers import ServerOptimizer
from fedsmoothlora.federation.settings import ParticipationSettings, PrivacySettings
from fedsmoothlora.federation.staleness import Baseline, InFlight, rebased
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
        round: the round to come, ``t``.
        updates: ``S^0 ... S^{t-1}``, exactly as merged, in the form in which they are sent.
        initial_state: the state that server and clients share before round 0.
        model: the LoRA of the global model on top of the backbone, if the method keeps one.
        lora: the part of ``model`` that is sent to clients of the last round, if they need only a part.
        memory: ``ServerUpdate.memory`` of the last round.
        aggregation: the rule by which a round's uploads are combined.
        private: the rule in its place with ``privacy.unit = "client"``; None if that is off.
        privacy: ``[privacy]``.
        optimizer: what is done with a round's update before it counts.
        transport: how factors travel; ``updates``, ``model`` and ``lora`` are what clients make of them.
        changes: the changes of the LoRA and the head that are sent with packed transport.
        population: how many clients there are, of whom some take part.
        control: SCAFFOLD's ``c``, by trained parameter; None where that is off.
        last_delta: the last delta of the global weights, over ``s``, where rounds are diagnosed.
        received: by client, how many of ``updates`` it has confirmed.
        accepted: by client, the last round whose upload counted.
        samples: by client, the number of training samples that it first reported.
        oldest: by client, ``accepted`` of the oldest kept checkpoint, from which the server may be restored.
        participation: the weight of uploads that began in earlier rounds.
        in_flight: the clients that train while a round ends, in asynchronous rounds.
        baselines: by round, the model from which clients in flight began.
        epsilons: by client, the last epsilon that it reported, with ``privacy.unit = "sample"``.
        left: ``P_t`` by layer, between the exchanges of a round in a shared subspace.
    """

    method: Method
    layers: Mapping[str, Layer]
    initial_state: InitialState
    rounds: int
    head: dict[str, Tensor]
    experiment: str = ""
    round: int = 0
    updates: MutableSequence[Coded] = field(default_factory=list)
    model: Products = field(default_factory=dict)
    lora: Coded | None = None
    memory: Update = field(default_factory=dict)
    aggregation: Aggregation = field(default_factory=Aggregation)
    private: PrivateMean | None = None
    privacy: PrivacySettings = field(default_factory=PrivacySettings)
    optimizer: ServerOptimizer = field(default_factory=ServerOptimizer)
    transport: Transport = field(default_factory=Transport)
    population: int = 0
    changes: ServerChanges = field(init=False)
    control: dict[str, Tensor] | None = None
    last_delta: Update = field(default_factory=dict)
    received: dict[str, int] = field(default_factory=dict)
    accepted: dict[str, int] = field(default_factory=dict)
    samples: dict[str, int] = field(default_factory=dict)
    oldest: dict[str, int] | None = None
    participation: ParticipationSettings = field(default_factory=ParticipationSettings)
    in_flight: InFlight = field(default_factory=InFlight)
    baselines: dict[int, Baseline] = field(default_factory=dict)
    epsilons: dict[str, float] = field(default_factory=dict)
    left: Mapping[str, Tensor] = field(default_factory=dict, repr=False)
    _sums: dict[tuple[int, int], Coded] = field(default_factory=dict, repr=False)
    _right: tuple[int, Products] = field(default=(-1, {}), repr=False)
    _bases: dict[tuple[int, bool], Mapping[str, Tensor]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self.head = placed(self.head, SERVER)  # a model's own may be on an accelerator
        self.changes = ServerChanges(self.method, self.layers, self.transport)

    def message(self, client: str, attempt: int = 0) -> Message:
        """The message to ``client`` for this round: the updates that it lacks, the LoRA and the head."""
        first = self.received.get(client, 0)
        accepted = self.accepted.get(client, -1)
        changed = self.changes.since(client, accepted, self.round, self._held)
        # Where the head is each client's own, it is sent to newcomers only.
        head = self.head if self.method.traits.shares_head or accepted < 0 else {}
        right = self._last_right() if self._holds_left(client) else {}
        sends_right = bool(right) and first == self.round - 1
        return Message(
            experiment=self.experiment,
            round=self.round,
            attempt=attempt,
            accepted_round=accepted,
            forget_before=accepted if self.oldest is None else self.oldest.get(client, -1),
            first_update=first,
            updates={} if sends_right else self._missed(first),
            basis=self._basis(right),
            right={name: update.A for name, update in right.items()} if sends_right else {},
            lora={} if changed and self._shared_parts else self._lora_for(client, accepted),
            head={} if changed else head,
            changes=changed,
            control=self.control or {},
        )

    def second_message(self, client: str, attempt: int = 0) -> Message:
        """The message of the round's second exchange, with ``P_t`` and without what the first one had."""
        return replace(
            self.message(client, attempt), exchange=1, left=self.left, basis={}, right={}, lora={}, head={}
        )

    def whole_lora(self) -> Coded:
        """All of the LoRA that clients start from, as it is sent."""
        if not self.transport.packs:
            return self.transport.coded(self.model or self.lora or {})
        if self._shared_parts:  # float32, to which changes are added
            return self.model or self.lora or {}
        return self.lora or {}  # packed

    @property
    def _uses_control(self) -> bool:
        """Whether clients change SCAFFOLD's control variates in this round."""
        return self.control is not None and self.method.trains_in(self.round)

    @property
    def _shared_parts(self) -> tuple[str, ...]:
        return changes.shared_parts(self.method)

    def _held(self) -> dict[str, Tensor]:
        """The LoRA and the head that clients hold too, where changes of them are sent."""
        parts, initial = self._shared_parts, self.initial_state.initial
        held: dict[str, Tensor] = {}
        if parts:
            lora: Update = self.model or decoded(self.lora or {})
            held = changes.factors(lora or {name: initial(name) for name in self.layers}, parts)
        return held | (changes.under_head(self.head) if self.method.traits.shares_head else {})

    def _holds_left(self, client: str) -> bool:
        """Whether a client has the last round's ``P``, as all clients of its sum."""
        last = self.round - 1
        return (
            self.method.two_exchanges
            and self.accepted.get(client) == last
            and self.received.get(client, -1) >= last
            and client not in self.changes.behind
        )

    def _last_right(self) -> Products:
        """The last round's update, of which a client of its sum needs the right factors only."""
        if self._right[0] != self.round:
            self._right = self.round, products_in(self.updates[self.round - 1]) if self.round else {}
        return self._right[1]

    def _basis(self, right: Products) -> Mapping[str, Tensor]:
        """``Q_t`` for a client that holds ``right``, of the layers in which it does not compute it itself."""
        if not self.method.two_exchanges:
            return {}
        key = self.round, bool(right)
        if key not in self._bases:
            self._bases = {one: value for one, value in self._bases.items() if one[0] == self.round}
            self._bases[key] = self.method.basis(self.memory, right)
        return self._bases[key]

    def _missed(self, first: int) -> Coded:
        """The sum of updates from ``first`` on: made once a round for all who lack the same, kept on disk."""
        if (first, self.round) not in self._sums:
            missed = (self.updates[t] for t in range(first, self.round))
            self._sums[first, self.round] = memmapped_update(catch_up(missed, self.layers))
        return self._sums[first, self.round]

    def _lora_for(self, client: str, accepted: int) -> Coded:
        """The LoRA for a client: all of it, or the part that a client lacks which holds the rest.

        Without a global LoRA, all clients receive ``lora``.
        """
        if self.transport.packs or self.lora is None:
            return self.whole_lora()
        holds_rest = client not in self.changes.behind and self.method.holds_rest(accepted, self.round)
        if not self.model or holds_rest:
            return self.transport.coded(self.lora)
        last = ServerUpdate(model=self.model, lora=self.lora, memory=self.memory)
        return self.transport.coded(self.method.whole(last))

    def reply_spec(
        self,
        samples: Mapping[str, int],
        attempt: int = 0,
        began: Mapping[str, int] | None = None,
        *,
        exchange: int = 0,
    ) -> ReplySpec:
        """The properties that replies of this round must have.

        Args:
            samples: number of training samples of each client that was asked.
            attempt: how often the round was repeated.
            began: the rounds in which clients began, if that is not this round.
            exchange: 1 for the second exchange of a round in a shared subspace.
        """
        if self.method.two_exchanges:
            return self._contribution_spec(samples, attempt, exchange)
        shares_head = self.method.traits.shares_head
        sent = self.method.sends(self.round)
        packed_parts = changes.sent_parts(self.method, self.round) if self.transport.packs else ()
        products = self.layers if sent == "product" and not packed_parts else {}
        return ReplySpec(
            experiment=self.experiment,
            round=self.round,
            attempt=attempt,
            began=began or {},
            heads={t: one.head for t, one in self.baselines.items()} if shares_head else {},
            clients={client: self.samples.get(client, count) for client, count in samples.items()},
            products={
                name: replace(layer, rank=self.method.upload_rank(layer)) for name, layer in products.items()
            },
            product_bytes=sum(self.transport.product_bytes(layer, layer.rank) for layer in products.values()),
            factors_apart=self.method.traits.averages_factors,
            tensors={
                name: self.method.core_shape(layer) if sent == "R" else _shape(layer, sent)
                for name, layer in self.layers.items()
                if sent in ("B", "A", "R", "W") and not packed_parts
            },
            factors={
                changes.factor_key(name, part): _shape(layer, part)
                for name, layer in self.layers.items()
                for part in packed_parts
            },
            bits=self.transport.bits if self.transport.packs else None,
            head=self.head if shares_head else {},
            control=control_shapes(self.layers, sent, self.head) if self._uses_control else {},
            dtype=self.transport.number,
        )

    def _contribution_spec(self, samples: Mapping[str, int], attempt: int, exchange: int) -> ReplySpec:
        """The first exchange has ``w_c P_c (m, r)``, the second ``w_c R_c (n, r)`` and the head's change."""
        return ReplySpec(
            experiment=self.experiment,
            round=self.round,
            attempt=attempt,
            exchange=exchange,
            weighted=True,
            clients={client: self.samples.get(client, count) for client, count in samples.items()},
            tensors={
                name: (layer.n if exchange else layer.m, layer.rank) for name, layer in self.layers.items()
            },
            head=self.head if exchange and self.method.traits.shares_head else {},
        )

    def summed_shapes(self, exchange: int = 0) -> dict[str, tuple[int, ...]]:
        """The shapes of the tensors of an exchange that are summed under a mask, by name.

        Products are their factors, and the head's are the changes of its tensors.
        """
        spec = self.reply_spec({}, exchange=exchange)
        return {
            **{f"{name}/B": (layer.m, layer.rank) for name, layer in spec.products.items()},
            **{f"{name}/A": (layer.rank, layer.n) for name, layer in spec.products.items()},
            **spec.tensors,
            **{name: tuple(value.shape) for name, value in changes.under_head(spec.head).items()},
        }

    def delivered(self, client: str, round: int | None = None) -> None:
        """Record that the client has replied to its message, so it has all updates until then.

        Args:
            client: the client's id.
            round: the round of the message; this round unless given.
        """
        self.received[client] = self.round if round is None else round

    def unanswered(self, client: str) -> None:
        """The client gave no answer, so the LoRA and the head that it holds may be lost."""
        self.changes.behind.add(client)

    def report_epsilons(self, replies: Sequence[Reply]) -> list[Metric]:
        """Record the epsilons of rows that clients report, and return the largest of all clients so far.

        That of a client which reports none is infinite: nobody knows it.
        """
        if not self.privacy.hides_rows:
            return []
        for reply in replies:
            before = self.epsilons.get(reply.client, 0.0)
            self.epsilons[reply.client] = max(before, reply.metrics.get("epsilon", math.inf))
        found = [Metric(None, "epsilon", max(self.epsilons.values()))] if self.epsilons else []
        return found if self.privacy.seed is None else [*found, Metric(None, "seeded_noise", 1.0)]

    def begin_second_exchange(self, total: Contribution, attempt: int) -> None:
        """Compute ``P_t`` from the sum of the first contributions of a round in a shared subspace."""
        self.left = self.method.left_factors(total.means(), self._view(attempt))

    def _from_sum(self, total: Contribution, attempt: int) -> tuple[ServerUpdate, dict[str, Tensor]]:
        """``S^t`` and the head, from the sum of the second contributions."""
        update = self.method.aggregate_means(self.left, total.means(), self._view(attempt))
        self.left = {}
        return update, total.moved_head(self.head) if self.method.traits.shares_head else {}

    def aggregate(self, replies: Sequence[Reply], total: Contribution | None = None) -> ServerUpdate:
        """Finish the round with the accepted replies: compute and record ``S^t``, and average the head.

        Replies are sorted by client, so that the order of arrival changes no result. Their tensors must be on
        the CPU.

        Args:
            replies: the accepted replies.
            total: the sum of the clients' contributions, with secure aggregation; the replies then hold no
                tensors.

        Raises ``ValueError`` if there is no reply, unless the mean is private.
        """
        replies = sorted(replies, key=lambda reply: reply.client)
        if not replies and self.private is None:
            raise ValueError("a round without replies has no client weights")
        if self.method.two_exchanges:
            total = total or summed(Contribution.of(reply) for reply in replies)
            update, head = self._from_sum(total, replies[0].attempt)
            self._finish(update, head, replies)
            return update
        held = self._held() if self.transport.packs else {}
        view = self._view()
        replies = [self._as_of_now(reply, held, view) for reply in replies]
        shared = self.head if self.method.traits.shares_head else {}
        combined = self._combined(replies, total, view, shared)
        method = self.method
        update = self.optimizer.apply(
            method.aggregate(combined.uploads, combined.weights, view),
            method.traits,
            method.sends(self.round),
            lambda name: self.model[name] if name in self.model else self.initial_state.initial(name),
            None if self.lora is None else decoded(self.lora),
        )
        head = self.optimizer.head(combined.head, self.head) if method.traits.shares_head else {}
        if self.transport.packs:
            update, head = self.changes.broadcast(update, head, held, self.round)
        update = self._as_sent(update)
        update = replace(update, metrics={**update.metrics, **combined.metrics})
        if self.control is not None:
            self.control = self._next_control(replies, combined.weights)
        self._finish(update, head, replies)
        return update

    def _combined(
        self,
        replies: Sequence[Reply],
        total: Contribution | None,
        view: ServerView,
        head: Mapping[str, Tensor],
    ) -> Combined:
        """The uploads that the method aggregates: all, or a single one where only their mean is known."""
        if total is not None and self.private is not None:
            return self.private.combine_sum(total, len(replies), view, head)
        if total is not None:
            return Combined(uploads=[unflatten(total.means())], weights=[1.0], head=total.moved_head(head))
        if self.private is not None:
            return self.private.combine(replies, view, head)
        return self.aggregation.combine(replies, self.layers, head)

    def _finish(self, update: ServerUpdate, head: dict[str, Tensor], replies: Sequence[Reply]) -> None:
        """Record the round's update and head, and whose uploads counted, and go on to the next round."""
        self.updates.append(update.merge)
        self.head = head or self.head
        self.model, self.lora, self.memory = update.model, update.lora, update.memory
        for reply in replies:
            self.accepted[reply.client] = reply.round
            self.samples[reply.client] = reply.samples
            self.changes.behind.discard(reply.client)
        began = {began for _, _, began in self.in_flight.clients}
        self.baselines = {t: one for t, one in self.baselines.items() if t in began}
        self.round += 1
        self._sums.clear()

    def keep_baseline(self) -> None:
        """Keep the model from which clients begin in this round, until all of them have replied."""
        if self.round not in self.baselines:
            self.baselines[self.round] = self._baseline(self._view())

    def _baseline(self, view: ServerView) -> Baseline:
        return Baseline(self.method.unchanged(view), self.head if self.method.traits.shares_head else {})

    def _view(self, attempt: int = 0) -> ServerView:
        return ServerView(
            round=self.round,
            rounds=self.rounds,
            layers=self.layers,
            memory=self.memory,
            model=self.model,
            lora=decoded(self.lora or {}),
            initial=self.initial_state.initial,
            orthonormal=self.initial_state.orthonormal,
            pretrained=lambda name: self.initial_state.pretrained(name).to(SERVER),
            prepared=placed(self.initial_state.prepared, SERVER),
            generator=lambda name, purpose: generator_for(
                self.initial_state.seed, "subspace", purpose, self.round, attempt, name
            ),
            code=self.transport.code,
            packs=self.transport.packs,
            nbytes=self.transport.product_bytes,
        )

    def _as_of_now(self, reply: Reply, held: Mapping[str, Tensor], view: ServerView) -> Reply:
        """The reply as methods read it. One that began in an earlier round makes its change to this model."""
        then = self.baselines[reply.round] if reply.round < self.round else None
        if self.transport.packs:
            parts = self._shared_parts
            began = (
                held if then is None else changes.factors(then.sent, parts) | changes.under_head(then.head)
            )
            reply = self.changes.decoded(reply, began)
        if then is None:
            return reply
        weight = self.participation.weight(self.round - reply.round)
        now = self.baselines.get(self.round) or self._baseline(view)
        return rebased(reply, then, now, weight, apart=self.method.traits.averages_factors)

    def _as_sent(self, update: ServerUpdate) -> ServerUpdate:
        """The update as rounded for clients, so that server and clients continue from the same numbers."""
        transport = self.transport
        merge = transport.coded(update.merge)  # coded, as it is kept and sent: less on disk too
        if transport.packs and self._shared_parts:  # the change was coded
            return replace(update, merge=merge)
        if transport.packs:
            lora = update.lora or transport.coded(update.model)
            return replace(update, merge=merge, model=products_in(decoded(lora)), lora=lora or None)
        return replace(
            update,
            merge=merge,
            model={name: transport.rounded(product) for name, product in update.model.items()},
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
            "R": (layer.rank, layer.rank),
            "W": (layer.m, layer.n),
        }
        names = {part: f"{name}.weight" if part == "W" else f"{name}.lora_{part}" for part in parts}
        for part in ("B", "A") if sent == "product" else (sent,):
            shapes[names[part]] = parts[part]
    return shapes


def _shape(layer: Layer, sent: str) -> tuple[int, int]:
    """The shape of a plain tensor that is uploaded of a layer."""
    return {"B": (layer.m, layer.rank), "A": (layer.rank, layer.n)}.get(sent, (layer.m, layer.n))
