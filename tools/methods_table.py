"""Write docs/methods.md: what each method shares, sends and keeps, from its code and a tiny federation."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from fedsmoothlora import methods
from fedsmoothlora.callbacks import Callback
from fedsmoothlora.config.model import Sections
from fedsmoothlora.data.own import OwnExamples
from fedsmoothlora.federation.assembly import Participants, assemble
from fedsmoothlora.federation.client import Learner
from fedsmoothlora.federation.client_state import ClientState
from fedsmoothlora.federation.messages import Message, Reply
from fedsmoothlora.federation.server import Server
from fedsmoothlora.methods import Coded, Layer, Method, Update
from fedsmoothlora.methods.fedsmoothlora import FedSmoothLoRA
from fedsmoothlora.modeling.adapters import AdaptedModel
from fedsmoothlora.modeling.settings import LoraSettings
from fedsmoothlora.tasks.objectives import Classification
from fedsmoothlora.training.settings import TrainingSettings

_FLOAT = 4
_ROUNDS = 4
_MEASURED = (2, 3)
_CLIENTS = 3
_RANK = 2
_SHAPE = (40, 30)  # out, in: not square, and large enough that factors are smaller than the matrix

_PICTURE = """\
![Bytes of a round against bytes of state, by method](methods.svg)

The picture shows the same federation: the bytes of a round, up and down, against the bytes that one client
and the server keep after 4 rounds. Merged updates are kept, so the state of methods that merge grows with the
rounds. Dots side by side have the same place."""

# How many numbers an upload has, and which part of the layer it is.
_UP = {"product": "r*(m + n)", "B": "r*m", "A": "r*n", "R": "r*r", "W": "m*n", "nothing": "0"}
_SHARED = {"product": "`B` and `A`", "B": "`B`", "A": "`A`", "R": "`R`", "W": "`W`", "nothing": "nothing"}

_COSTS = (
    *("method", "shared", "numbers up", "numbers down", "bytes up", "bytes down"),
    *("state of a client", "state of the server"),
)
_ABILITIES = (
    *("method", "source", "global model", "partial participation", "asynchronous rounds", "different ranks"),
    *(
        "server optimiser applies to",
        "SCAFFOLD",
        "bfloat16 transport",
        "client-level privacy noises",
        "sample-level privacy",
        "secure aggregation",
        "limitation",
    ),
)
_STEPS = {
    "merge": "the merged update",
    "factors": "the averaged factors",
    "product": "the product of the averaged LoRA",
    None: "nothing",
}

_INTRODUCTION = """\
# Methods

This page is written by `make docs`, and a test compares it with the code.

The formulas count the numbers that are sent per adapted layer and client in a round after the first, for a
client that takes part in every round. A layer has `m` output and `n` input features and rank `r`; a round
has `C` clients; `k` is a rank that depends on the uploads, and `d` the rank of each of `r / d` heads. Each
number has four bytes. With `transport.bits = 16`, the numbers of factors have two bytes, and those of dense
matrices and compressed sums four. With 8 bits or fewer, a product of rank `r` has `r*(m + n)*bits/8 + 4*r`
bytes, and a single factor 2 bytes per direction beside its integers. `/` separates even and odd rounds,
from round 0. A head that is trained whole is added in both directions. No merged update is larger than the
dense `m n`.

The bytes were measured with {clients} clients and one layer of {m} x {n} at rank {rank}, in the messages of
rounds {first} and {last}. They agree with the formulas."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Measurements of a tiny federation of one method, in its last two rounds.

    Attributes:
        up: bytes of a client's upload, by round.
        down: bytes of a message to a client, by round.
        ranks: ``k``, the rank of the merged update in each message; 0 where nothing is merged.
        kept: the method's own state of a client, by round.
        state: the client's whole state after the last round.
        server: the server after the last round.
    """

    up: Sequence[int]
    down: Sequence[int]
    ranks: Sequence[int]
    kept: Sequence[Update]
    state: ClientState
    server: Server


def document() -> str:
    """The text of docs/methods.md.

    Raises ``ValueError`` if the bytes that a method sends do not agree with its formula.
    """
    costs = [_row(*_COSTS), _row(*["---"] * len(_COSTS))]
    abilities = [_row(*_ABILITIES), _row(*["---"] * len(_ABILITIES))]
    for name in methods.names():
        method = methods.find(name)()
        up, down = formula_up(method), method.numbers_down
        measured = measure(method)
        for what, formula, found in (("up", up, measured.up), ("down", down, measured.down)):
            wanted = computed(formula, *_SHAPE, measured.ranks)
            if list(found) != wanted:
                raise ValueError(f"{name} sends {list(found)} bytes {what}; {formula} would be {wanted}")
        costs.append(
            _row(
                f"`{name}`",
                _either(_SHARED[method.sends(t)] for t in _MEASURED),
                _readable(up),
                _readable(down),
                _either(measured.up),
                _either(measured.down),
                _kept_by_client(measured),
                _kept_by_server(measured),
            )
        )
        abilities.append(
            _row(
                f"`{name}`",
                source(method.summary()),
                _yes(method.traits.global_model),
                _yes(_takes_partial(method)),
                _yes(method.traits.asynchronous),
                _yes(method.traits.client_ranks),
                _STEPS[method.traits.step_on],
                _yes(method.traits.stable_parameters),
                _yes(not method.traits.float32_reason),
                _noised(method),
                _hides_rows(method),
                _sums(method),
                method.limitation,
            )
        )
    introduction = _INTRODUCTION.format(
        clients=_CLIENTS, m=_SHAPE[0], n=_SHAPE[1], rank=_RANK, first=_ROUNDS - 2, last=_ROUNDS - 1
    )
    parts = [introduction, "## Communication and state", _PICTURE, "\n".join(costs)]
    parts += ["## Properties", "\n".join(abilities)]
    return "\n\n".join(parts) + "\n"


def formula_up(method: Method) -> str:
    """The formula of an upload's size, from `Method.sends` unless the method has its own."""
    return method.numbers_up or " / ".join(dict.fromkeys(_UP[method.sends(t)] for t in _MEASURED))


def computed(formula: str, m: int, n: int, ranks: Sequence[int]) -> list[int]:
    """Bytes of the last two rounds by a formula; ``/`` separates even and odd rounds.

    Args:
        formula: the formula.
        m: output features.
        n: input features.
        ranks: ``k`` of both rounds.
    """
    trees = [ast.parse(part, mode="eval").body for part in formula.split(" / ")]
    values = {"m": m, "n": n, "r": _RANK, "C": _CLIENTS, "d": _RANK // 2}
    return [
        _FLOAT * _number(trees[t % len(trees)], {**values, "k": k})
        for t, k in zip(_MEASURED, ranks, strict=True)
    ]


def _number(formula: ast.expr, values: Mapping[str, int]) -> int:
    """Evaluate a formula of ``+``, ``-``, ``*`` and ``min`` over whole numbers; nothing else is allowed."""
    match formula:
        case ast.Constant(value=int(value)):
            return value
        case ast.Name(id=name):
            return values[name]
        case ast.BinOp(left=left, op=op, right=right):
            operations = {ast.Add: int.__add__, ast.Sub: int.__sub__, ast.Mult: int.__mul__}
            return operations[type(op)](_number(left, values), _number(right, values))
        case ast.Call(func=ast.Name(id="min"), args=arguments):
            return min(_number(argument, values) for argument in arguments)
    raise ValueError(f"not a formula: {ast.unparse(formula)}")


def source(summary: str) -> str:
    """The paper that a method's summary names."""
    found = re.search(r"\(([^)]*(?:arXiv|ICLR)[^)]*)\)", summary)
    return found[1] if found else "–"


def measure(method: Method, m: int = _SHAPE[0], n: int = _SHAPE[1]) -> Measured:
    """Run a federation of a model with one adapted layer, ``(m, n)``, and count what is sent."""
    server, learner, clients = _federation(method, m, n)
    states = dict.fromkeys(clients, ClientState())
    up, down, ranks, kept = [], [], [], []
    for _ in range(_ROUNDS):
        merged = server.updates[-1].get("layer") if server.updates else None
        ranks.append(getattr(merged, "rank", 0))
        replies: list[Reply] = []
        messages: list[Message] = []
        for client, data in clients.items():
            message = server.message(client)
            visited = learner.visit(client, data, message, states[client], Callback())
            reply, states[client] = visited.reply, visited.state
            server.delivered(client)
            messages.append(message)
            replies.append(reply)
        learner.model.backbone.merge(server.aggregate(replies).merge)
        (one_up,), (one_down,) = {reply.nbytes for reply in replies}, {message.nbytes for message in messages}
        up.append(one_up)
        down.append(one_down)
        kept.append(states["0"].uploads[server.round - 1])
    return Measured(
        up=up[-2:], down=down[-2:], ranks=ranks[-2:], kept=kept[-2:], state=states["0"], server=server
    )


def _federation(method: Method, m: int, n: int) -> tuple[Server, Learner, dict[str, OwnExamples]]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential()
        model.add_module("layer", nn.Linear(n, m))
        model.add_module("head", nn.Sequential(nn.Tanh(), nn.Linear(m, 3 * _RANK)))
        rows = 32
        clients = {
            str(client): OwnExamples(
                TensorDataset(torch.randn(rows, n), torch.randint(3 * _RANK, (rows,))), f"client {client}"
            )
            for client in range(_CLIENTS)
        }
    accelerator = Accelerator(cpu=True)
    settings = LoraSettings(r=_RANK, alpha=2 * _RANK, target_modules=("layer",))
    adapted = AdaptedModel(model, settings, head=(), head_is_trained_whole=False)
    training = TrainingSettings(rounds=_ROUNDS, steps=2, batch_size=16, lr=0.01)
    sections = Sections(method=method, lora=settings, training=training)
    simulation = assemble(
        sections, adapted, Classification(), Participants(clients=clients), accelerator=accelerator
    )
    return simulation.server, simulation.learner, clients


def _takes_partial(method: Method) -> bool:
    """Whether clients may miss rounds, with the method's default options."""
    layer = Layer("layer", *_SHAPE, rank=_RANK, scale=1.0, gradient_rank=min(_SHAPE))
    try:
        method.check({"layer": layer}, partial=True)
    except ValueError:
        return False
    return True


def _kept_by_client(measured: Measured) -> str:
    found = []
    if any(measured.kept):
        found.append(f"its last {_either(map(_kinds, measured.kept))}")
    if any(segment.updates for segment in measured.state.segments):
        found.append("the later updates")
    return " and ".join(found) or "nothing"


def _kept_by_server(measured: Measured) -> str:
    found = []
    if measured.server.model:
        found.append("`B` and `A`")
    elif measured.server.lora:
        found.append(_kinds(measured.server.lora))
    if any(measured.server.updates):
        found.append("all merged updates")
    return "; ".join(found) or "nothing"


def _noised(method: Method) -> str:
    """The matrices that are noised and released with ``privacy.unit = "client"``."""
    if not method.traits.uses_mean_only:
        return "refused"
    if not method.traits.averages_factors:
        return "the mean product, `m n`"
    return _either(_SHARED[method.sends(t)] for t in (0, 1))


def _hides_rows(method: Method) -> str:
    """Whether ``privacy.unit = "sample"`` applies."""
    if not method.no_sample_privacy_reason:
        return "yes"
    if isinstance(method, FedSmoothLoRA):  # by default, it starts from the client's gradient
        assert not replace(method, gradient_aligned="random").no_sample_privacy_reason
        return "with `gradient_aligned` = `weight`, `random` or `none`"
    return "refused"


def _sums(method: Method) -> str:
    """Whether ``privacy.secure_aggregation`` applies."""
    if isinstance(method, FedSmoothLoRA):
        return 'with `exchange = "subspace"`'
    return _yes(method.traits.sums_tensors and method.traits.global_model)


def _kinds(update: Coded) -> str:
    """Which part of a layer an update of one layer is."""
    (value,) = update.values()
    if not isinstance(value, Tensor):
        return "`B` and `A`"
    kinds = {(_SHAPE[0], _RANK): "`B`", (_RANK, _SHAPE[1]): "`A`", (_RANK, _RANK): "`R`"}
    return kinds.get(_shape(value), "`W`")


def _shape(value: Tensor) -> tuple[int, int]:
    rows, columns = value.shape
    return rows, columns


def _either(values: Iterable[object]) -> str:
    """One value, or two that alternate."""
    return " / ".join(dict.fromkeys(map(str, values)))


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _readable(formula: str) -> str:
    return formula.replace("*", " ")


def _yes(it_is: bool) -> str:
    return "yes" if it_is else "no"


if __name__ == "__main__":
    print(document(), end="")
