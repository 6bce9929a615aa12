"""Many short spans of a local file in few system calls.

A call for every span costs more than a microsecond, ten times the copying of some hundred
bytes. Copying out of a mapping costs no call, but a file that somebody cuts off meanwhile, or a
failing disk, then ends the process. So the kernel copies: one ``pwritev`` writes a thousand
spans of a mapping to a file in memory, from where they are read. Of a page that is not there it
says ``EFAULT``.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys

import numpy as np
import numpy.typing as npt

from shardpoint.storage.base import Buffer

__all__ = ["LONGEST_GATHERED", "gather"]

LONGEST_GATHERED = 1024
"""Bytes of a span, at most: longer ones are read as fast by a call for each."""

_FEWEST = 64  # spans for which preparing pays
_FARTHEST = 8192  # bytes from one to the next on average: beyond, most of what is mapped is in vain
_VECTOR = 1024
_POINTER = 8


def _find_pwritev() -> ctypes._NamedFuncPointer | None:
    """Return the C library's function; None where there is none, or not as known here."""
    if sys.platform != "linux" or ctypes.sizeof(ctypes.c_void_p) != _POINTER:
        return None
    try:
        function = ctypes.CDLL(None).pwritev
    except (OSError, AttributeError):
        return None
    function.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_int64]
    function.restype = ctypes.c_ssize_t
    return function


_pwritev = _find_pwritev()


def gather(descriptor: int, starts: npt.NDArray[np.int64], length: int, into: Buffer) -> int:
    """Fill a buffer with spans of a file, one after the other.

    Parameters
    ----------
    descriptor
        Of a regular file, open for reading.
    starts
        ``int64[n]``, ascending: where each span begins.
    length
        Bytes of each.
    into
        ``n * length`` bytes.

    Returns
    -------
    How many spans were read. The others, all of them where the system cannot do this, are to be
    read in another way, which says what is wrong with them, if something is.
    """
    count = len(starts)
    if _pwritev is None or count < _FEWEST or not 0 < length <= LONGEST_GATHERED:
        return 0
    first = int(starts[0]) - int(starts[0]) % mmap.ALLOCATIONGRANULARITY
    span = int(starts[-1]) + length - first
    if span > count * _FARTHEST:
        return 0
    try:
        mapping = mmap.mmap(descriptor, span, prot=mmap.PROT_READ, offset=first)
        middle = os.memfd_create("shardpoint-gather", os.MFD_CLOEXEC)
    except (OSError, ValueError):
        return 0
    try:
        view = np.frombuffer(mapping, np.uint8)
        vector = np.empty((count, 2), np.int64)
        vector[:, 0] = view.ctypes.data + (starts - first)
        vector[:, 1] = length
        del view
        return _copy(middle, vector, length, into)
    finally:
        os.close(middle)
        mapping.close()


def _copy(middle: int, vector: npt.NDArray[np.int64], length: int, into: Buffer) -> int:
    """Copy spans of memory by way of a file; return how many were."""
    assert _pwritev is not None
    address, done = vector.ctypes.data, 0
    while done < len(vector):
        count = min(_VECTOR, len(vector) - done)
        entry = address + done * vector.itemsize * 2
        nbytes = int(_pwritev(middle, entry, count, 0))
        whole = max(nbytes, 0) // length
        part = into[done * length : (done + whole) * length]
        if len(part) and os.preadv(middle, [part], 0) != len(part):
            return done
        done += whole
        if whole < count:
            return done
    return done
