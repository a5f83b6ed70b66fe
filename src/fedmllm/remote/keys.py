"""Certificates and keys of a federation: an authority, the server's certificate, a key pair for each site.

TLS shows the sites that the server is the right one; the registered public keys show the server that a site is.
"""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives import serialization as forms
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedmllm.errors import ConfigError
from fedmllm.remote.files import site_name

LOCAL = ("localhost", "127.0.0.1")
"""Always in the server's certificate: `fedmllm server` talks to its own SuperLink there."""


def make_keys(folder: Path, hosts: Sequence[str], sites: Sequence[str], days: int) -> list[Path]:
    """Make what is missing and leave what is there; the files that were made.

    With `hosts`, the names and addresses that sites reach the server under: `ca.crt`, `ca.key`, `server.crt`, `server.key`.
    For each site `NAME.key`, which only the site should have, and `NAME.pub`. Private keys have permissions 0600. Raises
    ConfigError for a name that cannot be, and where the server's certificate is there for other hosts.
    """
    made: list[Path] = []
    for site in sites:
        try:
            site_name(site)
        except ValueError as error:
            raise ConfigError(f"--site {site}: {error}.") from None
    folder.mkdir(parents=True, exist_ok=True)
    if hosts:
        made += _authority(folder, days)
        made += _server(folder, hosts, days)
    for site in sites:
        made += _site(folder, site)
    return made


def _private(path: Path, content: bytes) -> Path:
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(content)
    return path


def _public(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(forms.Encoding.PEM, forms.PrivateFormat.PKCS8, forms.NoEncryption())


def _site(folder: Path, site: str) -> list[Path]:
    path = folder / f"{site}.key"
    if path.exists():
        return []
    key = ec.generate_private_key(ec.SECP384R1())
    private = key.private_bytes(forms.Encoding.PEM, forms.PrivateFormat.OpenSSH, forms.NoEncryption())
    public = key.public_key().public_bytes(forms.Encoding.OpenSSH, forms.PublicFormat.OpenSSH)
    return [_private(path, private), _public(folder / f"{site}.pub", public + b"\n")]


def _named(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _usage(*, signs: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs, key_cert_sign=signs, crl_sign=signs, content_commitment=False, key_encipherment=False,
        data_encipherment=False, key_agreement=False, encipher_only=False, decipher_only=False,
    )  # fmt: skip


def _certificate(
    subject: str, issuer: str, key: ec.EllipticCurvePublicKey, signer: ec.EllipticCurvePublicKey, days: int, authority: bool
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(_named(subject))
        .issuer_name(_named(issuer))
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))  # clocks differ
        .not_valid_after(now + timedelta(days=days))
        .add_extension(x509.BasicConstraints(ca=authority, path_length=0 if authority else None), critical=True)
        .add_extension(_usage(signs=authority), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer), critical=False)
    )


def _authority(folder: Path, days: int) -> list[Path]:
    if (folder / "ca.key").exists():
        return []
    key = ec.generate_private_key(ec.SECP384R1())
    name = f"fedmllm authority {os.urandom(4).hex()}"
    made = _certificate(name, name, key.public_key(), key.public_key(), days, authority=True).sign(key, hashes.SHA384())
    return [_private(folder / "ca.key", _pem(key)), _public(folder / "ca.crt", made.public_bytes(forms.Encoding.PEM))]


def _alternative(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _server(folder: Path, hosts: Sequence[str], days: int) -> list[Path]:
    names = {_alternative(host) for host in (*hosts, *LOCAL)}
    path = folder / "server.crt"
    if (folder / "server.key").exists():
        there = x509.load_pem_x509_certificate(path.read_bytes())
        if set(there.extensions.get_extension_for_class(x509.SubjectAlternativeName).value) != names:
            raise ConfigError(f"{path} is for other hosts; move it and server.key away to make new ones.")
        return []
    signer = forms.load_pem_private_key((folder / "ca.key").read_bytes(), None)
    authority = x509.load_pem_x509_certificate((folder / "ca.crt").read_bytes())
    if not isinstance(signer, ec.EllipticCurvePrivateKey):
        raise ConfigError(
            f"{folder / 'ca.key'} is of another kind; make the server's certificate with what made the authority."
        )
    issuer = str(authority.subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value)
    key = ec.generate_private_key(ec.SECP384R1())
    ordered = sorted(names, key=str)
    made = (
        _certificate(hosts[0][:64], issuer, key.public_key(), signer.public_key(), days, authority=False)
        .add_extension(x509.SubjectAlternativeName(ordered), critical=False)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .sign(signer, hashes.SHA384())
    )
    return [_private(folder / "server.key", _pem(key)), _public(path, made.public_bytes(forms.Encoding.PEM))]


__all__ = ["make_keys"]
