"""Make one client of each file that rows were read from."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import PurePath
from typing import TYPE_CHECKING, Literal

from fedsmoothlora.data.partitioning.base import Partitioning, Rows
from fedsmoothlora.errors import ConfigError

if TYPE_CHECKING:
    from fedsmoothlora.data.partitions import Partition


@dataclass(frozen=True, kw_only=True)
class ByFile(Partitioning):
    """Make one client of each file that rows were read from.

    Attributes:
        kind: ``by_file``.
    """

    kind: Literal["by_file"] = "by_file"

    def deal(self, rows: Rows, seed: int) -> Partition:
        """See `by_file`."""
        if rows.file_of_row is None:
            raise ConfigError(
                f"partition.kind = 'by_file': data.source = {rows.source!r} does not come in one file or "
                "folder per client"
            )
        return by_file(rows.file_of_row)


def by_file(files: Iterable[str | PurePath]) -> Partition:
    """Make one client of each file that rows were read from.

    Args:
        files: the file of each row, (rows,). The client's id is the file's name without folder and last
            suffix. If several files have the same name, "-2", "-3", ... are appended to all but the first.
            Clients come in the order of their first rows.

    Raises:
        ConfigError: there are no rows, or a file name is missing, empty or blank; the message names the row.
    """
    from fedsmoothlora.data.dealing import named_clients, names_no_client

    held: dict[PurePath, list[int]] = {}
    for row, file in enumerate(files):
        if not isinstance(file, str | PurePath) or not PurePath(file).stem.strip():
            raise names_no_client("by_file", row, file)
        held.setdefault(PurePath(file), []).append(row)
    # A numbered id must not equal another file's name: "a.txt", "b/a.txt", "a-2.txt".
    taken = {path.stem for path in held}
    ids: dict[str, list[int]] = {}
    for path, rows in held.items():
        client, number = path.stem, 1
        if client in ids:
            while client in taken:
                number += 1
                client = f"{path.stem}-{number}"
            taken.add(client)
        ids[client] = rows
    return named_clients("by_file", ids)
