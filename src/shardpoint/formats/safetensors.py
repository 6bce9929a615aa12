"""Headers of safetensors files, read strictly and written.

Source: the format's specification in the safetensors repository (README, "Format"): eight
bytes with the header's length, a JSON object, then the tensors' bytes, row-major and
little-endian, without overlap or holes.
"""

from __future__ import annotations

import json
import struct
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, NoReturn

from shardpoint.dtypes import BY_SAFETENSORS_NAME, DType
from shardpoint.errors import (
    CorruptionError,
    FormatError,
    LimitExceededError,
    NotSupportedError,
    Problem,
)
from shardpoint.formats._zip_reading import ReadAt

__all__ = [
    "MAX_HEADER_BYTES",
    "SafetensorsHeader",
    "SafetensorsTensor",
    "encode_header",
    "read_header",
    "written_order",
]

MAX_HEADER_BYTES = 100_000_000
"""The limit of the format's own reader."""

_MAX_AXES = 64
_MAX_NUMBER = (1 << 63) - 1
_LENGTH = struct.Struct("<Q")
_METADATA = "__metadata__"
_FIELDS = {"dtype", "shape", "data_offsets"}


@dataclass(frozen=True, slots=True)
class SafetensorsTensor:
    """One tensor: its bytes are `start` up to `end` of the file, row-major."""

    dtype: DType
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class SafetensorsHeader:
    """A header: tensors by name in its own order, ``__metadata__``, where the data begin."""

    tensors: dict[str, SafetensorsTensor]
    metadata: dict[str, str]
    data_start: int


class _DuplicateError(ValueError):
    pass


def read_header(
    read_at: ReadAt, file_size: int, *, offset: int = 0, file: str
) -> SafetensorsHeader:
    """Read and check a header.

    Parameters
    ----------
    read_at
        ``read_at(absolute offset, length)`` returns exactly that many bytes.
    file_size
        Where the file, or the image in it, ends.
    offset
        Where it begins.
    file
        For messages.

    Raises
    ------
    FormatError
        If the header is not what the specification asks for, or tensors overlap, leave holes,
        or have other sizes than their shapes give; names the tensor.
    CorruptionError
        If the file ends before the header or the data.
    LimitExceededError
        If the header is larger than `MAX_HEADER_BYTES`.
    NotSupportedError
        If an element type is not known.
    """
    available = file_size - offset - _LENGTH.size
    if offset < 0 or available < 0:
        _fail(f"{max(file_size - offset, 0)} bytes are too few", file, kind=CorruptionError)
    (length,) = _LENGTH.unpack(_exactly(read_at, offset, _LENGTH.size, file))
    if length > available:
        _fail(
            f"the header should have {length} bytes, {available} are left",
            file,
            kind=CorruptionError,
        )
    if length > MAX_HEADER_BYTES:
        _fail(
            f"the header has {length} bytes, more than {MAX_HEADER_BYTES}",
            file,
            kind=LimitExceededError,
        )
    content = _parse(_exactly(read_at, offset + _LENGTH.size, length, file), file)
    data_start = offset + _LENGTH.size + length
    metadata = _check_metadata(content.pop(_METADATA, {}), file)
    tensors = {
        name: _check_tensor(name, entry, data_start, file) for name, entry in content.items()
    }
    _check_spans(tensors, data_start, file_size, file)
    return SafetensorsHeader(tensors, metadata, data_start)


def _fail(
    message: str, file: str, *, key: str | None = None, kind: type[Exception] = FormatError
) -> NoReturn:
    raise kind(str(Problem(f"safetensors: {message}", key=key, file=file)))


def _exactly(read_at: ReadAt, offset: int, length: int, file: str) -> bytes:
    data = read_at(offset, length)
    if len(data) != length:
        _fail(f"wanted {length} bytes, found {len(data)}", file, kind=CorruptionError)
    return data


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        [(twice, _)] = Counter(name for name, _ in pairs).most_common(1)
        raise _DuplicateError(f"the name {twice!r} occurs twice")
    return content


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _parse(raw: bytes, file: str) -> dict[str, Any]:
    if raw[:1] != b"{":
        _fail(f"the header begins with {raw[:1]!r}, not with '{{'", file)
    try:
        content = json.loads(raw.decode(), object_pairs_hook=_pairs, parse_constant=_no_constant)
    except _DuplicateError as error:
        _fail(str(error), file)
    except (ValueError, RecursionError) as error:
        _fail(f"the header is not JSON: {error}", file)
    assert isinstance(content, dict)  # it begins with a brace
    return content


def _check_metadata(metadata: Any, file: str) -> dict[str, str]:
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        _fail(f"{_METADATA} is not an object of strings", file)
    return metadata


def _is_number(value: Any) -> bool:
    return type(value) is int and 0 <= value <= _MAX_NUMBER


def _check_tensor(name: str, entry: Any, data_start: int, file: str) -> SafetensorsTensor:
    if not isinstance(entry, dict) or set(entry) != _FIELDS:
        _fail(f"wanted the fields {sorted(_FIELDS)}, found {_shown(entry)}", file, key=name)
    shape, offsets, type_name = entry["shape"], entry["data_offsets"], entry["dtype"]
    if not isinstance(shape, list) or len(shape) > _MAX_AXES or not all(map(_is_number, shape)):
        _fail(f"the shape is {_shown(shape)}", file, key=name)
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_number, offsets)):
        _fail(f"data_offsets are {_shown(offsets)}", file, key=name)
    dtype = BY_SAFETENSORS_NAME.get(type_name) if isinstance(type_name, str) else None
    if dtype is None:
        _fail(f"the dtype {_shown(type_name)} is not known", file, key=name, kind=NotSupportedError)
    start, end = offsets
    wanted = prod(shape) * dtype.itemsize
    if end - start != wanted:
        _fail(
            f"{dtype.name} of shape {shape} takes {wanted} bytes, data_offsets {offsets} "
            f"give {end - start}",
            file,
            key=name,
        )
    return SafetensorsTensor(dtype, tuple(shape), data_start + start, data_start + end)


def _shown(value: Any) -> str:
    """Return a value of unknown size for a message."""
    if isinstance(value, list | dict) and len(value) > 2 * _MAX_AXES:
        return f"{type(value).__name__} of {len(value)}"
    text = repr(value)
    return text if len(text) <= 200 else text[:200] + "..."


def _check_spans(
    tensors: Mapping[str, SafetensorsTensor], data_start: int, file_size: int, file: str
) -> None:
    position = data_start
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if tensor.end > file_size:
            _fail(
                f"the data end at {tensor.end}, the file at {file_size}",
                file,
                key=name,
                kind=CorruptionError,
            )
        if tensor.start != position:
            what = "overlap those of another tensor" if tensor.start < position else "leave a hole"
            _fail(f"the data from {tensor.start} on {what} (wanted {position})", file, key=name)
        position = tensor.end
    if position != file_size:
        _fail(f"the data end at {position}, the file at {file_size}", file)


_WRITTEN_FIRST = (
    *("U64", "I64", "F64", "C64", "F32", "U32", "I32", "BF16", "F16", "U16", "I16"),
    *("F8_E5M2FNUZ", "F8_E4M3FNUZ", "F8_E8M0", "F8_E4M3", "F8_E5M2", "I8", "U8", "BOOL"),
)


def written_order(tensors: Mapping[str, DType]) -> list[str]:
    """Return names in the order in which safetensors 0.8 writes tensors: by dtype, then by name.

    Wide elements come first, so that all are aligned.
    """
    places = {name: place for place, name in enumerate(_WRITTEN_FIRST)}

    def place(name: str) -> tuple[int, str]:
        return places.get(tensors[name].safetensors_name or "", len(places)), name

    return sorted(tensors, key=place)


def encode_header(
    tensors: Sequence[tuple[str, DType, tuple[int, ...]]],
    *,
    metadata: Mapping[str, str] | None = None,
) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """Return a header, and where in the file each tensor's bytes begin and end.

    The tensors follow each other in the given order. The header's size is a multiple of 8;
    give wide elements first to have all of them aligned.

    Raises
    ------
    NotSupportedError
        If the format has no name for an element type.
    FormatError
        If a name occurs twice or is the reserved one.
    """
    content: dict[str, Any] = {}
    if metadata:
        content[_METADATA] = dict(metadata)
    position = 0
    spans: dict[str, tuple[int, int]] = {}
    for name, dtype, shape in tensors:
        if dtype.safetensors_name is None:
            raise NotSupportedError(f"key {name!r}: safetensors has no dtype {dtype.name}")
        if name in content or name == _METADATA:
            raise FormatError(f"key {name!r}: safetensors cannot have this name (again)")
        end = position + prod(shape) * dtype.itemsize
        spans[name] = (position, end)
        content[name] = {
            "dtype": dtype.safetensors_name,
            "shape": list(shape),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    start = _LENGTH.size + len(text)
    return (
        _LENGTH.pack(len(text)) + text,
        {name: (start + first, start + last) for name, (first, last) in spans.items()},
    )
