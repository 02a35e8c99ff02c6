"""The registered keys of sites: fingerprints and signatures.

A site's registered key is the one that authenticates its SuperNode (`fedsmoothlora.flower.keys`).
"""

from __future__ import annotations

import base64
from typing import Any

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from fedsmoothlora.errors import KeysError

_ALGORITHM = ec.ECDSA(hashes.SHA384())


def fingerprint(public: bytes) -> str:
    """The fingerprint of a site's public key, ``SHA256:...``, as ``ssh-keygen -lf`` shows it.

    Args:
        public: the key in OpenSSH's or in PEM's format.

    Raises:
        KeysError: it is no public key.
    """
    try:
        digest = serialization.ssh_key_fingerprint(_public_key(public), hashes.SHA256())
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise KeysError("it is no public key") from None
    return f"SHA256:{base64.b64encode(digest).decode().rstrip('=')}"


def sign(private: ec.EllipticCurvePrivateKey, data: bytes) -> bytes:
    """The signature of ``data`` by a registered key: ECDSA with SHA-384."""
    return private.sign(data, _ALGORITHM)


def is_signed(data: bytes, signature: bytes, public: bytes) -> bool:
    """Whether a registered key signed ``data``. Never raises, whatever the signature and the key are."""
    try:
        key = _public_key(public)
        if not isinstance(key, ec.EllipticCurvePublicKey):
            return False
        key.verify(signature, data, _ALGORITHM)
    except (InvalidSignature, ValueError, TypeError, UnsupportedAlgorithm):
        return False
    return True


def public_bytes(private: ec.EllipticCurvePrivateKey) -> bytes:
    """The public part of a registered key in OpenSSH's format."""
    encoding, form = serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    return private.public_key().public_bytes(encoding, form)


def _public_key(public: bytes) -> Any:
    load = serialization.load_ssh_public_key
    if public.startswith(b"-----BEGIN"):
        load = serialization.load_pem_public_key
    return load(public)
