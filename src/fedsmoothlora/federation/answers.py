"""Ask clients, and decide whether enough of them have answered; for synchronous and asynchronous rounds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from fedsmoothlora.callbacks import Callback
from fedsmoothlora.errors import FederationStoppedError
from fedsmoothlora.federation.messages import Message, Reply
from fedsmoothlora.federation.simulation import ClientReply, Simulation


def answers(
    simulation: Simulation,
    t: int,
    attempt: int,
    clients: Sequence[str],
    message: Callable[[str], Message],
    callback: Callback,
    *,
    exchange: int = 0,
) -> Iterator[ClientReply]:
    """The replies that were stored before the run was stopped, then those of the other clients.

    Args:
        simulation: the federation.
        t: the round.
        attempt: how often the round was repeated.
        clients: the clients to ask.
        message: builds a client's message and counts its bytes.
        callback: notified of every step.
        exchange: which exchange of the round the messages belong to.
    """
    kept = simulation.replies.load(t, attempt, callback.on_note, exchange=exchange)
    for client in clients:
        if client in kept:
            message(client)  # counts its bytes, as when the client replied
            callback.on_client_end(client)
            yield kept[client]
    left = [client for client in clients if client not in kept]
    if len(left) < len(clients):
        callback.on_note(
            f"round {t + 1}: {len(clients) - len(left)} of {len(clients)} clients had replied "
            "before the run was stopped, and are not trained again"
        )
    for answer in simulation.engine.train(simulation, left, message, callback) if left else ():
        simulation.replies.keep(answer)
        yield answer


def size(reply: Reply) -> int:
    """The size in bytes of a reply that was not checked; 0 if it has none."""
    try:
        return reply.nbytes
    except (AttributeError, TypeError):
        return 0


def fewest(simulation: Simulation) -> tuple[int, str]:
    """The fewest uploads with which a round is valid, and the setting that requires them."""
    if simulation.server.private is not None:
        return 0, ""
    settings = simulation.server.aggregation.settings
    uploads = simulation.uploads.min_clients
    if settings.fewest > uploads:
        return (
            settings.fewest,
            f"the {settings.fewest} that server.aggregation = {settings.aggregation!r} needs",
        )
    return uploads, f"uploads.min_clients = {uploads}"


def too_few(simulation: Simulation, t: int, attempts: int) -> FederationStoppedError:
    """The error for a round that has too few uploads after so many attempts, with advice."""
    training = simulation.learner.training
    _, reason = fewest(simulation)
    tries = [f"a smaller training.lr than {training.lr}"]
    tries += simulation.learner.method.divergence_advice()
    if training.max_grad_norm is None:
        tries.append("training.max_grad_norm = 1.0")
    return FederationStoppedError(
        f"round {t + 1}: after {attempts} {'attempt' if attempts == 1 else 'attempts'} no other clients are "
        f"left, and fewer uploads could be used than {reason}. "
        f"If clients diverged, try {', or '.join(tries)}"
    )
