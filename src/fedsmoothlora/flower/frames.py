"""Questions and answers as bytes on a local socket between a ClientApp and its warm process.

A frame is JSON and, as they are, the bytes of a safetensors file::

    length of the JSON | length of the tensors | JSON | tensors

A length has 8 bytes, little-endian, and is limited. Bytes are read as they come, so a wrong length costs no
more memory than the bytes that were sent. Nothing is unpickled.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Mapping
from typing import Any, get_args

from fedsmoothlora.errors import WireError
from fedsmoothlora.federation.payload import Payload
from fedsmoothlora.flower.questions import Answer, Kind, Question, Status

LARGEST_JSON = 2**26
LARGEST_TENSORS = 2**36
_LENGTH = 8
_KINDS: tuple[Kind, ...] = tuple(kind for kinds in get_args(Kind) for kind in get_args(kinds))
_PIECE = 2**20


def send_question(connection: socket.socket, question: Question) -> None:
    """Send a question.

    Raises ``WireError`` if it does not fit into a frame, ``OSError`` if the connection has ended.
    """
    _send(connection, {"kind": question.kind}, question.payload)


def receive_question(connection: socket.socket) -> Question:
    """Receive a question.

    Raises ``WireError`` for anything else, ``OSError`` if the connection ends too early.
    """
    content, payload = _receive(connection)
    kind = content.get("kind")
    for known in _KINDS:
        if kind == known:
            return Question(kind=known, payload=payload)
    raise WireError("it is no question")


def send_answer(connection: socket.socket, answer: Answer) -> None:
    """Send an answer. Raises errors as `send_question`."""
    tables = {name: dict(table) for name, table in answer.tables.items()}
    _send(connection, {"status": answer.status, "tables": tables}, answer.payload)


def receive_answer(connection: socket.socket) -> Answer:
    """Receive an answer. Raises errors as `receive_question`."""
    content, payload = _receive(connection)
    status, tables = content.get("status"), content.get("tables")
    if type(tables) is dict and all(type(table) is dict for table in tables.values()):
        for known in get_args(Status):
            if status == known:
                return Answer(status=known, tables=tables, payload=payload)
    raise WireError("it is no answer")


def receive_exactly(connection: socket.socket, size: int) -> bytes:
    """Receive ``size`` bytes. Raises ``ConnectionError`` if the connection ends before."""
    pieces, left = [], size
    while left:
        piece = connection.recv(min(left, _PIECE))
        if not piece:
            raise ConnectionResetError("the connection ended")
        pieces.append(piece)
        left -= len(piece)
    return b"".join(pieces)


def _send(connection: socket.socket, content: Mapping[str, Any], payload: Payload | None) -> None:
    fields = None if payload is None else dict(payload.fields)
    tensors = b"" if payload is None else payload.tensors
    try:
        text = json.dumps({**content, "fields": fields}).encode()
    except (TypeError, ValueError) as error:
        raise WireError(f"it has values that are not plain: {error}") from None
    _check(len(text), len(tensors))
    lengths = [number.to_bytes(_LENGTH, "little") for number in (len(text), len(tensors))]
    # No send follows the last byte, not even an empty one: the other end may have closed the connection.
    connection.sendall(b"".join((*lengths, text)))
    if tensors:
        connection.sendall(tensors)


def _receive(connection: socket.socket) -> tuple[dict[str, Any], Payload | None]:
    lengths = receive_exactly(connection, 2 * _LENGTH)
    size, tensors_size = (int.from_bytes(part, "little") for part in (lengths[:_LENGTH], lengths[_LENGTH:]))
    _check(size, tensors_size)
    text = receive_exactly(connection, size)
    tensors = receive_exactly(connection, tensors_size)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        content = None
    if type(content) is not dict or "fields" not in content:
        raise WireError("it is no frame")
    fields = content.pop("fields")
    if fields is None:
        return content, None
    if type(fields) is not dict:
        raise WireError("its fields are no table")
    return content, Payload(tensors=tensors, fields=fields)


def _check(size: int, tensors_size: int) -> None:
    if size > LARGEST_JSON or tensors_size > LARGEST_TENSORS:
        raise WireError(
            f"it has {size} bytes of fields and {tensors_size} bytes of tensors; "
            f"there may be {LARGEST_JSON} and {LARGEST_TENSORS}"
        )
