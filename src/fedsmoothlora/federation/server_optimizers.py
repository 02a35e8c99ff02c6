"""Federated optimisers: the server takes a step with a round's update as the pseudo-gradient.

With the update ``D`` (FedAvgM, arXiv 1909.06335; FedAdagrad, FedAdam and FedYogi, arXiv 2003.00295; all
elementwise, ``m_0 = 0``, ``v_0 = epsilon^2``)::

    momentum   m = beta1 m + D                                          step = lr m
    adaptive   m = beta1 m + (1 - beta1) D                              step = lr m / (sqrt(v) + epsilon)
    adagrad    v = v + D^2
    adam       v = beta2 v + (1 - beta2) D^2
    yogi       v = v - (1 - beta2) D^2 sign(v - D^2)

``D`` is the merged update, or the change of the averaged factors or of their product (`Traits.step_on`). If
``D`` is low-rank, momentum is computed exactly from factors, and the other optimisers form the dense matrix.
In both cases the step is truncated to the rank of ``D``, so that its size in bytes is the same. The step is
recorded and sent as ``S^t``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from fedsmoothlora.algebra.coding import decoded
from fedsmoothlora.algebra.lowrank import LowRank
from fedsmoothlora.federation.settings import ServerSettings
from fedsmoothlora.methods import Products, Sent, ServerUpdate, Traits, Update

# Relative singular values up to this are directions that rounding added to a sum.
_ROUNDING = 8 * torch.finfo(torch.float32).eps


@dataclass(kw_only=True)
class ServerOptimizer:
    """A federated optimiser with its moments.

    Attributes:
        settings: ``[server]``.
        moments: ``m`` and ``v``, by name.
    """

    settings: ServerSettings = field(default_factory=ServerSettings)
    moments: dict[str, LowRank | Tensor] = field(default_factory=dict)

    def apply(
        self,
        update: ServerUpdate,
        traits: Traits,
        sent: Sent,
        before: Callable[[str], LowRank],
        lora_before: Update | None,
    ) -> ServerUpdate:
        """Replace the method's update by the optimiser's step.

        Args:
            update: the method's result of the round.
            traits: the method's traits; ``step_on`` names the quantity ``D``.
            sent: the part of a layer that clients upload in this round; other factors do not change.
            before: ``before(name)`` is the server's LoRA of a layer before this round.
            lora_before: ``ServerUpdate.lora`` of the round before, if the server has no LoRA of its own.
        """
        if self.settings.optimizer == "none":
            return update
        if traits.step_on == "merge":
            return replace(
                update, merge={n: self._step(n, value) for n, value in decoded(update.merge).items()}
            )
        if traits.step_on == "product":
            model = {}
            for name, product in update.model.items():
                step = self._step(name, product - before(name), rank=product.rank)
                assert isinstance(step, LowRank)
                model[name] = (before(name) + step).truncate(product.rank)
            return replace(update, model=model)
        return self._on_factors(update, sent, before, lora_before)

    def head(self, mean: Mapping[str, Tensor], before: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The next head, after a step with the change of every parameter."""
        if self.settings.optimizer == "none":
            return dict(mean)
        found = {}
        for name, value in mean.items():
            step = self._step(f"head {name}", value - before[name])
            assert isinstance(step, Tensor)
            found[name] = before[name] + step
        return found

    def _on_factors(
        self, update: ServerUpdate, sent: Sent, before: Callable[[str], LowRank], lora_before: Update | None
    ) -> ServerUpdate:
        parts = ("B", "A") if sent == "product" else (sent,)
        if not update.model:  # factors are shared without a global LoRA
            shared: dict[str, Tensor] = {}
            for name, value in decoded(update.lora or {}).items():
                old = (lora_before or {}).get(name, getattr(before(name), sent))
                assert isinstance(value, Tensor)
                assert isinstance(old, Tensor)
                shared[name] = old + self._dense_step(f"{name} {sent}", value - old)
            return replace(update, lora=shared)
        model: dict[str, LowRank] = {}
        for name, product in update.model.items():
            old = before(name)
            moved = {
                part: getattr(old, part)
                + self._dense_step(f"{name} {part}", getattr(product, part) - getattr(old, part))
                for part in parts
            }
            model[name] = LowRank(moved.get("B", product.B), moved.get("A", product.A))
        lora = None if update.lora is None else {name: getattr(model[name], sent) for name in update.lora}
        return replace(update, model=model, lora=lora)

    def _dense_step(self, name: str, delta: Tensor) -> Tensor:
        step = self._step(name, delta)
        assert isinstance(step, Tensor)
        return step

    def _step(self, name: str, delta: LowRank | Tensor, rank: int | None = None) -> LowRank | Tensor:
        """The step for ``delta``; if that is a product, the step is a product of rank ``rank`` or its own."""
        settings = self.settings
        if settings.optimizer != "momentum":
            dense = delta.dense() if isinstance(delta, LowRank) else delta
            step = self._adaptive_step(name, dense)
            if isinstance(delta, LowRank):
                return LowRank.from_dense(step, delta.rank if rank is None else rank)
            return step
        beta = 0.9 if settings.beta1 is None else settings.beta1
        lr = 1.0 if settings.lr is None else settings.lr
        last = self.moments.get(f"m {name}")
        if isinstance(delta, LowRank):
            m = delta + beta * last if isinstance(last, LowRank) else delta
            m = m.truncate(None, tolerance=_ROUNDING)  # exact; its rank never exceeds the matrix's
            self.moments[f"m {name}"] = m
            return (lr * m).truncate(delta.rank if rank is None else rank)
        moment = delta + beta * last if isinstance(last, Tensor) else delta.clone()
        self.moments[f"m {name}"] = moment
        return lr * moment

    def _adaptive_step(self, name: str, delta: Tensor) -> Tensor:
        settings, kind = self.settings, self.settings.optimizer
        beta1 = settings.beta1 if settings.beta1 is not None else 0.0 if kind == "adagrad" else 0.9
        beta2 = 0.99 if settings.beta2 is None else settings.beta2
        epsilon = 1e-3 if settings.epsilon is None else settings.epsilon
        lr = 0.1 if settings.lr is None else settings.lr
        m, v = self.moments.get(f"m {name}"), self.moments.get(f"v {name}")
        if not isinstance(m, Tensor) or not isinstance(v, Tensor):
            m, v = torch.zeros_like(delta), torch.full_like(delta, epsilon**2)
        square = delta.square()
        m = beta1 * m + (1 - beta1) * delta
        if kind == "adagrad":
            v = v + square
        elif kind == "adam":
            v = beta2 * v + (1 - beta2) * square
        else:
            v = v - (1 - beta2) * square * torch.sign(v - square)
        self.moments[f"m {name}"], self.moments[f"v {name}"] = m, v
        return lr * m / (v.sqrt() + epsilon)


def weight_deltas(update: ServerUpdate, before: Products) -> Update:
    """How a round changed the global weights, over ``s``: what was merged, and the change of the LoRA."""
    found: dict[str, LowRank | Tensor] = dict(decoded(update.merge))
    for name, product in update.model.items():
        moved = product - before[name] if name in before else product
        merged = found.get(name)
        if isinstance(merged, Tensor):
            found[name] = merged + moved.dense()
        else:
            found[name] = moved if merged is None else merged + moved
    return found
