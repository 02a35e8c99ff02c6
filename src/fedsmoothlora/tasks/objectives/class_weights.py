"""Weights of classes in the training loss, from the settings and a client's own rows."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from fedsmoothlora.errors import ConfigError
from fedsmoothlora.tasks.objectives.base import Objective

ClassWeights = Literal["balanced"] | Mapping[str, float]

_KEY = "training.class_weights"


@runtime_checkable
class WeighsClasses(Objective, Protocol):
    """An objective whose loss can weigh classes."""

    def weighted(self, labels: Tensor, weights: ClassWeights) -> Objective:
        """The objective of a client.

        Args:
            labels: ``(rows,)``, the classes of the client's training rows.
            weights: ``training.class_weights``.

        Raises ``ConfigError`` if the weights do not fit the classes.
        """
        ...


def class_weights(labels: Tensor, weights: ClassWeights, classes: Sequence[str] = ()) -> Tensor:
    """The weight of every class, ``(classes,)``, float32; 0 for a class that the client lacks.

    ``balanced`` is ``n / (K n_k)``, where ``n`` is the number of rows, ``n_k`` that of class ``k``, and ``K``
    the number of classes that occur, as ``compute_class_weight`` of scikit-learn computes it.

    Args:
        labels: ``(rows,)``, the classes of the client's training rows.
        weights: ``training.class_weights``.
        classes: names of the classes; the numbers 0, 1, ... unless given.

    Raises ``ConfigError`` if a table names another class, or lacks a class.
    """
    counts = torch.bincount(labels, minlength=len(classes))
    names = classes or [str(label) for label in range(len(counts))]
    present = counts > 0
    if isinstance(weights, Mapping):
        occurring = [name for name, there in zip(names, present.tolist(), strict=True) if there]
        check_names(weights, classes or occurring, known=classes)
        found = torch.tensor([weights.get(name, 0.0) for name in names], dtype=torch.float64)
    else:
        found = len(labels) / (present.sum() * counts.clamp(min=1)).double()
    return torch.where(present, found, 0.0).float()


def check_names(weights: ClassWeights, needed: Collection[str], known: Collection[str] = ()) -> None:
    """Raise ``ConfigError`` unless a table has all ``needed`` classes, and no others than the ``known``."""
    if not isinstance(weights, Mapping):
        return
    if missing := [name for name in needed if name not in weights]:
        raise ConfigError(
            f"{_KEY} has no weight for the class {missing[0]!r}; it should name every class: "
            + ", ".join(needed)
        )
    if known and (unknown := [name for name in weights if name not in known]):
        raise ConfigError(f"{_KEY} names the class {unknown[0]!r}; the classes are {', '.join(known)}")
