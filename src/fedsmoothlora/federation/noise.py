"""Gaussian noise for private releases: from the system's cryptographic generator, or seeded for tests."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedsmoothlora.algebra.seeds import generator_for

_AT_ONCE = 2**20  # numbers that are drawn at once, for 32 bytes of randomness each


@dataclass(frozen=True)
class Noise:
    """Draws Gaussian noise.

    Attributes:
        seed: a seed for tests; without one, the noise is cryptographically random.
    """

    seed: int | None = None

    def draw(self, shape: Sequence[int], std: float, round: int, name: str) -> Tensor:
        """Noise of a standard deviation, in float64 on the CPU.

        Args:
            shape: of the tensor.
            std: the standard deviation.
            round: ``t``; with a seed, equal rounds and names give equal noise.
            name: the name of the tensor.
        """
        if self.seed is not None:
            generator = generator_for(self.seed, "privacy noise", round, name)
            return std * torch.randn(tuple(shape), generator=generator, dtype=torch.float64)
        return std * torch.from_numpy(secure_gaussians(math.prod(shape))).reshape(tuple(shape))


def secure_gaussians(count: int) -> NDArray[np.float64]:
    """``count`` independent standard Gaussians from `os.urandom`.

    torch's and NumPy's generators are not cryptographic: their state can be found from their outputs, and so
    can the rest of the noise. The system's is (ChaCha20 on Linux).

    Each number is half the sum of four Gaussians of Box and Muller's formula, made of four uniform numbers
    with 53 bits. A single Gaussian in floating point takes only some of the numbers near a value, and which
    ones depends on the value below the noise. The sum of four has too many preimages to search (arXiv
    2107.10138, section 5.1; Opacus' secure mode does the same).
    """
    blocks = [_block(min(_AT_ONCE, count - done)) for done in range(0, count, _AT_ONCE)]
    return np.concatenate(blocks) if blocks else np.zeros(0)


def secure_uniforms(count: int) -> NDArray[np.float64]:
    """``count`` independent numbers in [0, 1) with 53 bits from `os.urandom`."""
    bits = np.frombuffer(os.urandom(8 * count), dtype=np.uint64)
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _block(count: int) -> NDArray[np.float64]:
    bits = np.frombuffer(os.urandom(32 * count), dtype=np.uint64).reshape(2, 2, count)
    uniform = ((bits >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53  # in (0, 1]
    radius = np.sqrt(-2.0 * np.log(uniform[0]))  # (2, count)
    angle = 2.0 * np.pi * uniform[1]
    found: NDArray[np.float64] = (radius * (np.cos(angle) + np.sin(angle))).sum(axis=0) / 2.0
    return found
