"""A site: one client with its own data, state and copy of the model."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from fedsmoothlora.algebra.coding import decoded
from fedsmoothlora.callbacks import Callback
from fedsmoothlora.config import Config
from fedsmoothlora.errors import BehindError, SiteError
from fedsmoothlora.federation.engines.in_process import personal_metrics, visit
from fedsmoothlora.federation.masked import masked_numbers
from fedsmoothlora.federation.messages import Message, Reply
from fedsmoothlora.federation.payload import Payload
from fedsmoothlora.federation.simulation import Simulation
from fedsmoothlora.federation.two_exchanges import completed
from fedsmoothlora.flower.handshake import SiteInfo
from fedsmoothlora.flower.secure_site import EXPERIMENT, SecureSite
from fedsmoothlora.modeling.fingerprint import tokenizer_hash, weights_sha256
from fedsmoothlora.printable import printable
from fedsmoothlora.runs.planning import LoadedModel, Plan, build, load, plan
from fedsmoothlora.secure_aggregation.messages import Delivery
from fedsmoothlora.storage.client_store import StoredStates
from fedsmoothlora.storage.update_history import Part, UpdateHistory
from fedsmoothlora.tasks.objectives.base import Evaluation

_TEXT_KEYS = ("client-id", "data", "model", "state", "warm", "key", "sites")
# Keys that Flower's simulation sets: the node is the client at this position.
_PLACE, _PLACES = "partition-id", "num-partitions"
_KEYS = (*_TEXT_KEYS, "histogram", _PLACE, _PLACES)


def _plan_of(config: Config, site: str | None) -> Plan:
    return plan(config, site=site)


class Preparation:
    """Reads a site's data and loads its model, anew for every message.

    Args:
        plan: reads the data of a configuration, those of one client if its id is given.
        load: loads the model of a plan; the caller may change it.
    """

    def __init__(
        self,
        plan: Callable[[Config, str | None], Plan] = _plan_of,
        load: Callable[[Plan], LoadedModel] = load,
    ) -> None:
        self._plan = plan
        self._load = load

    def planned(self, config: Config, site: str | None) -> Plan:
        """The plan of a configuration; its data are those of one client if the client's id is given."""
        return self._plan(config, site)

    def simulation(self, planned: Plan) -> Simulation:
        """The planned simulation with the pretrained weights."""
        return build(planned, loaded=self._load(planned))

    def caught_up(self, planned: Plan, history: UpdateHistory) -> Simulation | None:
        """The planned simulation, with the server updates of a history merged into the backbone.

        None, with a note, if an update cannot be read.
        """
        simulation = self.simulation(planned)
        return simulation if _merged(simulation, history, history.parts) else None


class KeptPreparation(Preparation):
    """Keeps the data and the model of one site between messages.

    A model that has trained is as good as a new one: each message sets its weights, LoRA and head, as it does
    where one process trains all clients in turn. Updates that are merged stay merged. If a message asks for
    other updates, the model is loaded again.
    """

    def __init__(self) -> None:
        super().__init__()
        self._planned: tuple[Config, str | None, Plan] | None = None
        self._simulation: Simulation | None = None
        self._merged: tuple[Part, ...] = ()

    def planned(self, config: Config, site: str | None) -> Plan:
        """The plan, read once."""
        if self._planned is None or self._planned[:2] != (config, site):
            self._planned = self._simulation = None  # one data set and one model in memory
            self._planned = config, site, super().planned(config, site)
        return self._planned[2]

    def simulation(self, planned: Plan) -> Simulation:
        """The simulation; its model is loaded again if updates are merged into it."""
        if self._simulation is None or self._merged:
            self._simulation = None  # one model in memory
            self._simulation, self._merged = super().simulation(planned), ()
        return self._simulation

    def caught_up(self, planned: Plan, history: UpdateHistory) -> Simulation | None:
        """The simulation; updates that its backbone lacks are merged."""
        if self._simulation is None or history.parts[: len(self._merged)] != self._merged:
            self.simulation(planned)
        simulation = self._simulation
        assert simulation is not None
        if not _merged(simulation, history, history.parts[len(self._merged) :]):
            self._simulation = None  # some of them may be merged
            return None
        self._merged = history.parts
        return simulation


def _merged(simulation: Simulation, history: UpdateHistory, parts: Sequence[Part]) -> bool:
    """Merge parts of a history into the backbone; False, with a note, if one cannot be read."""
    for part in parts:
        updates = history.updates(part)
        if updates is None:
            return False
        simulation.learner.model.backbone.merge(updates)
    return True


@dataclass(frozen=True, kw_only=True)
class Site:
    """A client on the machine that holds its data.

    Attributes:
        config: the federation's configuration, with this site's own paths in it.
        client: its id; None if ``place`` determines the client.
        place: the client's position among all clients, in a simulation.
        places: number of nodes of the simulation.
        state: the folder of its state between rounds.
        own_data: all rows of ``data.source`` are this client's.
        shows_histogram: the coordinator receives the number of training rows of each class.
        preparation: reads the data and loads the model.
        secure: masks its uploads, with ``privacy.secure_aggregation``.
    """

    config: Config
    client: str | None
    place: int | None
    places: object
    state: Path
    own_data: bool
    shows_histogram: bool
    preparation: Preparation = field(default_factory=Preparation)
    secure: SecureSite | None = None

    @classmethod
    def at(cls, config: Config, node: Mapping[str, object], preparation: Preparation | None = None) -> Site:
        """The site of a node that was started with ``--node-config``.

        ==============  =====================================================================
        ``client-id``   its id, one of the federation's
        ``data``        path of its training data, in place of ``data.source``
        ``model``       folder of its copy of the model, in place of ``model.source``
        ``state``       folder of its state between rounds; ``fedsmoothlora-state`` unless set
        ``warm``        folder of its warm process's socket; that of ``state`` unless set
        ``histogram``   ``true`` shows the coordinator how many rows of each class it has
        ``key``         the private key of its SuperNode, with ``privacy.secure_aggregation``
        ``sites``       the file of the sites that it trusts; the site then masks all its uploads
        ==============  =====================================================================

        Args:
            config: the federation's configuration.
            node: the values of ``--node-config``.
            preparation: reads the data and loads the model; anew for every message unless given.

        Raises:
            SiteError: a key is unknown, missing or of the wrong type.
        """
        if unknown := sorted(node.keys() - set(_KEYS)):
            raise SiteError(f"--node-config: unknown key {unknown[0]!r}; there are {', '.join(_TEXT_KEYS)}")
        for key in _TEXT_KEYS:
            if key in node and (not isinstance(node[key], str) or not node[key]):
                raise SiteError(f"--node-config: {key} = {node[key]!r} must be text in quotes")
        if "sites" in node and not config.privacy.secure_aggregation:
            raise SiteError(
                "--node-config: sites = ... says that this site masks its uploads, and the federation's "
                "configuration has no privacy.secure_aggregation = true"
            )
        client, place, data = node.get("client-id"), node.get(_PLACE), node.get("data")
        if client is None and place is None:
            raise SiteError("--node-config: client-id is missing: say which client this site is")
        known = config.flower.clients
        if client is not None and known and client not in known:
            raise SiteError(f"--node-config: client-id = {client!r} is not in flower.clients = {list(known)}")
        if known and client is not None and data is None:
            raise SiteError("--node-config: data is missing: say where this site's training data are")
        if data is not None and not known:
            raise SiteError("--node-config: data belongs to a federation whose flower.clients are named")
        if "model" in node:
            config = replace(config, model=replace(config.model, source=str(node["model"]), revision=None))
        if data is not None:
            # The coordinator's test set is not here, and a test set beside the site's data is not read.
            config = replace(
                config,
                data=replace(config.data, source=str(data), test=None, test_rows=None),
                evaluation=replace(config.evaluation, test=False),
            )
        return cls(
            config=config,
            client=None if client is None else str(client),
            place=place if client is None and isinstance(place, int) else None,
            places=node.get(_PLACES),
            state=Path(str(node.get("state", "fedsmoothlora-state"))),
            own_data=data is not None,
            shows_histogram=node.get("histogram") is True,
            preparation=preparation or Preparation(),
            secure=SecureSite.at(node) if config.privacy.secure_aggregation else None,
        )

    def info(self) -> SiteInfo:
        """The info that the coordinator needs before round 0; all data are read and checked.

        With ``[privacy]`` it says nothing of the rows: every client counts as one, unless numbers of rows are
        public.
        """
        planned, client = self._plan()
        if self.secure is not None:
            self.secure.check(self.config.flower.clients or list(planned.partition.clients))
        simulation = self.preparation.simulation(planned)
        model = simulation.learner.model
        # A kept model may have trained.
        model.backbone.set_shift()
        model.load_head(simulation.learner.initial_state.head)
        privacy = self.config.privacy
        privacy.check_rows(client, len(simulation.clients[client]))
        counts = np.bincount(
            planned.train.labels[planned.training_rows(client)], minlength=len(planned.classes)
        )
        return SiteInfo(
            client=client,
            samples=1 if privacy.hides_counts else len(simulation.clients[client]),
            validation=0 if privacy.uploads_only else len(simulation.validation.get(client, ())),
            classes=planned.outputs,
            weights=weights_sha256(model.model),
            tokenizer=tokenizer_hash(self.config.model),
            # Rows are counted by class; labels of another kind have no histogram.
            histogram=tuple(counts.tolist())
            if self.shows_histogram and not privacy.uploads_only and planned.outputs == planned.classes
            else (),
        )

    def train(self, message: Message, callback: Callback) -> Reply:
        """Carry out the client's round. ``seconds_loading`` is among the metrics of the reply.

        Raises:
            BehindError: the client lacks server updates that are not in ``message``.
            DivergedError, LostStateError: as `Learner.visit`.
            SiteError: the site masks its uploads.
        """
        if self.secure is not None:
            raise SiteError("privacy.secure_aggregation = true: no upload leaves this site without a mask")
        began = time.perf_counter()
        simulation, client = self._caught_up(message, callback)
        loading = time.perf_counter() - began
        simulation.states = self._states(message)
        reply = visit(simulation, client, message, callback).reply
        if self.config.privacy.uploads_only:
            return reply
        return replace(reply, metrics={**reply.metrics, "seconds_loading": loading})

    def train_masked(
        self, message: Message, deliveries: Mapping[str, Delivery], callback: Callback
    ) -> Payload:
        """Carry out the client's round; its masked upload, as stage 3 of secure aggregation sends it.

        With ``privacy.unit = "sample"``, the client's epsilon is beside it.

        Args:
            message: the message of the round.
            deliveries: by other site, its shares for this one.
            callback: receives notes.

        Raises:
            BehindError, DivergedError, LostStateError: as `train`.
            SecureAggregationError: the coordinator breaks the protocol's rules.
            SiteError: the site does not mask its uploads.
        """
        if self.secure is None:
            raise SiteError("privacy.secure_aggregation = false: there is nothing to mask for")
        simulation, client = self._caught_up(message, callback)
        simulation.states = self._states(message)
        reply, privacy = visit(simulation, client, message, callback).reply, self.config.privacy
        weight = privacy.weight_of(len(simulation.clients[client]))
        before = None if message.exchange or privacy.clips_at_clients else message.head
        masked = self.secure.mask(
            message.experiment,
            message.round,
            message.exchange,
            deliveries,
            lambda session: masked_numbers(
                reply, before, privacy.largest_number, len(session.clients), weight
            ),
        )
        return Payload(masked, dict(reply.metrics) if privacy.hides_rows else {})

    def validate(self, message: Message, callback: Callback) -> Evaluation:
        """Evaluate the global model on the client's validation rows; ``message.lora`` is its whole LoRA.

        If ``message.personal`` is set, the client's personal models are evaluated instead. What leaves the
        site has no confusion matrix.

        Raises ``BehindError`` as `train`, ``SiteError`` if ``[privacy]`` keeps metrics here.
        """
        if self.config.privacy.uploads_only:
            raise SiteError(f"{self.config.privacy.key}: no metric of this client's rows leaves it")
        simulation, client = self._caught_up(message, callback)
        # The next training message does not repeat the updates of this one.
        states = self._states(message)
        state = states.load(client, callback)
        states.save(client, state.after(completed(message, state) or message))
        if message.personal:
            simulation.states = states
            return Evaluation(personal_metrics(simulation, client, message, callback))
        model = simulation.learner.model
        model.backbone.set_shift(decoded(message.lora))  # type: ignore[arg-type]
        model.load_head(message.head)
        with model.without_lora():
            return replace(simulation.evaluate(simulation.validation[client]), confusion=None)

    def _caught_up(self, message: Message, callback: Callback) -> tuple[Simulation, str]:
        """The client's simulation with the backbone at ``W^t``; the updates of the message are stored."""
        planned, client = self._plan()
        folder = self._folder(message)
        whole = completed(message, self._states(message).load(client, callback)) if message.right else message
        if whole is None:
            raise BehindError(f"client {client} lacks its part of the update of round {message.round}")
        # All updates since the pretrained weights: every process computes the backbone from them.
        history = UpdateHistory(folder / "updates", message.experiment, client, callback)
        simulation = self.preparation.caught_up(planned, history) if history.add(whole) else None
        if simulation is None:
            raise BehindError(f"client {client} lacks server updates before round {message.round + 1}")
        return simulation, client

    def _plan(self) -> tuple[Plan, str]:
        """The plan of this client, and its id."""
        torch.set_num_threads(self.config.machine.threads)
        planned = self.preparation.planned(self.config, self.client if self.own_data else None)
        clients: Sequence[str] = list(planned.partition.clients)
        if self.place is not None and self.places not in (None, len(clients)):
            raise SiteError(
                f"Flower's simulation has {self.places} nodes, the configuration {len(clients)} clients: "
                f"start it with --federation-config 'num-supernodes={len(clients)}'"
            )
        if self.client is None and self.place is not None and self.place < len(clients):
            return planned, clients[self.place]
        if self.client not in clients:
            who = self.client if self.place is None else f"place {self.place}"
            raise SiteError(f"--node-config: {who} is no client of the partition: {', '.join(clients[:10])}")
        assert self.client is not None
        return planned, self.client

    def _states(self, message: Message) -> StoredStates:
        return StoredStates(self._folder(message) / "clients", message.experiment)

    def _folder(self, message: Message) -> Path:
        """The folder of this run's state. The experiment's name comes from the coordinator and is checked."""
        if not EXPERIMENT.fullmatch(message.experiment):
            raise SiteError(
                f"the coordinator's experiment is '{printable(message.experiment)}'; it must be 32 hex digits"
            )
        return self.state / message.experiment
