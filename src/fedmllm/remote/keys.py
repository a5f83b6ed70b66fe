"""The keys of a federation: a certificate authority, the server's certificate, and each site's key.

The authority and the server's certificate are for TLS and use ECDSA on P-256. A site's key is for node authentication: an
OpenSSH key, ECDSA on P-384, whose private half never leaves the site and whose public half the server registers.
"""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_ssh_public_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedmllm.errors import ConfigError

CA, CA_KEY, CERTIFICATE, KEY = "ca.crt", "ca.key", "server.crt", "server.key"
_LOCAL = ("localhost", "127.0.0.1")
"""The server connects to itself under these names, so they are in every certificate."""


def _write(path: Path, content: bytes) -> Path:
    """Create a file; a private key, whose name ends in .key, is for this user only. Raises ConfigError if the file exists,
    because a lost key cannot be recovered."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        # With the right permissions from the first moment.
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600 if path.suffix == ".key" else 0o644)
    except FileExistsError:
        raise ConfigError(f"{path} exists already; move it away, or give another folder.") from None
    with os.fdopen(handle, "wb") as file:
        file.write(content)
    return path


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _alternative(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _certificate(
    subject: str,
    public: ec.EllipticCurvePublicKey,
    issuer: x509.Name,
    signer: ec.EllipticCurvePrivateKey,
    days: int,
    hosts: Sequence[str] = (),
) -> x509.Certificate:
    """The certificate of a server with these names; without names, that of an authority."""
    now = datetime.now(UTC)
    usage = dict.fromkeys(
        ("content_commitment", "key_encipherment", "data_encipherment", "key_agreement", "encipher_only", "decipher_only"),
        False,
    )
    builder = (
        x509.CertificateBuilder()
        .subject_name(_name(subject))
        .issuer_name(issuer)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))  # clocks may differ
        .not_valid_after(now + timedelta(days=days))
        .add_extension(x509.BasicConstraints(ca=not hosts, path_length=None if hosts else 0), critical=True)
        .add_extension(
            x509.KeyUsage(digital_signature=bool(hosts), key_cert_sign=not hosts, crl_sign=not hosts, **usage), critical=True
        )
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False)
    )
    if hosts:
        builder = builder.add_extension(x509.SubjectAlternativeName([_alternative(h) for h in hosts]), critical=False)
        builder = builder.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
    return builder.sign(signer, hashes.SHA256())


def make_authority(folder: Path, days: int = 3650) -> list[Path]:
    """Make `ca.crt`, which every site needs, and `ca.key`, which signs server certificates and stays on the server."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = "fedmllm federation"
    certificate = _certificate(name, key.public_key(), _name(name), key, days)
    return [_write(folder / CA_KEY, _pem(key)), _write(folder / CA, certificate.public_bytes(Encoding.PEM))]


def make_server(folder: Path, hosts: Sequence[str], days: int = 825) -> list[Path]:
    """Make `server.key`, and `server.crt` for these names and addresses, signed by the authority in the folder.

    Raises ConfigError if there is no authority.
    """
    try:
        signer = load_pem_private_key((folder / CA_KEY).read_bytes(), None)
        authority = x509.load_pem_x509_certificate((folder / CA).read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{folder}: there is no authority to sign with ({error}).") from None
    if not isinstance(signer, ec.EllipticCurvePrivateKey):
        raise ConfigError(f"{folder / CA_KEY}: not a key made by `fedmllm keys`.")
    key = ec.generate_private_key(ec.SECP256R1())
    names = list(dict.fromkeys([*hosts, *_LOCAL]))
    certificate = _certificate(names[0], key.public_key(), authority.subject, signer, days, names)
    return [_write(folder / KEY, _pem(key)), _write(folder / CERTIFICATE, certificate.public_bytes(Encoding.PEM))]


def make_site(folder: Path, name: str) -> list[Path]:
    """Make `NAME.key`, which stays at the site, and `NAME.pub`, which the server registers."""
    if not name.replace("-", "").replace("_", "").isalnum():
        raise ConfigError(f"--site {name}: a site's name may contain letters, digits, - and _ only.")
    key = ec.generate_private_key(ec.SECP384R1())
    private = key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())
    public = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
    return [_write(folder / f"{name}.key", private), _write(folder / f"{name}.pub", public + f" {name}\n".encode())]


def make(folder: Path, hosts: Sequence[str], sites: Sequence[str], days: int = 825) -> list[Path]:
    """Make a server certificate for `hosts` that is valid for so many days, with an authority if there is none yet, and a key
    for each of `sites`; the files. Raises ConfigError instead of overwriting a file."""
    files: list[Path] = []
    if hosts:
        if not (folder / CA_KEY).exists():
            files += make_authority(folder)
        files += make_server(folder, hosts, days)
    for site in sites:
        files += make_site(folder, site)
    return files


def is_public_key(path: Path) -> bool:
    """Whether the file contains a public key that Flower can register."""
    try:
        return isinstance(load_ssh_public_key(path.read_bytes()), ec.EllipticCurvePublicKey)
    except Exception:  # whatever cryptography raises for another kind of file
        return False
