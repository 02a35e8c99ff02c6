"""Rounds with secure aggregation: the server learns the sum of the clients' uploads, and no upload.

A client sends ``w_c x_c`` and ``w_c`` as integers under masks that cancel in the sum over the clients
(`fedsmoothlora.secure_aggregation`). So the server has one mean of every tensor, and checks no single upload.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedsmoothlora.callbacks import Callback, NotesOnly
from fedsmoothlora.errors import (
    ConfigError,
    DivergedError,
    FederationStoppedError,
    LyingSitesError,
    NotFiniteError,
    StateError,
    TooFewSitesError,
)
from fedsmoothlora.federation.changes import under_head
from fedsmoothlora.federation.contributions import Contribution
from fedsmoothlora.federation.messages import Message, Reply
from fedsmoothlora.federation.participation import sample_clients
from fedsmoothlora.federation.records import Metric
from fedsmoothlora.federation.serialization import flatten
from fedsmoothlora.federation.simulation import BegunSum, KeptSum, Simulation
from fedsmoothlora.methods import Products
from fedsmoothlora.secure_aggregation.fixed_point import FixedPoint, Words
from fedsmoothlora.secure_aggregation.messages import Session

if TYPE_CHECKING:  # it imports Flower, which is optional
    from fedsmoothlora.secure_aggregation.session import Sum

# Sessions of one round before the run ends.
_ATTEMPTS = 3

# The clients of an attempt.
Draw = Callable[[int], Sequence[str]]


@runtime_checkable
class SumsUnderMask(Protocol):
    """An engine whose clients mask their uploads for each other."""

    def masked_sum(
        self,
        simulation: Simulation,
        session: Session,
        code: FixedPoint,
        message: Callable[[str], Message],
        callback: Callback,
        spent: Callable[[str, float], None],
        keep: Callable[[bytes], None],
    ) -> Sum:
        """Carry out a session, in which the clients train.

        Args:
            simulation: the federation.
            session: the session.
            code: the code of the clients' tensors.
            message: builds a client's message of the round, and counts its bytes.
            callback: notified of every client's round, and of the reason if a client is lost.
            spent: receives a client's epsilon, with ``privacy.unit = "sample"``.
            keep: stores the session's transcript, before the clients reveal shares.

        Raises:
            TooFewSitesError, LyingSitesError, ValueError: there is no sum.
            InterruptedRunError: the run was asked to stop.
        """
        ...

    def revealed_sum(
        self, simulation: Simulation, transcript: bytes, code: FixedPoint, callback: Callback
    ) -> Sum:
        """Ask the clients of a session for their shares again.

        Arguments and errors are those of `masked_sum`; ``transcript`` is the stored one.
        """
        ...


@dataclass
class MaskedUploads:
    """Collects the sum of a round's uploads. If too few clients remain, the round is repeated.

    Clients give one sum of a round only: two sums over different clients would show an upload. So a session
    is stored before its clients reveal shares, and its sum before it is used. A resumed run goes on with
    these.

    Attributes:
        simulation: the federation.
        t: the round.
        callback: notified of every step.
        total: the sum, after `collect`.
        starts: always empty, because diagnostics are refused.
    """

    simulation: Simulation
    t: int
    callback: Callback
    total: Contribution | None = None
    starts: list[Products] = field(default_factory=list)
    _sums: list[KeptSum] = field(default_factory=list)
    _cut: int = 0

    def collect(self) -> list[Reply]:
        """For every summed client a reply without tensors, ordered by client.

        Raises ``FederationStoppedError`` if too few clients remain in several attempts.
        """
        server = self.simulation.server
        kept = self._sum(0, self._drawn, server.message)
        if server.method.two_exchanges:
            assert self.total is not None
            first = kept
            server.begin_second_exchange(self.total, first.attempt)
            kept = self._sum(
                1,
                lambda attempt: first.summed,
                lambda client, attempt: server.second_message(client, first.attempt),
            )
        epsilons = self._sums[0].epsilons
        for client in self._sums[0].asked:
            if client in self._sums[0].summed:
                server.delivered(client)
            if client not in kept.summed:
                server.unanswered(client)
        return [
            Reply(
                client=client,
                experiment=server.experiment,
                round=self.t,
                attempt=self._sums[0].attempt,
                samples=1,
                sent={},
                metrics={"epsilon": epsilons[client]} if client in epsilons else {},
            )
            for client in kept.summed
        ]

    def metrics(self, accepted: Sequence[Reply]) -> list[Metric]:
        """The round's numbers of clients and bytes, and the largest epsilon; nothing of a single client.

        With ``privacy.unit = "client"`` there are none: each would tell something of who took part.
        """
        if self.simulation.learner.privacy.hides_clients:
            return []
        sums = self._sums
        values = {
            "clients": len(accepted),
            "left_out": len(sums[0].asked) - len(accepted),
            "refused": sum(one.refused for one in sums),
            "bytes_up": sum(len(one.summed) * one.numbers.nbytes for one in sums),
            "bytes_down": sum(one.sent for one in sums),
            "numbers_cut": self._cut,
        }
        epsilons = self.simulation.server.report_epsilons(accepted)
        return [*(Metric(None, name, value) for name, value in values.items()), *epsilons]

    def _sum(self, exchange: Literal[0, 1], draw: Draw, message: Callable[[str, int], Message]) -> KeptSum:
        """The sum of an exchange, stored before; or that of a session."""
        kept = self.simulation.sums.load(self.t, exchange)
        if kept is None:
            kept = self._new_sum(exchange, draw, message)
            self.simulation.sums.keep(kept)
        else:
            self._note("the sum of its uploads was stored before the run was stopped; no site is asked again")
        code = self._code(exchange, len(kept.asked))
        mean = code.decode(kept.numbers, len(kept.summed))
        self.total = Contribution(
            weight=1.0,
            tensors={name: torch.from_numpy(value) for name, value in mean.tensors.items()},
            rounding=code.rounding,
        )
        if mean.saturated:
            self._note(
                f"{mean.saturated} numbers of all uploads were above privacy.mask_range = "
                f"{self.simulation.learner.privacy.mask_range:g} and were cut to it; set it higher"
            )
        self._sums.append(kept)
        self._cut += mean.saturated
        return kept

    def _new_sum(
        self, exchange: Literal[0, 1], draw: Draw, message: Callable[[str, int], Message]
    ) -> KeptSum:
        """Hold sessions until one has a sum."""
        sums = self.simulation.sums
        for _ in range(_ATTEMPTS):
            try:
                begun = sums.begun(self.t, exchange)
                if begun is None:
                    return self._in_a_session(exchange, draw, message)
                self._note("its sites have masked their uploads before, and are asked for their shares again")
                code = self._code(exchange, len(begun.asked))
                found = self._engine.revealed_sum(self.simulation, begun.transcript, code, self.callback)
                return self._kept(begun, found)
            except LyingSitesError as error:
                raise FederationStoppedError(
                    f"round {self.t + 1}: {error}. So there is no sum, and sites that have revealed shares "
                    "take part in no other one of the round. Begin a new run without the site from the "
                    "exported model (docs/operations.md)"
                ) from None
            except StateError:  # a file of this run: no other session would mend it
                raise
            except (TooFewSitesError, ValueError) as error:
                self._note(f"there is no sum: {error}")
        raise FederationStoppedError(
            f"round {self.t + 1}: after {_ATTEMPTS} attempts there is no sum of enough sites "
            "(privacy.threshold); the notes above say which were lost. Go on with --resume once they are "
            "there. A site that has revealed shares takes part in no other sum of the round, so if sites are "
            "lost for good, begin a new run without them from the exported model (docs/operations.md)"
        )

    def _in_a_session(
        self,
        exchange: Literal[0, 1],
        draw: Draw,
        message: Callable[[str, int], Message],
    ) -> KeptSum:
        """The sum of a new session."""
        simulation, sent, epsilons = self.simulation, 0, dict[str, float]()
        attempt = simulation.sums.begin(self.t, exchange)
        clients = draw(attempt)
        asked = self._sums[0].asked if self._sums else clients
        session = Session(
            run=simulation.server.experiment,
            round=self.t,
            attempt=attempt,
            exchange=exchange,
            clients=tuple(sorted(clients)),
            threshold=simulation.learner.privacy.threshold_of(len(asked)),
        )

        def counted(client: str) -> Message:
            nonlocal sent
            made = message(client, attempt)
            sent += made.nbytes
            return made

        def begun(transcript: bytes) -> BegunSum:
            return BegunSum(
                round=self.t,
                exchange=exchange,
                attempt=attempt,
                asked=session.clients,
                sent=sent,
                epsilons=epsilons,
                transcript=transcript,
            )

        if not exchange:
            self.callback.on_round_begin(self.t, simulation.server.rounds, len(clients))
        found = self._engine.masked_sum(
            simulation,
            session,
            self._code(exchange, len(clients)),
            counted,
            self.callback if not exchange else NotesOnly(self.callback),
            epsilons.__setitem__,
            lambda transcript: simulation.sums.keep_begun(begun(transcript)),
        )
        return self._kept(begun(b""), found)

    def _kept(self, begun: BegunSum, found: Sum) -> KeptSum:
        wrong = {**found.refused, **found.lying}
        for client, reason in sorted(wrong.items()):
            self._note(f"client {client}: {reason}")
        return KeptSum(
            round=begun.round,
            exchange=begun.exchange,
            attempt=begun.attempt,
            asked=begun.asked,
            summed=found.summed,
            refused=len(wrong),
            sent=begun.sent,
            epsilons=begun.epsilons,
            numbers=found.total,
        )

    @property
    def _engine(self) -> SumsUnderMask:
        assert isinstance(self.simulation.engine, SumsUnderMask)  # `check_engine` was called
        return self.simulation.engine

    def _drawn(self, attempt: int) -> list[str]:
        """The clients of an attempt. The same may be asked again, because they were not summed."""
        simulation = self.simulation
        return sample_clients(
            list(simulation.clients),
            simulation.participation.count(len(simulation.clients)),
            simulation.learner.initial_state.seed,
            self.t,
            attempt,
        )

    def _code(self, exchange: Literal[0, 1], clients: int) -> FixedPoint:
        """The code of the round's tensors, of which ``clients`` are summed."""
        shapes = self.simulation.server.summed_shapes(exchange)
        privacy = self.simulation.learner.privacy
        return masked_code(shapes, privacy.largest_number, clients, privacy.weight_of(1))

    def _note(self, text: str) -> None:
        self.callback.on_note(f"round {self.t + 1}: {text}")


def check_engine(secure_aggregation: bool) -> None:
    """Raise ``ConfigError`` for secure aggregation in one process, which sees all uploads."""
    if secure_aggregation:
        raise ConfigError(
            "privacy.secure_aggregation = true: in one process there is nobody to hide uploads from; run it "
            "through Flower: fedsmoothlora run CONFIG --engine flower, or docs/deploy.md"
        )


def masked_code(
    shapes: Mapping[str, Iterable[int]], mask_range: float, clients: int, least_weight: float = 0.0
) -> FixedPoint:
    """The fixed-point code of tensors with these shapes, the same at all sites and at the coordinator.

    ``least_weight`` is the smallest weight of a client, which the coordinator checks.
    """
    names = sorted(shapes)
    return FixedPoint(
        shapes={name: tuple(shapes[name]) for name in names},
        bounds=dict.fromkeys(names, mask_range),
        clients=clients,
        least_weight=least_weight,
    )


def masked_numbers(
    reply: Reply, head: Mapping[str, Tensor] | None, mask_range: float, clients: int, weight: float
) -> Words:
    """The integers that a client masks in place of its reply.

    Args:
        reply: its reply.
        head: the head that the client was sent, whose change is summed; None if the reply has the change, as
            in the second exchange of a shared subspace.
        mask_range: the largest absolute value of a number.
        clients: the number of the session's clients.
        weight: ``w_c``, at most 1.

    Raises ``DivergedError`` if a number is not finite.
    """
    moved = dict(reply.head)
    if head is not None:
        moved = {name: value.float() - head[name].to(value.device).float() for name, value in moved.items()}
    tensors = {name: _array(value) for name, value in {**flatten(reply.sent), **under_head(moved)}.items()}
    code = masked_code({name: value.shape for name, value in tensors.items()}, mask_range, clients)
    try:
        return code.encode(tensors, max(weight, 1 / code.limit))
    except NotFiniteError as error:
        raise DivergedError(f"its upload is not finite: {error}") from None


def _array(tensor: Tensor) -> NDArray[np.floating[Any]]:
    return tensor.detach().cpu().double().numpy()
