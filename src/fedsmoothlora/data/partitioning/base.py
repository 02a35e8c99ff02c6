"""The interface of a partition: its keys in a configuration, and its rule for dealing rows to clients."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from fedsmoothlora.errors import ConfigError

if TYPE_CHECKING:
    from fedsmoothlora.data.partitions import Labels, Partition


@dataclass(frozen=True, kw_only=True, eq=False)
class Rows:
    """The properties of a training set's rows that a partition can use.

    Attributes:
        labels: class of every row, (rows,), integers.
        labelled: whether the data have labels; otherwise all labels are 0.
        client_of_row: each row's value of the client column; None if the partition names no column.
        file_of_row: the file, or the client's folder, of each row; None if the training set does not have one
            file or folder per client.
        source: ``data.source``, for error messages.
    """

    labels: Labels
    labelled: bool = True
    client_of_row: Sequence[str] | None = None
    file_of_row: Sequence[str] | None = None
    source: str = ""

    def classes_for(self, kind: str) -> Labels:
        """The labels, for a partition that deals rows by them.

        Raises ``ConfigError`` if the rows have no labels.
        """
        if not self.labelled:
            raise ConfigError(
                f"partition.kind = {kind!r} deals rows by their label: set data.label_column, or use "
                "another partition.kind; labels that are numbers, lists or tags deal no rows"
            )
        return self.labels


@dataclass(frozen=True, kw_only=True)
class Partitioning(ABC):
    """The base class of partitions. Its fields are the keys of ``[partition]``; ``None`` means not set.

    Configurations can name a subclass in a file of this folder. Its field ``kind`` has the name as its only
    value and default.

    Attributes:
        kind: the name of the partition.
    """

    kind: str

    @property
    def client_column(self) -> str | None:
        """The column whose values name the clients; None if there is none."""
        return None

    @abstractmethod
    def deal(self, rows: Rows, seed: int) -> Partition:
        """Deal the rows to clients.

        Args:
            rows: the training set's rows.
            seed: seed of all random draws.

        Raises:
            ConfigError: the rows cannot be dealt in this way; the message names the key to change.
        """

    def options(self) -> dict[str, Any]:
        """The keys that are set, without ``kind``."""
        values = {part.name: getattr(self, part.name) for part in fields(self) if part.name != "kind"}
        return {name: value for name, value in values.items() if value is not None}
