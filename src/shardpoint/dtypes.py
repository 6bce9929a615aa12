"""Element types: one table of names, sizes and spellings.

Names are those of torch without the ``torch.`` prefix. Elements always travel as raw
little-endian bytes; `DType.numpy` is what users see, `DType.raw` what copies use.

Sources: torch's dtype names and legacy storage classes; the safetensors format
specification for its short names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import ml_dtypes
import numpy as np

from shardpoint.errors import NotSupportedError

__all__ = ["BY_CODE", "BY_NAME", "BY_SAFETENSORS_NAME", "BY_STORAGE_NAME", "DType", "dtype_named"]


@dataclass(frozen=True, slots=True)
class DType:
    """An element type.

    Attributes
    ----------
    name
        torch's name, such as ``"bfloat16"``.
    code
        Position in `BY_CODE`; what index columns hold. Stable: it is part of the native index.
    itemsize
        Bytes per element.
    numpy
        The dtype of arrays given to users; a structured (real, imag) one for ``complex32``.
    storage_name
        torch's legacy storage class (``"FloatStorage"``), or None for the types that
        torch pickles as untyped storage with the dtype beside it.
    safetensors_name
        The short name in a safetensors header, or None.
    """

    name: str
    code: int
    itemsize: int
    numpy: np.dtype[np.generic]
    storage_name: str | None
    safetensors_name: str | None

    @property
    def raw(self) -> np.dtype[np.generic]:
        """An opaque dtype of the same size, for copying bytes without interpreting them."""
        return _RAW[self.itemsize]


_RAW: Mapping[int, np.dtype[np.generic]] = {
    1: np.dtype("u1"),
    2: np.dtype("<u2"),
    4: np.dtype("<u4"),
    8: np.dtype("<u8"),
    16: np.dtype("<c16"),  # numpy copies 16-byte complex as fast as integers; bits are kept
}

_ROWS: tuple[tuple[str, object, str | None, str | None], ...] = (
    ("float32", "<f4", "FloatStorage", "F32"),
    ("float64", "<f8", "DoubleStorage", "F64"),
    ("float16", "<f2", "HalfStorage", "F16"),
    ("bfloat16", ml_dtypes.bfloat16, "BFloat16Storage", "BF16"),
    ("int8", "i1", "CharStorage", "I8"),
    ("uint8", "u1", "ByteStorage", "U8"),
    ("int16", "<i2", "ShortStorage", "I16"),
    ("int32", "<i4", "IntStorage", "I32"),
    ("int64", "<i8", "LongStorage", "I64"),
    ("bool", "?", "BoolStorage", "BOOL"),
    ("complex64", "<c8", "ComplexFloatStorage", "C64"),
    ("complex128", "<c16", "ComplexDoubleStorage", None),
    ("uint16", "<u2", None, "U16"),
    ("uint32", "<u4", None, "U32"),
    ("uint64", "<u8", None, "U64"),
    ("float8_e4m3fn", ml_dtypes.float8_e4m3fn, None, "F8_E4M3"),
    ("float8_e5m2", ml_dtypes.float8_e5m2, None, "F8_E5M2"),
    ("float8_e4m3fnuz", ml_dtypes.float8_e4m3fnuz, None, "F8_E4M3FNUZ"),
    ("float8_e5m2fnuz", ml_dtypes.float8_e5m2fnuz, None, "F8_E5M2FNUZ"),
    ("float8_e8m0fnu", ml_dtypes.float8_e8m0fnu, None, "F8_E8M0"),
    ("complex32", [("real", "<f2"), ("imag", "<f2")], None, None),
    ("float4_e2m1fn_x2", "u1", None, None),  # two 4-bit values in a byte: users see the bytes
)


def _build() -> tuple[DType, ...]:
    table = []
    for code, (name, numpy_type, storage_name, safetensors_name) in enumerate(_ROWS):
        numpy_dtype: np.dtype[np.generic] = np.dtype(numpy_type)  # type: ignore[call-overload]
        table.append(
            DType(name, code, numpy_dtype.itemsize, numpy_dtype, storage_name, safetensors_name)
        )
    return tuple(table)


BY_CODE: tuple[DType, ...] = _build()
BY_NAME: Mapping[str, DType] = MappingProxyType({d.name: d for d in BY_CODE})
BY_STORAGE_NAME: Mapping[str, DType] = MappingProxyType(
    {d.storage_name: d for d in BY_CODE if d.storage_name is not None}
)
BY_SAFETENSORS_NAME: Mapping[str, DType] = MappingProxyType(
    {d.safetensors_name: d for d in BY_CODE if d.safetensors_name is not None}
)


def dtype_named(name: str) -> DType:
    """Return the dtype of that torch name (without ``torch.``).

    Raises
    ------
    NotSupportedError
        If shardpoint does not know the name.
    """
    try:
        return BY_NAME[name]
    except KeyError:
        known = ", ".join(BY_NAME)
        raise NotSupportedError(f"dtype {name!r} is not supported; known: {known}") from None
