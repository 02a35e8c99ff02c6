"""The engine that trains several clients in one forward pass, in this process and with one model.

The clients of a group are visited one after the other up to their training, then trained together
(`fedsmoothlora.training.lockstep`), and then finish their visits one after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from functools import partial

from fedsmoothlora.callbacks import Callback
from fedsmoothlora.errors import DivergedError
from fedsmoothlora.federation.engines.in_process import InProcess, answered, stopped_before, visiting
from fedsmoothlora.federation.messages import Message
from fedsmoothlora.federation.simulation import ClientReply, Simulation
from fedsmoothlora.federation.visit import Visit
from fedsmoothlora.training.local import LocalTraining, Trained, Visiting
from fedsmoothlora.training.lockstep import Lockstep

# A visit that has begun, with the training for which it pauses, or its result if it has ended.
Begun = tuple[Visiting[Visit], LocalTraining | Visit]


class Batched(InProcess):
    """Trains ``clients`` clients at a time together (`fedsmoothlora.federation.simulation.Engine`).

    All else, such as evaluations and personal models, is computed for one client after the other.

    Args:
        clients: ``machine.batch_clients``.
    """

    def __init__(self, clients: int) -> None:
        self.clients = clients
        self._lockstep: Lockstep | None = None

    def train(
        self,
        simulation: Simulation,
        clients: Sequence[str],
        message: Callable[[str], Message],
        callback: Callback,
    ) -> Iterator[ClientReply]:
        """Run groups of clients, in the order of the clients."""
        for first in range(0, len(clients), self.clients):
            with ExitStack() as stack:
                group = clients[first : first + self.clients]
                visits = self._begun(simulation, group, message, callback, stack)
                yield from self._finished(simulation, visits, callback)

    def _begun(
        self,
        simulation: Simulation,
        clients: Sequence[str],
        message: Callable[[str], Message],
        callback: Callback,
        stack: ExitStack,
    ) -> dict[str, Begun]:
        """The visits of a group, up to the clients' training; without clients that cannot take part.

        ``stack`` closes visits that do not end, so that the callback is notified of the end of their clients.
        """
        visits: dict[str, Begun] = {}
        for client in clients:
            if simulation.should_stop():
                raise stopped_before(simulation, client)
            visit = stack.enter_context(closing(visiting(simulation, client, message(client), callback)))
            begun = answered(simulation, client, callback, partial(_begin, visit))
            if begun is not None:
                visits[client] = (visit, begun)
        return visits

    def _finished(
        self,
        simulation: Simulation,
        visits: dict[str, Begun],
        callback: Callback,
    ) -> Iterator[ClientReply]:
        """The replies of a group, whose clients train together."""
        wanted = [begun for _, begun in visits.values() if isinstance(begun, LocalTraining)]
        found = iter(self._trainer(simulation).train(wanted) if wanted else ())
        for client, (visit, begun) in visits.items():
            visited = (
                answered(simulation, client, callback, partial(_end, visit, next(found)))
                if isinstance(begun, LocalTraining)
                else begun
            )
            if visited is not None:
                yield ClientReply(client=client, reply=visited.reply, start=visited.start)

    def _trainer(self, simulation: Simulation) -> Lockstep:
        if self._lockstep is None:
            learner = simulation.learner
            self._lockstep = Lockstep(
                learner.model,
                learner.training,
                learner.accelerator,
                pads_left=getattr(learner.objective, "pads_left", False),
            )
        return self._lockstep


def _begin(visit: Visiting[Visit], client: str) -> LocalTraining | Visit:
    """Run a visit up to the client's training, or to its end if it is one without (a second exchange)."""
    try:
        return next(visit)
    except StopIteration as end:
        found: Visit = end.value
        return found


def _end(visit: Visiting[Visit], trained: Trained | DivergedError, client: str) -> Visit:
    """Finish a visit after the client's training."""
    try:
        if isinstance(trained, DivergedError):
            visit.throw(trained)
        else:
            visit.send(trained)
    except StopIteration as end:
        found: Visit = end.value
        return found
    raise RuntimeError("a client trains once in a round")
