"""Masks: the keystream of ChaCha20, keyed by a whole 256-bit secret.

Flower's ``pseudo_rand_gen`` is not used: it folds the secret to 32 bits, so a coordinator could try all of
them.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fedsmoothlora.secure_aggregation.fixed_point import Words

_PIECE = 2**20  # bytes of the keystream in memory
_FIRST_BLOCK = bytes(16)  # counter and nonce are 0, because no key is used twice


def mask_key(secret: bytes, context: bytes) -> bytes:
    """A key of 32 bytes for one mask, by HKDF-SHA256 (RFC 5869).

    Args:
        secret: at least 32 secret bytes.
        context: bytes that belong to this mask alone: session and clients.
    """
    if len(secret) < 32:
        raise ValueError(f"the secret has {len(secret)} bytes; it must have at least 32")
    return HKDF(algorithm=hashes.SHA256(), length=32, salt=None, info=context).derive(secret)


def add_mask(numbers: Words, key: bytes, sign: Literal[1, -1]) -> None:
    """Add the mask of a key to ``numbers``, or subtract it, modulo their size, in place.

    The mask is the keystream of ChaCha20 (RFC 8439) as little-endian integers. Its integers are uniform,
    because every size is a power of 2. A key is for one mask only.
    """
    stream = Cipher(algorithms.ChaCha20(key, _FIRST_BLOCK), mode=None).encryptor()
    step = _PIECE // numbers.itemsize
    combine = np.add if sign > 0 else np.subtract
    for start in range(0, len(numbers), step):
        piece = numbers[start : start + step]
        mask = np.frombuffer(stream.update(bytes(piece.nbytes)), piece.dtype)
        combine(piece, mask, out=piece)
