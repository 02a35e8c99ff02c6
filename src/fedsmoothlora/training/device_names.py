"""Names of the devices that clients train on. This module does not load torch."""

from __future__ import annotations

import re

# torch does not read "cuda:01", and takes "cuda:256" for the first GPU.
_NAME = re.compile(r"auto|cpu|cuda(:(0|[1-9]\d?))?", re.ASCII)


def wrong_name(name: str) -> str | None:
    """The reason why ``name`` is no value of ``machine.device``, and the remedy; None if it is one."""
    if name == "mps":
        return "norms and losses are summed in float64, which Apple's GPUs lack; take 'cpu', or leave it out"
    if not _NAME.fullmatch(name):
        return "should be 'auto', 'cpu', 'cuda', or 'cuda:N' with the number N of a GPU, such as 'cuda:1'"
    return None
