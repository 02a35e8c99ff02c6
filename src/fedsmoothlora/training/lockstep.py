"""Local training of several clients in step, with one forward and one backward pass for all of them.

Each client's result equals that of training it by itself, but sums are computed in another order, and dropout
draws from one generator for all clients.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from fedsmoothlora.algebra.finite import are_finite
from fedsmoothlora.data.examples import Batch
from fedsmoothlora.data.tokens import joined
from fedsmoothlora.errors import ConfigError, DivergedError
from fedsmoothlora.modeling.adapters import AdaptedModel
from fedsmoothlora.modeling.branches import Branches
from fedsmoothlora.training.local import LocalTraining, Trained
from fedsmoothlora.training.loop import (
    Losses,
    checkpointing,
    kept_buffers,
    optimizer_of,
    seeded,
    still_normalisation,
)
from fedsmoothlora.training.settings import TrainingSettings

_TOLERANCE = 1e-3  # of the loss of a client beside others; the error of float32 is far below it


class Lockstep:
    """Trains clients of one model together.

    Args:
        model: the model; its backbone is set to ``W^t`` for training.
        settings: ``[training]``.
        accelerator: the device.
        pads_left: whether narrower batches are padded on the left.
    """

    def __init__(
        self, model: AdaptedModel, settings: TrainingSettings, accelerator: Accelerator, *, pads_left: bool
    ) -> None:
        self._model, self._settings, self._accelerator = model, settings, accelerator
        self._pads_left = pads_left
        self._checked: set[bool] = set()  # whether the batches of a check were padded to one width

    def train(self, wanted: Sequence[LocalTraining]) -> list[Trained | DivergedError]:
        """Train clients together; a client with fewer steps, or one that diverges, leaves the others early.

        The clients' seconds are equal parts of the time that they took together. Before the first step of the
        first clients, each client's loss is compared with its loss without the others, and again before the
        first step whose batches differ in width.

        Returns:
            The result of each client, or the error by which it diverged.

        Raises:
            ConfigError: the model's rows are not independent, or it does not keep the rows of clients apart.
        """
        began = time.perf_counter()
        model = self._model.model
        self._model.backbone.set_shift()
        branches = Branches(self._model, [one.start for one in wanted], [one.head for one in wanted])
        clients = [
            _Client(position, one, branches, self._settings, self._accelerator)
            for position, one in enumerate(wanted)
        ]
        with checkpointing(model, self._settings), kept_buffers(model), branches.attached():
            self._set_mode(branches, training=True)
            # Dropout draws from one generator, so the rows of one client are masked unlike those of another.
            with seeded(wanted[0].seed, self._accelerator.device):
                for client in clients:
                    client.first_step()
                for step in range(max(one.steps for one in wanted)):
                    self._step(branches, [client for client in clients if client.trains_in(step)])
            self._set_mode(branches, training=False)
        seconds = (time.perf_counter() - began) / len(clients)
        return [client.result(seconds) for client in clients]

    def _set_mode(self, branches: Branches, *, training: bool) -> None:
        for module in (self._model.model, *branches.modules()):
            module.train(training)
            still_normalisation(module)

    def _step(self, branches: Branches, clients: Sequence[_Client]) -> None:
        """One step of all clients that have one."""
        if not clients:
            return
        cut = [list(client.wanted.split(next(client.batches))) for client in clients]
        values: list[list[Tensor]] = [[] for _ in clients]
        for number in range(max(len(parts) for parts in cut)):
            at = [position for position, parts in enumerate(cut) if number < len(parts)]
            batches = [cut[position][number][0] for position in at]
            holding = [clients[position] for position in at]
            self._check(branches, holding, batches)
            losses = [
                loss * cut[position][number][1]
                for position, loss in zip(at, self._losses(branches, holding, batches), strict=True)
            ]
            # The loss of a client depends on its own parameters only, so the sum's gradients are theirs.
            with branches.holding([one.position for one in holding], [_rows(batch) for batch in batches]):
                self._accelerator.backward(torch.stack(losses).sum())
            for position, loss in zip(at, losses, strict=True):
                values[position].append(loss.detach())
        branches.take_gradients([client.position for client in clients])
        for client, parts in zip(clients, values, strict=True):
            client.step(torch.stack(parts))

    def _losses(
        self, branches: Branches, clients: Sequence[_Client], batches: Sequence[Batch]
    ) -> list[Tensor]:
        """The loss of each client's batch, computed with one forward pass."""
        rows = [_rows(batch) for batch in batches]
        whole = joined(batches, left=self._pads_left)
        recorded = _Recorded(self._model.model)
        with branches.holding([client.position for client in clients], rows):
            # Only the model's output is wanted: the mean over the rows of all clients is nobody's loss.
            clients[0].wanted.loss(cast(nn.Module, recorded), whole)
        losses, first = [], 0
        for client, count in zip(clients, rows, strict=True):
            own = {name: value[first : first + count] for name, value in whole.items()}
            replayed = _Replayed(self._model.model, recorded.rows(first, count))
            losses.append(client.wanted.loss(cast(nn.Module, replayed), own))
            first += count
        return losses

    def _check(self, branches: Branches, clients: Sequence[_Client], batches: Sequence[Batch]) -> None:
        """Raise ``ConfigError`` if a client's loss beside others differs from its loss by itself.

        Batches are compared once, and those that are padded to one width once more.
        Both are computed in evaluation mode with random branches, so that clients differ. A model whose rows
        are not independent fails, and so does one whose first dimension is not that of the rows.
        """
        padded = len({tuple(value.shape[1:] for value in batch.values()) for batch in batches}) > 1
        if len(clients) == 1 or padded in self._checked:  # the next group has more
            return
        self._checked.add(padded)
        self._set_mode(branches, training=False)
        with torch.no_grad(), branches.at_random(torch.Generator().manual_seed(0)):
            together = torch.stack(self._losses(branches, clients, batches))
            alone = torch.stack(
                [
                    self._losses(branches, [client], [batch])[0]
                    for client, batch in zip(clients, batches, strict=True)
                ]
            )
        self._set_mode(branches, training=True)
        if not torch.allclose(together, alone, rtol=_TOLERANCE, atol=_TOLERANCE, equal_nan=True):
            raise ConfigError(
                f"machine.batch_clients: the losses of {len(clients)} clients in one forward pass of "
                f"{type(self._model.model).__name__} are {together.tolist()}; one by one they are "
                f"{alone.tolist()}, so its rows are not independent of each other"
                f"{', or depend on their padding' if padded else ''}; leave the key at 1"
            )


class _Client:
    """The optimiser, the losses and the state of one of the clients."""

    def __init__(
        self,
        position: int,
        wanted: LocalTraining,
        branches: Branches,
        settings: TrainingSettings,
        accelerator: Accelerator,
    ) -> None:
        self.position, self.wanted = position, wanted
        self.batches: Iterator[Batch] = iter(wanted.batches)
        self._branches, self._settings, self._accelerator = branches, settings, accelerator
        self._named = branches.parameters(position)
        self._parameters = list(self._named.values())
        head = [self._named[name] for name in wanted.head]
        self._optimizer = optimizer_of(self._parameters, settings, wanted.lr, accelerator.device, head)
        self._corrections = wanted.corrections(self._named)
        self._losses = Losses(wanted.on_step, late=0 if accelerator.device.type == "cpu" else 1)
        self._error: DivergedError | None = None

    def trains_in(self, step: int) -> bool:
        """Whether the client has this step."""
        return self._error is None and step < self.wanted.steps

    def first_step(self) -> None:
        """The step with the gradients of the start, if it has any."""
        if not self.wanted.start.gradients:
            return
        for name, product in self.wanted.start.gradients.items():
            for part, gradient in (("B", product.B), ("A", product.A)):
                if (parameter := self._named.get(f"{name}.lora_{part}")) is not None:
                    parameter.grad = gradient
        self._update()

    def step(self, losses: Tensor) -> None:
        """The optimiser step after a backward pass.

        Args:
            losses: the terms of the step's loss, ``(parts,)``.
        """
        try:
            self._losses.add(losses)
            self._update()
            self._losses.step_ends()
        except DivergedError as error:
            self._error = error

    def result(self, seconds: float) -> Trained | DivergedError:
        """The result of the client, whose training took this time."""
        try:
            self._losses.training_ends()
        except DivergedError as error:
            self._error = self._error or error
        if self._error is not None:
            return self._error
        if self._parameters and not bool(are_finite(self._parameters).all()):
            return DivergedError(f"trained weights are not finite after step {len(self._losses.read)}")
        return Trained(
            losses=self._losses.read,
            seconds=seconds,
            lora=self._branches.lora(self.position),
            head=self._branches.head(self.position),
        )

    def _update(self) -> None:
        for correct in self._corrections:
            correct()
        if self._settings.max_grad_norm is not None:
            self._accelerator.clip_grad_norm_(self._parameters, self._settings.max_grad_norm)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)


class _Recorded:
    """A model that remembers the output of its one call."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._outputs: list[Any] = []

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        self._outputs.append(self._model(*inputs, **named))
        return self._outputs[-1]

    def __getattr__(self, name: str) -> Any:
        return _attribute(self._model, name)

    def get_submodule(self, name: str) -> _Recorded:
        """The part of the model that an objective calls in place of the model."""
        self._model = self._model.get_submodule(name)
        return self

    def rows(self, first: int, count: int) -> Any:
        """Some rows of the output: its logits."""
        if len(self._outputs) != 1:
            raise ConfigError(
                f"machine.batch_clients: the objective calls the model {len(self._outputs)} times for a "
                "batch, and clients are trained together with one forward pass only; leave the key at 1"
            )
        output = self._outputs[0]
        if isinstance(output, Tensor):
            return output[first : first + count]
        if not isinstance(logits := getattr(output, "logits", None), Tensor):
            raise ConfigError(
                f"machine.batch_clients: the model returns {type(output).__name__}, and the rows of clients "
                "are known only in a tensor, or in the tensor logits of an object; leave the key at 1"
            )
        return _Logits(logits[first : first + count])


class _Logits:
    def __init__(self, logits: Tensor) -> None:
        self.logits = logits


class _Replayed:
    """A model whose forward pass has already happened: it returns a known output."""

    def __init__(self, model: nn.Module, output: Any) -> None:
        self._model, self._output = model, output

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        return self._output

    def __getattr__(self, name: str) -> Any:
        return _attribute(self._model, name)

    def get_submodule(self, name: str) -> _Replayed:
        """The part of the model that an objective calls in place of the model."""
        return self


def _attribute(model: nn.Module, name: str) -> Any:
    """An attribute of the model, which an objective reads. Its parameters are not those of the clients."""
    if name in ("parameters", "named_parameters", "state_dict"):
        raise ConfigError(
            f"machine.batch_clients: the objective calls {name}() of the model, and clients that train "
            "together have parameters of their own; leave the key at 1"
        )
    return getattr(model, name)


def _rows(batch: Batch) -> int:
    return len(batch["labels"])
