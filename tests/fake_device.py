"""A made-up accelerator, with which a machine without one finds tensors that are mixed across devices.

torch's own `FakeTensor` cannot carry a round: its tensors have no values, on which a federation's control
flow depends, and autograd refuses tensors of a device that torch was built without. A tensor on `FAKE` has
its values on the CPU and claims another device. Operations compute on the values, with the results of the
CPU, and raise torch's error where an operation mixes devices.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# A device that torch knows in every build, and starts no driver for.
FAKE = torch.device("mps:0")
_aten = torch.ops.aten
# The packages whose code made the host wait for a value on `FAKE`, in order; a test empties the list.
HOST_READS: list[str] = []
# On an accelerator these wait: they return a number, or a tensor whose shape depends on values.
_READS = (
    _aten._local_scalar_dense,
    _aten.equal,
    _aten.is_nonzero,
    _aten.masked_select,
    _aten.nonzero,
    _aten._unique2,
    _aten.unique_dim,
)
# These take tensors of two devices: a copy, and rows of a GPU's tensor by indices on the CPU.
_MAY_MIX = (_aten.copy_, _aten.index)


class FakeAccelerator(Accelerator):
    """An accelerator whose device is `FAKE`."""

    def __init__(self) -> None:
        super().__init__(cpu=True)

    @property
    def device(self) -> torch.device:
        return FAKE


class OnFake(Tensor):
    """A tensor on `FAKE`. For torch's C++ code it is one on the meta device, for which autograd works."""

    value: Tensor

    @staticmethod
    def __new__(cls, value: Tensor) -> OnFake:
        with torch.inference_mode(False):  # a view of an ordinary tensor must be ordinary there too
            made = Tensor._make_wrapper_subclass(
                cls,
                value.shape,
                strides=value.stride(),
                storage_offset=value.storage_offset(),
                dtype=value.dtype,
                device="meta",
            )
        made.value = value
        return made

    device = property(lambda self: FAKE)
    is_meta = property(lambda self: False)
    __torch_function__ = torch._C._disabled_torch_function_impl

    @property
    def data(self) -> Tensor:
        return Tensor.data.__get__(self)

    @data.setter
    def data(self, new: OnFake) -> None:
        Tensor.data.__set__(self, new)
        self.value = new.value

    def __repr__(self, **options: Any) -> str:
        return f"OnFake({self.value})"

    def tolist(self) -> Any:
        HOST_READS.append(_caller())
        return self.value.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _carried_out(func, args, kwargs or {})


class FakeDevice(TorchDispatchMode):
    """While it is entered, tensors can be made on `FAKE` and moved there.

    Args:
        loading: models are loaded meanwhile, which begins on the meta device. At other times only torch's C++
            code makes tensors there, to compute with tensors on `FAKE`, and they belong on `FAKE` too.
    """

    def __init__(self, *, loading: bool = False) -> None:
        super().__init__()
        self._loading = loading

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
            with self:  # in inference mode, torch hands these over whole
                return func.decompose(*args, **kwargs)
        if self._loading and _type_of(kwargs.get("device")) == "meta" and OnFake not in types:
            return func(*args, **kwargs)
        return _carried_out(func, args, kwargs)


def _carried_out(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    fake: dict[int, OnFake] = {}  # by the identity of their values
    others: list[Tensor] = []

    def value_of(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, OnFake):
            others.append(tensor)
            return tensor
        fake[id(tensor.value)] = tensor
        return tensor.value

    def tagged(value: Tensor) -> Tensor:
        # An operation in place returns the tensor that it was given.
        return fake[id(value)] if id(value) in fake else OnFake(value)

    values = _mapped(value_of, args)
    named = {name: _mapped(value_of, value) for name, value in kwargs.items()}
    if fake and func.overloadpacket not in _MAY_MIX:
        _check_numbers(func, others)
    device = _type_of(kwargs.get("device"))  # given where tensors are made, or moved
    if fake and _waits(func, args, device):
        HOST_READS.append(_caller())
    if device is not None:
        named["device"] = "cpu"
    out = func(*values, **named)
    if func.overloadpacket is _aten.copy_:
        return args[0]
    to_fake = bool(fake) if device is None else device in (FAKE.type, "meta")
    return _mapped(tagged, out) if to_fake else out


def _caller() -> str:
    """The package of the innermost code that is neither torch's nor of this file: ``fedsmoothlora``."""
    frame = sys._getframe(1)
    while (name := str(frame.f_globals["__name__"]).split(".")[0]) in ("torch", __name__) and frame.f_back:
        frame = frame.f_back
    return name


def _waits(func: Any, args: Any, device: str | None) -> bool:
    """Whether a real accelerator would make the host wait for values on `FAKE`."""
    packet = func.overloadpacket
    if packet is _aten.index:
        masks = [mask for mask in args[1] if mask is not None and mask.dtype in (torch.bool, torch.uint8)]
        return any(isinstance(mask, OnFake) for mask in masks)
    to_host = packet is _aten.copy_ and not isinstance(args[0], OnFake)
    return packet in _READS or to_host or (packet is _aten._to_copy and device == "cpu")


def _mapped(change: Callable[[Tensor], Tensor], value: Any) -> Any:
    """Tensors changed, also those in lists; torch's own tree functions take longer than a round."""
    if isinstance(value, Tensor):
        return change(value)
    return type(value)(_mapped(change, part) for part in value) if isinstance(value, list | tuple) else value


def _type_of(device: Any) -> str | None:
    return None if device is None else torch.device(device).type


def _check_numbers(func: Any, others: Sequence[Tensor]) -> None:
    """Raise torch's error where tensors of another device are more than numbers."""
    for tensor in others:
        if tensor.ndim:
            raise RuntimeError(
                f"{func}: ReplySpec all tensors to be on the same device, but found at least two devices, "
                f"{FAKE} and {tensor.device}!"
            )
