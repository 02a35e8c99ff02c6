"""A model's forward and backward passes compiled by ``torch.compile``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from fedsmoothlora.errors import ConfigError

BACKEND = "inductor"
_COMPILER = ("torch._dynamo", "torch._functorch", "torch._inductor")


class CompiledForward:
    """The compiled ``forward`` of a model.

    It is compiled when it is called, and again for another kind of call, such as another set of trained
    parameters. Values that are written into parameters in place need no compilation. Hooks that modules get
    later may be ignored, so the model calls it only in a context.

    Args:
        model: the model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        # Of the method, not of the module: a compiled module has other names of parameters, and its `forward`
        # has another signature, by which objectives choose their arguments.
        self._forward: Callable[..., Any] = torch.compile(model.forward, backend=BACKEND)

    @contextmanager
    def called(self) -> Iterator[None]:
        """Make calls of the model compiled ones. Raises ``ConfigError`` for an error of the compiler."""
        before = vars(self._model).get("forward")
        self._model.forward = self._forward
        try:
            yield
        except RuntimeError as error:
            if not type(error).__module__.startswith(_COMPILER):
                raise
            cause = " ".join(str(error).split("\n\n")[0].split())  # advice for torch's developers follows
            raise ConfigError(
                f"machine.compile = true: torch.compile failed ({type(error).__name__}: {cause}); it needs a "
                "C++ compiler, and Triton on a GPU; if they are there, set machine.compile = false"
            ) from None
        finally:
            del self._model.forward
            if before is not None:
                self._model.forward = before
