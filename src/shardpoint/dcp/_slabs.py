"""Memory for staged tensors: large, aligned, and used again from save to save.

The first touch of a page costs several times what copying into it does, so memory that
nothing lies in any more is kept for the next save. Private memory asks for huge pages, which
makes even the first touch cheap; memory that is shared with another process cannot have them
on most machines.
"""

from __future__ import annotations

import ctypes
import itertools
import logging
import mmap
import os
import weakref
from collections import deque
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from shardpoint.errors import StorageError

__all__ = ["Lease", "Slab", "lease", "release_free", "shared_slab_at"]

logger = logging.getLogger(__name__)

Bytes: TypeAlias = npt.NDArray[np.uint8]

_GRANULE = 2 << 20  # a huge page
_POPULATE_READ = 22  # madvise(2)
_numbers = itertools.count()


class Slab:
    """One mapping.

    Attributes
    ----------
    number
        Its own among all slabs of this process; addresses come again.
    size
        In bytes.
    file
        The descriptor of shared memory, open as long as the slab lives; None where it is
        private.
    pinned
        Whether an accelerator can copy to it without a detour.
    address
        Where it lies in this process.
    is_untouched
        Whether it is shared and its pages are not there yet. The first copy is then faster by
        way of `file`, which needs neither zeros in a new page nor a fault for it.
    """

    def __init__(self, size: int, *, shared: bool, pinned: bool) -> None:
        self.number = next(_numbers)
        self.size = max(-(-size // _GRANULE), 1) * _GRANULE
        self.shared = shared
        self.file: int | None = None
        self.is_untouched = shared
        try:
            self.memory = self._mapped()
        except OSError as error:
            kind = "shared " if shared else ""
            raise StorageError(
                error.errno,
                f"cannot get {self.size} bytes of {kind}memory to copy the state to: "
                f"{error.strerror}",
            ) from error
        view = np.frombuffer(self.memory, np.uint8)
        self.address = int(view.ctypes.data)
        self.pinned = pinned and _pin(self, self.address, self.size)

    def _mapped(self) -> mmap.mmap:
        if self.shared:
            self.file = os.memfd_create("shardpoint-staging", os.MFD_CLOEXEC)
            weakref.finalize(self, os.close, self.file)
            os.ftruncate(self.file, self.size)
            return mmap.mmap(self.file, self.size)
        memory = mmap.mmap(-1, self.size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        try:
            memory.madvise(mmap.MADV_HUGEPAGE)
        except OSError as error:  # a kernel without them
            logger.debug("no huge pages for staging: %s", error)
        return memory

    def map_pages(self) -> None:
        """Let this process see pages that were written by way of `file`.

        A copy into them would do so one by one; this is for when nobody waits.
        """
        if _madvise is not None and not self.is_untouched:
            # Systems before Linux 5.14 do not know it: then the next copy takes longer.
            _madvise(self.address, self.size, _POPULATE_READ)


def _find_madvise() -> ctypes._NamedFuncPointer | None:
    """Return the C library's function; that of `mmap.mmap` keeps other threads from running."""
    function = getattr(ctypes.CDLL(None), "madvise", None)
    if function is not None:
        function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return function


_madvise = _find_madvise()


def _pin(slab: Slab, address: int, size: int) -> bool:
    """Register memory with the accelerator; whether that was possible."""
    if not torch.cuda.is_available():
        return False
    runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    result = runtime.cudaHostRegister(address, size, 0)
    if int(result) != 0:
        logger.warning("staging memory could not be pinned (CUDA error %s)", int(result))
        return False
    # not at exit: the accelerator's context may be gone by then
    weakref.finalize(slab, runtime.cudaHostUnregister, address).atexit = False
    return True


class Lease:
    """The use of a slab, until the last tensor that lies in it is gone.

    Attributes
    ----------
    slab
        Where the memory is.
    memory
        The whole slab; tensors over it keep the slab from being used by others.
    """

    def __init__(self, slab: Slab) -> None:
        self.slab = slab
        # an array of this lease alone: it lives exactly as long as tensors over it
        self.memory: Bytes = np.frombuffer(slab.memory, np.uint8)
        weakref.finalize(self.memory, _give_back, slab).atexit = False


# Garbage collection may give back at any moment, in any thread: a deque needs no lock.
_free: deque[Slab] = deque()
_shared: weakref.WeakValueDictionary[int, Slab] = weakref.WeakValueDictionary()


def lease(size: int, *, shared: bool, pinned: bool) -> Lease:
    """Return memory of at least `size` bytes, whose contents are arbitrary.

    Parameters
    ----------
    shared
        Memory that another process can map.
    pinned
        Memory that an accelerator copies to directly, where there is one.
    """
    pinned = pinned and torch.cuda.is_available()
    for _ in range(len(_free)):
        try:
            slab = _free.popleft()
        except IndexError:
            break
        if slab.shared != shared or slab.pinned != pinned:
            _free.append(slab)
        elif slab.size >= size:
            return Lease(slab)
        # one that is too small goes, before a larger one is made
    slab = Slab(size, shared=shared, pinned=pinned)
    if shared:
        _shared[slab.address] = slab
    return Lease(slab)


def shared_slab_at(address: int) -> Slab | None:
    """Return the shared slab that an address of this process lies in."""
    for slab in list(_shared.values()):
        if slab.address <= address < slab.address + slab.size:
            return slab
    return None


def release_free() -> None:
    """Give the memory that is kept for the next save back to the system."""
    _free.clear()


def _give_back(slab: Slab) -> None:
    """Keep a slab for the next save, one of each kind."""
    for other in list(_free):
        if (other.shared, other.pinned) == (slab.shared, slab.pinned):
            if other.size >= slab.size:
                return
            try:
                _free.remove(other)
            except ValueError:  # somebody was faster
                continue
    _free.append(slab)


os.register_at_fork(after_in_child=_free.clear)
