"""One client's part of a round: from the server's message to its reply (steps 1 to 6 of the method)."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property, partial

from accelerate import Accelerator
from torch import Tensor, nn

from fedsmoothlora.algebra.coding import decoded
from fedsmoothlora.algebra.lowrank import LowRank, with_core
from fedsmoothlora.algebra.schedules import learning_rate_at
from fedsmoothlora.callbacks import Callback
from fedsmoothlora.data.examples import Examples, labels_of
from fedsmoothlora.errors import DivergedError, NotFiniteError
from fedsmoothlora.federation import changes, two_exchanges
from fedsmoothlora.federation.accounting import Ledger, MemoryLedger
from fedsmoothlora.federation.client_changes import ClientChanges
from fedsmoothlora.federation.client_loss import ClientLoss
from fedsmoothlora.federation.client_round import ClientRound
from fedsmoothlora.federation.client_state import ClientState, kept_under, under
from fedsmoothlora.federation.client_views import ClientViews
from fedsmoothlora.federation.contributions import weighted
from fedsmoothlora.federation.devices import SERVER, placed
from fedsmoothlora.federation.initial_state import InitialState
from fedsmoothlora.federation.messages import Message, Reply
from fedsmoothlora.federation.personal import GlobalModel, PersonalTraining
from fedsmoothlora.federation.personal_client import PersonalClient
from fedsmoothlora.federation.privacy import clipped_change
from fedsmoothlora.federation.probe import Probe
from fedsmoothlora.federation.sample_privacy import SamplePrivacy
from fedsmoothlora.federation.settings import PersonalSettings, PrivacySettings
from fedsmoothlora.federation.transport import Transport
from fedsmoothlora.federation.visit import Visit
from fedsmoothlora.methods import ClientView, Coded, Method, Products, Start, Update, Upload
from fedsmoothlora.modeling.adapters import AdaptedModel
from fedsmoothlora.tasks.objectives import Objective
from fedsmoothlora.tasks.objectives.class_weights import WeighsClasses
from fedsmoothlora.training.corrections import ControlVariates, Correction, proximal
from fedsmoothlora.training.local import Found, LocalTraining, Trained, Visiting
from fedsmoothlora.training.loop import checkpointing, train
from fedsmoothlora.training.private import train_privately
from fedsmoothlora.training.settings import TrainingSettings

# Before the names of SCAFFOLD's control variates in a client's state.
_CONTROL = "control:"


@dataclass(frozen=True, kw_only=True)
class Learner:
    """The model, method, objective and settings with which clients train. Clients use one learner in turn.

    Attributes:
        initial_state: the state that server and clients share before round 0; it has the run's seed.
        ranks: LoRA ranks by client, if they differ.
        transport: the number format of sent factors.
        diagnoses: whether clients also record diagnostics (``evaluation.diagnostics``).
        privacy: ``[privacy]``. With it, nothing but the upload leaves a client: no metric, no number of
            samples, no progress and no note. With ``unit = "sample"`` its epsilon leaves it too, and its
            number of samples if they are public.
        personal: ``[personal]``.
    """

    model: AdaptedModel
    method: Method
    objective: Objective
    training: TrainingSettings
    accelerator: Accelerator
    initial_state: InitialState
    ranks: Mapping[str, int] = field(default_factory=dict)
    transport: Transport = field(default_factory=Transport)
    diagnoses: bool = False
    privacy: PrivacySettings = field(default_factory=PrivacySettings)
    personal: PersonalSettings = field(default_factory=PersonalSettings)

    @cached_property
    def changes(self) -> ClientChanges:
        """The changes of the LoRA and the head that are sent with packed transport."""
        clip_norm = self.privacy.clip_norm if self.privacy.hides_clients else None
        return ClientChanges(self.method, self.transport, clip_norm)

    @cached_property
    def loss(self) -> ClientLoss:
        """The loss that clients minimise."""
        return ClientLoss(
            model=self.model.model,
            objective=self.objective,
            training=self.training,
            accelerator=self.accelerator,
        )

    @cached_property
    def _views(self) -> ClientViews:
        return ClientViews(
            model=self.model,
            method=self.method,
            loss=self.loss,
            training=self.training,
            accelerator=self.accelerator,
            initial_state=self.initial_state,
            transport=self.transport,
            changes=self.changes,
            ranks=self.ranks,
            calibrates=not self.privacy.hides_rows,
        )

    @property
    def _probe(self) -> Probe:
        seed = self.initial_state.seed
        return Probe(model=self.model, loss=self.loss, training=self.training, seed=seed)

    def calibrate(
        self, client: str, data: Examples, message: Message, state: ClientState, callback: Callback
    ) -> Mapping[str, Tensor]:
        """The gradients that a client sends before a round, if its method exchanges gradients.

        Raises ``DivergedError`` as `visit` does.
        """
        learner = self.for_rows(data)
        view, held = learner._views.of(self._round(client, data, message, state, callback))
        self.model.load_head(self._head_for(view, message, held))
        with _diverging("its gradient"):
            return self.method.calibrate(view)

    def visit(
        self,
        client: str,
        data: Examples,
        message: Message,
        state: ClientState,
        callback: Callback,
        ledger: Ledger | None = None,
    ) -> Visit:
        """Run one client's round; arguments, result and errors are those of `visiting`."""
        return self.alone(self.visiting(client, data, message, state, callback, ledger))

    def alone(self, visiting: Visiting[Found]) -> Found:
        """Run a client's round to its end, and train the client by itself."""
        try:
            wanted = next(visiting)
            try:
                trained = self._train(wanted)
            except BaseException as error:
                visiting.throw(error)
                raise
            visiting.send(trained)
        except StopIteration as end:
            found: Found = end.value
            return found
        raise RuntimeError("a client trains once in a round")

    def visiting(
        self,
        client: str,
        data: Examples,
        message: Message,
        state: ClientState,
        callback: Callback,
        ledger: Ledger | None = None,
    ) -> Visiting[Visit]:
        """One client's round, which pauses where the client trains. The backbone must hold ``W^t``.

        It yields the local training, and goes on when it is sent the result. Other clients may be visited in
        between (`fedsmoothlora.federation.engines.batched`).

        Args:
            client: the client's id.
            data: the client's training rows.
            message: the server's message.
            state: the state that the client kept; ``ClientState()`` in its first round.
            callback: notified of every step.
            ledger: what the client has released, with ``privacy.unit = "sample"``; nothing unless given.

        Returns:
            The reply, the state to keep, and the start.

        Raises:
            DivergedError: the loss or weights are not finite.
            LostStateError: the client's state is lost, and the method cannot start without it.
            SpentBudgetError: the client's training would pass ``privacy.target_epsilon``.
        """
        learner = self.for_rows(data)
        if not self.privacy.uploads_only:
            return (yield from learner._visiting(self._round(client, data, message, state, callback)))
        private = self._sample_privacy(client, data, message, ledger or MemoryLedger())
        metrics = private.metrics(private.spend(message)) if private else {}
        silent = self._round(client, data, message, state, Callback())
        visit = yield from learner._visiting(silent, private)
        samples = 1 if self.privacy.hides_counts else visit.reply.samples
        return replace(visit, reply=replace(visit.reply, samples=samples, metrics=metrics))

    def _sample_privacy(
        self, client: str, data: Examples, message: Message, ledger: Ledger
    ) -> SamplePrivacy | None:
        """DP-SGD of the client in this round; None with another unit, and in rounds without training."""
        if not self.privacy.hides_rows or not self.method.trains_in(message.round):
            return None
        return SamplePrivacy(
            settings=self.privacy,
            training=self.training,
            client=client,
            rows=len(data),
            steps=self.training.steps_for(len(data)),
            ledger=ledger,
        )

    def for_rows(self, data: Examples) -> Learner:
        """The learner with the class weights of a client that has these training rows, if any are set."""
        weights = self.training.class_weights
        if weights is None:
            return self
        assert isinstance(self.objective, WeighsClasses)  # checked when the federation was assembled
        return replace(self, objective=self.objective.weighted(labels_of(data), weights))

    def personal_client(self, client: str, data: Examples) -> PersonalClient:
        """The client with its personal model (Ditto); the model is at the client's rank."""
        loss, layers = self.for_rows(data).loss, self.model.layers
        if self.ranks:
            self.model.use_rank(self.ranks[client])
            layers = self.model.layers_at(self.ranks[client])
        return PersonalClient(
            client=client,
            data=data,
            settings=self.personal,
            steps=self._steps(data),
            trains=PersonalTraining(
                model=self.model,
                loss=loss,
                split=loss.split,
                training=self.training,
                accelerator=self.accelerator,
                seed=self.initial_state.seed,
                initial=lambda name: self.initial_state.initial(name, layers[name].rank),
            ),
        )

    def _round(
        self, client: str, data: Examples, message: Message, state: ClientState, callback: Callback
    ) -> ClientRound:
        return ClientRound(
            client=client,
            data=data,
            message=message,
            state=state.after(message),
            callback=callback,
            run_seed=self.initial_state.seed,
        )

    def _visiting(self, at: ClientRound, private: SamplePrivacy | None = None) -> Visiting[Visit]:
        message, trains = at.message, self.method.trains_in(at.message.round)
        steps = self._steps(at.data) if trains else 0
        at.callback.on_client_begin(at.client, steps)
        began = time.perf_counter()
        view, held = self._views.of(at)
        head = self._head_for(view, message, held)
        start = self._start(view, head)  # steps 1 to 4
        started = time.perf_counter()
        metrics = dict(start.metrics)
        if self.diagnoses:
            metrics.update(self._probe.at_start(start, at.client, at.data))

        lr = learning_rate_at(message.round, self.training.rounds, self.training.lr, self.training.lr_min)
        control = self._control(view, message) if trains else None
        training_begins = time.perf_counter()
        if private is None:
            trained = yield self._local_training(at, start, head, steps, lr, control)  # step 5
            self._continue_from(at.client, start, trained)
        else:
            trained = self._train_privately(at, start, lr, control, private)
        trained_at = time.perf_counter()

        with _diverging("its upload"):
            upload = self.method.upload(self._trained(start) if trains else {}, start, view)  # step 6
            sent, sent_head, left = self._sent(at, view, start, upload, head, held)
        own_control, control_change = control.after(steps, lr) if control else ({}, {})
        uploaded = time.perf_counter()
        if self.diagnoses:
            metrics["loss_at_end"] = self._probe.mean_loss(at.client, at.data, with_lora=bool(start.lora))
            metrics["seconds_diagnosis"] = training_begins - started + time.perf_counter() - uploaded
        for note in start.notes:
            at.note(note)
        reply = Reply(
            client=at.client,
            experiment=message.experiment,
            round=message.round,
            attempt=message.attempt,
            samples=len(at.data),
            sent=sent,
            head=sent_head,
            control=control_change,
            metrics={
                **metrics,
                **upload.metrics,
                **_train_loss(trained.losses),
                "seconds_start": started - began,
                "seconds_training": trained.seconds,
                "seconds_upload": uploaded - trained_at,
            },
        )
        return Visit(
            reply=reply,
            state=at.state.with_upload(message.round, {**self._kept(upload, own_control), **left}),
            start=_relative(start) if self.diagnoses else {},
            # Of methods that keep a LoRA at the server, the start is the global model.
            at=GlobalModel(lora=_relative(start) if view.server_lora else {}, head=head)
            if self.personal.on and trains
            else None,
        )

    def _start(self, view: ClientView, head: Mapping[str, Tensor]) -> Start:
        """The method's start on the model's device; the model is at that start, with this head."""
        model, device = self.model, self.accelerator.device
        model.load_head(head)
        with _diverging("its start"):
            start = self.method.start(view)
        start = replace(
            start,
            lora=placed(start.lora, device),
            cores=placed(start.cores, device),
            shift=placed(start.shift, device),
            gradients=placed(start.gradients, device),
        )
        model.backbone.set_shift(start.shift)
        if start.lora:
            model.load_lora(start.lora, start.cores)
        model.train_only(start.trains)
        return start

    def _local_training(
        self,
        at: ClientRound,
        start: Start,
        head: Mapping[str, Tensor],
        steps: int,
        lr: float,
        control: ControlVariates | None,
    ) -> LocalTraining:
        return LocalTraining(
            start=start,
            head=head,
            steps=steps,
            batches=at.batches(steps, "training", self.training.batch_size),
            loss=self.loss.of,
            split=self.loss.split,
            lr=lr,
            seed=at.seed("dropout"),
            corrections=partial(self._corrections, control),
            on_step=lambda loss: at.callback.on_client_step(at.client, loss),
        )

    def _train_privately(
        self,
        at: ClientRound,
        start: Start,
        lr: float,
        control: ControlVariates | None,
        private: SamplePrivacy,
    ) -> Trained:
        """Train the model by DP-SGD. No loss is returned, because losses would tell something of the rows."""
        began = time.perf_counter()
        with self._training_model(start):
            train_privately(
                self.model.model,
                at.data,
                private.batches(at.message),
                self.loss.of_rows,
                self.training,
                private.mechanism(at.message),
                lr=lr,
                accelerator=self.accelerator,
                seed=at.seed("dropout"),
                head=self.model.head_parameters(),
                corrections=self._corrections(control, self.model.trained_parameters()),
            )
        return Trained(losses=[], seconds=time.perf_counter() - began)

    @contextmanager
    def _training_model(self, start: Start) -> Iterator[None]:
        """The model as clients with this start train it."""
        with (
            nullcontext() if start.lora else self.model.without_lora(),
            checkpointing(self.model.model, self.training),
            self.model.calls_for_training(),
        ):
            yield

    def _train(self, wanted: LocalTraining) -> Trained:
        """Train the model, which is at the client's start."""
        began = time.perf_counter()
        with self._training_model(wanted.start):
            losses = train(
                self.model.model,
                wanted.batches,
                partial(wanted.loss, self.model.model),
                self.training,
                lr=wanted.lr,
                accelerator=self.accelerator,
                seed=wanted.seed,
                split=wanted.split,
                head=self.model.head_parameters(),
                corrections=wanted.corrections(self.model.trained_parameters()),
                first=self.model.at_factors(wanted.start.gradients),
                on_step=wanted.on_step,
            )
        return Trained(losses=losses, seconds=time.perf_counter() - began)

    def _continue_from(self, client: str, start: Start, trained: Trained) -> None:
        """Make the model the client's trained one, if the client was trained beside the model."""
        if trained.head is None:
            return
        if self.ranks:
            self.model.use_rank(self.ranks[client])
        self.model.backbone.set_shift(start.shift)
        if start.lora:
            self.model.load_lora(trained.lora)
        self.model.load_head(trained.head)
        self.model.train_only(start.trains)

    def _sent(
        self,
        at: ClientRound,
        view: ClientView,
        start: Start,
        upload: Upload,
        head_before: Mapping[str, Tensor],
        held: Mapping[str, Tensor],
    ) -> tuple[Coded, dict[str, Tensor], Update]:
        """The upload and the head as they are sent, and the part of the client's state that this leaves."""
        head = self.model.head() if self.method.traits.shares_head else {}
        sent, head, left = self.changes.coded(upload, head, view, held)
        if self.privacy.clips_at_clients:
            part, clip_norm = self.method.sends(at.message.round), self.privacy.first_clip_norm
            sent, head = clipped_change(decoded(sent), head, start.lora, head_before, part, clip_norm)
        if not self.method.two_exchanges:
            return sent, head, left
        pending = two_exchanges.pending(upload.pending, head, head_before, at.message.attempt)
        sent, head = self._contribution(sent, {}, at.data)
        return sent, head, {**left, **pending}

    def answer_second(self, client: str, data: Examples, message: Message, state: ClientState) -> Visit:
        """A client's second exchange in a round, after `visit`, for methods with two exchanges.

        Raises:
            DivergedError: the upload is not finite.
            LostStateError: what the first exchange left is lost.
        """
        pending, moved_head = two_exchanges.pending_in(state, message)
        began = time.perf_counter()
        device = self.accelerator.device
        with _diverging("its second upload"):
            limit = self.privacy.mask_range if self.privacy.secure_aggregation else math.inf
            upload = self.method.second_upload(placed(message.left, device), placed(pending, device), limit)
        sent, head = self._contribution(upload.sent, moved_head, data)
        reply = Reply(
            client=client,
            experiment=message.experiment,
            round=message.round,
            attempt=message.attempt,
            exchange=message.exchange,
            samples=self._weight(data),
            sent=sent,
            head=head,
            metrics={}
            if self.privacy.uploads_only
            else {**upload.metrics, "seconds_second_upload": time.perf_counter() - began},
        )
        kept = {
            **state.uploads[message.round],
            **placed(upload.kept, SERVER),
            **two_exchanges.left_of(message),
        }
        return Visit(reply=reply, state=state.with_upload(message.round, kept))

    def _weight(self, data: Examples) -> int:
        """The client's weight, as the server learns it; 1 under a mask, which weighs by itself."""
        return 1 if self.privacy.hides_counts or self.privacy.secure_aggregation else len(data)

    def _contribution(
        self, sent: Coded, head: Mapping[str, Tensor], data: Examples
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Plain tensors and the head's change, multiplied by the client's weight."""
        weight, tensors = self._weight(data), {n: v for n, v in sent.items() if isinstance(v, Tensor)}
        return weighted(tensors, weight), weighted(head, weight)

    def _steps(self, data: Examples) -> int:
        """The steps of local training in a round."""
        return self.training.steps_for(len(data), self.method.calibration.batches)

    def _head_for(self, view: ClientView, message: Message, held: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The head at the start of the round: the server's, or the client's own if heads are not shared."""
        return changes.head_of(held) or dict(message.head) or self._own_head(view)

    def _kept(self, upload: Upload, control: Mapping[str, Tensor]) -> Update:
        """The method's state for the next round, with head and control variates if they are used."""
        traits = self.method.traits
        keeps_head = traits.keeps_upload or not traits.shares_head
        return {
            **upload.kept,
            **(self.model.head() if keeps_head else {}),
            **under(_CONTROL, control),
        }

    def _control(self, view: ClientView, message: Message) -> ControlVariates | None:
        """SCAFFOLD's control variates, which are 0 in a client's first round; None if SCAFFOLD is off."""
        if not self.training.scaffold:
            return None
        own = kept_under(_CONTROL, view.kept)
        return ControlVariates(self.model.trained_parameters(), message.control, own)

    def _corrections(
        self, control: ControlVariates | None, parameters: Mapping[str, nn.Parameter]
    ) -> list[Correction]:
        """The corrections of every gradient of these parameters by federated optimisers."""
        found = [] if control is None else [control.correct]
        if self.training.proximal_mu:
            found.append(proximal(parameters.values(), self.training.proximal_mu))
        return found

    def _own_head(self, view: ClientView) -> dict[str, Tensor]:
        """The client's own head if heads are not shared; the initial head if the client has kept none."""
        head = dict(self.initial_state.head)
        for name in head:
            value = view.kept.get(name)
            if isinstance(value, Tensor):
                head[name] = value
        return head

    def _trained(self, start: Start) -> Update:
        """The trained LoRA of every layer, or the change of the layer's weight."""
        if "R" in start.trains:
            return self.model.cores()
        if "W" not in start.trains:
            return self.model.lora()
        backbone = self.model.backbone
        return {name: backbone.delta(name, start.shift.get(name)) for name in self.model.layers}


def _relative(start: Start) -> Products:
    """The start of local training relative to ``W^t``, divided by ``s``: ``lora + shift``."""
    if not start.lora:
        return start.shift
    found = {}
    for name, product in start.lora.items():
        if name in start.cores:
            product = LowRank(product.B, with_core(start.cores[name], product.A))
        found[name] = product + start.shift[name] if name in start.shift else product
    return found


def _train_loss(losses: Sequence[float]) -> dict[str, float]:
    """The metrics of the training loss; none for a round that does not train."""
    if not losses:
        return {}
    return {
        "train_loss": sum(losses) / len(losses),
        "train_loss_first": losses[0],
        "train_loss_last": losses[-1],
    }


@contextmanager
def _diverging(what: str) -> Iterator[None]:
    """Raise ``DivergedError`` if the product of finite factors overflows."""
    try:
        yield
    except NotFiniteError as error:
        raise DivergedError(f"{what} is not finite: {error}") from None
