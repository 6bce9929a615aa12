"""Many short spans of a local file in few system calls.

A call for every span costs more than a microsecond, ten times the copying of some hundred
bytes. Copying out of a mapping costs no call, but a file that somebody cuts off meanwhile, or a
failing disk, then ends the process. So the kernel copies: with one ``process_vm_writev`` the
process writes a thousand spans of a mapping into its own memory. Of a page that is not there
it says ``EFAULT`` (process_vm_writev(2)).
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

LONGEST_GATHERED = 8192
"""Bytes of a span, at most: longer ones are read as fast by a call for each."""

_FEWEST = 64  # spans for which preparing pays
# Bytes from one span to the next, on average: beyond the first, what the system reads ahead from
# a disk would be in vain for the most part; beyond the second, so is what is mapped.
_FAR = 8192
_FARTHEST = 64 << 10
_VECTOR = 1024
_POINTER = 8


def _find_copy() -> ctypes._NamedFuncPointer | None:
    """Return the C library's function; None where there is none, or not as known here."""
    if sys.platform != "linux" or ctypes.sizeof(ctypes.c_void_p) != _POINTER:
        return None
    try:
        function = ctypes.CDLL(None).process_vm_writev
    except (OSError, AttributeError):
        return None
    function.argtypes = [
        *(ctypes.c_int, ctypes.c_void_p, ctypes.c_ulong),
        *(ctypes.c_void_p, ctypes.c_ulong, ctypes.c_ulong),
    ]
    function.restype = ctypes.c_ssize_t
    return function


_process_vm_writev = _find_copy()


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
    if _process_vm_writev is None or count < _FEWEST or not 0 < length <= LONGEST_GATHERED:
        return 0
    first = int(starts[0]) - int(starts[0]) % mmap.ALLOCATIONGRANULARITY
    span = int(starts[-1]) + length - first
    if span > count * _FARTHEST:
        return 0
    try:
        mapping = mmap.mmap(descriptor, span, prot=mmap.PROT_READ, offset=first)
    except (OSError, ValueError):
        return 0
    try:
        if span > count * _FAR:
            mapping.madvise(mmap.MADV_RANDOM)
        view = np.frombuffer(mapping, np.uint8)
        vector = np.empty((count, 2), np.int64)
        vector[:, 0] = view.ctypes.data + (starts - first)
        vector[:, 1] = length
        del view
        return _copy(vector, length, np.frombuffer(into, np.uint8))
    finally:
        mapping.close()


def _copy(vector: npt.NDArray[np.int64], length: int, into: npt.NDArray[np.uint8]) -> int:
    """Copy spans of memory, of which there are addresses and lengths; return how many were."""
    assert _process_vm_writev is not None
    process, done = os.getpid(), 0
    while done < len(vector):
        spans = vector[done : done + _VECTOR]
        target = np.array([into.ctypes.data + done * length, len(spans) * length], np.int64)
        addresses = spans.ctypes.data, len(spans), target.ctypes.data, 1
        nbytes = int(_process_vm_writev(process, *addresses, 0))
        whole = max(nbytes, 0) // length
        done += whole
        if whole < len(spans):
            break
    return done
