"""No message to a client contains a direction of a single client's upload, up to scale."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from fedsmoothlora.algebra.lowrank import LowRank
from fedsmoothlora.algebra.update import Update
from fedsmoothlora.federation.messages import Reply
from fedsmoothlora.federation.simulation import Simulation
from fedsmoothlora.methods.registry import names

Make = Callable[..., Simulation]


# In fewer dimensions, two random vectors may be parallel by chance.
LONG = 16


def directions(update: Update) -> Iterator[Tensor]:
    """Columns of ``B``, rows of ``A``, and columns and rows of plain tensors, as unit vectors."""
    for value in update.values():
        factors = (value.B.mT, value.A) if isinstance(value, LowRank) else (value.mT, value)
        for rows in factors:
            if rows.shape[1] >= LONG:
                kept = rows[torch.linalg.vector_norm(rows, dim=1) > 0].double()
                yield torch.nn.functional.normalize(kept, dim=1)


def similarity(sent: Update, uploaded: Update) -> float:
    """The largest ``|cosine|`` between a direction of one and a direction of the other."""
    found = [
        float((one @ other.mT).abs().max())
        for one in directions(sent)
        for other in directions(uploaded)
        if one.shape[1] == other.shape[1] and len(one) and len(other)
    ]
    return max(found, default=0.0)


def replies(simulation: Simulation, generator: torch.Generator) -> list[Reply]:
    """Replies of all clients with random uploads."""
    server = simulation.server
    samples = {client: 10 + index for index, client in enumerate(simulation.clients)}
    spec = server.reply_spec(samples)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    def upload() -> Update:
        products = {
            name: LowRank(random(layer.m, layer.rank), random(layer.rank, layer.n))
            for name, layer in spec.products.items()
        }
        return {**products, **{name: random(*shape) for name, shape in spec.tensors.items()}}

    return [
        Reply(
            client=client,
            experiment=spec.experiment,
            round=spec.round,
            attempt=0,
            samples=samples[client],
            sent=upload(),
            head={name: random(*value.shape) for name, value in spec.head.items()},
            metrics={"train_loss": 1.0},
        )
        for client in simulation.clients
    ]


@pytest.mark.parametrize("method", [name for name in names() if name != "local"])
def test_no_message_holds_a_direction_of_one_client(method: str, toy_federation: Make) -> None:
    options: dict[str, Any] = {"method.name": method}
    simulation = toy_federation(options)
    server, generator = simulation.server, torch.Generator().manual_seed(0)
    uploaded: list[Update] = []
    for _ in range(2):
        answers = replies(simulation, generator)
        uploaded += [answer.sent for answer in answers]
        server.aggregate(answers)
        for client in (*simulation.clients, "newcomer"):
            message = server.message(client)
            for sent in (message.updates, message.lora):
                assert max(similarity(sent, one) for one in uploaded) < 0.999
        for client in simulation.clients:
            server.delivered(client)


def test_stacked_factors_would_be_found() -> None:
    generator = torch.Generator().manual_seed(0)
    one, other = (
        LowRank(torch.randn(19, 2, generator=generator), torch.randn(2, 17, generator=generator))
        for _ in range(2)
    )
    stacked = LowRank.weighted_sum([one, other], [0.25, 0.75])
    refactored = stacked.truncate(None)

    assert similarity({"layer": stacked}, {"layer": one}) > 0.999
    assert similarity({"layer": refactored}, {"layer": one}) < 0.999
    assert torch.allclose(refactored.dense(), stacked.dense(), atol=1e-5)
