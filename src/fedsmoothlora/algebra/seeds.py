"""Seeds computed from their purpose, so that the order in which clients are trained changes no result."""

import hashlib

import torch


def seed_for(*purpose: str | int) -> int:
    """A 63-bit seed from its purpose, e.g. ``seed_for(run_seed, "training", round, client)``.

    The parts are hashed (BLAKE2b) with their types and lengths, so that successive rounds or clients get
    unrelated seeds, and ``("1", "2")`` differs from ``("12",)`` and from ``(1, 2)``.
    """
    digest = hashlib.blake2b(digest_size=8)
    for part in purpose:
        text = f"{type(part).__name__}:{part}"
        digest.update(f"{len(text)}:{text};".encode())
    return int.from_bytes(digest.digest(), "big") >> 1


def generator_for(*purpose: str | int) -> torch.Generator:
    """A CPU generator seeded by ``seed_for(*purpose)``."""
    return torch.Generator().manual_seed(seed_for(*purpose))
