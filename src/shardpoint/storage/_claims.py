"""A lock on a folder, held by a process and gone with it."""

from __future__ import annotations

import errno
import os

from shardpoint.errors import ConcurrentSaveError
from shardpoint.storage.base import Claim, NoClaim

if os.name == "posix":
    import fcntl

__all__ = ["claim_folder"]

_HELD_BY_ANOTHER = (errno.EAGAIN, errno.EACCES)


class _FolderClaim:
    """A lock by ``flock`` on an open folder: no file is left behind, whatever happens."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def release(self) -> None:
        """Unlock, also where a forked process has inherited the descriptor."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_UN)
            finally:
                os.close(descriptor)

    def __del__(self) -> None:
        self.release()


def claim_folder(path: str, *, shared: bool) -> Claim:
    """Lock a folder; see `Storage.claim`. File systems without such locks give `NoClaim`."""
    if os.name != "posix":
        return NoClaim()
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        if error.errno in _HELD_BY_ANOTHER:
            raise ConcurrentSaveError(
                f"another save is writing to {path!r}: wait until it is done, or save elsewhere"
            ) from error
        return NoClaim()  # network file systems that cannot lock folders
    return _FolderClaim(descriptor)
