"""One client's part of a round: from the server's message to its reply (steps 1 to 6 of the method)."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property, partial

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from fedsmoothlora.algebra.coding import decoded
from fedsmoothlora.algebra.lowrank import LowRank, with_core
from fedsmoothlora.algebra.schedules import learning_rate_at
from fedsmoothlora.algebra.seeds import generator_for, seed_for
from fedsmoothlora.algebra.sketches import Sketch
from fedsmoothlora.callbacks import Callback
from fedsmoothlora.data.examples import Batch, BatchOrder, Examples, labels_of
from fedsmoothlora.data.tokens import TokenBudget
from fedsmoothlora.errors import DivergedError, NotFiniteError
from fedsmoothlora.federation import changes, two_exchanges
from fedsmoothlora.federation.accounting import Ledger, MemoryLedger
from fedsmoothlora.federation.client_changes import ClientChanges
from fedsmoothlora.federation.client_state import ClientState, kept_under, under
from fedsmoothlora.federation.contributions import weighted
from fedsmoothlora.federation.devices import SERVER, placed
from fedsmoothlora.federation.initial_state import InitialState
from fedsmoothlora.federation.messages import Message, Reply
from fedsmoothlora.federation.personal import Deviation, GlobalModel, PersonalTraining, without_personal
from fedsmoothlora.federation.privacy import clipped_change
from fedsmoothlora.federation.probe import Probe
from fedsmoothlora.federation.sample_privacy import SamplePrivacy, no_gradients
from fedsmoothlora.federation.settings import PersonalSettings, PrivacySettings
from fedsmoothlora.federation.transport import Transport
from fedsmoothlora.methods import ClientView, Coded, Method, Products, Start, Update, Upload
from fedsmoothlora.modeling.adapters import AdaptedModel
from fedsmoothlora.tasks.objectives import Objective
from fedsmoothlora.tasks.objectives.base import RowLosses
from fedsmoothlora.tasks.objectives.class_weights import WeighsClasses
from fedsmoothlora.training.calibration import calibration_gradients, calibration_sketches
from fedsmoothlora.training.corrections import ControlVariates, Correction, proximal
from fedsmoothlora.training.local import Found, LocalTraining, Trained, Visiting
from fedsmoothlora.training.loop import autocast, checkpointing, to_device, train, whole
from fedsmoothlora.training.private import train_privately
from fedsmoothlora.training.settings import TrainingSettings

# Before the names of SCAFFOLD's control variates in a client's state.
_CONTROL = "control:"


@dataclass(frozen=True, kw_only=True)
class Visit:
    """The result of one client's round.

    Attributes:
        reply: the reply to the server.
        state: the state that stays at the client.
        start: the start of local training relative to ``W^t``, divided by ``s``, by layer; empty unless
            ``evaluation.diagnostics`` is set.
        at: the global model at the start of the round, if the client trains a personal model in this round.
    """

    reply: Reply
    state: ClientState
    start: Products = field(default_factory=dict)
    at: GlobalModel | None = None


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

    @property
    def _probe(self) -> Probe:
        seed = self.initial_state.seed
        return Probe(model=self.model, loss=self._loss, training=self.training, seed=seed)

    def calibrate(
        self, client: str, data: Examples, message: Message, state: ClientState, callback: Callback
    ) -> Mapping[str, Tensor]:
        """The gradients that a client sends before a round, if its method exchanges gradients.

        Raises ``DivergedError`` as `visit` does.
        """
        learner = self._for_rows(data)
        view, held = learner._view(client, data, message, state.after(message), callback)
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
        learner = self._for_rows(data)
        if not self.privacy.uploads_only:
            return (yield from learner._visiting(client, data, message, state, callback))
        private = self._sample_privacy(client, data, message, ledger or MemoryLedger())
        metrics = private.metrics(private.spend(message)) if private else {}
        visit = yield from learner._visiting(client, data, message, state, Callback(), private)
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

    def _for_rows(self, data: Examples) -> Learner:
        """The learner with the class weights of a client that has these training rows, if any are set."""
        weights = self.training.class_weights
        if weights is None:
            return self
        assert isinstance(self.objective, WeighsClasses)  # checked when the federation was assembled
        return replace(self, objective=self.objective.weighted(labels_of(data), weights))

    def _visiting(
        self,
        client: str,
        data: Examples,
        message: Message,
        state: ClientState,
        callback: Callback,
        private: SamplePrivacy | None = None,
    ) -> Visiting[Visit]:
        state = state.after(message)
        trains = self.method.trains_in(message.round)
        steps = self.training.steps_for(len(data), self.method.calibration.batches) if trains else 0
        callback.on_client_begin(client, steps)
        began = time.perf_counter()
        model = self.model
        view, held = self._view(client, data, message, state, callback)
        head_before = self._head_for(view, message, held)
        model.load_head(head_before)
        with _diverging("its start"):
            start = self._start(view)  # steps 1 to 4
        model.backbone.set_shift(start.shift)
        if start.lora:
            model.load_lora(start.lora, start.cores)
        model.train_only(start.trains)
        started = time.perf_counter()
        metrics = dict(start.metrics)
        if self.diagnoses:
            metrics.update(self._probe.at_start(start, client, data))

        lr = learning_rate_at(message.round, self.training.rounds, self.training.lr, self.training.lr_min)
        control = self._control(view, message) if trains else None
        seed = self._seed("dropout", client, message)
        training_begins = time.perf_counter()
        if private is None:
            trained = yield LocalTraining(  # step 5
                start=start,
                head=head_before,
                steps=steps,
                batches=self._batches(data, steps, "training", client, message),
                loss=self._loss_of,
                split=self._split,
                lr=lr,
                seed=seed,
                corrections=partial(self._corrections, control),
                on_step=lambda loss: callback.on_client_step(client, loss),
            )
            self._continue_from(client, start, trained)
        else:
            with self._training_model(start):
                train_privately(  # its losses would tell something of the rows
                    model.model,
                    data,
                    private.batches(message),
                    self._losses,
                    self.training,
                    private.mechanism(message),
                    lr=lr,
                    accelerator=self.accelerator,
                    seed=seed,
                    corrections=self._corrections(control, model.trained_parameters()),
                )
            trained = Trained(losses=[], seconds=time.perf_counter() - training_begins)
        trained_at = time.perf_counter()

        with _diverging("its upload"):
            upload = self.method.upload(self._trained(start) if trains else {}, start, view)  # step 6
            shared_head = model.head() if self.method.traits.shares_head else {}
            sent, head, kept = self.changes.coded(upload, shared_head, view, held)
            if self.privacy.clips_at_clients:
                part, clip_norm = self.method.sends(message.round), self.privacy.first_clip_norm
                sent, head = clipped_change(decoded(sent), head, start.lora, head_before, part, clip_norm)
            pending: Update = {}
            if self.method.two_exchanges:
                pending = two_exchanges.pending(upload.pending, head, head_before, message.attempt)
                sent, head = self._contribution(sent, {}, data)
        own_control, control_change = control.after(steps, lr) if control else ({}, {})
        uploaded = time.perf_counter()
        if self.diagnoses:
            metrics["loss_at_end"] = self._probe.mean_loss(client, data, with_lora=bool(start.lora))
            metrics["seconds_diagnosis"] = training_begins - started + time.perf_counter() - uploaded
        for note in start.notes:
            callback.on_note(f"client {client}: {note}")
        reply = Reply(
            client=client,
            experiment=message.experiment,
            round=message.round,
            attempt=message.attempt,
            samples=len(data),
            sent=sent,
            head=head,
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
            state=state.with_upload(message.round, {**self._kept(upload, own_control), **kept, **pending}),
            start=_relative(start) if self.diagnoses else {},
            # Of methods that keep a LoRA at the server, the start is the global model.
            at=GlobalModel(lora=_relative(start) if view.server_lora else {}, head=head_before)
            if self.personal.on and trains
            else None,
        )

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
        """The client's weight, as the server learns it."""
        return 1 if self.privacy.hides_counts else len(data)

    def _contribution(
        self, sent: Coded, head: Mapping[str, Tensor], data: Examples
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Plain tensors and the head's change, multiplied by the client's weight."""
        weight, tensors = self._weight(data), {n: v for n, v in sent.items() if isinstance(v, Tensor)}
        return weighted(tensors, weight), weighted(head, weight)

    def personalise(
        self,
        client: str,
        data: Examples,
        message: Message,
        state: ClientState,
        visit: Visit,
        callback: Callback,
    ) -> Visit:
        """Train the client's personal model after `visit`; the model is then the personal one (Ditto).

        It continues from the deviation that the client kept with its last accepted upload. If it diverges,
        the deviation stays as it was.

        Args:
            client: the client's id.
            data: the client's training rows.
            message: the server's message.
            state: the client's state before the visit.
            visit: the result of the visit.
            callback: notified if the personal model diverges.

        Returns:
            The visit, with the personal model in its state.
        """
        assert visit.at is not None
        assert self.personal.ditto is not None
        training, before = self._personal_training(client, data), self._deviation(message, state)
        try:
            after = training.train(
                visit.at,
                before,
                data,
                purpose=("personal", message.round, message.attempt, client),
                steps=self.personal.steps
                or self.training.steps_for(len(data), self.method.calibration.batches),
                lr=learning_rate_at(
                    message.round, self.training.rounds, self.training.lr, self.training.lr_min
                ),
                weight=self.personal.ditto,
            )
        except DivergedError as error:
            callback.on_note(
                f"client {client}: its personal model diverged in round {message.round + 1} and stays as it "
                f"was: {error}; try a smaller personal.ditto than {self.personal.ditto:g}"
            )
            after = before
            training.load(visit.at, before)
        kept = {**visit.state.uploads[message.round], **after.kept()}
        return replace(visit, state=visit.state.with_upload(message.round, kept))

    def load_personal(self, client: str, data: Examples, message: Message, state: ClientState) -> None:
        """Make the model the client's personal one. ``message.lora`` is the whole LoRA of the server."""
        training = self._personal_training(client, data)
        training.load(self._global_model(message), self._deviation(message, state))

    def fine_tune(self, client: str, data: Examples, message: Message, steps: int) -> None:
        """Make the model a copy of the global one that is trained for ``steps`` steps on the client's rows.

        Raises ``DivergedError`` if the loss or weights are not finite.
        """
        self._personal_training(client, data).train(
            self._global_model(message),
            Deviation(),
            data,
            purpose=("fine-tuning", message.round, client),
            steps=steps,
            lr=self.training.lr,
            weight=0.0,
        )

    def _personal_training(self, client: str, data: Examples) -> PersonalTraining:
        learner, layers = self._for_rows(data), self.model.layers
        if self.ranks:
            self.model.use_rank(self.ranks[client])
            layers = self.model.layers_at(self.ranks[client])
        return PersonalTraining(
            model=self.model,
            loss=learner._loss,
            split=learner._split,
            training=self.training,
            accelerator=self.accelerator,
            seed=self.initial_state.seed,
            initial=lambda name: _leading(self.initial_state.initial(name), layers[name].rank),
        )

    def _deviation(self, message: Message, state: ClientState) -> Deviation:
        """The deviation that the client kept with its last accepted upload; 0 if there is none."""
        kept = state.uploads.get(message.accepted_round, {})
        return Deviation.kept_in(kept).to(self.accelerator.device)

    def _global_model(self, message: Message) -> GlobalModel:
        """The global model of a message with the server's whole LoRA."""
        device = self.accelerator.device
        whole = {name: LowRank.of(product) for name, product in decoded(message.lora).items()}
        return GlobalModel(lora=placed(whole, device), head=placed(message.head, device))

    def _start(self, view: ClientView) -> Start:
        """The method's start, moved to the model's device."""
        start = self.method.start(view)
        return replace(
            start,
            lora=placed(start.lora, self.accelerator.device),
            cores=placed(start.cores, self.accelerator.device),
            shift=placed(start.shift, self.accelerator.device),
            gradients=placed(start.gradients, self.accelerator.device),
        )

    def _head_for(self, view: ClientView, message: Message, held: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The head at the start of the round: the server's, or the client's own if heads are not shared."""
        return changes.head_of(held) or dict(message.head) or self._own_head(view)

    def _server_lora(self, view: ClientView, message: Message, held: Mapping[str, Tensor]) -> Update:
        """The LoRA that the server sent, on the client's device."""
        lora = self.changes.lora(view, message, held)
        return self.transport.decoded(placed(lora, self.accelerator.device))

    def _kept(self, upload: Upload, control: Mapping[str, Tensor]) -> Update:
        """The method's state for the next round, with head and control variates if they are used."""
        traits = self.method.traits
        keeps_head = traits.keeps_upload or not traits.shares_head
        return {
            **upload.kept,
            **(self.model.head() if keeps_head else {}),
            **under(_CONTROL, control),
        }

    def _view(
        self, client: str, data: Examples, message: Message, state: ClientState, callback: Callback
    ) -> tuple[ClientView, dict[str, Tensor]]:
        """The method's view of the client, and the LoRA and the head that it shares with the server."""
        device = self.accelerator.device
        layers = self.model.layers
        if self.ranks:
            self.model.use_rank(self.ranks[client])
            layers = self.model.layers_at(self.ranks[client])
        kept = without_personal(state.uploads.get(message.accepted_round, {}))
        received = state.received_since(message.accepted_round, message.round) if kept else {}
        if message.accepted_round >= 0 and (received is None or message.accepted_round not in state.uploads):
            kept, received = {}, {}
            callback.on_note(
                f"client {client}: its state from round {message.accepted_round + 1} is lost; it takes part "
                "like a new client, without round matching"
            )

        def batches() -> Iterator[Batch]:
            size = self.method.calibration.batch_size
            return self._batches(data, self.method.calibration.batches, "calibration", client, message, size)

        @contextmanager
        def calibrating(at: Products) -> Iterator[None]:
            """Step 2: the weights are ``W^t + s * at``, without LoRA."""
            self.model.backbone.set_shift(at)
            with self.model.without_lora(), checkpointing(self.model.model, self.training):
                yield

        seed = self._seed("calibration draws", client, message)

        def gradients(at: Products) -> Mapping[str, Tensor]:
            model = self.model
            with calibrating(at):
                return calibration_gradients(
                    model.model, model.modules, batches(), self._loss, self._split, seed=seed
                )

        def sketch(at: Products, sketches: Mapping[str, Sketch]) -> Mapping[str, Tensor]:
            model = self.model
            with calibrating(at):
                return calibration_sketches(
                    model.model, model.modules, sketches, batches, self._loss, self._split, seed=seed
                )

        def generator(layer: str) -> torch.Generator:
            return generator_for(
                self.initial_state.seed, "lora rows", message.round, message.attempt, client, layer
            )

        view = ClientView(
            round=message.round,
            rounds=self.training.rounds,
            layers=layers,
            device=device,
            server_lora={},
            kept=placed(kept, device),
            kept_round=message.accepted_round if kept else -1,
            received=placed(received or {}, device),
            gradients=gradients,
            sketch=sketch,
            initial=lambda name: _leading(self.initial_state.initial(name), layers[name].rank).to(
                device=device
            ),
            orthonormal=lambda name: self.initial_state.orthonormal(name).to(device=device),
            generator=generator,
            pretrained=self.initial_state.pretrained,
            prepared=placed(self.initial_state.prepared, device),
            exchanged=placed(message.gradients, device),
            code=self.transport.code,
            packs=self.transport.packs,
            nbytes=self.transport.product_bytes,
        )
        if self.privacy.hides_rows:
            view = replace(view, gradients=no_gradients, sketch=no_gradients)
        if self.method.two_exchanges:
            view = replace(view, basis=placed(self._basis(view, message, state), device))
        held = self.changes.held(view, message)
        return replace(view, server_lora=self._server_lora(view, message, held)), held

    def _basis(self, view: ClientView, message: Message, state: ClientState) -> dict[str, Tensor]:
        """``Q_t`` by layer: from the message, from the last update, or the seeded one of round 0.

        A client whose state is lost takes the seeded one too. The others' subspace is another one then, which
        loses nothing: ``Q_t`` decides only in which directions the next ``P`` points.
        """
        last, basis = state.last_update(message.round), dict(message.basis)
        for name in view.layers:
            if name not in basis:
                basis[name] = (
                    self.method.computed_basis(name, last[name])
                    if name in last
                    else self.initial_state.orthonormal(name).A.mT.contiguous()
                )
        return basis

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

    def _batches(
        self,
        data: Examples,
        count: int,
        purpose: str,
        client: str,
        message: Message,
        batch_size: int | None = None,
    ) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(self._seed(purpose, client, message))
        order = BatchOrder(len(data), batch_size or self.training.batch_size, generator)
        for rows in order.take(count):
            yield data.batch(rows)

    def _loss(self, batch: Batch) -> Tensor:
        return self._loss_of(self.model.model, batch)

    def _loss_of(self, model: nn.Module, batch: Batch) -> Tensor:
        with autocast(self.training, self.accelerator.device):
            return self.objective.loss(model, to_device(batch, self.accelerator))

    def _losses(self, batch: Batch) -> Tensor:
        """The loss of every row, ``(rows,)``, for sample-level privacy."""
        assert isinstance(self.objective, RowLosses)  # checked when the federation was assembled
        with autocast(self.training, self.accelerator.device):
            return self.objective.losses(self.model.model, to_device(batch, self.accelerator))

    def _split(self, batch: Batch) -> Iterable[tuple[Batch, float]]:
        if self.training.tokens_per_batch is not None:
            return self.objective.parts(batch, TokenBudget(self.training.tokens_per_batch))
        parts = self.training.accumulation
        return whole(batch) if parts == 1 else self.objective.parts(batch, parts)

    def _seed(self, purpose: str, client: str, message: Message) -> int:
        return seed_for(self.initial_state.seed, purpose, message.round, message.attempt, client)


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


def _leading(product: LowRank, rank: int) -> LowRank:
    """The first directions of the shared initial LoRA, for a client of lower rank."""
    return LowRank(product.B[:, :rank], product.A[:rank])
