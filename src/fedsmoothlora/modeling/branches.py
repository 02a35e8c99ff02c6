"""The LoRA, the shifts and the heads of several clients beside one backbone, for one forward pass."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from fedsmoothlora.algebra.lowrank import LowRank
from fedsmoothlora.errors import ConfigError
from fedsmoothlora.methods import Layer, Start
from fedsmoothlora.modeling.adapters import AdaptedModel


@dataclass(frozen=True, kw_only=True)
class _Stack:
    """Factors of all clients, padded with zeros to the largest rank: ``B (K, m, r)`` and ``A (K, r, n)``."""

    B: Tensor
    A: Tensor

    @classmethod
    def of(cls, factors: Sequence[tuple[Tensor, Tensor]]) -> _Stack:
        B, A = zip(*factors, strict=True)
        return cls(
            B=pad_sequence([one.float().mT for one in B], batch_first=True).mT.contiguous(),
            A=pad_sequence([one.float() for one in A], batch_first=True),
        )

    def __add__(self, other: _Stack) -> _Stack:
        """The factors of each client's sum ``B A + B' A'``."""
        return _Stack(B=torch.cat((self.B, other.B), dim=2), A=torch.cat((self.A, other.A), dim=1))

    def at(self, clients: Sequence[int]) -> _Stack:
        """The factors of these clients; those of all clients are not copied."""
        if len(clients) == len(self.B):
            return self
        index = torch.tensor(clients, device=self.B.device)
        return _Stack(B=self.B[index], A=self.A[index])


class Branches:
    """Several clients' changes of one model, each computed for the rows of its client only.

    A layer with the weight ``W^t``, which is shared, computes
    ``y = W^t x + s (B_k A_k x + shift_k x)`` for the rows of client ``k``. The products of all clients are
    batched (``bmm``). Parts of a head that is trained whole are copied for each client.

    The factors of all clients lie in one tensor for each layer. The parameters of a client are views of it,
    so each client has gradients, clipping and an optimiser of its own.

    Args:
        model: the model, whose backbone holds ``W^t``. It is changed within `attached` only.
        starts: the start of each client; their LoRA may have different ranks.
        heads: the parameters of the fully trained head of each client.

    Raises ``ConfigError`` if the method trains anything but LoRA factors and the head.
    """

    def __init__(
        self, model: AdaptedModel, starts: Sequence[Start], heads: Sequence[Mapping[str, Tensor]]
    ) -> None:
        self._model = model
        self._lora: dict[str, _Stack] = {}
        self._shift: dict[str, _Stack] = {}
        self._ranks: dict[str, list[int]] = {}
        self._dropout = nn.Dropout(model.dropout)
        device = next(model.model.parameters()).device
        parts = starts[0].trains  # a round trains the same parts at all clients
        if not set(parts) <= {"B", "A"}:
            raise ConfigError(
                f"machine.batch_clients: the method trains {', '.join(parts)}, and clients that train "
                "together train the LoRA factors B and A only; leave it at 1"
            )
        for name, layer in model.layers.items():
            if starts[0].lora:
                products = [start.lora[name] for start in starts]
                stack = _Stack.of([(product.B, product.A) for product in products])
                stack.B.requires_grad_("B" in parts)
                stack.A.requires_grad_("A" in parts)
                self._lora[name] = stack
                self._ranks[name] = [product.rank for product in products]
            if any(name in start.shift for start in starts):
                shifts = [start.shift.get(name) or _nothing(layer, device) for start in starts]
                self._shift[name] = _Stack.of([(shift.B, shift.A) for shift in shifts])
        self._heads = {
            part: [_copied(part, module, head) for head in heads] for part, module in model.head_parts.items()
        }
        self._parameters = [self._parameters_of(client) for client in range(len(starts))]
        self._clients: list[int] = []  # in hand
        self._rows: list[int] = []  # of each of them

    def parameters(self, client: int) -> dict[str, nn.Parameter]:
        """The trained parameters of a client, named as by `AdaptedModel.trained_parameters`."""
        return self._parameters[client]

    def lora(self, client: int) -> dict[str, LowRank]:
        """A copy of the factors of a client, by layer."""
        return {
            name: LowRank(self._view(name, "B", client).clone(), self._view(name, "A", client).clone())
            for name in self._lora
        }

    def head(self, client: int) -> dict[str, Tensor]:
        """A copy of the client's head."""
        return {
            f"{part}.{name}": parameter.detach().clone()
            for part, copies in self._heads.items()
            for name, parameter in copies[client].named_parameters()
        }

    def modules(self) -> Iterator[nn.Module]:
        """The clients' copies of the head; their mode is set with that of the model."""
        for copies in self._heads.values():
            yield from copies

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Make the model compute with the branches of the clients in hand, and without LoRA of its own."""
        with ExitStack() as stack:
            stack.enter_context(self._model.without_lora())
            for name, module in self._model.modules.items():
                handle = module.register_forward_hook(self._hook(name, self._model.layers[name].scale))
                stack.callback(handle.remove)
            for part, module in self._model.head_parts.items():
                module.forward = partial(self._head_forward, part)
                stack.callback(delattr, module, "forward")  # the class's own method is used again
            yield

    @contextmanager
    def holding(self, clients: Sequence[int], rows: Sequence[int]) -> Iterator[None]:
        """The clients whose rows the next forward and backward passes hold, in the order of the rows.

        Args:
            clients: their positions.
            rows: the number of rows of each of them.
        """
        self._clients, self._rows = list(clients), list(rows)
        try:
            yield
        finally:
            self._clients, self._rows = [], []

    def take_gradients(self, clients: Sequence[int]) -> None:
        """Move the gradients of these clients from the shared tensors to the clients' parameters."""
        for name, stack in self._lora.items():
            for part in ("B", "A"):
                whole: Tensor = getattr(stack, part)
                if whole.grad is None:
                    continue
                for client in clients:
                    parameter = self._parameters[client][f"{name}.lora_{part}"]
                    parameter.grad = self._cut(name, part, whole.grad, client)
                whole.grad = None

    @contextmanager
    def at_random(self, generator: torch.Generator) -> Iterator[None]:
        """Random factors and heads that differ between clients; the values are restored at the end."""
        values = [part for stack in self._lora.values() for part in (stack.B, stack.A)]
        values += [parameter for module in self.modules() for parameter in module.parameters()]
        saved = [value.detach().clone() for value in values]

        def noise(value: Tensor) -> Tensor:
            return torch.randn(value.shape, generator=generator).to(value) * 0.1

        try:
            with torch.no_grad():
                for value in values:
                    value.add_(noise(value))
            yield
        finally:
            with torch.no_grad():
                for value, before in zip(values, saved, strict=True):
                    value.copy_(before)

    def _parameters_of(self, client: int) -> dict[str, nn.Parameter]:
        heads = {
            f"{part}.{name}": parameter
            for part, copies in self._heads.items()
            for name, parameter in copies[client].named_parameters()
        }
        return heads | {
            f"{name}.lora_{part}": nn.Parameter(self._view(name, part, client))
            for name, stack in self._lora.items()
            for part in ("B", "A")
            if getattr(stack, part).requires_grad
        }

    def _view(self, name: str, part: str, client: int) -> Tensor:
        return self._cut(name, part, getattr(self._lora[name], part).detach(), client)

    def _cut(self, name: str, part: str, whole: Tensor, client: int) -> Tensor:
        """A client's part of a tensor of all clients, without the padding of its rank."""
        rank = self._ranks[name][client]
        return whole[client, :, :rank] if part == "B" else whole[client, :rank]

    def _hook(self, name: str, scale: float) -> Any:
        def add(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
            x: Tensor = inputs[0]  # (rows, ..., n)
            lora, shift = (stacks.get(name) for stacks in (self._lora, self._shift))
            dropped = self._dropout.p > 0 and module.training
            if lora is not None and shift is not None and not dropped:
                lora, shift = lora + shift, None  # fewer products, of the same sum
            total = self._grouped(name, output)  # (clients, vectors, m)
            for stack, drops in ((lora, dropped), (shift, False)):
                if stack is None:
                    continue
                stack = stack.at(self._clients)
                vectors = self._grouped(name, self._dropout(x) if drops else x)  # (clients, vectors, n)
                total = torch.baddbmm(total, torch.bmm(vectors, stack.A.mT), stack.B.mT, alpha=scale)
            return self._ungrouped(total, output)

        return add

    def _head_forward(self, part: str, *inputs: Tensor, **named: Tensor) -> Tensor:
        """Each client's copy of a part of the head, on the client's rows."""
        first = [0]
        for size in self._sizes(part, next(iter((*inputs, *named.values())))):
            first.append(first[-1] + size)
        return torch.cat(
            [
                self._heads[part][client](
                    *(value[begin:end] for value in inputs),
                    **{name: value[begin:end] for name, value in named.items()},
                )
                for client, (begin, end) in zip(self._clients, pairwise(first), strict=True)
            ]
        )

    def _sizes(self, name: str, value: Tensor) -> list[int]:
        """The length of every client's part of the first dimension, which may be several for each row."""
        each, rest = divmod(len(value), sum(self._rows))
        if rest:
            raise ConfigError(
                f"machine.batch_clients: layer {name} gets {len(value)} vectors or groups of them for "
                f"{sum(self._rows)} rows, so the rows of clients cannot be told apart; leave it at 1"
            )
        return [rows * each for rows in self._rows]

    def _grouped(self, name: str, value: Tensor) -> Tensor:
        """``(rows, ..., n)`` as ``(clients, vectors, n)``, padded if numbers of rows differ."""
        sizes = self._sizes(name, value)
        if len(set(sizes)) == 1:
            return value.reshape(len(sizes), -1, value.shape[-1])
        return pad_sequence(list(value.split(sizes)), batch_first=True).flatten(1, -2)

    def _ungrouped(self, total: Tensor, output: Tensor) -> Tensor:
        """``(clients, vectors, m)`` as a tensor of the shape of ``output``, without padding."""
        sizes = [rows * len(output) // sum(self._rows) for rows in self._rows]
        if len(set(sizes)) == 1:
            return total.reshape(output.shape)
        each = output[0].numel() // output.shape[-1]  # vectors of one entry of the first dimension
        whole = [own[: size * each] for own, size in zip(total, sizes, strict=True)]
        return torch.cat(whole).reshape(output.shape)


def _nothing(layer: Layer, device: torch.device) -> LowRank:
    """The shift of a client without one, of rank 0."""
    return LowRank(torch.zeros(layer.m, 0, device=device), torch.zeros(0, layer.n, device=device))


def _copied(part: str, module: nn.Module, head: Mapping[str, Tensor]) -> nn.Module:
    """A client's own copy of a part of the head, with the client's values."""
    found = copy.deepcopy(module)
    with torch.no_grad():
        for name, parameter in found.named_parameters():
            parameter.copy_(head[f"{part}.{name}"])
    return found
