"""Rounds with secure aggregation: the server learns the sum of the clients' uploads, and no upload.

A client sends ``w_c x_c`` and ``w_c`` as integers under masks that cancel in the sum over the clients
(`fedsmoothlora.secure_aggregation`). So the server has one mean of every tensor, and checks no single upload.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedsmoothlora.callbacks import Callback
from fedsmoothlora.errors import (
    ConfigError,
    DivergedError,
    FederationStoppedError,
    LyingSitesError,
    NotFiniteError,
    TooFewSitesError,
)
from fedsmoothlora.federation.changes import under_head
from fedsmoothlora.federation.contributions import Contribution
from fedsmoothlora.federation.messages import Message, Reply
from fedsmoothlora.federation.participation import sample_clients
from fedsmoothlora.federation.records import Metric
from fedsmoothlora.federation.serialization import flatten
from fedsmoothlora.federation.simulation import KeptSum, Simulation
from fedsmoothlora.methods import Products
from fedsmoothlora.secure_aggregation.fixed_point import FixedPoint, Words
from fedsmoothlora.secure_aggregation.messages import Session

if TYPE_CHECKING:  # it imports Flower, which is optional
    from fedsmoothlora.secure_aggregation.session import Sum

# Sessions of one round before the run ends.
_ATTEMPTS = 3


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
    ) -> Sum:
        """Carry out a session, in which the clients train.

        Args:
            simulation: the federation.
            session: the session.
            code: the code of the clients' tensors.
            message: builds a client's message of the round, and counts its bytes.
            callback: notified of every client's round, and of the reason if a client is lost.

        Raises:
            TooFewSitesError, LyingSitesError, ValueError: there is no sum.
            InterruptedRunError: the run was asked to stop.
        """
        ...


@dataclass
class MaskedUploads:
    """Collects the sum of a round's uploads. If too few clients remain, the round is repeated.

    A sum is stored before it is used, and clients give no second one of the same round: two sums over
    different clients would show an upload. So a resumed run begins with the stored sum.

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
    _kept: KeptSum | None = None
    _attempt: int = 0
    _sent: int = 0
    _cut: int = 0

    def collect(self) -> list[Reply]:
        """For every summed client a reply without tensors, ordered by client.

        Raises ``FederationStoppedError`` if too few clients remain in several attempts.
        """
        simulation, server = self.simulation, self.simulation.server
        kept = simulation.sums.load(self.t)
        if kept is None:
            kept = self._new_sum()
            simulation.sums.keep(kept)
        else:
            self._note("the sum of its uploads was stored before the run was stopped; no site is asked again")
        mean = self._code(len(kept.asked)).decode(kept.numbers)
        self._kept, self._cut = kept, mean.saturated
        self.total = Contribution(
            weight=1.0, tensors={name: torch.from_numpy(value) for name, value in mean.tensors.items()}
        )
        if mean.saturated:
            self._note(
                f"{mean.saturated} numbers of all uploads were above privacy.mask_range = "
                f"{simulation.learner.privacy.mask_range:g} and were cut to it; set it higher"
            )
        for client in kept.asked:
            if client in kept.summed:
                server.delivered(client)
            else:
                server.unanswered(client)
        return [
            Reply(
                client=client,
                experiment=server.experiment,
                round=self.t,
                attempt=kept.attempt,
                samples=1,
                sent={},
            )
            for client in kept.summed
        ]

    def metrics(self, accepted: Sequence[Reply]) -> list[Metric]:
        """The round's numbers of clients and bytes; nothing of a single client."""
        kept = self._kept
        assert kept is not None  # `collect` was called
        values = {
            "clients": len(kept.summed),
            "left_out": len(kept.asked) - len(kept.summed),
            "refused": kept.refused,
            "bytes_up": len(kept.summed) * kept.numbers.nbytes,
            "bytes_down": kept.sent,
            "numbers_cut": self._cut,
        }
        return [Metric(None, name, value) for name, value in values.items()]

    def _new_sum(self) -> KeptSum:
        """Hold sessions until one has a sum."""
        simulation, lying = self.simulation, set[str]()
        for _ in range(_ATTEMPTS):
            self._attempt, self._sent = simulation.sums.begin(self.t), 0
            session = self._session(lying)
            self.callback.on_round_begin(self.t, simulation.server.rounds, len(session.clients))
            try:
                found = self._engine.masked_sum(
                    simulation, session, self._code(len(session.clients)), self._message, self.callback
                )
            except LyingSitesError as error:
                lying |= error.sites.keys()
                self._note(f"there is no sum: {error}")
            except (TooFewSitesError, ValueError) as error:
                self._note(f"there is no sum: {error}")
            else:
                for client, reason in sorted({**found.refused, **found.lying}.items()):
                    self._note(f"client {client}: {reason}")
                return KeptSum(
                    round=self.t,
                    attempt=self._attempt,
                    asked=session.clients,
                    summed=found.summed,
                    refused=len({**found.refused, **found.lying}),
                    sent=self._sent,
                    numbers=found.total,
                )
        raise FederationStoppedError(
            f"round {self.t + 1}: after {_ATTEMPTS} attempts there is no sum of at least "
            f"{session.threshold} sites (privacy.threshold); the notes above say which sites were lost. A "
            "site that has revealed shares takes part in no other attempt of the round. Run again with "
            "--resume once enough other sites are there, or begin a new run from the exported model"
        )

    @property
    def _engine(self) -> SumsUnderMask:
        assert isinstance(self.simulation.engine, SumsUnderMask)  # `check_engine` was called
        return self.simulation.engine

    def _session(self, lying: set[str]) -> Session:
        simulation, privacy = self.simulation, self.simulation.learner.privacy
        clients = sample_clients(
            list(simulation.clients),
            simulation.participation.count(len(simulation.clients)),
            simulation.learner.initial_state.seed,
            self.t,
            self._attempt,
            lying,
        )
        try:
            privacy.check_session(len(clients))
        except ConfigError as error:
            raise FederationStoppedError(
                f"round {self.t + 1}: without {', '.join(sorted(lying))}, which lied: {error}"
            ) from None
        return Session(
            run=simulation.server.experiment,
            round=self.t,
            attempt=self._attempt,
            clients=tuple(sorted(clients)),
            threshold=privacy.threshold_of(len(clients)),
        )

    def _message(self, client: str) -> Message:
        made = self.simulation.server.message(client, self._attempt)
        self._sent += made.nbytes
        return made

    def _code(self, clients: int) -> FixedPoint:
        """The code of the round's tensors, of which ``clients`` are summed."""
        shapes = self.simulation.server.summed_shapes()
        return masked_code(shapes, self.simulation.learner.privacy.mask_range, clients)

    def _note(self, text: str) -> None:
        self.callback.on_note(f"round {self.t + 1}: {text}")


def check_engine(secure_aggregation: bool) -> None:
    """Raise ``ConfigError`` for secure aggregation in one process, which sees all uploads."""
    if secure_aggregation:
        raise ConfigError(
            "privacy.secure_aggregation = true: in one process there is nobody to hide uploads from; run it "
            "through Flower: fedsmoothlora run CONFIG --engine flower, or docs/deploy.md"
        )


def masked_code(shapes: Mapping[str, Iterable[int]], mask_range: float, clients: int) -> FixedPoint:
    """The fixed-point code of tensors with these shapes, the same at all sites and at the coordinator."""
    names = sorted(shapes)
    return FixedPoint(
        shapes={name: tuple(shapes[name]) for name in names},
        bounds=dict.fromkeys(names, mask_range),
        clients=clients,
    )


def masked_numbers(
    reply: Reply, head: Mapping[str, Tensor], mask_range: float, clients: int, weight: float
) -> Words:
    """The integers that a client masks in place of its reply.

    Args:
        reply: its reply, whose head is a trained one.
        head: the head that the client was sent. The head's change is summed.
        mask_range: ``privacy.mask_range``.
        clients: the number of the session's clients.
        weight: ``w_c``, at most 1.

    Raises ``DivergedError`` if a number is not finite.
    """
    moved = {name: value.float() - head[name].to(value.device).float() for name, value in reply.head.items()}
    tensors = {name: _array(value) for name, value in {**flatten(reply.sent), **under_head(moved)}.items()}
    code = masked_code({name: value.shape for name, value in tensors.items()}, mask_range, clients)
    try:
        return code.encode(tensors, max(weight, 1 / code.limit))
    except NotFiniteError as error:
        raise DivergedError(f"its upload is not finite: {error}") from None


def _array(tensor: Tensor) -> NDArray[np.floating[Any]]:
    return tensor.detach().cpu().double().numpy()
