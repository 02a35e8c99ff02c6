"""The engine that runs all clients in this process, one after the other, with one model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

from torch import Tensor

from fedsmoothlora.callbacks import Callback
from fedsmoothlora.errors import DivergedError, InterruptedRunError, LostStateError, SpentBudgetError
from fedsmoothlora.federation.client import Visit
from fedsmoothlora.federation.messages import Message
from fedsmoothlora.federation.records import ON_TEST, OWN
from fedsmoothlora.federation.simulation import ClientReply, Simulation
from fedsmoothlora.tasks.objectives.base import Evaluation

Answer = TypeVar("Answer")


class InProcess:
    """Runs clients one after the other in this process (`fedsmoothlora.federation.simulation.Engine`)."""

    in_turn = True

    def train(
        self,
        simulation: Simulation,
        clients: Sequence[str],
        message: Callable[[str], Message],
        callback: Callback,
    ) -> Iterator[ClientReply]:
        """Run one client after the other."""
        visits = _each(
            simulation, clients, callback, lambda client: visit(simulation, client, message(client), callback)
        )
        for client, visited in visits:
            yield ClientReply(client=client, reply=visited.reply, start=visited.start)

    def calibrate(
        self,
        simulation: Simulation,
        clients: Sequence[str],
        message: Callable[[str], Message],
        callback: Callback,
    ) -> Iterator[tuple[str, Mapping[str, Tensor]]]:
        """Compute the gradients of one client after the other."""

        def gradients(client: str) -> Mapping[str, Tensor]:
            state = simulation.states.load(client, callback)
            return simulation.learner.calibrate(
                client, simulation.clients[client], message(client), state, callback
            )

        yield from _each(simulation, clients, callback, gradients)

    def validate(
        self, simulation: Simulation, message: Callable[[str], Message], callback: Callback
    ) -> Mapping[str, Evaluation]:
        """Evaluate the model in its current state on each client's validation rows."""
        return {client: simulation.evaluate(rows) for client, rows in simulation.validation.items()}


def _each(
    simulation: Simulation, clients: Sequence[str], callback: Callback, ask: Callable[[str], Answer]
) -> Iterator[tuple[str, Answer]]:
    """The answers of clients in turn, without those of clients that diverge or have lost their state."""
    for client in clients:
        if simulation.should_stop():
            raise InterruptedRunError(
                f"stopped in round {simulation.server.round + 1}, before client {client}"
            )
        answer = answered(simulation, client, callback, ask)
        if answer is not None:
            yield client, answer


def answered(
    simulation: Simulation, client: str, callback: Callback, ask: Callable[[str], Answer]
) -> Answer | None:
    """The answer of a client; None, with a note, if it diverges or cannot take part."""
    t = simulation.server.round
    try:
        return ask(client)
    except DivergedError as error:
        callback.on_note(f"client {client} diverged in round {t + 1} and is left out: {error}")
    except (LostStateError, SpentBudgetError) as error:
        callback.on_note(f"client {client} sits out round {t + 1}: {error}")
    return None


def visit(simulation: Simulation, client: str, message: Message, callback: Callback) -> Visit:
    """Run one client's round: load its state, train, store its state, and evaluate its own model if needed.

    Raises:
        DivergedError, LostStateError, SpentBudgetError: as in `Learner.visit`; the client's state is not
            changed, but what it has released may be.
    """
    learner = simulation.learner
    state = simulation.states.load(client, callback)
    try:
        ledger = simulation.states.ledger(client) if learner.privacy.hides_rows else None
        visited = learner.visit(client, simulation.clients[client], message, state, callback, ledger)
    finally:
        callback.on_client_end(client)
    simulation.states.save(client, visited.state)
    if learner.privacy.hides_clients:
        return visited
    reply = visited.reply
    if not learner.method.traits.global_model and simulation.test is not None:
        # Without a global model, the round's metrics are means of these metrics.
        on_test = simulation.evaluate(simulation.test)
        reply = replace(
            reply, metrics={**reply.metrics, **{f"{ON_TEST}{n}": v for n, v in on_test.metrics.items()}}
        )
    measures_own = simulation.evaluate_clients or (
        simulation.test is None and not learner.method.traits.global_model
    )
    if measures_own and client in simulation.validation:
        # At this point the model is the client's own: its shifted backbone, its LoRA, its head.
        own = simulation.evaluate(simulation.validation[client])
        reply = replace(
            reply, metrics={**reply.metrics, **{f"{OWN}{name}": v for name, v in own.metrics.items()}}
        )
    return replace(visited, reply=reply)
