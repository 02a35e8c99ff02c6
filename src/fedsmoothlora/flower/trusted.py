"""The sites whose keys a site trusts: a file at every site, which the coordinator cannot change.

It is TOML::

    fewest = 2

    [fingerprints]
    hospital-a = "SHA256:..."
    hospital-b = "SHA256:..."
    hospital-c = "SHA256:..."

A coordinator that chose the fingerprints could play all other sites, and subtract what it sent in their
names.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import tomli_w

from fedsmoothlora.errors import KeysError, StateError
from fedsmoothlora.flower.keys import read_fingerprints
from fedsmoothlora.storage.files import read_text, write_text

_KEY = ".key.pub"
_FINGERPRINT = re.compile(r"SHA256:[A-Za-z0-9+/]{43}")


@dataclass(frozen=True, kw_only=True)
class TrustedSites:
    """The content of the file.

    Attributes:
        fewest: the smallest threshold to which the site agrees: its upload is in no sum of fewer sites.
        fingerprints: the fingerprint of every site's public key, by client id, its own included.
    """

    fewest: int
    fingerprints: Mapping[str, str]

    @classmethod
    def read(cls, path: Path) -> TrustedSites:
        """Read the file. Raises ``KeysError`` if it cannot be used."""
        try:
            table = tomllib.loads(read_text(path))
            found = cls(fewest=table.pop("fewest"), fingerprints=table.pop("fingerprints"))
            if table or type(found.fewest) is not int or type(found.fingerprints) is not dict:
                raise ValueError("it must have fewest and [fingerprints], and nothing else")
            found.check()
        except (StateError, ValueError, KeyError) as error:
            raise KeysError(f"{path}: {error}; `fedsmoothlora flower trust` writes this file") from None
        return found

    def check(self) -> None:
        """Raise ``ValueError`` for fingerprints that are none or of two sites, and for a wrong ``fewest``."""
        for client, found in self.fingerprints.items():
            if type(found) is not str or not _FINGERPRINT.fullmatch(found):
                raise ValueError(f"the fingerprint of {client} is {found!r}; it must be SHA256:...")
            if list(self.fingerprints.values()).count(found) > 1:
                raise ValueError(f"the fingerprint of {client} is that of another site too")
        if not 2 <= self.fewest <= len(self.fingerprints):
            raise ValueError(
                f"fewest is {self.fewest} of {len(self.fingerprints)} sites; it must be from 2 to all of them"
            )

    def write(self, path: Path) -> None:
        """Write the file."""
        table = {"fewest": self.fewest, "fingerprints": dict(self.fingerprints)}
        write_text(path, tomli_w.dumps(table))


def trusted_sites(folder: Path, fewest: int | None = None, clients: Sequence[str] = ()) -> TrustedSites:
    """The sites whose public keys are in a folder, as ``CLIENT.key.pub``.

    Args:
        folder: the folder.
        fewest: the smallest threshold; more than half of the sites unless given.
        clients: the sites; all of the folder unless given.

    Raises ``KeysError`` if there are fewer than three, or if a key or ``fewest`` is not valid.
    """
    names = clients or sorted(path.name.removesuffix(_KEY) for path in folder.glob(f"*{_KEY}"))
    if len(names) < 3:
        raise KeysError(
            f"{folder} has {len(names)} public keys of the form CLIENT{_KEY}; secure aggregation needs those "
            "of three sites or more"
        )
    found = TrustedSites(
        fewest=len(names) // 2 + 1 if fewest is None else fewest,
        fingerprints=read_fingerprints(folder, names),
    )
    try:
        found.check()
    except ValueError as error:
        raise KeysError(f"{folder}: {error}") from None
    return found
