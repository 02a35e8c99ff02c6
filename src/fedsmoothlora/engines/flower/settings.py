"""The keys of ``[flower]``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Gt

from fedsmoothlora.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class FlowerSettings:
    """The keys of ``[flower]``; nothing but the Flower engine reads them.

    Attributes:
        clients: ids of the sites, who have the data; ``data.source`` is each site's own then. Empty: every
            process reads ``data.source`` and takes its client's rows, as on one machine.
        timeout: seconds that a round waits for replies; those that came by then are what the round has.
        wait: seconds that the coordinator waits, before anything is trained, for all sites to connect.
    """

    clients: tuple[str, ...] = ()
    timeout: Annotated[float, Gt(0)] = 3600.0
    wait: Annotated[float, Gt(0)] = 600.0

    def check(self) -> None:
        """Raise ``ConfigError`` where one client is named twice, or not at all."""
        for client in self.clients:
            if not client.strip() or self.clients.count(client) > 1:
                raise ConfigError(
                    f"flower.clients: {client!r} must be a name of its own, and stand there once"
                )
