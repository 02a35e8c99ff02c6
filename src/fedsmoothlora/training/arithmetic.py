"""The arithmetic of a GPU: deterministic algorithms, and TF32."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from fedsmoothlora.errors import ConfigError

# cuBLAS reads it when it is first used in a process. With these values its results can be repeated.
_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
_REPEATABLE = (":4096:8", ":16:8")


def prepare(device: torch.device, *, deterministic: bool) -> None:
    """Set cuBLAS's variable in the environment of this process, where it stays.

    Args:
        device: the device that clients train on.
        deterministic: ``machine.deterministic``; without it, and without CUDA, nothing is done.

    Raises ``ConfigError`` if the variable has another value, or if it is too late to set it.
    """
    if not deterministic or device.type != "cuda":
        return
    found = os.environ.get(_WORKSPACE)
    if found in _REPEATABLE:
        return
    if found is not None:
        raise ConfigError(
            f"machine.deterministic = true: the environment variable {_WORKSPACE} is {found!r}; set it to "
            f"{_REPEATABLE[0]!r}, or remove it"
        )
    if torch.cuda.is_initialized():
        raise ConfigError(
            "machine.deterministic = true: this process has used the GPU before; start a new process, with "
            f"the environment variable {_WORKSPACE}={_REPEATABLE[0]}"
        )
    os.environ[_WORKSPACE] = _REPEATABLE[0]


@contextmanager
def arithmetic(device: torch.device, *, deterministic: bool, tf32: bool | None) -> Iterator[None]:
    """The context in which a run computes on a GPU; torch's settings are restored at the end.

    On other devices it does nothing.

    Args:
        device: the device that clients train on.
        deterministic: ``machine.deterministic``: torch uses deterministic algorithms only, and cuDNN does not
            choose algorithms by their time.
        tf32: ``machine.tf32``: whether products and convolutions of float32 tensors round their inputs to
            TF32; torch's own settings if it is None.

    Raises ``ConfigError`` if an operation has no deterministic algorithm, or if the process has set the
    precision of float32 by torch's other interface.
    """
    if device.type != "cuda":
        yield
        return
    with ExitStack() as stack:
        if tf32 is not None:
            stack.enter_context(_tf32(tf32))
        if deterministic:
            stack.enter_context(_deterministic())
        yield


@contextmanager
def _tf32(on: bool) -> Iterator[None]:
    # torch 2.9 also has `fp32_precision`. Once it is set, reading `allow_tf32` or
    # `torch.get_float32_matmul_precision()` raises an error, and torch's own compiler reads both.
    owners = (torch.backends.cuda.matmul, torch.backends.cudnn)
    try:
        with _set([(owner, "allow_tf32", on) for owner in owners]):
            yield
    except RuntimeError as error:
        if "legacy and new APIs" not in str(error):
            raise
        raise ConfigError(
            f"machine.tf32 = {str(on).lower()}: this process has set fp32_precision in torch.backends, which "
            "torch does not combine with allow_tf32; leave machine.tf32 out, or do not set it"
        ) from None


@contextmanager
def _deterministic() -> Iterator[None]:
    before, warned = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.use_deterministic_algorithms(True)
    cudnn = torch.backends.cudnn
    try:
        with _set([(cudnn, "deterministic", True), (cudnn, "benchmark", False)]):
            yield
    except RuntimeError as error:
        if "use_deterministic_algorithms" not in str(error):
            raise
        raise ConfigError(
            f"machine.deterministic = true: {str(error).split('. ')[0]}; set machine.deterministic = false"
        ) from None
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warned)


@contextmanager
def _set(values: Sequence[tuple[Any, str, Any]]) -> Iterator[None]:
    """Set attributes of objects, and restore them at the end."""
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in values]
    try:
        for owner, name, value in values:
            setattr(owner, name, value)
        yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)
