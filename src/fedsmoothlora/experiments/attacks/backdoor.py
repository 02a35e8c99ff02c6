"""Train on rows with a trigger that are labelled as the target."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
from annotated_types import Gt, Interval

from fedsmoothlora.experiments.attacks.base import DataAttack, Setting, Success

if TYPE_CHECKING:
    from fedsmoothlora.data.examples import Examples
    from fedsmoothlora.data.raw import LabelledRows
    from fedsmoothlora.experiments.attack_suite.poisoning import Trigger


@dataclass(frozen=True, kw_only=True)
class Backdoor(DataAttack):
    """Put a trigger into a share of the rows and label these as ``target``.

    The trigger is a white square at the lower right of an image, or a word before a text. The success is the
    share of evaluated rows of other classes that are classified as ``target`` once they have the trigger.

    Attributes:
        kind: ``backdoor``.
        target: the class that the trigger stands for; the first one unless set.
        share: the share of a malicious client's rows that get the trigger.
        patch: the side of the square, as a share of the image's height.
        word: the word.
    """

    kind: Literal["backdoor"] = "backdoor"
    target: str | None = None
    share: Annotated[float, Interval(gt=0, le=1)] = 0.5
    patch: Annotated[float, Gt(0), Interval(le=1)] = 0.2
    word: str = "cf"

    def check_classes(self, setting: Setting) -> None:
        """Raise ``ConfigError`` if there is no class ``target``."""
        self._label(setting)

    def refusal(self, setting: Setting) -> str | None:
        """A reason for tasks without classes, and for recordings."""
        from fedsmoothlora.data.stored_audio import StoredAudio

        reason = super().refusal(setting)
        if reason is None and isinstance(setting.planned.train, StoredAudio):
            return "there is no trigger for recordings; it is put on images and into texts"
        return reason

    def poisoned(self, setting: Setting, client: str) -> Examples:
        """The rows, a share of which has the trigger; which ones is drawn by the run's seed."""
        from fedsmoothlora.algebra.seeds import seed_for

        planned = setting.planned
        honest = planned.train.take(planned.training_rows(client))
        rng = np.random.default_rng(seed_for(planned.config.seed, "backdoor", client))
        count = max(1, round(self.share * len(honest)))
        chosen = np.zeros(len(honest), dtype=np.bool_)
        chosen[rng.permutation(len(honest))[:count]] = True
        labels = np.where(chosen, self._label(setting), honest.labels)
        return planned.task_data.examples(self._trigger.stamped(honest, chosen, labels))

    def success(self, setting: Setting) -> Success | None:
        """The evaluated rows of other classes, with the trigger."""
        planned, target = setting.planned, self._label(setting)
        rows: LabelledRows | None = planned.test
        if rows is None:
            rows = planned.train.take(setting.validation)
        others = rows.take(np.flatnonzero(rows.labels != target))
        if not len(others):
            return None
        triggered = self._trigger.stamped(others, np.ones(len(others), dtype=np.bool_), others.labels)
        return Success(examples=planned.task_data.examples(triggered), target=target)

    @property
    def _trigger(self) -> Trigger:
        from fedsmoothlora.experiments.attack_suite.poisoning import Trigger

        return Trigger(patch=self.patch, word=self.word)

    def _label(self, setting: Setting) -> int:
        return 0 if self.target is None else setting.label_of(self.target)
