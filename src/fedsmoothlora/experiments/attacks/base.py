"""The interface of an attack by malicious clients.

Importing this module imports no torch. Files of attacks import it inside their functions.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fedsmoothlora.errors import ConfigError

if TYPE_CHECKING:
    from fedsmoothlora.data.examples import Examples
    from fedsmoothlora.federation.messages import Message, Reply
    from fedsmoothlora.methods import Layer
    from fedsmoothlora.runs.planning import Plan


@dataclass(frozen=True, kw_only=True)
class Setting:
    """The federation that is attacked.

    Attributes:
        planned: the plan of the run.
        malicious: the malicious clients.
    """

    planned: Plan
    malicious: Sequence[str]

    @property
    def validation(self) -> NDArray[np.int64]:
        """The honest clients' validation rows of the training set, which evaluate without a test set."""
        kept = [rows for client, rows in self.planned.validation.items() if client not in self.malicious]
        return np.sort(np.concatenate(kept)) if kept else np.zeros(0, dtype=np.int64)

    def label_of(self, name: str) -> int:
        """The label of a class. Raises ``ConfigError`` that lists the classes."""
        classes = self.planned.classes
        if name not in classes:
            raise ConfigError(f"there is no class {name!r}; there are {', '.join(classes)}")
        return classes.index(name)


@dataclass(frozen=True, kw_only=True)
class Success:
    """How the success of an attack is measured: the share of rows that the model puts into a class.

    Attributes:
        examples: the rows, none of which is of that class.
        target: the label of that class.
    """

    examples: Examples
    target: int


@dataclass(frozen=True, kw_only=True)
class Attack(ABC):
    """An attack. Its fields are its options, each with a default.

    A subclass in a file of this folder is an attack that ``--attacks`` can name. The name is the default of
    its field ``kind``.

    Attributes:
        kind: the name of the attack.
    """

    kind: str = ""

    @classmethod
    def name(cls) -> str:
        """The name of the attack."""
        return str(vars(cls)["kind"])

    @abstractmethod
    def refusal(self, setting: Setting) -> str | None:
        """Why the attack does not fit the data or the task; None if it does.

        Raises ``ConfigError`` for options that cannot be right, such as a class that does not exist.
        """

    @property
    def label(self) -> str:
        """The name with the options that differ from their defaults, for tables and folders.

        Characters of a class's name that a folder cannot have are replaced.
        """
        changed = [
            f"{part.name}={getattr(self, part.name)}"
            for part in fields(self)
            if getattr(self, part.name) != part.default
        ]
        return re.sub(r"[^\w.=-]", "_", "-".join([self.kind, *changed]), flags=re.ASCII)

    def table(self) -> dict[str, Any]:
        """The name and all options that are set, as plain JSON values."""
        return {key: value for key, value in asdict(self).items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class UploadAttack(Attack):
    """An attack of clients that train honestly and change their reply afterwards."""

    def refusal(self, setting: Setting) -> str | None:
        """A reason for packed uploads and for those in two exchanges, which this attack does not change."""
        bits = setting.planned.config.transport.bits
        if bits < 16:
            return f"transport.bits = {bits}: the attack changes uploads in 16 or 32 bits only"
        if setting.planned.config.method.two_exchanges:
            return "method.exchange = 'subspace': the attack changes uploads that are made in one exchange"
        return None

    @abstractmethod
    def forged(self, reply: Reply, message: Message, layers: Mapping[str, Layer]) -> Reply:
        """The reply that is sent in place of the honest one.

        Args:
            reply: the honest reply.
            message: the message that it answers.
            layers: the adapted layers.
        """


@dataclass(frozen=True, kw_only=True)
class DataAttack(Attack):
    """An attack of clients whose training rows are changed before they train honestly."""

    def refusal(self, setting: Setting) -> str | None:
        """A reason for tasks without classes."""
        task = setting.planned.config.task
        if not task.classifies:
            return f"task.kind = {task.kind!r} has no classes, and the attack changes labels"
        self.check_classes(setting)
        return None

    @abstractmethod
    def check_classes(self, setting: Setting) -> None:
        """Raise ``ConfigError`` for options that name classes which the data lack."""

    @abstractmethod
    def poisoned(self, setting: Setting, client: str) -> Examples:
        """The training rows of a malicious client."""

    @abstractmethod
    def success(self, setting: Setting) -> Success | None:
        """How the success is measured; None if there are no rows for it."""
