"""Questions and answers on a local socket."""

import socket
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedsmoothlora.errors import WireError
from fedsmoothlora.federation.payload import Payload
from fedsmoothlora.flower.frames import (
    LARGEST_JSON,
    LARGEST_TENSORS,
    receive_answer,
    receive_question,
    send_answer,
    send_question,
)
from fedsmoothlora.flower.questions import Answer, Question

PLAIN = st.text(max_size=20) | st.integers() | st.floats(allow_nan=False) | st.booleans()
PAYLOADS = st.none() | st.builds(
    Payload,
    tensors=st.binary(max_size=200),
    fields=st.dictionaries(st.text(max_size=10), PLAIN, max_size=5),
)
TABLES = st.dictionaries(
    st.text(max_size=10),
    st.dictionaries(st.text(max_size=10), PLAIN | st.lists(PLAIN, max_size=3), max_size=3),
    max_size=3,
)


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    one, other = socket.socketpair()
    with one, other:
        yield one, other


@given(kind=st.sampled_from(["agree", "train", "advertise", "mask"]), payload=PAYLOADS, tables=TABLES)
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_questions_and_answers_arrive_as_they_were_sent(pair, kind, payload, tables) -> None:  # type: ignore[no-untyped-def]
    one, other = pair
    question = Question(kind=kind, payload=payload)
    send_question(one, question)
    assert receive_question(other) == question
    answer = Answer(status="done", tables=tables, payload=payload)
    send_answer(other, answer)
    assert receive_answer(one) == answer


def test_floats_that_are_not_finite_and_types_of_numbers_arrive_as_they_were_sent(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    one, other = pair
    fields = {"nan": float("nan"), "inf": float("inf"), "one": 1, "whole": 1.0, "true": True}
    send_question(one, Question(kind="train", payload=Payload(b"x", fields)))
    found = receive_question(other).payload
    assert found is not None
    assert repr(dict(found.fields)) == repr(fields)


def length(number: int) -> bytes:
    return number.to_bytes(8, "little")


@pytest.mark.parametrize(
    "sent",
    [
        pytest.param(length(LARGEST_JSON + 1) + length(0), id="too many fields"),
        pytest.param(length(2) + length(LARGEST_TENSORS + 1), id="too many tensors"),
        pytest.param(length(2) + length(0) + b"{}", id="no fields"),
        pytest.param(length(2) + length(0) + b"[]", id="no table"),
        pytest.param(length(3) + length(0) + b"\x80\x04.", id="a pickle"),
        pytest.param(length(12) + length(0) + b'{"fields":1}', id="fields of another type"),
        pytest.param(length(15) + length(0) + b'{"fields":null}', id="no kind and no status"),
        pytest.param(length(26) + length(0) + b'{"fields":null,"kind":"x"}', id="another kind"),
        pytest.param(length(9) + length(0) + b'{"fields"', id="cut off"),
        pytest.param(length(200_000) + length(0) + b"[" * 200_000, id="nested too deep"),
    ],
)
def test_anything_else_is_refused(pair: tuple[socket.socket, socket.socket], sent: bytes) -> None:
    one, other = pair
    for receive in (receive_question, receive_answer):
        one.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2**20)
        one.sendall(sent)
        with pytest.raises(WireError):
            receive(other)


@pytest.mark.parametrize("sent", [b"", b"12345", length(100) + length(0) + b"{"], ids=["none", "few", "some"])
def test_a_connection_that_ends_too_early_is_an_error(
    pair: tuple[socket.socket, socket.socket], sent: bytes
) -> None:
    one, other = pair
    one.sendall(sent)
    one.close()
    with pytest.raises(ConnectionError):
        receive_question(other)


def test_nothing_is_sent_after_the_last_byte() -> None:
    """Even an empty send fails once the other end has read the frame and closed the connection."""
    sent: list[bytes] = []

    class Recorded(socket.socket):
        def sendall(self, data: bytes, *flags: int) -> None:  # type: ignore[override]
            sent.append(bytes(data))

    with Recorded(socket.AF_UNIX) as connection:
        send_answer(connection, Answer(status="done", tables={"metrics": {"accuracy": 0.5}}))
    assert len(sent) == 1


def test_values_that_are_not_plain_are_not_sent(pair: tuple[socket.socket, socket.socket]) -> None:
    one, _ = pair
    payload = Payload(b"", {"round": b"\x00"})  # type: ignore[dict-item]
    with pytest.raises(WireError, match="not plain"):
        send_question(one, Question(kind="train", payload=payload))
