"""Messages and states of secure aggregation survive their bytes, and nothing else is read as one."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from simulated_session import a_session, fingerprints, registered_key, simulated

from fedsmoothlora.errors import WireError
from fedsmoothlora.secure_aggregation import coordinator, site
from fedsmoothlora.secure_aggregation.messages import (
    Advertisement,
    Confirmation,
    Delivery,
    Masked,
    Revealed,
    Session,
    Shares,
)
from fedsmoothlora.secure_aggregation.serialization import dumped, dumped_masked, loaded, loaded_masked
from fedsmoothlora.secure_aggregation.site import Advertised, Confirmed, MaskSent, Shared

KINDS: dict[str, Any] = {
    "advertise": Advertisement,
    "share": Shares,
    "confirm": Confirmation,
    "reveal": Revealed,
}


def test_a_session_of_which_every_message_and_state_is_bytes_gives_the_same_sum() -> None:
    run = simulated(a_session(4, 3), lost={"site-03": "mask"})

    def through_bytes(stage: str) -> Any:
        if stage == "mask":
            return lambda message: loaded_masked(dumped_masked(message), run.code)
        return lambda message: loaded(KINDS[stage], dumped(message))

    stages = ("advertise", "share", "mask", "confirm", "reveal")
    run.lies = {(stage, c): through_bytes(stage) for stage in stages for c in run.session.clients}
    run.deals = {client: lambda state: loaded(Advertised, dumped(state)) for client in run.session.clients}
    assert np.array_equal(run.run().total, sum(run.numbers[client] for client in run.summed()))


def test_every_state_and_message_of_a_site_is_the_same_after_its_bytes() -> None:
    session, names = a_session(3, 2), a_session(3, 2).clients
    first = {c: site.advertise(session, c, registered_key(c), 2) for c in names}
    roster = {c: sent for c, (_, sent) in first.items()}
    second = {c: site.share(first[c][0], roster, fingerprints(session)) for c in names}
    deliveries = coordinator.deliveries({c: sent for c, (_, sent) in second.items()}, names[0])
    third = site.mask(second[names[0]][0], deliveries, np.arange(4, dtype="<u4"))
    fourth = site.confirm(third[0], sorted(names), registered_key(names[0]))
    for kind, value in (
        (Session, session),
        (Advertised, first[names[0]][0]),
        (Advertisement, first[names[0]][1]),
        (Shared, second[names[0]][0]),
        (Shares, second[names[0]][1]),
        (MaskSent, third[0]),
        (Confirmed, fourth[0]),
        (Confirmation, fourth[1]),
    ):
        assert loaded(kind, dumped(value)) == value
    for inner, mapping in ((Advertisement, roster), (Delivery, deliveries)):
        table: Any = dict[str, inner]  # type: ignore[valid-type]
        assert loaded(table, dumped(mapping, table)) == mapping


@pytest.mark.parametrize("kind", [Session, *KINDS.values(), Advertised, Confirmed], ids=lambda k: k.__name__)
@given(data=st.binary(max_size=60))
def test_arbitrary_bytes_are_refused(kind: Any, data: bytes) -> None:
    with pytest.raises(WireError, match=f"it is no {kind.__name__}"):
        loaded(kind, data)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


ADVERTISEMENT = dict.fromkeys(Advertisement.__dataclass_fields__, "")


def test_the_table_of_empty_fields_is_an_advertisement() -> None:
    assert loaded(Advertisement, json.dumps(ADVERTISEMENT).encode()).client == ""


@given(field=st.sampled_from(["client", "mask_key", "signature", "other"]), value=JSON)
def test_fields_of_another_type_and_unknown_fields_are_refused(field: str, value: Any) -> None:
    if field == "other" or not isinstance(value, str):
        with pytest.raises(WireError, match="it is no Advertisement"):
            loaded(Advertisement, json.dumps({**ADVERTISEMENT, field: value}).encode())


def test_a_session_that_breaks_its_own_rules_is_refused() -> None:
    table = json.loads(dumped(a_session(4, 3)))
    for wrong in ({"threshold": 2}, {"clients": ["b", "a", "c", "d"]}, {"round": True}, {"round": 1.0}):
        with pytest.raises(WireError, match="it is no Session"):
            loaded(Session, json.dumps({**table, **wrong}).encode())


def test_an_error_quotes_nothing_of_what_was_received() -> None:
    with pytest.raises(WireError) as raised:
        loaded(Confirmation, b'{"signature": "the secret !"}')
    assert "secret" not in str(raised.value)


def test_masked_integers_of_another_number_are_refused() -> None:
    run = simulated(a_session(2, 2))
    masked = Masked(numbers=run.numbers["site-00"], unusable=("site-01",))
    data = dumped_masked(masked)
    found = loaded_masked(data, run.code)
    assert np.array_equal(found.numbers, masked.numbers)
    assert found.unusable == masked.unusable
    for wrong in (data[:-1], data + b"0", b"", data[8:], (2**63).to_bytes(8, "little") + data[8:]):
        with pytest.raises(WireError):
            loaded_masked(wrong, run.code)
    not_json = data[:8] + b"x" + data[9:]
    with pytest.raises(WireError, match="it is no tuple"):
        loaded_masked(not_json, run.code)
