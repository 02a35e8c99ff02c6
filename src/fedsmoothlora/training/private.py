"""DP-SGD (arXiv 1607.00133): local training that hides every single row of a client, by Opacus.

Every step draws a batch, in which each row is by itself with probability ``q``, and computes::

    gradient = (sum_i clip_C(g_i) + noise) / denominator,   noise ~ N(0, (z C)^2)

``g_i`` is the gradient of row ``i`` with respect to all trained parameters together, and ``clip_C`` scales
it down to the norm ``C`` if it is longer. The denominator is fixed. Opacus computes the gradients of the rows
(`GradSampleModule`), and clips and adds them up (`DPOptimizer`). The noise comes from a function of the
caller: torch's generators on the CPU use 32 bits of their seeds, all of which can be tried out.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from fedsmoothlora.algebra.finite import all_finite
from fedsmoothlora.data.examples import Batch, Examples
from fedsmoothlora.errors import ConfigError, DivergedError
from fedsmoothlora.training.corrections import Correction
from fedsmoothlora.training.loop import kept_buffers, optimizer_of, seeded, still_normalisation
from fedsmoothlora.training.opacus_import import opacus_module
from fedsmoothlora.training.settings import TrainingSettings

# The loss of every row of a batch by itself, ``(rows,)``.
Losses = Callable[[Batch], Tensor]
# Gaussian noise of a shape and a standard deviation, in float64 on the CPU, for a step and a parameter.
Noise = Callable[[Sequence[int], float, int, str], Tensor]

# How far a row's gradient in a batch may be from that of the row alone, as a share of its norm, for models
# that compute in float32, and for others. Rounding makes a difference of 1e-6 or 1e-2, other rows one of 1.
_TOLERANCE, _LOOSE_TOLERANCE = 1e-3, 0.1
# Models whose rows were found to be apart, with the trained parameters that were looked at.
_checked: WeakKeyDictionary[nn.Module, set[frozenset[str]]] = WeakKeyDictionary()


@dataclass(frozen=True, kw_only=True)
class Mechanism:
    """The Gaussian mechanism of every step.

    Attributes:
        clip_norm: ``C``.
        noise_multiplier: ``z``.
        denominator: by which the noised sum is divided.
        noise: draws the noise.
    """

    clip_norm: float
    noise_multiplier: float
    denominator: float
    noise: Noise


def train_privately(
    model: nn.Module,
    data: Examples,
    batches: Iterable[Sequence[int]],
    losses: Losses,
    settings: TrainingSettings,
    mechanism: Mechanism,
    *,
    lr: float,
    accelerator: Accelerator,
    seed: int,
    head: Collection[nn.Parameter] = (),
    corrections: Sequence[Correction] = (),
) -> int:
    """Train the model's unfrozen parameters in place by DP-SGD, as `fedsmoothlora.training.loop.train` does.

    There is no dropout: its masks would follow from the run's seed, and a further row would shift those of
    all rows after it, so that more than its own gradient changed.

    A step without any row takes the noise alone. A batch is cut into parts of at most ``batch_size /
    accumulation`` rows. Corrections and ``max_grad_norm`` apply to the noised gradient. A row whose gradient
    is not finite counts as 0, so that it does not end the training, which everybody would see.

    Args:
        model: the model.
        data: the client's rows.
        batches: the numbers of the rows of every step; may be empty.
        losses: the loss of every row of a batch, computed with ``model``.
        settings: ``[training]``.
        mechanism: clipping and noise.
        lr: this round's learning rate.
        accelerator: runs the backward pass and clips the noised gradient.
        seed: seed of random draws in ``data.batch``; the global generator's state is restored.
        head: the parameters that are trained at ``training.head_lr``.
        corrections: functions that change the noised gradient.

    Returns:
        The number of steps.

    Raises:
        ConfigError: the model mixes the rows of a batch, or the gradient of a single row cannot be computed.
        DivergedError: at the end, a trained parameter is not finite.
    """
    check_rows_apart(model, data, losses)
    trained = _trained(model)
    part_rows = -(-settings.batch_size // settings.accumulation)
    _train_without_dropout(model)
    steps = 0
    with seeded(seed, accelerator.device), kept_buffers(model), _gradients_by_row(model):
        fresh = optimizer_of(list(trained.values()), settings, lr, accelerator.device, head)
        optimizer = _private(fresh, trained, mechanism)

        def correct(_: object) -> None:
            for correction in corrections:
                correction()
            if settings.max_grad_norm is not None:
                accelerator.clip_grad_norm_(trained.values(), settings.max_grad_norm)

        optimizer.attach_step_hook(correct)
        for rows in batches:
            for first in range(0, len(rows), part_rows):
                part = data.batch(rows[first : first + part_rows])
                _backward(losses, part, len(rows[first : first + part_rows]), trained, accelerator)
                _take(optimizer, last=False)
            # The step itself adds no row. So steps with and without rows are alike.
            for parameter in trained.values():
                parameter.grad_sample = parameter.new_zeros((0, *parameter.shape))  # type: ignore[attr-defined]
            _take(optimizer, last=True)
            steps += 1
    model.eval()
    if not all(map(all_finite, trained.values())):
        raise DivergedError(f"trained weights are not finite after step {steps}")
    return steps


def check_rows_apart(model: nn.Module, data: Examples, losses: Losses) -> None:
    """Refuse a model in which the gradient of a row in a batch is not that of the row alone.

    Layers that mix rows or that see other dimensions first, layers that are trained and not called, and
    effects of padding are found in this way. Only the first time for a model and its trained parameters, two
    rows are compared, without dropout.

    Raises ``ConfigError`` with the name of a parameter.
    """
    trained = _trained(model)
    known = _checked.setdefault(model, set())
    if (names := frozenset(trained)) in known or not len(data):
        return
    rows = _unlike(data)
    _train_without_dropout(model)
    with _gradients_by_row(model):
        _losses(losses, data.batch(rows), len(rows)).sum().backward()
        together = {name: _rows_of(name, parameter, len(rows)) for name, parameter in trained.items()}
    values = (*model.parameters(), *together.values())
    tolerance = _TOLERANCE if all(one.dtype == torch.float32 for one in values) else _LOOSE_TOLERANCE
    for place, row in enumerate(rows):
        model.zero_grad(set_to_none=True)
        _losses(losses, data.batch([row]), 1).sum().backward()
        alone = {name: parameter.grad for name, parameter in trained.items()}
        largest = max((float(one.norm()) for one in alone.values() if one is not None), default=0.0)
        for name, gradient in alone.items():
            one = together[name][place]
            difference = float((one if gradient is None else one - gradient).norm())
            own = 0.0 if gradient is None else float(gradient.norm())
            if difference > tolerance * (own + 0.1 * largest):
                raise ConfigError(
                    f"privacy.unit = 'sample': the gradient of a row with respect to {name} depends on the "
                    "other rows of the batch, so clipping would not bound what a single row changes; the "
                    "model mixes rows (such as by batch normalisation or by padding), or the layer's first "
                    "dimension is not the rows"
                )
    model.zero_grad(set_to_none=True)
    model.eval()
    known.add(names)


def _train_without_dropout(model: nn.Module) -> None:
    """Switch only the layers with trained parameters to training mode.

    Opacus looks only at layers in training mode. Dropout has no parameters.
    """
    model.eval()
    for module in model.modules():
        module.training = any(p.requires_grad for p in module.parameters(recurse=False))
    still_normalisation(model)


def _unlike(data: Examples) -> list[int]:
    """Two rows, of which one is padded if rows have different lengths."""
    lengths: Sequence[int] | None = getattr(data, "lengths", None)
    every = range(len(data))
    return [0, len(data) - 1] if lengths is None else [f(every, key=lengths.__getitem__) for f in (min, max)]


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


@contextmanager
def _gradients_by_row(model: nn.Module) -> Iterator[None]:
    """Compute ``grad_sample`` of every trained parameter in backward passes of summed losses."""
    module = opacus_module("grad_sample").GradSampleModule
    try:
        wrapped = module(model, loss_reduction="sum")
    except NotImplementedError as error:
        raise ConfigError(
            f"privacy.unit = 'sample': Opacus computes no gradient for each row of a trained layer: {error}"
        ) from None
    try:
        with warnings.catch_warnings():
            # The inputs of a layer on a frozen backbone require no gradient.
            warnings.filterwarnings("ignore", "Full backward hook is firing")
            yield
    finally:
        wrapped.to_standard_module()
        for one in model.modules():  # left over if a forward pass had no backward pass
            for name in ("activations", "max_batch_len"):
                one.__dict__.pop(name, None)


def _backward(
    losses: Losses, batch: Batch, rows: int, trained: Mapping[str, nn.Parameter], accelerator: Accelerator
) -> None:
    """Compute the gradient of every row, in float32; 0 for rows where it is not finite."""
    accelerator.backward(_losses(losses, batch, rows).sum())
    found = {name: _rows_of(name, parameter, rows) for name, parameter in trained.items()}
    finite = torch.stack([one.flatten(1).isfinite().all(dim=1) for one in found.values()]).all(dim=0)
    for name, parameter in trained.items():
        # Under autocast they are bfloat16, whose norms would be rounded. Clipping needs exact ones.
        gradients = found[name].to(parameter.dtype)
        gradients[~finite] = 0
        parameter.grad_sample = gradients  # type: ignore[attr-defined]


def _losses(losses: Losses, batch: Batch, rows: int) -> Tensor:
    found = losses(batch)
    if found.shape != (rows,):
        raise ConfigError(
            f"privacy.unit = 'sample': the objective's losses(model, batch) have the shape "
            f"{tuple(found.shape)}; one loss for each of {rows} rows is needed"
        )
    return found


def _rows_of(name: str, parameter: nn.Parameter, rows: int) -> Tensor:
    """The gradients of a parameter by row, ``(rows, ...)``. Raises ``ConfigError`` if they are not there."""
    found = getattr(parameter, "grad_sample", None)
    if not isinstance(found, Tensor) or len(found) != rows:
        seen = f"{len(found)} gradients" if isinstance(found, Tensor) else "no gradient of its own"
        raise ConfigError(
            f"privacy.unit = 'sample': Opacus finds {seen} for {rows} rows at {name}: the forward pass does "
            "not call its layer once with the rows as first dimension; take it out of lora.target_modules"
        )
    return found


def _take(optimizer: Any, *, last: bool) -> None:
    """Clip and add up the gradients of a part, or take the step after the last one."""
    optimizer.signal_skip_step(do_skip=not last)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _private(
    optimizer: torch.optim.Optimizer, trained: Mapping[str, nn.Parameter], mechanism: Mechanism
) -> Any:
    """Opacus' optimiser, with noise from the mechanism."""

    class Noised(opacus_module("optimizers").DPOptimizer):  # type: ignore[misc]
        steps = 0

        @torch.no_grad()
        def add_noise(self) -> None:
            """Set ``grad`` to the clipped sum with noise, which is added in float64."""
            std = self.noise_multiplier * self.max_grad_norm
            for name, parameter in trained.items():
                noise = mechanism.noise(parameter.shape, std, self.steps, name)
                total = parameter.summed_grad.double() + noise.to(parameter.device)  # type: ignore[attr-defined]
                parameter.grad = total.to(parameter.dtype)
            self.steps += 1

    return Noised(
        optimizer,
        noise_multiplier=mechanism.noise_multiplier,
        max_grad_norm=mechanism.clip_norm,
        expected_batch_size=mechanism.denominator,
    )
