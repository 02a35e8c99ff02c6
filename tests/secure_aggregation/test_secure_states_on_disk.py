"""A session whose sites keep their states on disk between stages, as new processes do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from simulated_session import a_session, registered_key, simulated

from fedsmoothlora.errors import SecureAggregationError
from fedsmoothlora.flower.secure_sessions import SecureSessions
from fedsmoothlora.secure_aggregation import site
from fedsmoothlora.secure_aggregation.messages import Session
from fedsmoothlora.secure_aggregation.site import Advertised, Confirmed, MaskSent, Shared


class OnDisk:
    """The sites' states, by client: each is taken from disk once, by a store of its own."""

    def __init__(self, root: Path, session: Session) -> None:
        self._root, self._session = root, session
        self._next = {client: iter((Advertised, Shared, MaskSent, Confirmed)) for client in session.clients}

    def __getitem__(self, client: str) -> Any:
        return SecureSessions(self._root / client).take(next(self._next[client]))

    def __setitem__(self, client: str, state: Any) -> None:
        sessions = SecureSessions(self._root / client)
        if isinstance(state, Advertised):
            sessions.begin(self._session)
        if state is None:
            sessions.end(self._session)
        else:
            sessions.keep(state)

    def __ior__(self, others: Any) -> OnDisk:
        assert not others
        return self


def test_states_on_disk_give_the_same_sum(tmp_path: Path) -> None:
    for session in (a_session(4, 3), a_session(4, 3, round=1)):
        run = simulated(session, lost={"site-03": "mask"})
        run._states = OnDisk(tmp_path, session)  # type: ignore[assignment]
        assert np.array_equal(run.run().total, sum(run.numbers[client] for client in run.summed()))
    left = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.json"))
    # Only the lost site has a state: the others' were taken.
    assert left == [*(f"site-0{place}/last.json" for place in range(4)), "site-03/state.json"]


def test_a_round_that_was_summed_is_not_summed_without_one_of_its_sites(tmp_path: Path) -> None:
    session = a_session(4, 3)
    run = simulated(session)
    run._states = OnDisk(tmp_path, session)  # type: ignore[assignment]
    run.run()
    again = simulated(a_session(4, 3, attempt=1), lost={"site-03": "advertise"})
    again._states = OnDisk(tmp_path, again.session)  # type: ignore[assignment]
    with pytest.raises(SecureAggregationError, match="another sum of round 0"):
        again.run()


def test_a_site_masks_one_vector_in_a_session(tmp_path: Path) -> None:
    session = a_session(2, 2)
    state, _ = site.advertise(session, "site-00", registered_key("site-00"), 2)
    states = OnDisk(tmp_path, session)
    states["site-00"] = state
    assert states["site-00"] == state
    with pytest.raises(SecureAggregationError, match="is over or has not begun"):
        _ = states["site-00"]
