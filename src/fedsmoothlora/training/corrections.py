"""Corrections that federated optimisers add to a client's gradient before the optimiser step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

Correction = Callable[[], None]


def proximal(parameters: Iterable[nn.Parameter], mu: float) -> Correction:
    """FedProx (arXiv 1812.06127): add the gradient of ``mu/2 ||theta - theta_start||^2``.

    ``theta_start`` are the values of the parameters when this function is called. The reported training loss
    does not include the term.
    """
    starts = [(parameter, parameter.detach().clone()) for parameter in parameters]

    @torch.no_grad()
    def correct() -> None:
        for parameter, start in starts:
            if parameter.grad is not None:
                parameter.grad.add_(parameter - start, alpha=mu)

    return correct


def towards(
    products: Iterable[tuple[nn.Parameter, nn.Parameter, float]],
    values: Iterable[tuple[nn.Parameter, Tensor]],
    weight: float,
) -> Correction:
    """Ditto (arXiv 2012.04221): add the gradient of ``weight/2 ||V - W||^2`` for a deviation ``V - W``.

    The deviation of a layer is ``s B A``, whose term ``weight/2 s^2 ||B A||^2`` has the gradients
    ``weight s^2 B A A^T`` and ``weight s^2 B^T B A``. The reported training loss does not include the terms.

    Args:
        products: ``B (m, r)``, ``A (r, n)`` and the scale ``s`` of every layer.
        values: further trained parameters, each with the value that it is drawn towards.
        weight: ``lambda``.
    """
    factors, centres = list(products), [(parameter, value.to(parameter)) for parameter, value in values]

    @torch.no_grad()
    def correct() -> None:
        for B, A, scale in factors:
            if B.grad is not None and A.grad is not None:
                strength = weight * scale**2
                B.grad.addmm_(B, A @ A.mT, alpha=strength)
                A.grad.addmm_(B.mT @ B, A, alpha=strength)
        for parameter, centre in centres:
            if parameter.grad is not None:
                parameter.grad.add_(parameter - centre, alpha=weight)

    return correct


class ControlVariates:
    """SCAFFOLD (arXiv 1910.06378, option II): every step's gradient is corrected by ``c - c_i``.

    After ``K`` steps of plain SGD with learning rate ``lr``, ``c_i`` becomes
    ``c_i - c + (theta_start - theta_i) / (K lr)``: the mean gradient along the client's path, with the
    terms of FedProx and of weight decay if these are on.

    Args:
        trained: the trained parameters by name, with their values at the start of training.
        server: ``c`` by name of the parameter; missing entries count as 0.
        own: ``c_i`` by name of the parameter; missing entries count as 0.
    """

    def __init__(
        self,
        trained: Mapping[str, nn.Parameter],
        server: Mapping[str, Tensor],
        own: Mapping[str, Tensor],
    ) -> None:
        self._trained = dict(trained)
        self._starts = {name: parameter.detach().clone() for name, parameter in trained.items()}
        zeros = {name: torch.zeros_like(start) for name, start in self._starts.items()}
        self._server = {name: server.get(name, zero).to(zero) for name, zero in zeros.items()}
        self._own = {name: own.get(name, zero).to(zero) for name, zero in zeros.items()}

    @torch.no_grad()
    def correct(self) -> None:
        """Add ``c - c_i`` to the gradients."""
        for name, parameter in self._trained.items():
            if parameter.grad is not None:
                parameter.grad.add_(self._server[name]).sub_(self._own[name])

    @torch.no_grad()
    def after(self, steps: int, lr: float) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The new ``c_i`` after ``steps`` steps, and its change."""
        own = {
            name: self._own[name] - self._server[name] + (self._starts[name] - parameter) / (steps * lr)
            for name, parameter in self._trained.items()
        }
        return own, {name: value - self._own[name] for name, value in own.items()}
