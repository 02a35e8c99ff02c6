"""Train on rows of one class that are labelled as another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from fedsmoothlora.errors import ConfigError
from fedsmoothlora.experiments.attacks.base import DataAttack, Setting, Success

if TYPE_CHECKING:
    from fedsmoothlora.data.examples import Examples


@dataclass(frozen=True, kw_only=True)
class LabelFlip(DataAttack):
    """Label all rows of the class ``source`` as ``target``.

    The success is the share of evaluated rows of ``source`` that are classified as ``target``.

    Attributes:
        kind: ``label_flip``.
        source: the class whose rows are relabelled; unless set, the one of which the malicious clients have
            the most rows.
        target: the class that they are given; unless set, the one that follows ``source``.
    """

    kind: Literal["label_flip"] = "label_flip"
    source: str | None = None
    target: str | None = None

    def check_classes(self, setting: Setting) -> None:
        """Raise ``ConfigError`` for a class that does not exist, or if source and target are the same."""
        self.flipped(setting)

    def poisoned(self, setting: Setting, client: str) -> Examples:
        """The rows with other labels."""
        import torch

        from fedsmoothlora.data.examples import Subset, labels_of
        from fedsmoothlora.experiments.attack_suite.poisoning import Relabelled

        planned = setting.planned
        source, target = self.flipped(setting)
        honest = Subset(planned.task_data.train, planned.training_rows(client))
        labels = labels_of(honest)
        return Relabelled(honest, torch.where(labels == source, target, labels))

    def success(self, setting: Setting) -> Success | None:
        """The evaluated rows of the class ``source``."""
        from fedsmoothlora.data.examples import Subset

        planned = setting.planned
        source, target = self.flipped(setting)
        if planned.test is not None and planned.task_data.test is not None:
            examples = planned.task_data.test
            rows = np.flatnonzero(planned.test.labels == source)
        else:
            examples, rows = planned.task_data.train, setting.validation
            rows = rows[planned.train.labels[rows] == source]
        return Success(examples=Subset(examples, rows), target=target) if len(rows) else None

    def flipped(self, setting: Setting) -> tuple[int, int]:
        """The labels of ``source`` and ``target``.

        Raises ``ConfigError`` for a class that does not exist, or if both are the same.
        """
        planned = setting.planned
        if self.source is not None:
            source = setting.label_of(self.source)
        else:
            rows = np.concatenate([planned.training_rows(client) for client in setting.malicious])
            source = int(np.bincount(planned.train.labels[rows]).argmax())
        following = (source + 1) % len(planned.classes)
        target = following if self.target is None else setting.label_of(self.target)
        if source == target:
            raise ConfigError(
                f"label_flip: source and target are both {planned.classes[source]!r}: take two classes"
            )
        return source, target
