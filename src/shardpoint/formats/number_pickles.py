"""The pickles of plain numbers, which most of an optimizer's objects are: read without a machine.

Protocol 2, as `torch.save` writes them. Source of the opcodes: the standard library's
``pickletools``.
"""

from __future__ import annotations

import struct

__all__ = ["FLOAT_BEGIN", "FLOAT_SIZE", "UNKNOWN_PICKLE", "number_of"]


class _Unknown:
    """The type of `UNKNOWN_PICKLE`."""


UNKNOWN_PICKLE = _Unknown()
"""Stands for a pickle of something else."""

_FLOAT = struct.Struct(">3sds")
FLOAT_SIZE = _FLOAT.size
FLOAT_BEGIN = b"\x80\x02G"
"""A float's pickle is this, its eight bytes from the highest to the lowest, and a full stop."""

_INTEGER = struct.Struct("<3sis")
_SHORT = struct.Struct("<3sHs")
_BYTE = struct.Struct("<3sBs")
_BY_LENGTH = {
    _FLOAT.size: (_FLOAT, FLOAT_BEGIN),
    _INTEGER.size: (_INTEGER, b"\x80\x02J"),
    _SHORT.size: (_SHORT, b"\x80\x02M"),
    _BYTE.size: (_BYTE, b"\x80\x02K"),
}
_CONSTANTS = {b"\x80\x02\x88.": True, b"\x80\x02\x89.": False, b"\x80\x02N.": None}


def number_of(pickle: bytes) -> float | int | bool | _Unknown | None:
    """Return the number that a pickle is, True, False or None; `UNKNOWN_PICKLE` for others.

    Examples
    --------
    >>> import pickle
    >>> [number_of(pickle.dumps(value, 2)) for value in (0.5, -3, 70000, True)]
    [0.5, -3, 70000, True]
    >>> number_of(pickle.dumps("word", 2)) is UNKNOWN_PICKLE
    True
    """
    form = _BY_LENGTH.get(len(pickle))
    if form is not None:
        begin, value, end = form[0].unpack(pickle)
        if begin == form[1] and end == b".":
            number: float | int = value
            return number
    return _CONSTANTS.get(pickle, UNKNOWN_PICKLE)
