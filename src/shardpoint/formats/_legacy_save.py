"""The format of ``torch.save`` before torch 1.6, still written on request.

Five pickles follow each other: a magic number, a protocol number, facts on the machine, the
object, and the list of the storages' keys. Then comes every storage in the order of that list:
its number of elements (8 bytes, little-endian) and its bytes, not aligned. There are no
checksums. Source: files that torch 2.6 to 2.15 wrote with
``_use_new_zipfile_serialization=False``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from shardpoint.errors import CorruptionError, ForbiddenContentError, FormatError, NotSupportedError
from shardpoint.formats._object_resolver import ObjectResolver
from shardpoint.formats._pickle_guards import DEFAULT_LIMITS, Limits, WorkBudget, describe
from shardpoint.formats._record_members import RecordMember
from shardpoint.formats._tensor_pickles import StorageReference
from shardpoint.formats._zip_reading import Window
from shardpoint.formats.object_decoder import NumpyFactory, TensorDescription
from shardpoint.formats.pickle_machine import run_pickle

__all__ = ["is_legacy", "open_legacy"]

_MAGIC = 0x1950A86A20F9469CFC6C
_PROTOCOL = 1001
_COUNT_BYTES = 8
_UNMEASURED = Limits(max_depth=None)
# The pickles' length is not written anywhere; they are small beside the storages.
_FIRST_TRY = 1 << 20
_GROWTH = 16
_MAX_PICKLE_BYTES = 1 << 30


class _NothingNamed:
    """The resolver of pickles that hold numbers, text, lists and dictionaries only."""

    def __init__(self, source: str) -> None:
        self._source = source

    def _refuse(self, *_: Any) -> NoReturn:
        raise ForbiddenContentError(f"{self._source}: a plain value is wanted here")

    find_global = reduce = new_object = build = persistent_load = _refuse


def is_legacy(begin: bytes) -> bool:
    """Whether a file may be in this format, by its first bytes: a pickle of protocol 2 to 5."""
    return begin[:1] == b"\x80" and begin[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05")


def open_legacy(
    window: Window, *, allowed: Mapping[str, Callable[..., Any]]
) -> tuple[bytes, Callable[[str], RecordMember]]:
    """Return the object's pickle, and what finds a storage by its key.

    Raises
    ------
    FormatError
        If the file is not in this format.
    CorruptionError
        If it is cut off, or a storage has another size than the pickle says.
    ForbiddenContentError, LimitExceededError, NotSupportedError
        As `object_decoder.decode_object`.
    """
    pickle, storages, keys, position = _read_pickles(window, allowed)
    found: dict[str, RecordMember] = {}
    for key in keys:
        storage = storages.get(key)
        if storage is None or key in found:
            window.fail(f"storage {describe(key)} is listed, but not used or not once", position)
        raw = window.read(position, _COUNT_BYTES, f"the size of storage {key!r}")
        count = int.from_bytes(raw, "little", signed=True)
        start = position + _COUNT_BYTES
        if count != storage.count or start + storage.nbytes > window.length:
            window.fail(
                f"storage {key!r} should have {storage.count} elements ({storage.nbytes} bytes), "
                f"it has {count}, and {window.length - start} bytes are left",
                position,
                kind=CorruptionError,
            )
        found[key] = RecordMember(key, window.offset + start, storage.nbytes, None)
        position = start + storage.nbytes

    def find_storage(key: str) -> RecordMember:
        if key not in found:
            window.fail(f"storage {describe(key)} is not in the file")
        return found[key]

    return pickle, find_storage


def _read_pickles(
    window: Window, allowed: Mapping[str, Callable[..., Any]]
) -> tuple[bytes, dict[str, StorageReference], list[str], int]:
    size = _FIRST_TRY
    while True:
        data = window.read(0, min(size, window.length), "the pickles")
        try:
            return _parse_pickles(window, data, allowed)
        except FormatError as error:
            # It may only be cut off; what is forbidden or too much stays so.
            is_whole = len(data) == window.length or size >= _MAX_PICKLE_BYTES
            if is_whole or type(error) is not FormatError:
                raise
        size *= _GROWTH


def _parse_pickles(
    window: Window, data: bytes, allowed: Mapping[str, Callable[..., Any]]
) -> tuple[bytes, dict[str, StorageReference], list[str], int]:
    source = window.source
    view = memoryview(data)
    plain = _NothingNamed(source)
    magic, length = run_pickle(view[:64], plain, source=source)
    position = length
    if type(magic) is not int or magic != _MAGIC:
        window.fail("a pickle, but not torch.save's: it does not begin with the magic number")
    protocol, length = run_pickle(view[position : position + 64], plain, source=source)
    position += length
    if protocol != _PROTOCOL:
        window.fail(f"torch.save's protocol {describe(protocol)}, wanted {_PROTOCOL}")
    machine, length = run_pickle(view[position : position + 4096], plain, source=source)
    position += length
    if type(machine) is not dict or machine.get("little_endian") is not True:
        window.fail("the file was written on a big-endian machine", kind=NotSupportedError)
    resolver = ObjectResolver(
        source=source,
        factory=NumpyFactory(),
        allowed=allowed,
        make_tensor=_as_described,
        budget=WorkBudget(len(view) - position, source=source, limits=DEFAULT_LIMITS),
    )
    _, length = run_pickle(view[position:], resolver, source=source, limits=_UNMEASURED)
    pickle = data[position : position + length]
    position += length
    keys, length = run_pickle(view[position:], plain, source=source)
    if type(keys) is not list or not all(type(key) is str for key in keys):
        window.fail(f"the storages' keys are {describe(keys)}, not a list of texts", position)
    return pickle, resolver.storages, keys, position + length


def _as_described(description: TensorDescription, storage: StorageReference) -> TensorDescription:
    return description
