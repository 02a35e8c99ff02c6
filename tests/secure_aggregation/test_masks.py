"""Masks are the keystream of ChaCha20, as RFC 8439 gives it, with keys by HKDF, as RFC 5869 gives them."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsmoothlora.secure_aggregation.masks import add_mask, mask_key

# RFC 8439, appendix A.1: test vectors 1 and 2, key and nonce 0, the blocks 0 and 1.
KEYSTREAM = bytes.fromhex(
    "76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7"
    "da41597c5157488d7724e03fb8d84a376a43b8f41518a11cc387b669b2ee6586"
    "9f07e7be5551387a98ba977c732d080dcb0f29a048e3656912c6533e32ee7aed"
    "29b721769ce64e43d57133b074d839d531ed1f28510afb45ace10a1f4b794d6f"
)
# RFC 5869, appendix A.3: HKDF-SHA256 without salt and info.
SECRET = bytes([0x0B]) * 22
OUTPUT = bytes.fromhex("8da4e775a563c18f715f802a063c5a31b8a11f5c5ee1879ec3454e5f3c738d2d")


@pytest.mark.parametrize("dtype", ["<u2", "<u4"])
def test_a_mask_is_the_published_keystream(dtype: str) -> None:
    numbers: Any = np.zeros(len(KEYSTREAM) // np.dtype(dtype).itemsize, dtype)
    add_mask(numbers, bytes(32), 1)
    assert numbers.tobytes() == KEYSTREAM


def test_a_key_is_the_published_output_of_hkdf() -> None:
    # mask_key asks for 32 bytes of secret, so the vector's shorter one is derived by the library itself.
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF

    assert HKDF(algorithm=hashes.SHA256(), length=32, salt=None, info=b"").derive(SECRET) == OUTPUT
    derived = HKDF(algorithm=hashes.SHA256(), length=32, salt=None, info=b"a").derive(bytes(32))
    assert mask_key(bytes(32), b"a") == derived


@given(
    secrets=st.lists(st.binary(min_size=32, max_size=64), min_size=2, max_size=2, unique=True),
    contexts=st.lists(st.binary(max_size=20), min_size=2, max_size=2, unique=True),
)
def test_keys_differ_for_other_secrets_and_other_contexts(
    secrets: list[bytes], contexts: list[bytes]
) -> None:
    assert len({mask_key(secret, context) for secret in secrets for context in contexts}) == 4


def test_short_secrets_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 32"):
        mask_key(bytes(31), b"")


@given(key=st.binary(min_size=32, max_size=32), values=st.lists(st.integers(0, 2**32 - 1), max_size=50))
def test_a_mask_that_is_added_and_subtracted_leaves_the_numbers(key: bytes, values: list[int]) -> None:
    numbers: Any = np.array(values, "<u4")
    add_mask(numbers, key, 1)
    add_mask(numbers, key, -1)
    assert numbers.tolist() == values


def test_a_long_mask_is_one_keystream() -> None:
    size = 2**18 + 5  # more integers of 32 bits than a piece of the keystream has
    numbers: Any = np.zeros(size, "<u4")
    add_mask(numbers, bytes(32), 1)
    assert numbers[: len(KEYSTREAM) // 4].tobytes() == KEYSTREAM
    # Another piece size: the same keystream as integers of 16 bits.
    others: Any = np.zeros(2 * size, "<u2")
    add_mask(others, bytes(32), 1)
    assert others.tobytes() == numbers.tobytes()
    assert len(np.unique(numbers)) > 0.99 * size
