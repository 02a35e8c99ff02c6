"""Make one client of each distinct value of a column: the natural federation of users, sites, devices."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from fedsmoothlora.data.partitioning.base import Partitioning, Rows

if TYPE_CHECKING:
    from fedsmoothlora.data.partitions import Partition


@dataclass(frozen=True, kw_only=True)
class ByColumn(Partitioning):
    """Make one client of each distinct value of a column: the natural federation of users, sites, devices.

    Attributes:
        kind: ``by_column``.
        column: the column of the training set whose values name the clients.
    """

    kind: Literal["by_column"] = "by_column"
    column: str

    @property
    def client_column(self) -> str:
        """The column whose values name the clients."""
        return self.column

    def deal(self, rows: Rows, seed: int) -> Partition:
        """See `by_column`."""
        assert rows.client_of_row is not None, "the data is read with its client column"
        return by_column(rows.client_of_row, self.column)


def by_column(values: Iterable[str | None], column: str = "") -> Partition:
    """Make one client of each distinct value of a column: the natural federation of users, sites, devices.

    Args:
        values: the column's value for every row, (rows,). The value is the client's id, taken as it is;
            clients come in the order of their first rows.
        column: the column's name, for error messages only.

    Raises:
        ConfigError: there are no rows, or a value is missing, empty, blank or not a string; the message names
            the row.
    """
    from fedsmoothlora.data.dealing import named_clients, names_no_client

    where = f"by_column: column {column!r}" if column else "by_column"
    held: dict[str, list[int]] = {}
    for row, value in enumerate(values):
        if not isinstance(value, str) or not value.strip():
            raise names_no_client(where, row, value)
        held.setdefault(str(value), []).append(row)
    return named_clients(where, held)
