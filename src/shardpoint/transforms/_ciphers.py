"""The one module that knows the package `cryptography`, which may be missing."""

from __future__ import annotations

from dataclasses import dataclass

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

__all__ = ["Cipher", "RecordKeys", "TagError", "derive"]

_CHECK = 16
_PURPOSE = b"shardpoint aes-gcm/1"


class TagError(Exception):
    """A tag does not belong to the bytes."""


@dataclass(frozen=True, slots=True, repr=False)
class RecordKeys:
    """What one record's key and salt give.

    Attributes
    ----------
    encryption
        The record's own key, as long as the caller's.
    check
        16 bytes by which a wrong key is known; they tell nothing of the key.
    """

    encryption: bytes
    check: bytes


def derive(key: bytes, salt: bytes, context: bytes) -> RecordKeys:
    """Derive a record's keys by HKDF-SHA256."""
    length = len(key)
    information = _PURPOSE + bytes([length]) + context
    derived = HKDF(SHA256(), length + _CHECK, salt, information).derive(key)
    return RecordKeys(derived[:length], derived[length:])


class Cipher:
    """AES-GCM under one record's key, with numbers as nonces; any threads side by side."""

    __slots__ = ("_aead",)

    def __init__(self, key: bytes) -> None:
        self._aead = AESGCM(key)

    def seal(self, number: int, data: bytes | bytearray, associated: bytes) -> bytes:
        """Return the encrypted bytes and their tag."""
        return self._aead.encrypt(number.to_bytes(12, "big"), data, associated)

    def open(self, number: int, data: bytes | memoryview, associated: bytes) -> bytes:
        """Return the decrypted bytes.

        Raises
        ------
        TagError
            If the tag does not belong to number, bytes and associated bytes.
        """
        try:
            return self._aead.decrypt(number.to_bytes(12, "big"), data, associated)
        except InvalidTag as error:
            raise TagError("its authentication tag is another") from error
