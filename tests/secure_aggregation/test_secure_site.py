"""A site refuses what a dishonest coordinator may ask it for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from simulated_session import a_session, fingerprints, registered_key

from fedsmoothlora.errors import SecureAggregationError
from fedsmoothlora.secure_aggregation import coordinator, site
from fedsmoothlora.secure_aggregation.identities import public_bytes
from fedsmoothlora.secure_aggregation.messages import Advertisement, Session
from fedsmoothlora.secure_aggregation.site import signed_by

FOUR = a_session(4, 3)
NUMBERS: Any = np.arange(6, dtype="<u4")


def advertised(session: Session = FOUR) -> tuple[dict[str, Any], dict[str, Advertisement]]:
    both = {c: site.advertise(session, c, registered_key(c), 2) for c in session.clients}
    return {c: state for c, (state, _) in both.items()}, {c: sent for c, (_, sent) in both.items()}


def shared(session: Session = FOUR) -> tuple[dict[str, Any], dict[str, Any]]:
    states, roster = advertised(session)
    both = {c: site.share(states[c], roster, fingerprints(session)) for c in session.clients}
    return {c: state for c, (state, _) in both.items()}, {c: sent for c, (_, sent) in both.items()}


def masked(session: Session = FOUR) -> dict[str, Any]:
    states, shares = shared(session)
    return {c: site.mask(states[c], coordinator.deliveries(shares, c), NUMBERS)[0] for c in session.clients}


@pytest.mark.parametrize(("count", "threshold"), [(4, 2), (5, 2), (3, 1), (1, 1), (3, 4), (2, 1)])
def test_thresholds_that_two_groups_of_sites_could_reach_are_refused(count: int, threshold: int) -> None:
    with pytest.raises(ValueError, match="more than half"):
        a_session(count, threshold)


def test_a_session_has_sorted_and_different_clients() -> None:
    for clients in (("b", "a"), ("a", "a")):
        with pytest.raises(ValueError, match="sorted and different"):
            Session(run="1", round=0, attempt=0, clients=clients, threshold=2)


def test_a_site_refuses_a_threshold_below_its_own() -> None:
    with pytest.raises(SecureAggregationError, match="this site agrees to 4 or more"):
        site.advertise(FOUR, "site-00", registered_key("site-00"), fewest=4)
    with pytest.raises(SecureAggregationError, match="without client nobody"):
        site.advertise(FOUR, "nobody", registered_key("nobody"), fewest=2)


def test_a_coordinator_that_plays_the_other_sites_is_refused() -> None:
    states, roster = advertised()
    coordinators = registered_key("the coordinator's own")
    forged = {
        client: signed_by(coordinators, FOUR, replace(sent, identity=public_bytes(coordinators)))
        for client, sent in roster.items()
        if client != "site-00"
    }
    with pytest.raises(SecureAggregationError, match=r"client site-01 are refused: its key is SHA256:"):
        site.share(states["site-00"], {**roster, **forged}, fingerprints(FOUR))


def test_one_registered_site_cannot_play_another_one() -> None:
    states, roster = advertised()
    stolen = {**roster, "site-01": roster["site-02"]}
    with pytest.raises(SecureAggregationError, match="client site-01 are refused: it is no client"):
        site.share(states["site-00"], stolen, fingerprints(FOUR))
    renamed = {**roster, "site-01": replace(roster["site-02"], client="site-01")}
    with pytest.raises(SecureAggregationError, match="client site-01 are refused: its key is"):
        site.share(states["site-00"], renamed, fingerprints(FOUR))


@pytest.mark.parametrize("other", [a_session(4, 3, round=1), a_session(4, 3, attempt=1), a_session(4, 4)])
def test_keys_of_another_session_are_refused(other: Session) -> None:
    states, roster = advertised()
    _, elsewhere = advertised(other)
    with pytest.raises(SecureAggregationError, match=r"site-01 are refused: its keys .* are not signed"):
        site.share(states["site-00"], {**roster, "site-01": elsewhere["site-01"]}, fingerprints(FOUR))


def test_keys_that_are_no_points_are_refused_before_they_are_used() -> None:
    states, roster = advertised()
    signed = signed_by(registered_key("site-01"), FOUR, replace(roster["site-01"], mask_key=b""))
    with pytest.raises(SecureAggregationError, match=r"site-01 are refused: .* no points of the curve"):
        site.share(states["site-00"], {**roster, "site-01": signed}, fingerprints(FOUR))


def test_a_site_refuses_a_roster_without_its_own_keys_or_with_too_few() -> None:
    states, roster = advertised()
    others = {client: sent for client, sent in roster.items() if client != "site-00"}
    for wrong in (others, {**roster, "site-00": replace(roster["site-00"], seed_hash=bytes(32))}):
        with pytest.raises(SecureAggregationError, match="own keys are missing or altered"):
            site.share(states["site-00"], wrong, fingerprints(FOUR))
    few = {client: roster[client] for client in ("site-00", "site-01")}
    with pytest.raises(SecureAggregationError, match="2 sites advertise keys; the threshold is 3"):
        site.share(states["site-00"], few, fingerprints(FOUR))


def test_a_site_masks_for_no_fewer_sites_than_the_threshold() -> None:
    states, shares = shared()
    found = coordinator.deliveries(shares, "site-00")
    with pytest.raises(SecureAggregationError, match="2 sites share keys; the threshold is 3"):
        site.mask(states["site-00"], {"site-01": found["site-01"]}, NUMBERS)
    for wrong in ({**found, "site-09": found["site-01"]}, {**found, "site-00": found["site-01"]}):
        with pytest.raises(SecureAggregationError, match="advertised no keys"):
            site.mask(states["site-00"], wrong, NUMBERS)


def test_masking_leaves_the_plain_numbers_as_they_are() -> None:
    states, shares = shared()
    plain = NUMBERS.copy()
    site.mask(states["site-00"], coordinator.deliveries(shares, "site-00"), NUMBERS)
    assert np.array_equal(NUMBERS, plain)


@pytest.mark.parametrize(
    ("summed", "reason"),
    [
        (["site-00", "site-01"], "the threshold is 3"),
        (["site-01", "site-02", "site-03"], "other sites"),
        (["site-00", "site-01", "site-09"], "other sites"),
        (["site-00", "site-00", "site-01"], "other sites"),
        (["site-02", "site-01", "site-00"], "other sites"),
    ],
    ids=["few", "without it", "a stranger", "twice", "not sorted"],
)
def test_a_site_signs_only_lists_that_can_be_true(summed: list[str], reason: str) -> None:
    with pytest.raises(SecureAggregationError, match=reason):
        site.confirm(masked()["site-00"], summed, registered_key("site-00"))


def confirmations(states: Mapping[str, Any], lists: Mapping[str, list[str]]) -> dict[str, Any]:
    return {c: site.confirm(states[c], lists[c], registered_key(c)) for c in lists}


def test_nothing_is_revealed_if_sites_were_shown_different_lists() -> None:
    # From one half it wants site-03's mask key, from the other its seed.
    states = masked()
    all_four, three = sorted(states), ["site-00", "site-01", "site-02"]
    both = confirmations(
        states, {"site-00": three, "site-01": three, "site-02": all_four, "site-03": all_four}
    )
    signed = {client: sent for client, (_, sent) in both.items()}
    for state, _ in both.values():
        with pytest.raises(SecureAggregationError, match="2 sites sign the same list"):
            site.reveal(state, signed)


def test_nothing_is_revealed_for_forged_confirmations() -> None:
    states = masked()
    everyone = sorted(states)
    both = confirmations(states, dict.fromkeys(everyone, everyone))
    state, own = both["site-00"]
    # Its own signature under the names of others.
    with pytest.raises(SecureAggregationError, match="1 sites sign the same list"):
        site.reveal(state, dict.fromkeys(everyone, own))


def test_a_site_reveals_one_secret_of_each_site() -> None:
    states = masked()
    summed = ["site-00", "site-01", "site-03"]
    both = confirmations(states, dict.fromkeys(summed, summed))
    revealed = site.reveal(both["site-00"][0], {client: sent for client, (_, sent) in both.items()})
    assert sorted(revealed.seeds) == summed
    assert sorted(revealed.mask_keys) == ["site-02"]


def test_the_state_after_masking_holds_no_key_and_no_seed_of_the_site() -> None:
    states, shares = shared()
    before = states["site-00"].advertised
    after, _ = site.mask(states["site-00"], coordinator.deliveries(shares, "site-00"), NUMBERS)
    text = repr(after)
    for secret in (before.seed, before.mask_key, before.cipher_key):
        assert repr(secret) not in text
