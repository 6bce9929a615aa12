"""Authenticated encryption of records, frame by frame, with AES-GCM.

Sources: NIST SP 800-38D (GCM), RFC 5869 (HKDF).

**No nonce is used twice.** GCM breaks when one key meets one nonce twice. Random nonces of 96
bits for each frame would do up to some 2**32 frames for each key, which large jobs reach. So
the caller's key encrypts nothing itself. Every record has 32 random bytes, the salt, and a key
of its own derived from the caller's key and the salt with HKDF-SHA256; under that key the
nonce is the frame's number, and one more, outside of the numbers, for the seal. Two
records have the same key only if their salts are equal: with 2**64 records the chance is
2**-129. A record is encrypted once and in one pass, so no number is used for two contents.

**What is detected.** Each frame's tag covers its bytes, its number (by the nonce) and the
header, which holds the salt. The seal is a tag on the table: all lengths, their number, the
total. So a frame that is changed, moved, repeated, left out, or taken from another record
does not decode, and a table or a header that is changed is noticed before any frame is
decoded. A check value, derived from key and salt, tells a wrong key from damage, and makes
GCM commit to its key.

**What is not detected.** A record knows nothing of its name: who can write to the store can
put one whole record of the same dtype and shape in another's place, or an older one. With
another `context` for each checkpoint (say, its run and step) records of one checkpoint are no
good in another. Lengths are not hidden, nor is what ``.metadata`` and the index say: keys,
shapes, dtypes. Checksums in the index are of the encrypted bytes.

The header is ``"aes-gcm"``, the key id's length (uint8), the key id (UTF-8), the salt and the
check value (32 and 16 bytes).
"""

from __future__ import annotations

import hmac
import secrets
from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING, TypeAlias

from shardpoint.errors import NotSupportedError, PlanError
from shardpoint.transforms._frame_format import check_frame_size, read_table
from shardpoint.transforms._framed import (
    DamagedFrameError,
    FramedRecord,
    FramedStream,
)
from shardpoint.transforms._records import Origin, RecordBytes, Tally

if TYPE_CHECKING:
    from shardpoint.transforms._ciphers import Cipher

__all__ = ["AesGcm", "AesGcmWithoutKey", "KeyProvider"]

_NAME = "stream.aes-gcm@shardpoint"
_VERSION = "1"
_MARK = b"aes-gcm"
_SALT = 32
_CHECK = 16
_TAG = 16
_KEY_LENGTHS = (16, 24, 32)
_SEAL_NUMBER = (1 << 96) - 1
_MOST_KEY_ID = 255

KeyProvider: TypeAlias = "bytes | Callable[[str], bytes]"
"""A key of 16, 24 or 32 bytes, or what gives the key for a key id."""


class AesGcm:
    """Encryption that detects tampering and leaves parts readable on their own.

    Parameters
    ----------
    key
        16, 24 or 32 secret random bytes (no password), or a function that gives them for a
        key id, called when a record is written or opened.
    key_id
        Names the key, in every record, in plain text: readers that have several keys tell
        them apart by it. At most 255 bytes of UTF-8.
    context
        Bytes that readers must give too, or nothing decrypts; not secret, not stored.
    frame_size
        Bytes that are encrypted at once, 4 KiB to 1 MiB.

    Raises
    ------
    PlanError
        If an argument is of another size.

    Examples
    --------
    >>> AesGcm(bytes(32)).descriptor
    'stream.aes-gcm@shardpoint/1'
    """

    name = _NAME
    descriptor = f"{_NAME}/{_VERSION}"
    decodes_in_parts = True

    def __init__(
        self,
        key: KeyProvider,
        *,
        key_id: str = "",
        context: bytes = b"",
        frame_size: int = 64 << 10,
    ) -> None:
        if len(key_id.encode()) > _MOST_KEY_ID:
            raise PlanError(f"a key id may have {_MOST_KEY_ID} bytes, not {len(key_id.encode())}")
        if not callable(key):
            _check_key(key, key_id)
            key = bytes(key)
        check_frame_size(frame_size)
        self._key = key
        self._key_id = key_id
        self._context = bytes(context)
        self._frame_size = frame_size

    def __repr__(self) -> str:
        return f"AesGcm(<key>, key_id={self._key_id!r})"

    def stream(self, element_size: int | None) -> FramedStream:
        """Return what encodes one record, under a key of its own; all sizes are the same to it.

        Raises
        ------
        NotSupportedError
            If the package `cryptography` is not installed.
        PlanError
            If the function gives no key of the right size.
        """
        ciphers = _ciphers()
        if ciphers is None:
            raise NotSupportedError(f"{self.descriptor}: install shardpoint[crypto] to write it")
        salt = secrets.token_bytes(_SALT)
        keys = ciphers.derive(self._find_key(self._key_id), salt, self._context)
        key_id = self._key_id.encode()
        header = b"".join((_MARK, bytes([len(key_id)]), key_id, salt, keys.check))
        encoder = _Encoder(ciphers.Cipher(keys.encryption), header)
        return FramedStream(encoder, largest=self._frame_size)

    def undo(
        self, stored: RecordBytes, version: str, *, most: int, origin: Origin, tally: Tally | None
    ) -> RecordBytes:
        """See `Transform`."""
        if version != _VERSION:
            raise origin.not_supported(f"{_NAME} of version {version!r}, known is {_VERSION!r}")
        ciphers = _ciphers()
        if ciphers is None:
            raise origin.not_supported(f"{self.descriptor}: install shardpoint[crypto] to read it")
        table = read_table(stored, most=most, origin=origin)
        key_id, salt, check = _parse_header(table.header, origin)
        keys = ciphers.derive(self._key_of(key_id, origin), salt, self._context)
        if not hmac.compare_digest(keys.check, check):
            raise origin.corrupt(
                f"the key or the context is not the one that this was encrypted with (key id "
                f"{key_id!r}), or the record's header has been changed"
            )
        cipher = ciphers.Cipher(keys.encryption)
        try:
            cipher.open(_SEAL_NUMBER, table.seal, table.sealed)
        except ciphers.TagError as error:
            raise origin.corrupt("the frame table has been changed") from error
        return FramedRecord(
            stored,
            table,
            _Decoder(cipher, table.header, ciphers.TagError),
            origin=origin,
            tally=tally,
        )

    def _key_of(self, key_id: str, origin: Origin) -> bytes:
        """Return the key that a record names; what the caller's function raises is the reason."""
        try:
            return self._find_key(key_id)
        except Exception as error:
            raise origin.not_supported(
                f"it is encrypted and there is no key of id {key_id!r}: "
                f"{type(error).__name__}: {error}"
            ) from error

    def _find_key(self, key_id: str) -> bytes:
        if not callable(self._key):
            return self._key
        key = self._key(key_id)
        _check_key(key, key_id)
        return key


class AesGcmWithoutKey:
    """Says what is missing where a record is encrypted and no key was given."""

    name = _NAME

    def undo(
        self, stored: RecordBytes, version: str, *, most: int, origin: Origin, tally: Tally | None
    ) -> RecordBytes:
        """See `Transform`."""
        raise origin.not_supported(
            "it is encrypted with AES-GCM and no key was given: open it with "
            "transforms=[shardpoint.transforms.AesGcm(key)], or load it with an extension "
            "registry in which shardpoint.dcp.extension.AesGcm(key) is registered, or give the "
            "command --key-file FILE"
        )


def _ciphers() -> ModuleType | None:
    """Return the module that encrypts, or None where the package it needs is missing."""
    try:
        from shardpoint.transforms import _ciphers as module
    except ImportError:
        return None
    return module


def _check_key(key: bytes, key_id: str) -> None:
    if not isinstance(key, bytes | bytearray | memoryview) or len(key) not in _KEY_LENGTHS:
        found = f"{len(key)} bytes" if isinstance(key, bytes) else type(key).__name__
        raise PlanError(f"key {key_id!r} must be 16, 24 or 32 bytes, not {found}")


def _parse_header(header: bytes, origin: Origin) -> tuple[str, bytes, bytes]:
    """Return key id, salt and check value."""
    id_at = len(_MARK) + 1
    if not header.startswith(_MARK) or len(header) < id_at:
        raise origin.corrupt("the frames are not encrypted ones")
    salt_at = id_at + header[id_at - 1]
    if len(header) != salt_at + _SALT + _CHECK:
        raise origin.corrupt(f"the header of an encrypted record cannot have {len(header)} bytes")
    try:
        key_id = header[id_at:salt_at].decode()
    except UnicodeDecodeError as error:
        raise origin.corrupt("the key id is not UTF-8") from error
    return key_id, header[salt_at : salt_at + _SALT], header[salt_at + _SALT :]


class _Encoder:
    def __init__(self, cipher: Cipher, header: bytes) -> None:
        self._cipher = cipher
        self.header = header

    def encode(self, number: int, data: bytearray) -> bytes:
        """See `FrameEncoder`."""
        return self._cipher.seal(number, data, self.header)

    def seal(self, sealed: bytes) -> bytes:
        """See `FrameEncoder`."""
        return self._cipher.seal(_SEAL_NUMBER, b"", sealed)


class _Decoder:
    def __init__(self, cipher: Cipher, header: bytes, tag_error: type[Exception]) -> None:
        self._cipher = cipher
        self._header = header
        self._tag_error = tag_error

    def decode(self, number: int, data: memoryview, into: memoryview) -> None:
        """See `FrameDecoder`."""
        if len(data) != len(into) + _TAG:
            raise DamagedFrameError(f"it has {len(data)} bytes, wanted {len(into) + _TAG}")
        try:
            into[:] = self._cipher.open(number, data, self._header)
        except self._tag_error as error:
            raise DamagedFrameError(str(error)) from error
