"""The engine that runs all clients in this process, one after the other, with one model."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

from torch import Tensor

from fedsmoothlora.callbacks import Callback
from fedsmoothlora.errors import DivergedError, InterruptedRunError, LostStateError, SpentBudgetError
from fedsmoothlora.federation.messages import Message
from fedsmoothlora.federation.records import ON_TEST, OWN, PERSONAL, TUNED
from fedsmoothlora.federation.simulation import ClientReply, Simulation
from fedsmoothlora.federation.two_exchanges import completed
from fedsmoothlora.federation.visit import Visit
from fedsmoothlora.tasks.objectives.base import Evaluation
from fedsmoothlora.training.local import Visiting

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

    def personal(
        self, simulation: Simulation, message: Callable[[str], Message], callback: Callback
    ) -> Mapping[str, Mapping[str, float]]:
        """Evaluate the personal models of one client after the other."""
        return dict(
            _each(
                simulation,
                list(simulation.validation),
                callback,
                lambda client: personal_metrics(simulation, client, message(client), callback),
            )
        )


def _each(
    simulation: Simulation, clients: Sequence[str], callback: Callback, ask: Callable[[str], Answer]
) -> Iterator[tuple[str, Answer]]:
    """The answers of clients in turn, without those of clients that diverge or have lost their state."""
    for client in clients:
        if simulation.should_stop():
            raise stopped_before(simulation, client)
        answer = answered(simulation, client, callback, ask)
        if answer is not None:
            yield client, answer


def stopped_before(simulation: Simulation, client: str) -> InterruptedRunError:
    """The error of a run that was asked to stop before this client."""
    server = simulation.server
    when = "after the last round" if server.round == server.rounds else f"in round {server.round + 1}"
    return InterruptedRunError(f"stopped {when}, before client {client}")


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
    """Run one client's round, in which it trains by itself. Raises what `visiting` raises."""
    return simulation.learner.alone(visiting(simulation, client, message, callback, pauses=False))


def visiting(
    simulation: Simulation, client: str, message: Message, callback: Callback, *, pauses: bool = True
) -> Visiting[Visit]:
    """One client's round: load its state, train, evaluate its own model if needed, store its state.

    If the message is that of a round's second exchange, the client makes its second upload only.

    Args:
        simulation: the federation.
        client: the client.
        message: its message.
        callback: notified of every step.
        pauses: whether the round pauses where the client trains (`Learner.visiting`).

    Raises:
        DivergedError, LostStateError, SpentBudgetError: as in `Learner.visit`; the client's state is not
            changed, but what it has released may be.
    """
    learner, data = simulation.learner, simulation.clients[client]
    state = simulation.states.load(client, callback)
    if message.exchange:
        answer = learner.answer_second(client, data, message, state)
        simulation.states.save(client, answer.state)
        return answer
    message = completed(message, state) or replace(message, right={})  # the backbone has the update here
    try:
        ledger = simulation.states.ledger(client) if learner.privacy.hides_rows else None
        visited = (
            (yield from learner.visiting(client, data, message, state, callback, ledger))
            if pauses
            else learner.visit(client, data, message, state, callback, ledger)
        )
    finally:
        callback.on_client_end(client)
    found: dict[str, float] = {}
    if not learner.privacy.uploads_only:
        found = _own_metrics(simulation, client)
    if visited.at is not None:
        began = time.perf_counter()
        visited = learner.personal_client(client, data).after(visited, message, state, callback)
        if client in simulation.validation:
            found |= _prefixed(PERSONAL, simulation.evaluate(simulation.validation[client]))
        found["seconds_personal"] = time.perf_counter() - began
    simulation.states.save(client, visited.state)
    reply = visited.reply
    return replace(visited, reply=replace(reply, metrics={**reply.metrics, **found})) if found else visited


def personal_metrics(
    simulation: Simulation, client: str, message: Message, callback: Callback
) -> dict[str, float]:
    """The metrics of a client's personal models on its validation rows, after the federation.

    These are the models of ``[personal]`` and ``evaluation.personal_steps``, as far as they are set. The
    backbone must hold the final ``W^T``; the client's state does not change.
    """
    learner, data, rows = simulation.learner, simulation.clients[client], simulation.validation[client]
    found: dict[str, float] = {}
    if learner.personal.on:
        state = simulation.states.load(client, callback)
        learner.personal_client(client, data).load(message, state)
        found |= _prefixed(PERSONAL, simulation.evaluate(rows))
    if simulation.personal_steps is not None:
        try:
            learner.personal_client(client, data).fine_tune(message, simulation.personal_steps)
        except DivergedError as error:
            callback.on_note(f"client {client}: its fine-tuning of the final model diverged: {error}")
        else:
            found |= _prefixed(TUNED, simulation.evaluate(rows))
    return found


def _own_metrics(simulation: Simulation, client: str) -> dict[str, float]:
    """The metrics of the client's own model, which the model is after its training."""
    own = not simulation.learner.method.traits.global_model
    found: dict[str, float] = {}
    if own and simulation.test is not None:
        # Without a global model, the round's metrics are means of these metrics.
        found |= _prefixed(ON_TEST, simulation.evaluate(simulation.test))
    if (simulation.evaluate_clients or (simulation.test is None and own)) and client in simulation.validation:
        # At this point the model is the client's own: its shifted backbone, its LoRA, its head.
        found |= _prefixed(OWN, simulation.evaluate(simulation.validation[client]))
    return found


def _prefixed(prefix: str, evaluation: Evaluation) -> dict[str, float]:
    return {f"{prefix}{name}": value for name, value in evaluation.metrics.items()}
