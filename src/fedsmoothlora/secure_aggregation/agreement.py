"""Key pairs of one session, and the secrets that two of them agree on (ECDH on P-384)."""

from __future__ import annotations

import base64

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.common.secure_aggregation.crypto.symmetric_encryption import generate_shared_key

_CURVE = ec.SECP384R1()
_SCALAR = 48  # bytes


def new_private_key() -> bytes:
    """A new private key, as its scalar."""
    number = ec.generate_private_key(_CURVE).private_numbers().private_value
    return number.to_bytes(_SCALAR, "big")


def public_key(private: bytes) -> bytes:
    """The public key, as a compressed point. Raises ``ValueError`` if ``private`` is no private key."""
    encoding, form = serialization.Encoding.X962, serialization.PublicFormat.CompressedPoint
    return _private(private).public_key().public_bytes(encoding, form)


def is_public_key(public: bytes) -> bool:
    """Whether bytes are a compressed point of the curve."""
    try:
        ec.EllipticCurvePublicKey.from_encoded_point(_CURVE, public)
    except ValueError:
        return False
    return len(public) == 1 + _SCALAR


def agreed_key(private: bytes, public: bytes) -> bytes:
    """The key for Flower's ``encrypt`` and ``decrypt``. Raises ``ValueError`` if a key is not valid."""
    return generate_shared_key(
        _private(private), ec.EllipticCurvePublicKey.from_encoded_point(_CURVE, public)
    )


def agreed_secret(private: bytes, public: bytes) -> bytes:
    """32 secret bytes, the same from both sides. Raises ``ValueError`` if a key is not valid."""
    return base64.urlsafe_b64decode(agreed_key(private, public))


def _private(scalar: bytes) -> ec.EllipticCurvePrivateKey:
    return ec.derive_private_key(int.from_bytes(scalar, "big"), _CURVE)
