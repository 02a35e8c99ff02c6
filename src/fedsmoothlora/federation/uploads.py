"""Check the replies of a round. The server trusts no reply.

`check_replies` is a pure function of the replies and their `ReplySpec`: it changes nothing, and no content of
a reply makes it raise. A reply is accepted if it answers this round's message, if its layers, head and number
of samples are as specified, if all values are finite, and if its norm is not far above those of the other
replies.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from fedsmoothlora.algebra.coding import Packed, PackedPart, bytes_for
from fedsmoothlora.algebra.lowrank import LowRank
from fedsmoothlora.algebra.update import Coded
from fedsmoothlora.errors import NotFiniteError
from fedsmoothlora.federation.changes import HEAD_NUMBERS
from fedsmoothlora.federation.messages import Reply, memmapped_reply
from fedsmoothlora.federation.reply_metrics import checked_metrics
from fedsmoothlora.federation.settings import UploadSettings
from fedsmoothlora.methods import Layer
from fedsmoothlora.printable import printable

# Federated optimisers and Frobenius norms square values, and squares must stay finite in float32 (3.4e38).
# The bound applies to ||B||, ||A|| and ||B|| ||A||, so no order of summation of B @ A overflows.
_LARGEST = 1e18

# The parts of a reply, and the names of the quantities that are compared with the round's other replies.
_PARTS = ("sent", "head", "control")
_WHATS = ("upload", "head's change", "control variates' change")


@dataclass(frozen=True, kw_only=True)
class ReplySpec:
    """The properties that a reply of this round must have.

    Attributes:
        experiment: the run's identity.
        round: ``t``.
        attempt: number of earlier attempts of this round.
        exchange: which exchange of the round it is.
        weighted: tensors are multiplied by the client's number of samples, and the head comes as its change
            in float32. Norms are compared after division by that number.
        clients: number of training samples of each client that was asked, which is known before round 0.
        began: the rounds whose messages clients answer, if that is not this round.
        heads: the heads that were sent down in those rounds, by round.
        products: layers whose upload is a product of shape ``(m, n)`` and at most the layer's rank.
        product_bytes: the most bytes of all products together; None if their ranks alone limit them.
        factors_apart: the method averages ``B`` and ``A`` apart, so that a product must have exactly the
            layer's rank and its norm is that of its factors, ``sqrt(||B||^2 + ||A||^2)``.
        tensors: layers or factors that come as plain tensors, with their shapes.
        factors: changes of factors that come packed, with their shapes.
        bits: bits of a packed number: products and factors are packed, and the head comes as its change in
            bfloat16. None where nothing is packed.
        head: the head that was sent down to be trained whole; ``{}`` if none.
        control: shapes of the changes of SCAFFOLD's control variates; ``{}`` if there are none.
        dtype: dtype of the upload's tensors. Those of the head keep the dtype in which they were sent, and
            changes of control variates are float32.
    """

    experiment: str
    round: int
    attempt: int
    clients: Mapping[str, int]
    exchange: int = 0
    weighted: bool = False
    began: Mapping[str, int] = field(default_factory=dict)
    heads: Mapping[int, Mapping[str, Tensor]] = field(default_factory=dict)
    products: Mapping[str, Layer] = field(default_factory=dict)
    product_bytes: int | None = None
    factors_apart: bool = False
    tensors: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    factors: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    bits: int | None = None
    head: Mapping[str, Tensor] = field(default_factory=dict)
    control: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32

    def for_client(self, client: str) -> ReplySpec:
        """The specification of one client's reply, with the round in which it began."""
        if client not in self.began:
            return self
        began = self.began[client]
        return replace(self, round=began, head=self.heads.get(began, self.head), began={})


@dataclass(frozen=True, kw_only=True)
class CheckedReplies:
    """The accepted and the refused replies of a round, in the order of the replies.

    Attributes:
        accepted: replies to aggregate, at most one per client.
        refused: the other replies, each with the reason: the client, the fault, and what would be right.
        notes: metrics that are not recorded, by client, with the reason.
    """

    accepted: list[Reply]
    refused: list[tuple[Reply, str]]
    notes: list[str] = field(default_factory=list)


@torch.no_grad()
def check_replies(replies: Sequence[Reply], expected: ReplySpec, settings: UploadSettings) -> CheckedReplies:
    """Decide which replies of a round are accepted.

    **Each by itself.** Client, experiment, round and attempt are those of the message; the sample count is
    the known one; the upload has exactly the
    expected layers, each a product ``(m, n)`` of at most the layer's rank (a lower one, also 0, is fine) or
    a plain tensor of the expected shape, or their packed form; all products together have no more bytes than
    they may; the head has the names, shapes and dtypes
    that were sent down, or is its change;
    changes of control variates are there exactly where they are wanted; every tensor is an ordinary one of
    the expected dtype, finite, with ``||x||``, ``||B||``, ``||A||`` and ``||B|| ||A||`` at most 1e18. Of
    two believable replies by one client the first counts; a damaged one does not use up its client's turn.

    **Compared with the others.** Norms are computed in float64: ``sqrt(sum_layers ||B A||_F^2)`` for an
    upload (or the norms of its plain tensors), ``sqrt(sum ||head - sent||_F^2)`` for a change of the head,
    and likewise for changes of control variates. Each norm is compared with its median over all replies that
    are valid alone (for an even number, the mean of the middle two). If a norm is above ``max_norm_factor``
    times the median, the reply is refused. The median follows the majority; two replies have none, and a
    factor of 2 or more refuses neither. If the median is 0, most clients changed nothing, and only uploads of
    norm 0 are accepted. The round then changes nothing; otherwise a single client could determine it.

    **Clipping** (``clip_to_median``) scales accepted replies whose norm is above the median by
    ``median / norm``: ``B`` of every product, every plain tensor, and the change of the head. Nothing is ever
    scaled up. Do not use it if plain tensors are full weights rather than changes.

    Accepted replies are the given objects, unless clipping scaled them, metrics that cannot be recorded were
    removed (`checked_metrics`), or tensors that require gradients were detached. Given tensors are never
    written to. The order of replies only decides which of several replies of one client is accepted.

    Args:
        replies: replies in order of arrival, with any content.
        expected: the specification, which is trusted.
        settings: ``[uploads]``; ``min_clients`` is left to the caller.

    Returns:
        The accepted replies, and the refused ones with reasons. No content of ``replies`` makes this function
        raise.
    """
    reasons: dict[int, str] = {}  # by position: two replies may name the same client
    believable: dict[int, Reply] = {}
    sizes: dict[int, tuple[float, ...]] = {}  # norms of the upload, the head's change, the control variates'
    seen: set[str] = set()
    notes: list[str] = []
    for position, reply in enumerate(replies):
        try:
            _check_address(reply, expected)
            own = expected.for_client(reply.client)
            reply, dropped = _read_once(reply)
            size = tuple(check(reply, own) for check in (_check_sent, _check_head, _check_control))
            if own.weighted:
                size = tuple(norm / max(1, reply.samples) for norm in size)
            if reply.client in seen:  # checked last, so that other reasons do not depend on the order
                raise _Refused(f"a repeat: its first valid reply of round {expected.round + 1} is used")
            believable[position], sizes[position] = _detached(reply), size
            seen.add(reply.client)
            if dropped:
                notes.append(f"{_client_of(reply)}: metrics that are not used: {_some(dropped)}")
        except _Refused as refusal:
            reasons[position] = f"{_client_of(reply)}: {refusal}"
        except Exception as error:  # a malicious object may raise any error when it is read
            reasons[position] = f"{_client_of(reply)}: its reply cannot be read ({type(error).__name__})"

    medians = [statistics.median(column) for column in zip(*sizes.values(), strict=True)]
    accepted: list[Reply] = []
    for position, reply in believable.items():
        try:
            for what, norm, median in zip(_WHATS, sizes[position], medians, strict=True):
                _check_size(what, norm, median, len(sizes), settings.max_norm_factor)
        except _Refused as refusal:
            reasons[position] = f"{_client_of(reply)}: {refusal}"
        else:
            if settings.clip_to_median:
                reply = _clipped(reply, expected.for_client(reply.client), sizes[position], medians)
            accepted.append(reply)
    refused = [(replies[i], reasons[i]) for i in sorted(reasons)]
    return CheckedReplies(accepted=accepted, refused=refused, notes=notes)


class _Refused(Exception):
    """The reason for refusing a reply, without the client's name."""


def _check_address(reply: Reply, expected: ReplySpec) -> None:
    """Check that the reply answers this round's message with the known number of samples."""
    if type(reply) is not Reply:
        raise _Refused(f"expected a reply; got {_show(reply)}")
    if type(reply.client) is not str or reply.client not in expected.clients:
        raise _Refused(
            f"was not asked in round {expected.round + 1}; the round asked {_list(expected.clients)}"
        )
    expected = expected.for_client(reply.client)
    for name in ("experiment", "round", "attempt", "exchange"):
        found, right = getattr(reply, name), getattr(expected, name)
        if type(found) is not type(right) or found != right:
            if name == "round":  # messages count rounds from 1
                found, right = found + 1 if type(found) is int else found, right + 1
            raise _Refused(f"its reply is for {name} {_show(found)}; this is {name} {_show(right)}")
    samples, known = reply.samples, expected.clients[reply.client]
    if type(samples) is not int or samples != known:
        raise _Refused(f"its number of training samples is {_show(samples)}; it is known to have {known}")


def _check_sent(reply: Reply, expected: ReplySpec) -> float:
    """The upload's norm; refused where a layer is not as expected."""
    _check_names("upload", "layer", reply.sent, [*expected.products, *expected.tensors, *expected.factors])
    if expected.bits is not None:
        return _root_sum_square(_packed_norms(reply, expected, expected.bits))
    norms = [
        _check_product(f"layer {name}", reply.sent[name], layer, expected)
        for name, layer in expected.products.items()
    ]
    _check_product_bytes(reply, expected)
    norms += [
        _check_tensor(f"layer {name}", reply.sent[name], shape, expected.dtype)
        for name, shape in expected.tensors.items()
    ]
    return _root_sum_square(norms)


def _check_head(reply: Reply, expected: ReplySpec) -> float:
    """Check every tensor of the head, and return the norm of the head's change."""
    _check_names("head", "tensor", reply.head, expected.head)
    norms = []
    for name, sent_down in expected.head.items():
        what, value = f"head tensor {name}", reply.head[name]
        if expected.bits is not None:
            norms.append(_check_tensor(what, value, sent_down.shape, HEAD_NUMBERS))
            continue
        if expected.weighted:
            norms.append(_check_tensor(what, value, sent_down.shape, torch.float32))
            continue
        _check_tensor(what, value, sent_down.shape, sent_down.dtype)
        change = float(torch.linalg.vector_norm(value.double() - sent_down.to(value.device).double()))
        if not math.isfinite(change):
            raise _Refused(f"{what}: its change from the head sent down is {change}; it must be finite")
        norms.append(change)
    return _root_sum_square(norms)


def _check_control(reply: Reply, expected: ReplySpec) -> float:
    """Check the changes of control variates, and return their norm."""
    _check_names("control variates", "parameter", reply.control, expected.control)
    norms = [
        _check_tensor(f"control variate of {name}", reply.control[name], shape, torch.float32)
        for name, shape in expected.control.items()
    ]
    return _root_sum_square(norms)


def _check_names(what: str, kind: str, found: object, wanted: Iterable[str]) -> None:
    if not isinstance(found, Mapping):
        raise _Refused(f"its {what} is {_show(found)}; expected a mapping from {kind} to value")
    wanted = list(wanted)
    if missing := [name for name in wanted if name not in found]:
        raise _Refused(f"its {what} lacks {kind} {_list(missing)}; expected are {_list(wanted)}")
    allowed = set(wanted)
    if unknown := [name for name in found if type(name) is not str or name not in allowed]:
        raise _Refused(f"its {what} has unknown {kind} {_list(unknown)}; expected are {_list(wanted)}")


def _check_product(what: str, value: object, layer: Layer, expected: ReplySpec) -> float:
    """``||B A||_F`` of a layer's product, or the norm of its factors; the dense matrix is not formed."""
    dtype, most = expected.dtype, "exactly" if expected.factors_apart else "at most"
    right = f"a low-rank product ({layer.m}, {layer.n}) of rank {most} {layer.rank}"
    if type(value) is not LowRank:
        raise _Refused(f"{what}: expected {right}; got {_show(value)}")
    B, A = (getattr(value, name, None) for name in ("B", "A"))
    B = _ordinary(f"{what}, factor B", B, f"a dense matrix of {dtype}", dtype)
    A = _ordinary(f"{what}, factor A", A, f"a dense matrix of {dtype}", dtype)
    rank = B.shape[-1] if B.ndim else 0
    if (*B.shape, *A.shape) != (layer.m, rank, rank, layer.n):
        raise _Refused(f"{what}: factors {tuple(B.shape)} and {tuple(A.shape)}; expected {right}")
    if rank > layer.rank or (expected.factors_apart and rank != layer.rank):
        raise _Refused(f"{what}: rank {rank}; expected {right}")
    left = _check_tensor(f"{what}, factor B", B, (layer.m, rank), dtype)
    right_norm = _check_tensor(f"{what}, factor A", A, (rank, layer.n), dtype)
    if expected.factors_apart:
        return math.hypot(left, right_norm)
    if (bound := left * right_norm) > _LARGEST:
        raise _Refused(
            f"{what}: ||B|| ||A|| is {bound:.3g}, at which the product may overflow; "
            f"it must be at most {_LARGEST:g}"
        )
    return LowRank(B.double(), A.double()).norm()


def _check_product_bytes(reply: Reply, expected: ReplySpec) -> None:
    """Check that all products together have no more bytes than they may; each is known to be well-formed."""
    found = sum(reply.sent[name].nbytes for name in expected.products)
    if expected.product_bytes is not None and found > expected.product_bytes:
        raise _Refused(
            f"its products have {found} bytes in all; they may have {expected.product_bytes}, those of "
            "products of the LoRA's rank"
        )


def _packed_norms(reply: Reply, expected: ReplySpec, bits: int) -> list[float]:
    """The norms of packed products and factors."""
    norms = [
        _check_packed(f"layer {name}", reply.sent[name], "product", (layer.m, layer.n), layer.rank, bits)
        for name, layer in expected.products.items()
    ]
    _check_product_bytes(reply, expected)
    for name, (rows, columns) in expected.factors.items():
        part: PackedPart = "B" if name.endswith("_B") else "A"
        rank = columns if part == "B" else rows
        norms.append(_check_packed(f"factor {name}", reply.sent[name], part, (rows, columns), rank, bits))
    return norms


def _check_packed(
    what: str, value: object, part: PackedPart, shape: tuple[int, int], rank: int, bits: int
) -> float:
    """The Frobenius norm of a packed product or factor."""
    most = f"at most {rank}" if part == "product" else f"{rank}"
    right = (
        f"a packed {'product' if part == 'product' else 'factor'} {shape}, {most} directions of {bits} bits"
    )
    if type(value) is not Packed:
        raise _Refused(f"{what}: expected {right}; got {_show(value)}")
    scales = _ordinary(
        f"{what}, scales", value.scales, right, torch.float32 if part == "product" else torch.bfloat16
    )
    codes = _ordinary(f"{what}, codes", value.codes, right, torch.uint8)
    directions = scales.shape[0] if scales.ndim == 1 else -1
    if (value.part, value.shape, value.bits) != (part, shape, bits):
        raise _Refused(
            f"{what}: got a packed {_show(value.part)} {_show(value.shape)} of {_show(value.bits)} bits; "
            f"expected {right}"
        )
    if directions < 0 or directions > rank or (part != "product" and directions != rank):
        raise _Refused(f"{what}: scales {tuple(scales.shape)}; expected {right}")
    length = {"product": sum(shape), "B": shape[0], "A": shape[1]}[part]
    if codes.shape != (size := (bytes_for(directions * length, bits),)):
        raise _Refused(f"{what}: codes {tuple(codes.shape)}; {directions} directions take {size}")
    if any(one.device.type == "meta" or not _has_memory(one) for one in (codes, scales)):
        raise _Refused(f"{what}: the tensor holds no values; expected {right}")
    _check_tensor(f"{what}, scales", scales, tuple(scales.shape), scales.dtype)
    try:
        found = value.decoded()
    except (ValueError, NotFiniteError) as error:
        raise _Refused(f"{what}: {error}") from None
    norm = found.to(dtype=torch.float64).norm()
    if not (norm := float(norm)) <= _LARGEST:
        raise _Refused(f"{what}: its norm is {norm:.3g}; it must be at most {_LARGEST:g}")
    return norm


def _check_tensor(what: str, value: object, shape: Sequence[int], dtype: torch.dtype) -> float:
    """A plain tensor's Frobenius norm."""
    right = f"a dense tensor {tuple(shape)} of {dtype}"
    value = _ordinary(what, value, right, dtype)
    if value.shape != tuple(shape):
        raise _Refused(f"{what}: shape {tuple(value.shape)}; expected {tuple(shape)}")
    if value.device.type == "meta" or not _has_memory(value):
        raise _Refused(f"{what}: the tensor has no values; expected {right}")
    norm = float(torch.linalg.vector_norm(value.double()))
    if not math.isfinite(norm):
        count = int((~torch.isfinite(value)).sum())
        raise _Refused(f"{what}: {count} of {value.numel()} values are not finite; all must be")
    if norm > _LARGEST:
        raise _Refused(f"{what}: its norm is {norm:.3g}; it must be at most {_LARGEST:g}")
    return norm


def _ordinary(what: str, value: object, right: str, dtype: torch.dtype) -> Tensor:
    """Check that a value is an ordinary dense tensor, whose shape and memory can be trusted."""
    if not isinstance(value, Tensor) or type(value) not in (Tensor, nn.Parameter):
        raise _Refused(f"{what}: expected {right}; got {_show(value)}")
    if value.is_nested or value.layout != torch.strided or value.is_quantized or value.dtype != dtype:
        kind = "nested" if value.is_nested else "quantised" if value.is_quantized else value.layout
        raise _Refused(f"{what}: got a tensor of {value.dtype} ({kind}); expected {right}")
    return value


def _has_memory(tensor: Tensor) -> bool:
    """Whether the storage is long enough for shape and strides; reading past its end kills the process."""
    if tensor.numel() == 0:
        return True
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    last = tensor.storage_offset() + sum((size - 1) * stride for size, stride in steps)
    return (last + 1) * tensor.element_size() <= tensor.untyped_storage().nbytes()


def _check_size(what: str, norm: float, median: float, count: int, factor: float) -> None:
    if norm > factor * median:  # never true for factor inf, not even for median 0
        raise _Refused(
            f"the norm of its {what} is {norm:.4g}; it may be at most {factor:g} times the median of this "
            f"round's {count} valid replies, {median:.4g}"
        )


def _read_once(reply: Reply) -> tuple[Reply, list[str]]:
    """The reply with plain dictionaries and valid metrics, and the reasons why other metrics are dropped."""
    changes: dict[str, Any] = {}
    for name in _PARTS:
        value = getattr(reply, name)
        if isinstance(value, Mapping) and type(value) is not dict:
            changes[name] = dict(value)
    metrics, dropped = checked_metrics(reply.metrics)
    if type(reply.metrics) is not dict or dropped:
        changes["metrics"] = metrics
    return replace(reply, **changes) if changes else reply, dropped


def _detached(reply: Reply) -> Reply:
    """The reply with its tensors detached from the autograd graph, which averaging would otherwise extend."""
    changes: dict[str, Any] = {}
    for field_name in _PARTS:
        values: Coded = getattr(reply, field_name)
        if any(tensor.requires_grad for value in values.values() for tensor in _tensors(value)):
            changes[field_name] = {name: _without_gradient(value) for name, value in values.items()}
    return replace(reply, **changes) if changes else reply


def _without_gradient(value: LowRank | Tensor | Packed) -> LowRank | Tensor | Packed:
    if isinstance(value, LowRank):
        return LowRank(value.B.detach(), value.A.detach())
    if isinstance(value, Packed):
        return replace(value, codes=value.codes.detach(), scales=value.scales.detach())
    return value.detach()


def _tensors(value: LowRank | Tensor | Packed) -> tuple[Tensor, ...]:
    if isinstance(value, LowRank):
        return value.B, value.A
    return (value.codes, value.scales) if isinstance(value, Packed) else (value,)


def _clipped(reply: Reply, expected: ReplySpec, norms: Sequence[float], medians: Sequence[float]) -> Reply:
    """The reply with upload and head's change scaled down to at most the median norms."""
    changes: dict[str, Any] = {}
    if norms[0] > medians[0]:
        factor = medians[0] / norms[0]
        changes["sent"] = {
            name: scaled if isinstance(scaled := value * factor, Packed) else scaled.to(dtype=expected.dtype)
            for name, value in reply.sent.items()
        }
    if norms[1] > medians[1]:
        factor = medians[1] / norms[1]
        changes["head"] = {
            name: value * factor
            if expected.bits is not None  # it is the change
            else _towards(expected.head[name], value, factor)
            for name, value in reply.head.items()
        }
    # Memory-mapped again, because half of a round's replies may be scaled down.
    return memmapped_reply(replace(reply, **changes)) if changes else reply


def _towards(base: Tensor, value: Tensor, factor: float) -> Tensor:
    """``base + factor (value - base)``, computed in float64, in the dtype of ``value``."""
    start = base.to(value.device).double()
    return (start + factor * (value.double() - start)).to(value.dtype)


def _root_sum_square(norms: Iterable[float]) -> float:
    return math.sqrt(math.fsum(norm * norm for norm in norms))


def _client_of(reply: object) -> str:
    try:
        return f"client {_show(getattr(reply, 'client', None), quoted=False)}"
    except Exception:
        return "client ?"


def _some(reasons: Sequence[str]) -> str:
    """The first reasons, joined."""
    more = f"; and {len(reasons) - 3} more" if len(reasons) > 3 else ""
    return "; ".join(reasons[:3]) + more


def _list(names: Iterable[object]) -> str:
    """The first names, so that a reason stays short."""
    shown = list(names)
    more = f" and {len(shown) - 5} more" if len(shown) > 5 else ""
    return (", ".join(_show(name, quoted=False) for name in shown[:5]) or "none") + more


def _show(value: object, *, quoted: bool = True) -> str:
    """A value for an error message, short and on one line; for objects of unknown classes, only the class."""
    if value is None or type(value) in (bool, float):
        return repr(value)
    if type(value) is int:
        return str(value) if value.bit_length() <= 64 else f"an int of {value.bit_length()} bits"
    if type(value) is str:
        return f"'{printable(value)}'" if quoted else printable(value)
    if isinstance(value, Tensor):
        return f"a tensor of {value.dtype}" + ("" if value.is_nested else f", shape {tuple(value.shape)}")
    name = type(value).__name__
    return name if name[:1].isupper() else f"{'an' if name[:1] in 'aeiou' else 'a'} {name}"
