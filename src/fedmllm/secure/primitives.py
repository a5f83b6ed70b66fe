"""The cryptographic primitives, all from maintained libraries: X25519, HKDF-SHA256, ChaCha20-Poly1305 and AES-256 in counter
mode from `cryptography`; Shamir's secret sharing, for secrets of 16 bytes, from `pycryptodome`.

Every key is used once: key pairs and seeds are new in each round, and the purpose, the clients and the round of a key are part
of its derivation. Nonces and counters may therefore start at zero.
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
"""Bytes of a seed, the largest secret that Shamir's scheme shares in one piece."""
KEY = 32
_NONCE = bytes(12)


def new_seed() -> bytes:
    """A random seed from the operating system."""
    return os.urandom(SECRET)


def derive(secret: bytes, *purpose: str | int, length: int = KEY) -> bytes:
    """A key for a single purpose."""
    # Each word is preceded by its length, so that different lists of words never give the same bytes.
    info = b"".join(len(word).to_bytes(4, "big") + word for word in (str(p).encode() for p in ("fedmllm", *purpose)))
    return HKDF(SHA256(), length, salt=None, info=info).derive(secret)


@dataclass(frozen=True)
class KeyPair:
    """A key pair derived from a seed: anyone who has the seed can derive the private key."""

    private: X25519PrivateKey
    public: bytes

    @classmethod
    def of(cls, seed: bytes) -> KeyPair:
        private = X25519PrivateKey.from_private_bytes(derive(seed, "private key"))
        return cls(private, private.public_key().public_bytes_raw())

    def agree(self, other: bytes) -> bytes:
        """The secret shared with the owner of a public key. Raises ValueError for bytes that are not a valid key."""
        return self.private.exchange(X25519PublicKey.from_public_bytes(other))


def seal(key: bytes, content: bytes) -> bytes:
    return ChaCha20Poly1305(key).encrypt(_NONCE, content, None)


def unseal(key: bytes, sealed: bytes) -> bytes:
    """Raises ValueError if the content was altered or sealed under another key."""
    try:
        return ChaCha20Poly1305(key).decrypt(_NONCE, sealed, None)
    except InvalidTag:
        raise ValueError("altered in transit") from None


def keystream(key: bytes) -> Callable[[int], bytes]:
    """A function that returns the next n bytes of a stream, which looks random to anyone without the key."""
    encryptor = Cipher(AES256(key), CTR(bytes(16))).encryptor()
    return lambda count: encryptor.update(bytes(count))


def split(secret: bytes, threshold: int, holders: int) -> list[bytes]:
    """One share per holder. Any `threshold` of them give the secret; fewer reveal nothing about it."""
    return [share for _, share in Shamir.split(threshold, holders, secret, ssss=False)]


def combine(shares: Sequence[tuple[int, bytes]]) -> bytes:
    """The secret, from exactly `threshold` pairs (position of the holder counted from 0, its share)."""
    return bytes(Shamir.combine([(position + 1, share) for position, share in shares], ssss=False))
