"""Messages and replies over the wire: what goes in comes out, and nothing else is taken for it."""

import json
import pickle
import tracemalloc
import zlib
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load
from torch import Tensor

from fedsmoothlora.algebra.lowrank import LowRank
from fedsmoothlora.errors import WireError
from fedsmoothlora.federation.messages import Message, Reply
from fedsmoothlora.federation.payload import Payload
from fedsmoothlora.federation.serialization import serialised
from fedsmoothlora.federation.wire import kinds, pack, unpack

DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float64, torch.int8])
NAMES = st.text(st.characters(codec="utf-8", exclude_characters="\0/"), min_size=1, max_size=12).filter(
    lambda name: name != "__metadata__"
)
WHOLE = st.integers(-(2**62), 2**62)


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    shape = draw(st.lists(st.integers(0, 4), max_size=3))
    values = torch.arange(max(1, torch.Size(shape).numel())) - 2
    tensor = values[: torch.Size(shape).numel()].reshape(shape).to(draw(DTYPES))
    return tensor.mT if tensor.ndim == 2 and draw(st.booleans()) else tensor  # also what is not contiguous


@st.composite
def products(draw: st.DrawFn) -> LowRank:
    m, r, n = (draw(st.integers(0, 4)) for _ in range(3))
    dtype = draw(DTYPES)
    return LowRank(torch.full((m, r), 2).to(dtype), torch.full((r, n), 3).to(dtype))


BY_KIND: dict[str, st.SearchStrategy[Any]] = {
    "text": st.text(max_size=20),
    "integer": WHOLE,
    "metrics": st.dictionaries(NAMES, st.floats(allow_nan=False), max_size=3),
    "tensors": st.dictionaries(NAMES, tensors(), max_size=3),
    "update": st.dictionaries(NAMES, st.one_of(tensors(), products()), max_size=3),
}


def contents(kind: type) -> st.SearchStrategy[Any]:
    return st.builds(kind, **{name: BY_KIND[how] for name, how in kinds(kind).items()})


def same(one: Any, other: Any) -> bool:
    if isinstance(one, LowRank):
        return isinstance(other, LowRank) and same(one.B, other.B) and same(one.A, other.A)
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    return bool(type(one) is type(other) and one == other)


def opened(data: bytes) -> tuple[bytes, bytes]:
    """The table and the tensors' bytes of a payload, by the layout that wire.py documents."""
    end = 8 + int.from_bytes(data[:8], "little")
    return zlib.decompress(data[8:end]), data[end:]


def closed(table: bytes, data: bytes) -> bytes:
    deflated = zlib.compress(table)
    return len(deflated).to_bytes(8, "little") + deflated + data


@given(st.one_of(contents(Message), contents(Reply)))
def test_what_is_sent_is_what_comes_in(content: Any) -> None:
    found = unpack(type(content), pack(content))
    for part in fields(content):
        assert same(getattr(content, part.name), getattr(found, part.name)), part.name


@given(st.one_of(contents(Message), contents(Reply)))
def test_only_safetensors_and_plain_values_are_sent_and_as_many_bytes_as_are_counted(content: Any) -> None:
    payload = pack(content)
    assert {type(value) for value in payload.fields.values()} <= {str, int, float}
    table, data = opened(payload.tensors)
    assert len(data) == content.nbytes
    # Any safetensors reader reads the file once its table is inflated.
    read = load(len(table).to_bytes(8, "little") + table + data)
    assert read.keys() == json.loads(table).keys() - {"__metadata__"}


def test_a_field_that_has_no_form_on_the_wire_is_refused_by_name() -> None:
    @dataclass
    class Odd:
        anything: list[int]

    with pytest.raises(TypeError, match=r"Odd\.anything"):
        kinds(Odd)


REPLY = Reply(
    client="a",
    round=1,
    samples=3,
    sent={"q": LowRank(torch.ones(3, 2), torch.ones(2, 4))},
    head={"bias": torch.ones(2)},
    metrics={"train_loss": 0.5},
)
GOOD = pack(REPLY)


def renamed(old: str, new: str) -> Payload:
    """The reply with a tensor of another name; names of one length, so that the file stays whole."""
    assert len(old) == len(new)
    return changed(lambda table: table.replace(old.encode(), new.encode()))


def changed(change: Callable[[bytes], bytes]) -> Payload:
    """The reply with another table."""
    table, data = opened(GOOD.tensors)
    return replace(GOOD, tensors=closed(change(table), data))


def without(name: str) -> Payload:
    return replace(GOOD, fields={key: value for key, value in GOOD.fields.items() if key != name})


def with_field(**values: Any) -> Payload:
    return replace(GOOD, fields={**GOOD.fields, **values})


MALFORMED: dict[str, tuple[Payload, str]] = {
    "a pickle": (replace(GOOD, tensors=pickle.dumps({"q": 1})), "no safetensors"),
    "no bytes at all": (replace(GOOD, tensors=b""), "no safetensors"),
    "half of the file": (replace(GOOD, tensors=GOOD.tensors[: len(GOOD.tensors) // 2]), "no safetensors"),
    "text for bytes": (replace(GOOD, tensors="text"), "of type str|'text'"),  # type: ignore[arg-type]
    "a header that claims more than there is": (
        replace(GOOD, tensors=(2**40).to_bytes(8, "little") + GOOD.tensors[8:]),
        "no safetensors",
    ),
    "a table that is not deflated": (
        replace(GOOD, tensors=serialised({"head:bias": torch.ones(2)})[0]),
        "no safetensors",
    ),
    "a table that grows without bound": (
        changed(lambda table: b" " * 2**25 + table),
        "its table is cut off, or longer than 16777216 bytes",
    ),
    "more beside the table": (
        replace(GOOD, tensors=closed(*opened(GOOD.tensors))[:8] + GOOD.tensors[9:]),
        "no safetensors",
    ),
    "a tensor longer than the bytes there are": (
        changed(lambda table: table.replace(b"[3,2]", b"[9,2]")),
        "no safetensors",
    ),
    "bytes that belong to no tensor": (
        replace(GOOD, tensors=GOOD.tensors + bytes(8)),
        "no safetensors",
    ),
    "half of a product": (renamed("sent:q/A", "sent:z/A"), "do not make products"),
    "factors that do not fit": (
        pack(replace(REPLY, sent={"q/B": torch.ones(3, 2), "q/A": torch.ones(5, 4)})),
        "do not make products",
    ),
    "a tensor of no field": (renamed("head:bias", "tail:bias"), "unknown tensor 'tail:bias'"),
    "a tensor without a field": (renamed("head:bias", "headXbias"), "unknown tensor"),
    "no sample count": (without("samples"), "has no samples"),
    "a sample count with a fraction": (
        with_field(samples=3.0),
        "samples is 3.0; it must be of type int",
    ),
    "a sample count that is a truth value": (with_field(samples=True), "samples is True"),
    "a client that is no text": (with_field(client=7), "client is 7; it must be of type str"),
    "a metric that is no number": (with_field(**{"metrics:train_loss": "0.5"}), "'train_loss' is '0.5'"),
    "a metric that is a list": (with_field(**{"metrics:rows": [1, 2]}), "'rows' is of type list"),
    "a field too many": (with_field(labels="0 1 1"), "unknown field 'labels'"),
    "a tensor as a field": (with_field(sent="x"), "unknown field 'sent'"),
    "a message for a reply": (pack(Message(round=1)), "unknown field 'accepted_round'"),
}


@pytest.mark.parametrize("what", MALFORMED)
def test_what_is_malformed_is_refused_with_a_reason(what: str) -> None:
    payload, reason = MALFORMED[what]
    with pytest.raises(WireError, match=reason):
        unpack(Reply, payload)


@given(st.binary(max_size=200), st.integers(0, 200))
def test_no_table_does_anything_but_be_refused_or_be_read(data: bytes, position: int) -> None:
    table, tensors = opened(GOOD.tensors)
    mixed = table[:position] + data + table[position + len(data) :]
    try:
        found = unpack(Reply, replace(GOOD, tensors=closed(mixed, tensors)))
    except WireError:
        return
    assert isinstance(found, Reply)


@given(st.binary(max_size=200), st.integers(0, 200))
def test_no_bytes_do_anything_but_be_refused_or_be_read(data: bytes, position: int) -> None:
    mixed = GOOD.tensors[:position] + data + GOOD.tensors[position + len(data) :]
    for tensors in (data, mixed):
        try:
            found = unpack(Reply, replace(GOOD, tensors=tensors))
        except WireError:
            continue
        assert isinstance(found, Reply)


def test_the_file_names_fields_and_layers_only() -> None:
    names = json.loads(opened(GOOD.tensors)[0]).keys() - {"__metadata__"}
    assert names == {"sent:q/B", "sent:q/A", "head:bias"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_framing_of_many_thin_factors_is_under_one_percent(dtype: torch.dtype) -> None:
    """A ViT-S's thirty-six attention layers at rank 8, with transformers' names; fields and all."""
    sent = {
        f"dinov2.encoder.layer.{block}.attention.attention.{name}": LowRank(
            torch.randn(384, 8).to(dtype), torch.randn(8, 384).to(dtype)
        )
        for block in range(12)
        for name in ("query", "key", "value")
    }
    metrics = {f"seconds_of_part_{number}": 0.1 * number for number in range(20)}
    reply = replace(REPLY, sent=sent, metrics=metrics)
    payload = pack(reply)
    fields = sum(len(name) + 8 for name in payload.fields)
    assert len(payload.tensors) + fields < 1.01 * reply.nbytes


def hostile(header: bytes, data: bytes = b"") -> Payload:
    return replace(GOOD, tensors=closed(header, data))


def peak_of_reading(payload: Payload, reason: str) -> int:
    """The bytes of memory that a refusal takes at most, the payload itself apart."""
    tracemalloc.start()
    try:
        with pytest.raises(WireError, match=reason):
            unpack(Reply, payload)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_hundreds_of_thousands_of_empty_tensors_are_refused_before_they_are_read() -> None:
    empty = '"{}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}'
    header = "{" + ",".join(empty.format(number) for number in range(240_000)) + "}"
    # The inflated table and its copies, and no tensor or parsed entry.
    assert peak_of_reading(hostile(header.encode()), "it has 240000 tensors") < 3 * len(header)


def test_bytes_after_the_tensors_are_refused_before_they_are_copied() -> None:
    table, data = opened(GOOD.tensors)
    many = bytes(64 * 2**20)
    assert peak_of_reading(hostile(table, data + many), "its tensors end at byte") < 2**20


def test_bytes_after_the_deflated_table_are_refused_before_they_are_copied() -> None:
    table, data = opened(GOOD.tensors)
    deflated = zlib.compress(table) + bytes(64 * 2**20)
    payload = replace(GOOD, tensors=len(deflated).to_bytes(8, "little") + deflated + data)
    assert peak_of_reading(payload, "its table has 67108") < 2**20


def test_tensors_are_counted_however_the_table_spells_their_keys() -> None:
    one = '{"dtype":"F32","shape":[0],"data\\u005foffsets":[0,0]}'
    table = "{" + ",".join(f'"sent:{number:x}":{one}' for number in range(240_000)) + "}"
    assert peak_of_reading(hostile(table.encode()), "there may be") < 32 * 2**20


def test_thousands_of_fields_are_refused() -> None:
    payload = with_field(**{f"metrics:{number}": 1.0 for number in range(5000)})
    with pytest.raises(WireError, match="fields; there may be 1000"):
        unpack(Reply, payload)


@pytest.mark.parametrize(
    "payload",
    [
        with_field(**{"a\n" * 1_000_000: 1}),
        with_field(**{"metrics:a\x1b[2J" + "x" * 1_000_000: "text"}),
        with_field(round="\n" * 1_000_000),
        renamed("head:bias", "head\\tbias"[:9]),
        hostile(b'{"sent:\\n/B":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}'),
        hostile(b'{"\\u001b[31m":{"dtype":"F99","shape":[0],"data_offsets":[0,0]}}'),
    ],
    ids=["field", "metric", "value", "tensor", "factor", "dtype"],
)
def test_the_reason_of_a_refusal_is_one_short_printable_line(payload: Payload) -> None:
    with pytest.raises(WireError) as error:
        unpack(Reply, payload)
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 500
