"""A site: one client with its own data, its own state and its own copy of the model."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from fedsmoothlora.algebra.coding import decoded
from fedsmoothlora.callbacks import Callback
from fedsmoothlora.config import Config
from fedsmoothlora.errors import BehindError, SiteError
from fedsmoothlora.federation.engines.in_process import visit
from fedsmoothlora.federation.messages import Message, Reply
from fedsmoothlora.federation.simulation import Simulation
from fedsmoothlora.flower.handshake import SiteInfo
from fedsmoothlora.modeling.fingerprint import tokenizer_hash, weights_sha256
from fedsmoothlora.runs.planning import Plan, build, plan
from fedsmoothlora.storage.client_store import StoredStates

_EXPERIMENT = re.compile(r"[0-9a-f]{32}")
_TEXT_KEYS = ("client-id", "data", "model", "state")
# Flower's own, in a simulation: the node stands for the client at that place.
_PLACE, _PLACES = "partition-id", "num-partitions"
_KEYS = (*_TEXT_KEYS, "histogram", _PLACE, _PLACES)


@dataclass(frozen=True, kw_only=True)
class Site:
    """A client as the node knows it that stands at the data.

    Attributes:
        config: the federation's configuration, with this site's own paths in it.
        client: its id; None where ``place`` says which client it is.
        place: the client's place among all clients, in a simulation.
        state: where it keeps what it knows between rounds.
        own_data: ``data.source`` is this client's alone.
        shows_histogram: it tells the coordinator how many rows of each class it has.
    """

    config: Config
    client: str | None
    place: int | None
    state: Path
    own_data: bool
    shows_histogram: bool

    @classmethod
    def at(cls, config: Config, node: Mapping[str, object]) -> Site:
        """The site of a node that was started with ``--node-config``.

        ==============  =====================================================================
        ``client-id``   its id, one of the federation's
        ``data``        path of its training data, in place of ``data.source``
        ``model``       folder of its copy of the model, in place of ``model.source``
        ``state``       folder of what it keeps between rounds; ``fedsmoothlora-state`` unless set
        ``histogram``   ``true`` shows the coordinator how many rows of each class it has
        ==============  =====================================================================

        Raises ``SiteError`` for a key that is unknown, missing or of the wrong type.
        """
        if unknown := sorted(node.keys() - set(_KEYS)):
            raise SiteError(f"--node-config: unknown key {unknown[0]!r}; there are {', '.join(_TEXT_KEYS)}")
        for key in _TEXT_KEYS:
            if key in node and (not isinstance(node[key], str) or not node[key]):
                raise SiteError(f"--node-config: {key} = {node[key]!r} must be text in quotes")
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
            # The coordinator's test set is not here.
            config = replace(config, data=replace(config.data, source=str(data), test=None, test_rows=None))
        return cls(
            config=config,
            client=None if client is None else str(client),
            place=place if client is None and isinstance(place, int) else None,
            state=Path(str(node.get("state", "fedsmoothlora-state"))),
            own_data=data is not None,
            shows_histogram=node.get("histogram") is True,
        )

    def info(self) -> SiteInfo:
        """What the coordinator must know before round 0; the data are read and checked for it."""
        planned, client = self._plan()
        simulation = build(planned)
        counts = np.bincount(
            planned.train.labels[planned.training_rows(client)], minlength=len(planned.classes)
        )
        return SiteInfo(
            client=client,
            samples=len(simulation.clients[client]),
            validation=len(simulation.validation.get(client, ())),
            classes=planned.classes,
            weights=weights_sha256(simulation.learner.model.model),
            tokenizer=tokenizer_hash(self.config.model),
            histogram=tuple(counts.tolist()) if self.shows_histogram else (),
        )

    def train(self, message: Message, callback: Callback) -> Reply:
        """The client's round. Its metrics have ``seconds_loading``: every message is a new process's.

        Raises:
            BehindError: it must be sent more than ``message`` brought.
            DivergedError, LostStateError: as `Learner.visit`.
        """
        began = time.perf_counter()
        simulation, client = self._caught_up(message, callback)
        loading = time.perf_counter() - began
        simulation.states = self._states(message)
        reply = visit(simulation, client, message, callback).reply
        return replace(reply, metrics={**reply.metrics, "seconds_loading": loading})

    def validate(self, message: Message, callback: Callback) -> Mapping[str, float]:
        """The global model's metrics on the client's validation rows; ``message.lora`` is all that it has.

        Raises ``BehindError`` as `train`.
        """
        simulation, client = self._caught_up(message, callback)
        # The next training message counts on what this one brought.
        states = self._states(message)
        states.save(client, states.load(client, callback).after(message))
        model = simulation.learner.model
        model.backbone.set_shift(decoded(message.lora))  # type: ignore[arg-type]
        model.load_head(message.head)
        with model.without_lora():
            return simulation.evaluate(simulation.validation[client]).metrics

    def _caught_up(self, message: Message, callback: Callback) -> tuple[Simulation, str]:
        """The client with the backbone at ``W^t``; what the message brought is kept."""
        planned, client = self._plan()
        folder = self._folder(message)
        stored = StoredStates(folder / "updates", message.experiment)
        # All updates since the pretrained weights, for ever: the backbone is made of them in every process.
        history = stored.load(client, callback).after(replace(message, forget_before=-1))
        if history.received_since(0, message.round) is None:
            raise BehindError(f"client {client} lacks server updates before round {message.round + 1}")
        stored.save(client, history)
        simulation = build(planned)
        for segment in history.segments:
            simulation.learner.model.backbone.merge(segment.updates)
        return simulation, client

    def _plan(self) -> tuple[Plan, str]:
        """The plan of this client, and its id."""
        torch.set_num_threads(self.config.machine.threads)
        planned = plan(self.config, site=self.client if self.own_data else None)
        clients: Sequence[str] = list(planned.partition.clients)
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
        """Where this run's state is; an experiment's name is the coordinator's, so it is not trusted."""
        if not _EXPERIMENT.fullmatch(message.experiment):
            raise SiteError(
                f"the coordinator names its experiment {message.experiment[:80]!r}; not 32 hex digits"
            )
        return self.state / message.experiment
