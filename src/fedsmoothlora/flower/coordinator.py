"""The coordinator's engine: it sends messages to the sites through Flower's grid and yields their replies."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from flwr.app import ConfigRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid
from torch import Tensor

from fedsmoothlora.callbacks import Callback
from fedsmoothlora.config.settings import FlowerSettings
from fedsmoothlora.errors import (
    DisagreementError,
    FederationStoppedError,
    InterruptedRunError,
    KeysError,
    WireError,
)
from fedsmoothlora.federation.messages import Message as RoundMessage
from fedsmoothlora.federation.messages import Reply
from fedsmoothlora.federation.reply_metrics import checked_metrics
from fedsmoothlora.federation.simulation import ClientReply, Simulation
from fedsmoothlora.federation.wire import pack, unpack
from fedsmoothlora.flower.handshake import SiteInfo
from fedsmoothlora.flower.keys import fingerprint
from fedsmoothlora.flower.records import Status, from_records, status_of, table, to_records
from fedsmoothlora.printable import listed, printable
from fedsmoothlora.tasks.objectives.base import Evaluation

_POLL = 0.5
# Seconds for which a round waits for the site info of a node that connected again.
_SHORT_WAIT = 120.0
_SITE_LOG = "the site's own log says why"
_REASONS: dict[Status, str] = {
    "diverged": "diverged and is left out",
    "lost": "sits out: the state that its method kept there is lost",
    "spent": "sits out: another round would pass its privacy.target_epsilon",
    "behind": "sits out: it lacks server updates",
    "failed": f"failed and is left out; {_SITE_LOG}",
}


class FlowerEngine:
    """Runs clients on other machines (`fedsmoothlora.federation.simulation.Engine`).

    Flower authenticates every message of a node by the node's key. ``flower.nodes`` binds client ids to these
    keys. Without it, a node is the client that it claims to be.

    Args:
        grid: Flower's connection to the nodes.
        settings: ``[flower]``.
        own: the coordinator's own site info, with which that of every site must agree.
        clients: the ids of the clients.
    """

    in_turn = False

    def __init__(self, grid: Grid, settings: FlowerSettings, own: SiteInfo, clients: Sequence[str]) -> None:
        self._grid = grid
        self._settings = settings
        self._own = own
        self._clients = tuple(clients)
        self._node_of: dict[str, int] = {}
        self._known: set[int] = set()
        self.site_infos: dict[str, SiteInfo] = {}

    # -- before round 0 ------------------------------------------------------------------------------

    def handshake(self, say: Callable[[str], None]) -> Mapping[str, SiteInfo]:
        """Wait for all clients, and check that all have the same labels and weights.

        Args:
            say: called with messages for the user.

        Raises:
            DisagreementError: values of a site and of the coordinator differ, a site cannot prepare its data,
                two nodes claim to be one client, or a client did not connect within ``flower.wait`` seconds.
        """
        deadline = time.monotonic() + self._settings.wait
        if self._settings.nodes is None:
            say("client ids are not bound to keys (flower.nodes): any registered node can claim any of them")
        say(f"waiting for {len(self._clients)} clients: {', '.join(self._clients)}")
        while missing := self._missing():
            if time.monotonic() > deadline:
                raise DisagreementError(
                    f"after {self._settings.wait:g} s (flower.wait) there is no {', '.join(missing)}; "
                    f"connected are {', '.join(sorted(self._node_of)) or 'none'}"
                )
            if problems := self._meet(max(1.0, deadline - time.monotonic()), say):
                raise DisagreementError("\n".join(problems))
            if self._missing():
                time.sleep(_POLL)
        say(f"{len(self._clients)} clients agree on label map, tokenizer and base weights")
        return self.site_infos

    def _missing(self) -> list[str]:
        """The clients whose node is not known."""
        return [client for client in self._clients if client not in self._node_of]

    def _meet(self, timeout: float, say: Callable[[str], None]) -> list[str]:
        """Ask nodes that are new for their site info; the reasons why some of them cannot take part.

        Nodes that ``flower.nodes`` does not let take part are named by ``say``, and not among the reasons.
        """
        news = self._admitted(say)
        problems: list[str] = []
        for node, content in self._ask("query.agree", [(node, to_records()) for node in news], timeout):
            self._known.add(node)
            try:
                if content is None or status_of(content) != "done":
                    raise DisagreementError(f"it cannot prepare its data; {_SITE_LOG}")
                info = SiteInfo.read(table(content, "site_info"))
                if (bound := news[node]) is None or bound == info.client:
                    self._welcome(node, info)
                else:
                    say(
                        f"node {node} is refused: it claims to be {printable(info.client)}, and its key is "
                        f"that of {bound} (flower.nodes)"
                    )
            except (DisagreementError, WireError) as error:
                problems.append(f"node {node}: {error}")
        return problems

    def _admitted(self, say: Callable[[str], None]) -> dict[int, str | None]:
        """The new nodes, each with the client of its key; None where ids are not bound to keys."""
        news = [node for node in self._grid.get_nodes() if node.node_id not in self._known]
        if self._settings.nodes is None:
            return {node.node_id: None for node in news}
        clients = {key: client for client, key in self._settings.nodes.items()}
        admitted: dict[int, str | None] = {}
        for node in news:
            key = _fingerprint(node.public_key)
            if key in clients:
                admitted[node.node_id] = clients[key]
            else:
                self._known.add(node.node_id)
                say(f"node {node.node_id} is refused: its key {key} is that of no client (flower.nodes)")
        return admitted

    def _welcome(self, node: int, info: SiteInfo) -> None:
        """Record the node of a client. Raises ``DisagreementError`` if it cannot be that client."""
        client = info.client
        if client not in self._clients:
            raise DisagreementError(
                f"it says that it is '{printable(client)}', which is not in flower.clients"
            )
        info.check(self._own)
        before = self._node_of.get(client)
        if before is not None and before in set(self._grid.get_node_ids()):
            raise DisagreementError(f"it says that it is {client}, and so does node {before}")
        known = self.site_infos.get(client)
        if known is not None and known.samples != info.samples:
            raise DisagreementError(f"{client} came back with {info.samples} rows; it had {known.samples}")
        self._node_of[client], self.site_infos[client] = node, info

    # -- in a round ----------------------------------------------------------------------------------

    def train(
        self,
        simulation: Simulation,
        clients: Sequence[str],
        message: Callable[[str], RoundMessage],
        callback: Callback,
    ) -> Iterator[ClientReply]:
        """Send all messages at once, and yield replies as they come, until the timeout."""
        what = f"round {simulation.server.round + 1}"
        for client, content in self._visits(simulation, MessageType.TRAIN, what, clients, message, callback):
            try:
                reply = unpack(Reply, from_records(content))
                if reply.client != client:
                    raise WireError(f"it names client '{printable(reply.client)}'")
            except WireError as error:
                callback.on_note(f"{what}: upload refused: client {client}: {error}")
            else:
                yield ClientReply(client=client, reply=reply)

    def calibrate(
        self,
        simulation: Simulation,
        clients: Sequence[str],
        message: Callable[[str], RoundMessage],
        callback: Callback,
    ) -> Iterator[tuple[str, Mapping[str, Tensor]]]:
        """Not available: gradients do not leave sites; `check_for_sites` refuses methods that need them."""
        raise RuntimeError("calibration gradients do not leave sites")

    def validate(
        self, simulation: Simulation, message: Callable[[str], RoundMessage], callback: Callback
    ) -> Mapping[str, Evaluation]:
        """Ask every client with validation rows for the global model's metrics on them.

        A metric that cannot be recorded is dropped for that client only (`checked_metrics`). The message
        brings a client up to date, so the next round need not send the same updates again.

        Raises ``FederationStoppedError`` if no client sent any metrics and there is no test set.
        """
        server, found = simulation.server, {}
        clients, what = list(simulation.validation), f"validation after round {server.round}"
        for client, content in self._visits(
            simulation, MessageType.EVALUATE, what, clients, message, callback
        ):
            try:
                metrics, reasons = checked_metrics(table(content, "metrics"))
            except WireError as error:
                metrics, reasons = {}, [str(error)]
            else:
                server.delivered(client)
            if reasons:
                callback.on_note(
                    f"{what}: metrics of client {client} are not used: {listed(reasons, most=3)}"
                )
            if metrics:
                found[client] = Evaluation(metrics, None)
        if clients and not found and simulation.test is None:
            raise FederationStoppedError(f"{what}: no client gave any metrics of the global model")
        return {client: found[client] for client in clients if client in found}

    def _visits(
        self,
        simulation: Simulation,
        kind: str,
        what: str,
        clients: Sequence[str],
        message: Callable[[str], RoundMessage],
        callback: Callback,
    ) -> Iterator[tuple[str, RecordDict]]:
        """Send messages to clients; yield the replies of those that are done, name the others in notes."""
        self._look_for(clients, callback)
        received = simulation.server.received
        waiting = {self._node_of[client]: client for client in clients if client in self._node_of}
        # Made one at a time, as they are sent.
        contents = ((node, to_records(pack(message(client)))) for node, client in list(waiting.items()))
        behind: list[str] = []
        for client in clients:
            if client not in self._node_of:
                callback.on_note(f"{what}: client {client} is not connected and is left out")
        for node, content in self._ask(kind, contents, self._settings.timeout, simulation.should_stop):
            client = waiting.pop(node)
            callback.on_client_end(client)
            status = _status(content)
            if content is not None and status == "done":
                yield client, content
            elif status == "behind" and received.get(client):
                callback.on_note(f"client {client} lost its state: it is sent all server updates again")
                received.pop(client)
                behind.append(client)
            elif content is None:
                callback.on_note(
                    f"{what}: client {client} is left out: Flower saw its process or its node end"
                )
            else:
                callback.on_note(f"{what}: client {client} {_REASONS.get(status, status)}")
        for client in waiting.values():
            callback.on_note(
                f"{what}: no reply of client {client} within {self._settings.timeout:g} s (flower.timeout); "
                "it is left out"
            )
        if behind:
            yield from self._visits(simulation, kind, what, behind, message, callback)

    def _look_for(self, clients: Iterable[str], callback: Callback) -> None:
        """Look for new nodes of clients whose node is gone; a node that is started again may get a new id."""
        there = set(self._grid.get_node_ids())
        for client in clients:
            if self._node_of.get(client) not in there:
                self._node_of.pop(client, None)
        if any(client not in self._node_of for client in clients) and there - self._known:
            for problem in self._meet(min(_SHORT_WAIT, self._settings.timeout), callback.on_note):
                callback.on_note(f"not used: {problem}")

    def _ask(
        self,
        kind: str,
        contents: Iterable[tuple[int, RecordDict]],
        timeout: float,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> Iterator[tuple[int, RecordDict | None]]:
        """Send contents to nodes; yield each node with its reply, None if Flower reports an error."""
        waiting: dict[str, int] = {}
        deadline = time.monotonic() + timeout
        for node, content in contents:
            # A registered node can send a reply in the name of another one if it knows the id of the message
            # that it answers. The id is a hash of the message: with a random number, nobody can guess it.
            content["secret"] = ConfigRecord({"secret": secrets.token_hex(32)})
            sent = Message(content, node, kind, ttl=timeout)
            for identity in self._grid.push_messages([sent]):
                if identity:
                    waiting[identity] = node
        while waiting:
            if should_stop():
                raise InterruptedRunError("stopped while waiting for clients")
            for identity, reply in self._replies(list(waiting)):
                yield waiting.pop(identity), reply
            if not waiting or time.monotonic() > deadline:
                return
            time.sleep(_POLL)

    def _replies(self, identities: Sequence[str]) -> Iterator[tuple[str, RecordDict | None]]:
        """The replies that have arrived, pulled one at a time: one may be unreadable."""
        for identity in identities:
            try:
                for reply in self._grid.pull_messages([identity]):
                    yield identity, None if reply.has_error() else reply.content
            except (ValueError, TypeError, KeyError):  # the node pushed something that is no message
                yield identity, None


def _status(content: RecordDict | None) -> Status:
    try:
        return "failed" if content is None else status_of(content)
    except WireError:
        return "failed"


def _fingerprint(public_key: bytes) -> str:
    """The fingerprint of a node's key; ``none`` if the node was registered without one."""
    try:
        return fingerprint(public_key)
    except KeysError:
        return "none"
