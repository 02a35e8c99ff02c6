"""A trained model as the exact delta of every adapted layer, and the head."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain

import torch
from torch import Tensor

from fedsmoothlora.algebra.coding import decoded
from fedsmoothlora.algebra.lowrank import LowRank
from fedsmoothlora.errors import NotKeptError
from fedsmoothlora.federation.client_state import ClientState
from fedsmoothlora.federation.personal import Deviation
from fedsmoothlora.federation.server import Server
from fedsmoothlora.methods import ClientView, Layer, Products, Update
from fedsmoothlora.modeling.backbone import add_exactly

# The largest share of a sum's first singular value that float32 factors cannot tell from 0.
_ROUNDING = torch.finfo(torch.float32).eps


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A trained model as its difference from the pretrained one.

    Attributes:
        deltas: ``W - W^0 = s (S^0 + S^1 + ... + LoRA)`` of the layers that training changed, exactly:
            a product (the updates' factors side by side), or dense; float64, with the scale ``s`` in it.
        head: the parameters of a head that was trained whole.
        client: the client whose own model it is; None for the global model.
    """

    deltas: Mapping[str, LowRank | Tensor]
    head: Mapping[str, Tensor] = field(default_factory=dict)
    client: str | None = None


@dataclass(frozen=True)
class Compressed:
    """A delta as one LoRA product.

    Attributes:
        product: float32 factors; the scale is in them.
        exact_rank: the rank of the whole delta.
        relative_error: ``||delta - product|| / ||delta||`` in the Frobenius norm.
    """

    product: LowRank
    exact_rank: int
    relative_error: float


def global_model(server: Server) -> Trained:
    """The global model: the sum of all updates, and of the LoRA that the method keeps, if any.

    Raises ``NotKeptError`` for a method without a global model.
    """
    method = server.method
    if not method.traits.global_model:
        known = ", ".join(sorted(server.accepted)[:10]) or "nobody has taken part yet"
        raise NotKeptError(
            f"method {method.name!r} has no global model: say whose own model you want (client: {known})"
        )
    return Trained(deltas=_sum(chain(_merged(server), [server.model]), server), head=server.head)


def client_model(server: Server, client: str, state: ClientState) -> Trained:
    """A client's own model, from its state after its last accepted round ``tau``.

    Without a global model, it is the model from which the client would continue: its own factors, combined
    with the server's if one is shared, and its head. For methods whose clients keep their upload, it is
    ``W^tau + s U_c`` with the head of that round. ``U_c`` is the result of the client's training, truncated
    to the rank of an upload.

    With ``[personal]``, it is the client's personal model: the final global model and the client's deviation.

    Args:
        server: the server as it was at the checkpoint.
        client: the client's id.
        state: the client's state.

    Raises:
        NotKeptError: the client is unknown or was never part of a round, its state is lost, or clients
            of this method keep no model of their own.
    """
    method, accepted = server.method, server.accepted.get(client, -1)
    if accepted < 0:
        there = ", ".join(sorted(server.accepted)[:10]) or "none"
        raise NotKeptError(
            f"client {client!r} has no model of its own: no upload of it counted in the rounds so far; "
            f"clients whose uploads did: {there}"
        )
    personal = Deviation.kept_in(state.uploads.get(accepted, {}))
    if personal.lora or personal.head:
        head = {name: value + personal.head[name].to(value) for name, value in server.head.items()}
        updates = chain(_merged(server), [server.model, personal.lora])
        return Trained(deltas=_sum(updates, server), head=head, client=client)
    if method.traits.global_model and not method.traits.keeps_upload:
        raise NotKeptError(
            f"client {client!r} has no model of its own: clients of method {method.name!r} start every round "
            "from the server's model; export that one"
        )
    kept = state.uploads.get(accepted)
    if kept is None:
        raise NotKeptError(
            f"client {client!r}: its state after round {accepted + 1} is lost, and with it its own model"
        )
    missing = [name for name in server.head if name not in kept]
    if method.traits.keeps_upload:
        own: list[Update] = [{name: kept[name] for name in server.layers}]
        updates = chain(_merged(server, before=accepted), own)
    else:
        updates = chain(_merged(server), _start(server, client, kept, accepted))
        if method.traits.shares_head:
            kept, missing = {**kept, **server.head}, []
    if missing:
        raise NotKeptError(f"client {client!r}: its own head ({', '.join(missing)}) was not kept by this run")
    head = {name: value for name in server.head if isinstance(value := kept[name], Tensor)}
    return Trained(deltas=_sum(updates, server), head=head, client=client)


def compress(delta: LowRank | Tensor, rank: int | None = None) -> Compressed:
    """A delta as one product: exact, or of the best rank-``rank`` approximation (Eckart-Young).

    The exact rank does not count singular directions below float32's rounding of the first one. So a sum of
    updates that share directions, or cancel, is compressed to its actual rank.

    Args:
        delta: as in `Trained`.
        rank: the highest rank; ``None`` for the exact one.
    """
    whole = LowRank.from_dense(delta) if isinstance(delta, Tensor) else delta.truncate(None)
    sigma = whole.B.square().sum(dim=0)  # balanced factors: each column of B has norm sqrt(sigma)
    # If all updates cancel, only rounding errors relative to their own size are left.
    size = 0.0 if isinstance(delta, Tensor) else float(delta.B.norm() * delta.A.norm())
    noise = 8 * torch.finfo(sigma.dtype).eps * size
    exact = int((sigma > torch.clamp(_ROUNDING * sigma[:1], min=noise)).sum())
    kept = exact if rank is None else min(rank, exact)
    product = LowRank(whole.B[:, :kept], whole.A[:kept]).to(dtype=torch.float32)
    norm = float(torch.linalg.vector_norm(sigma[:exact]))
    error = float(torch.linalg.vector_norm(sigma[kept:exact])) / norm if norm else 0.0
    return Compressed(product, exact, error)


def _merged(server: Server, before: int | None = None) -> Iterator[Update]:
    """``S^0 ... S^{before-1}``, one in memory at a time; all updates unless ``before`` is given."""
    return (decoded(server.updates[t]) for t in range(server.round if before is None else before))


def _sum(updates: Iterable[Update], server: Server) -> dict[str, LowRank | Tensor]:
    """The sum of updates by layer, times the layer's scale, in float64."""
    total: dict[str, LowRank | Tensor] = {}
    for update in updates:
        for name, value in update.items():
            exact = value.to(device="cpu", dtype=torch.float64)
            total[name] = add_exactly(total.get(name), exact, server.layers[name])
    return {name: total[name] * layer.scale for name, layer in server.layers.items() if name in total}


def _start(server: Server, client: str, kept: Update, accepted: int) -> tuple[Products, Products]:
    """Shift and LoRA of the client's next start."""

    def gradients(at: Products) -> Mapping[str, Tensor]:
        raise NotKeptError(f"method {server.method.name!r} starts from gradients, which are not stored")

    def generator(layer: str) -> torch.Generator:
        raise NotKeptError(f"method {server.method.name!r} draws new starts in every round")

    layers: Mapping[str, Layer] = server.layers
    start = server.method.start(
        ClientView(
            round=server.round,
            rounds=server.rounds,
            layers=layers,
            server_lora=_server_lora(server, client),
            kept=kept,
            kept_round=accepted,
            received={},
            gradients=gradients,
            initial=server.initial_state.initial,
            orthonormal=server.initial_state.orthonormal,
            generator=generator,
            pretrained=server.initial_state.pretrained,
            prepared=server.initial_state.prepared,
        )
    )
    return start.shift, start.lora


def _server_lora(server: Server, client: str) -> Update:
    """The LoRA that the client would be sent next, as it decodes it."""
    message, transport = server.message(client), server.transport
    return transport.decoded(server.whole_lora() if transport.packs else message.lora)
