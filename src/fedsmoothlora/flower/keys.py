"""Certificates and keys of a federation: TLS for the coordinator, a key that proves a site's identity."""

from __future__ import annotations

import datetime
import ipaddress
import os
from collections.abc import Sequence
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from fedsmoothlora.errors import KeysError
from fedsmoothlora.secure_aggregation.identities import fingerprint

_CURVE = ec.SECP384R1()
_DAYS = 825
_LOOPBACK = ("localhost", "127.0.0.1", "::1")


def write_certificates(folder: Path, hosts: Sequence[str]) -> None:
    """Write ``ca.crt``, which every site gets, and ``server.crt`` and ``server.key``, which stay here.

    The authority's own key signs this one certificate and is forgotten.

    Args:
        folder: where to; it is made.
        hosts: names and addresses by which sites reach the coordinator. Its own processes reach it by
            loopback, so the certificate names that too.

    Raises:
        KeysError: there are certificates in it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("server.key", "server.crt", "ca.crt"):
        if (folder / name).exists():
            raise KeysError(f"{folder / name} is there already: sites may trust it; choose another folder")
    names = dict.fromkeys((*hosts, *_LOOPBACK))
    authority, server = ec.generate_private_key(_CURVE), ec.generate_private_key(_CURVE)
    issuer = _name("fedsmoothlora federation")
    ca = (
        _certificate(issuer, issuer, authority.public_key())
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(authority.public_key()), critical=False)
        .add_extension(_usage(signs=True), critical=True)
        .sign(authority, hashes.SHA384())
    )
    certificate = (
        _certificate(_name(hosts[0]), issuer, server.public_key())
        .add_extension(x509.SubjectAlternativeName([_host(host) for host in names]), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.public_key()), critical=False
        )
        .add_extension(_usage(signs=False), critical=True)
        .sign(authority, hashes.SHA384())
    )
    private = server.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    _write_new(folder / "server.key", private, private=True)
    _write_new(folder / "server.crt", certificate.public_bytes(serialization.Encoding.PEM))
    _write_new(folder / "ca.crt", ca.public_bytes(serialization.Encoding.PEM))


def write_node_key(path: Path) -> Path:
    """Write a site's private key to ``path`` and its public one beside it; the public one's path.

    Raises ``KeysError`` if there is one already.
    """
    beside = path.with_name(f"{path.name}.pub")
    for file in (path, beside):
        if file.exists():
            raise KeysError(f"{file} is there already: a coordinator may know it; choose another name")
    key = ec.generate_private_key(_CURVE)
    encoding = serialization.Encoding
    private = key.private_bytes(
        encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    )
    public = key.public_key().public_bytes(encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    path.parent.mkdir(parents=True, exist_ok=True)
    _write_new(path, private, private=True)
    _write_new(beside, public + b"\n")
    return beside


def read_fingerprints(folder: Path, clients: Sequence[str]) -> dict[str, str]:
    """The fingerprints of the clients' public keys, which are ``CLIENT.key.pub`` in a folder.

    Raises ``KeysError`` if a file is missing or holds no public key.
    """
    found = {}
    for client in clients:
        file = folder / f"{client}.key.pub"
        try:
            found[client] = fingerprint(file.read_bytes())
        except OSError:
            raise KeysError(
                f"{file}: there is no such file; client {client} sends its public key, which "
                "`fedsmoothlora flower key` wrote"
            ) from None
        except KeysError as error:
            raise KeysError(f"{file}: {error}") from None
    return found


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])


def _host(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _certificate(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(minutes=5))  # clocks differ
        .not_valid_after(now + datetime.timedelta(days=_DAYS))
    )


def _usage(*, signs: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs,
        crl_sign=signs,
        encipher_only=False,
        decipher_only=False,
    )


def _write_new(path: Path, data: bytes, *, private: bool = False) -> None:
    """Write a file that must not exist; a private one for its owner alone, from the first byte on."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600 if private else 0o644)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
