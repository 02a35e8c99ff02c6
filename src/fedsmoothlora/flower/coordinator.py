"""The coordinator's engine: it sends messages to the sites through Flower's grid and yields their replies."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress

import httpx
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
from fedsmoothlora.federation.records import PERSONAL, TUNED
from fedsmoothlora.federation.reply_metrics import checked_metrics
from fedsmoothlora.federation.simulation import ClientReply, Simulation
from fedsmoothlora.federation.wire import pack
from fedsmoothlora.flower.handshake import SiteInfo
from fedsmoothlora.flower.in_flight import POLL, SitesInFlight
from fedsmoothlora.flower.questions import MESSAGE_TYPES
from fedsmoothlora.flower.received import SITE_LOG, no_reply_reason, reply_of, status_or_failed
from fedsmoothlora.flower.records import status_of, table, to_records
from fedsmoothlora.flower.secure_sites import SecureSites
from fedsmoothlora.printable import listed, printable
from fedsmoothlora.secure_aggregation.fixed_point import FixedPoint
from fedsmoothlora.secure_aggregation.identities import fingerprint
from fedsmoothlora.secure_aggregation.messages import Session
from fedsmoothlora.secure_aggregation.session import Sum, collect, unmasked
from fedsmoothlora.secure_aggregation.transcripts import dumped_transcript, loaded_transcript
from fedsmoothlora.tasks.objectives.base import Evaluation

# Seconds for which a round waits for the site info of a node that connected again.
_SHORT_WAIT = 120.0
# Seconds for which the end of a federation waits for sites that end their warm processes.
_END = 30.0


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

    def __init__(
        self,
        grid: Grid,
        settings: FlowerSettings,
        own: SiteInfo,
        clients: Sequence[str],
        *,
        units_per_row: int,
    ) -> None:
        self._grid = grid
        self._settings = settings
        self._own = own
        self._units_per_row = units_per_row
        self._clients = tuple(clients)
        self._node_of: dict[str, int] = {}
        self._key_of: dict[int, str] = {}
        self._known: set[int] = set()
        self._asked: set[int] = set()
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
                time.sleep(POLL)
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
        self._asked.update(news)
        problems: list[str] = []
        for node, content in self._ask("query.agree", [(node, to_records()) for node in news], timeout):
            self._known.add(node)
            try:
                if content is None or status_of(content) != "done":
                    raise DisagreementError(f"it cannot prepare its data; {SITE_LOG}")
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
        self._key_of |= {node.node_id: _fingerprint(node.public_key) for node in news}
        if self._settings.nodes is None:
            return {node.node_id: None for node in news}
        clients = {key: client for client, key in self._settings.nodes.items()}
        admitted: dict[int, str | None] = {}
        for node in news:
            key = self._key_of[node.node_id]
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

    def end(self) -> None:
        """Let the sites' warm processes end, and wait for that for a short time only.

        Sites that cannot be reached end them by themselves, after ``flower.timeout`` seconds.
        """
        if not self._settings.warm:
            return
        with suppress(Exception):  # the federation has ended; nothing depends on this message
            # The nodes of Flower's simulation have no keys, and no warm processes.
            nodes = [node.node_id for node in self._grid.get_nodes() if node.public_key]
            contents = [(node, to_records()) for node in nodes if node in self._asked]
            list(self._ask("query.end", contents, _END))

    # -- in a round ----------------------------------------------------------------------------------

    def train(
        self,
        simulation: Simulation,
        clients: Sequence[str],
        message: Callable[[str], RoundMessage],
        callback: Callback,
    ) -> Iterator[ClientReply]:
        """Send all messages at once, and yield replies as they come, until the timeout."""
        what, content_for = f"round {simulation.server.round + 1}", _packed(message)
        for client, content in self._visits(
            simulation, MessageType.TRAIN, what, clients, content_for, callback
        ):
            if (reply := reply_of(client, content, what, callback)) is not None:
                yield reply

    def masked_sum(
        self,
        simulation: Simulation,
        session: Session,
        code: FixedPoint,
        message: Callable[[str], RoundMessage],
        callback: Callback,
        spent: Callable[[str, float], None],
        keep: Callable[[bytes], None],
    ) -> Sum:
        """Carry out a session of secure aggregation (`fedsmoothlora.federation.masked.SumsUnderMask`).

        The keys are those with which Flower authenticates the nodes. Sites check them by fingerprints of
        their own.
        """
        there = self.nodes_of(session.clients, callback)
        fingerprints = {client: self._key_of[node] for client, node in there.items()}
        sites = self._secure_sites(simulation, session, code, message, callback, spent)
        transcript = collect(session, fingerprints, code, sites)
        keep(dumped_transcript(transcript))
        return unmasked(transcript, code, sites)

    def revealed_sum(
        self, simulation: Simulation, transcript: bytes, code: FixedPoint, callback: Callback
    ) -> Sum:
        """Ask the sites of a session for their shares again (`masked_sum`)."""
        found = loaded_transcript(transcript, code)
        sites = self._secure_sites(simulation, found.session, code, _no_message, callback)
        return unmasked(found, code, sites)

    def _secure_sites(
        self,
        simulation: Simulation,
        session: Session,
        code: FixedPoint,
        message: Callable[[str], RoundMessage],
        callback: Callback,
        spent: Callable[[str, float], None] = lambda client, epsilon: None,
    ) -> SecureSites:
        """The sites of a session, which answer its stages through messages of Flower."""

        def visits(
            kind: str,
            what: str,
            clients: Sequence[str],
            content_for: Callable[[str], RecordDict],
            callback: Callback,
        ) -> Iterator[tuple[str, RecordDict]]:
            trains = kind == MESSAGE_TYPES["mask"]
            # A run that is stopped between the last stages would lose the sum, which sites give once.
            never = None if trains else lambda: False
            timeout = self._settings.timeout if trains else min(_SHORT_WAIT, self._settings.timeout)
            return self._visits(simulation, kind, what, clients, content_for, callback, timeout, never)

        return SecureSites(
            session=session, code=code, message=message, spent=spent, visits=visits, callback=callback
        )

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
        what = f"validation after round {simulation.server.round}"
        found = self._evaluations(simulation, what, message, callback)
        if simulation.validation and not found and simulation.test is None:
            raise FederationStoppedError(f"{what}: no client gave any metrics of the global model")
        return found

    def personal(
        self, simulation: Simulation, message: Callable[[str], RoundMessage], callback: Callback
    ) -> Mapping[str, Mapping[str, float]]:
        """Ask every client with validation rows for the metrics of its personal models.

        Other metrics are dropped: they would replace those of the last round.
        """
        found = self._evaluations(simulation, "personal models", message, callback)
        return {
            client: {name: value for name, value in one.metrics.items() if name.startswith((PERSONAL, TUNED))}
            for client, one in found.items()
        }

    def _evaluations(
        self,
        simulation: Simulation,
        what: str,
        message: Callable[[str], RoundMessage],
        callback: Callback,
    ) -> dict[str, Evaluation]:
        """The metrics that clients with validation rows send, checked, in the order of the clients."""
        server, found = simulation.server, {}
        rows = {client: len(held) for client, held in simulation.validation.items()}
        clients = list(simulation.validation)
        for client, content in self._visits(
            simulation, MessageType.EVALUATE, what, clients, _packed(message), callback
        ):
            try:
                metrics, reasons = checked_metrics(table(content, "metrics"))
                weight = self._weight(content, rows[client])
            except WireError as error:
                metrics, reasons, weight = {}, [str(error)], None
            else:
                server.delivered(client)
            if reasons:
                callback.on_note(
                    f"{what}: metrics of client {client} are not used: {listed(reasons, most=3)}"
                )
            if metrics:
                found[client] = Evaluation(metrics, weight=weight)
        return {client: found[client] for client in clients if client in found}

    def _weight(self, content: RecordDict, rows: int) -> float | None:
        """The number of tokens or words that a client's metrics are means over; None if rows are the units.

        Raises ``WireError`` if its rows cannot have that many.
        """
        if "evaluation" not in content.config_records:
            return None
        weight, most = table(content, "evaluation").get("weight"), rows * self._units_per_row
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight <= most:
            raise WireError(f"the weight of its metrics is not a number above 0 and at most {most}")
        return float(weight)

    def _visits(
        self,
        simulation: Simulation,
        kind: str,
        what: str,
        clients: Sequence[str],
        content_for: Callable[[str], RecordDict],
        callback: Callback,
        timeout: float | None = None,
        should_stop: Callable[[], bool] | None = None,
    ) -> Iterator[tuple[str, RecordDict]]:
        """Send contents to clients; yield the replies of those that are done, name the others in notes.

        ``timeout`` is ``flower.timeout`` unless given.
        """
        timeout = timeout or self._settings.timeout
        received = simulation.server.received
        waiting = {node: client for client, node in self.nodes_of(clients, callback).items()}
        # Made one at a time, as they are sent.
        contents = ((node, content_for(client)) for node, client in list(waiting.items()))
        behind: list[str] = []
        for client in clients:
            if client not in waiting.values():
                callback.on_note(f"{what}: client {client} is not connected and is left out")
        for node, content in self._ask(kind, contents, timeout, should_stop or simulation.should_stop):
            client = waiting.pop(node)
            callback.on_client_end(client)
            status = status_or_failed(content)
            if content is not None and status == "done":
                yield client, content
            elif status == "behind" and client in received:
                callback.on_note(f"client {client} lost its state: it is sent all server updates again")
                received.pop(client)
                behind.append(client)
            else:
                callback.on_note(f"{what}: client {client} {no_reply_reason(content)}")
        for client in waiting.values():
            callback.on_note(
                f"{what}: no reply of client {client} within {timeout:g} s"
                f"{' (flower.timeout)' if timeout == self._settings.timeout else ''}; it is left out"
            )
        if behind:
            yield from self._visits(
                simulation, kind, what, behind, content_for, callback, timeout, should_stop
            )

    def nodes_of(self, clients: Sequence[str], callback: Callback) -> dict[str, int]:
        """The nodes of those clients that are connected.

        New nodes are looked for where a client's node is gone; one that is started again may get a new id.
        """
        there = set(self._grid.get_node_ids())
        for client in clients:
            if self._node_of.get(client) not in there:
                self._node_of.pop(client, None)
        if any(client not in self._node_of for client in clients) and there - self._known:
            for problem in self._meet(min(_SHORT_WAIT, self._settings.timeout), callback.on_note):
                callback.on_note(f"not used: {problem}")
        return {client: self._node_of[client] for client in clients if client in self._node_of}

    def traffic(self, simulation: Simulation, callback: Callback) -> SitesInFlight:
        """The sites that train, in asynchronous rounds."""
        return SitesInFlight(self, simulation, callback, self._settings.timeout)

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
            if identity := self.send(kind, node, content, timeout):
                waiting[identity] = node
        while waiting:
            if should_stop():
                raise InterruptedRunError("stopped while waiting for clients")
            for identity, reply in self.replies(list(waiting)):
                yield waiting.pop(identity), reply
            if not waiting or time.monotonic() > deadline:
                return
            time.sleep(POLL)

    def send(self, kind: str, node: int, content: RecordDict, timeout: float) -> str | None:
        """Send contents to a node; the id of the message, None if Flower does not take it."""
        # A registered node can send a reply in the name of another one if it knows the id of the message
        # that it answers. The id is a hash of the message: with a random number, nobody can guess it.
        content["secret"] = ConfigRecord({"secret": secrets.token_hex(32)})
        identities = list(self._grid.push_messages([Message(content, node, kind, ttl=timeout)]))
        return identities[0] if identities and identities[0] else None

    def replies(self, identities: Sequence[str]) -> Iterator[tuple[str, RecordDict | None]]:
        """The replies that have arrived, pulled one at a time: one may be unreadable."""
        for identity in identities:
            for content in self._pulled(identity):
                yield identity, content

    def _pulled(self, identity: str) -> list[RecordDict | None]:
        """The contents of the replies to a message; None for an error, and for bytes that are no message."""
        try:
            return [
                None if reply.has_error() else reply.content for reply in self._grid.pull_messages([identity])
            ]
        except (httpx.HTTPError, OSError):  # of the connection to the SuperLink
            raise
        except Exception:  # Flower's decoding of a node's bytes raises errors of many kinds
            return [None]


def _no_message(client: str) -> RoundMessage:
    raise RuntimeError("the site has trained before")


def _packed(message: Callable[[str], RoundMessage]) -> Callable[[str], RecordDict]:
    """The records of the messages of a round."""
    return lambda client: to_records(pack(message(client)))


def _fingerprint(public_key: bytes) -> str:
    """The fingerprint of a node's key; ``none`` if the node was registered without one."""
    try:
        return fingerprint(public_key)
    except KeysError:
        return "none"
