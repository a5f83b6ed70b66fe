"""The cryptography, all of it kept libraries': X25519, HKDF-SHA256, ChaCha20-Poly1305 and AES-256 in counter mode from
`cryptography`, Shamir's secret sharing from `pycryptodome`, whose secrets have 16 bytes.

Every key is used once: key pairs and seeds are fresh each round, and what a key is for, with whom and in which round goes into
its derivation. Therefore nonces and counters may start at zero.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from Crypto.Protocol.SecretSharing import Shamir
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.ciphers.algorithms import AES256
from cryptography.hazmat.primitives.ciphers.modes import CTR
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

SECRET = 16
"""Bytes of a seed: what Shamir's scheme shares in one piece."""
KEY = 32
_NONCE = bytes(12)


def fresh() -> bytes:
    """A seed from the operating system."""
    return os.urandom(SECRET)


def derive(secret: bytes, *purpose: str | int, length: int = KEY) -> bytes:
    """A key for one purpose alone."""
    # Lengths go in, so that no two lists of words are one text.
    info = b"".join(len(word).to_bytes(4, "big") + word for word in (str(p).encode() for p in ("fedmllm", *purpose)))
    return HKDF(SHA256(), length, salt=None, info=info).derive(secret)


@dataclass(frozen=True)
class KeyPair:
    """Made of a seed, so that who has the seed has the private key."""

    private: X25519PrivateKey
    public: bytes

    @classmethod
    def of(cls, seed: bytes) -> KeyPair:
        private = X25519PrivateKey.from_private_bytes(derive(seed, "private key"))
        return cls(private, private.public_key().public_bytes_raw())

    def agree(self, other: bytes) -> bytes:
        """The secret shared with the owner of a public key. Raises ValueError for bytes that are no such key."""
        return self.private.exchange(X25519PublicKey.from_public_bytes(other))


def seal(key: bytes, content: bytes) -> bytes:
    return ChaCha20Poly1305(key).encrypt(_NONCE, content, None)


def unseal(key: bytes, sealed: bytes) -> bytes:
    """Raises ValueError where it was altered or made for somebody else."""
    try:
        return ChaCha20Poly1305(key).decrypt(_NONCE, sealed, None)
    except InvalidTag:
        raise ValueError("altered on the way") from None


def keystream(key: bytes) -> Callable[[int], bytes]:
    """A function for the next so many bytes, which nobody without the key can tell from random ones."""
    encryptor = Cipher(AES256(key), CTR(bytes(16))).encryptor()
    return lambda count: encryptor.update(bytes(count))


def split(secret: bytes, enough: int, holders: int) -> list[bytes]:
    """A share for each holder, in their order; `enough` of them make the secret, fewer say nothing of it."""
    return [share for _, share in Shamir.split(enough, holders, secret, ssss=False)]


def combine(shares: Sequence[tuple[int, bytes]]) -> bytes:
    """The secret of exactly `enough` shares, each with its holder's place, counted from 0."""
    return bytes(Shamir.combine([(place + 1, share) for place, share in shares], ssss=False))


__all__ = ["KEY", "SECRET", "KeyPair", "combine", "derive", "fresh", "keystream", "seal", "split", "unseal"]
