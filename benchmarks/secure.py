"""A session of secure aggregation beside rounding and averaging the same uploads in the clear."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric import ec

from benchmarks.rows import Row, seconds
from fedsmoothlora.secure_aggregation import coordinator, site
from fedsmoothlora.secure_aggregation.fixed_point import FixedPoint
from fedsmoothlora.secure_aggregation.identities import fingerprint, public_bytes
from fedsmoothlora.secure_aggregation.messages import Advertisement, Confirmation, Delivery, Session
from fedsmoothlora.secure_aggregation.serialization import dumped, dumped_masked

_NUMBERS = 1_000_000  # of an upload
_SITES = (3, 10, 50)


def rows() -> Iterator[Row]:
    """Processor seconds of a site and of the coordinator, and bytes of a site, for 3, 10 and 50 sites."""
    for count in _SITES:
        found = _Costs(count)
        yield Row(
            name=f"{count} sites: a site, against rounding to integers alone",
            value=found.site,
            unit="s",
            against=found.rounding,
        )
        yield Row(
            name=f"{count} sites: the coordinator with one lost site, against a mean in the clear",
            value=found.coordinator,
            unit="s",
            against=found.adding,
        )
        yield Row(
            name=f"{count} sites: a site's bytes in both directions, against its upload in float32",
            value=found.bytes / 1e6,
            unit="MB",
            against=4 * _NUMBERS / 1e6,
        )


class _Costs:
    """The costs of one session; those of a site are means over the sites."""

    def __init__(self, count: int) -> None:
        names = tuple(f"site-{index:02}" for index in range(count))
        session = Session(run="0" * 32, round=0, attempt=0, clients=names, threshold=max(2, count * 2 // 3))
        keys = {name: ec.generate_private_key(ec.SECP384R1()) for name in names}
        known = {name: fingerprint(public_bytes(key)) for name, key in keys.items()}
        self._code = FixedPoint(shapes={"x": (_NUMBERS,)}, bounds={"x": 16.0}, clients=count)
        self._upload = {"x": np.random.default_rng(0).normal(size=_NUMBERS).astype(np.float32)}
        self._count = count
        self.site = self.coordinator = 0.0
        self.rounding = seconds(lambda: self._code.encode(self._upload, 1.0))
        self.adding = seconds(self._adding)

        advertised = self._at_sites(
            names, lambda name: site.advertise(session, name, keys[name], session.threshold)
        )
        roster, _ = self._timed(
            lambda: coordinator.collect_keys(session, {n: sent for n, (_, sent) in advertised.items()}, known)
        )
        shared = self._at_sites(names, lambda name: site.share(advertised[name][0], roster, known))
        shares, _ = self._timed(
            lambda: coordinator.collect_shares(session, roster, {n: sent for n, (_, sent) in shared.items()})
        )
        remaining = names[:-1] if count > session.threshold else names
        masked = self._at_sites(
            remaining,
            lambda name: site.mask(
                shared[name][0], coordinator.deliveries(shares, name), self._code.encode(self._upload, 1.0)
            ),
        )
        sums, _ = self._timed(
            lambda: coordinator.collect_masked(
                session, shares, {n: sent for n, (_, sent) in masked.items()}, self._code
            )
        )
        confirmed = self._at_sites(
            remaining, lambda name: site.confirm(masked[name][0], sorted(sums), keys[name])
        )
        signed = {name: sent for name, (_, sent) in confirmed.items()}
        revealed = self._at_sites(remaining, lambda name: site.reveal(confirmed[name][0], signed))
        found = self._timed(lambda: coordinator.unmask(session, roster, shares, sums, revealed))
        self._timed(lambda: self._code.decode(found.total))
        first = names[0]
        passed = coordinator.deliveries(shares, first)
        small = [
            dumped(advertised[first][1]),
            dumped(roster, dict[str, Advertisement]),
            dumped(shares[first]),
            dumped(passed, dict[str, Delivery]),
            dumped(signed[first]),
            dumped(signed, dict[str, Confirmation]),
            dumped(revealed[first]),
        ]
        self.bytes = len(dumped_masked(masked[first][1])) + sum(map(len, small))

    def _adding(self) -> None:
        total = np.zeros(_NUMBERS, np.float32)
        for _ in range(self._count):
            total += np.float32(0.5) * self._upload["x"]

    def _at_sites(self, names: tuple[str, ...], act: Callable[[str], Any]) -> Mapping[str, Any]:
        began = time.process_time()
        found = {name: act(name) for name in names}
        self.site += (time.process_time() - began) / len(names)
        return found

    def _timed(self, act: Callable[[], Any]) -> Any:
        began = time.process_time()
        found = act()
        self.coordinator += time.process_time() - began
        return found
