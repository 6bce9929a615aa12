"""Seconds, peak memory and bytes read of one operation in this process."""

from __future__ import annotations

import ctypes
import gc
import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Measurement", "evict", "file_system_of", "measure", "scaled"]

_PROCESS = Path("/proc/self")


@dataclass(frozen=True)
class Measurement:
    """What one operation took.

    Attributes
    ----------
    seconds
        Wall time.
    processor_seconds
        Processor time of all threads: what neighbours on the machine change little.
    peak_bytes
        The most resident memory during the operation beyond what was resident before it;
        None where the system does not say. Pages of memory-mapped files count.
    read_bytes
        Bytes that read calls returned, from the disk or from the page cache; None likewise.
        What is read through a memory map does not count.
    disk_bytes
        Bytes that came from the disk, by calls or through a memory map; None likewise. Nothing
        where the page cache has them.
    needed_bytes
        Bytes of the values that were asked for; None where the case has no such number.
    sent_bytes
        Bytes that one rank exchanges with the others; None where nothing was counted.
    """

    seconds: float
    processor_seconds: float
    peak_bytes: int | None
    read_bytes: int | None
    disk_bytes: int | None = None
    needed_bytes: int | None = None
    sent_bytes: int | None = None


def measure(
    operation: Callable[[], object],
    *,
    needed_bytes: int | None = None,
    before: Callable[[], object] = lambda: None,
) -> Measurement:
    """Run an operation once; `before` is run right before, outside the measurement.

    Where there are several ranks that has to end with a barrier: the first would wait for the
    last otherwise, and that would be measured.

    The system does not count what it copies out of a mapping. Where the operation returns a
    report with ``bytes_read``, as shardpoint's ``load`` does, at least that counts as read.

    Garbage collection stays on: what it costs, a program pays as well.
    """
    gc.collect()
    _release_free_memory()
    before()
    with suppress(OSError):
        (_PROCESS / "clear_refs").write_text("5")  # the peak becomes what is resident now
    resident = _status("VmRSS")
    read, disk = _bytes_read("rchar"), _bytes_read("read_bytes")
    started, processor = time.perf_counter(), time.process_time()
    outcome = operation()
    seconds, processor = time.perf_counter() - started, time.process_time() - processor
    read_after, disk_after = _bytes_read("rchar"), _bytes_read("read_bytes")
    peak, reported = _status("VmHWM"), getattr(outcome, "bytes_read", 0)
    return Measurement(
        seconds,
        processor,
        None if peak is None or resident is None else max(0, peak - resident),
        None if read is None or read_after is None else max(read_after - read, reported),
        None if disk is None or disk_after is None else disk_after - disk,
        needed_bytes,
    )


def scaled(measured: Measurement, factor: float) -> Measurement:
    """Return what something `factor` times as large would take if it grew in proportion."""
    return Measurement(
        measured.seconds * factor,
        measured.processor_seconds * factor,
        None if measured.peak_bytes is None else int(measured.peak_bytes * factor),
        None,
    )


def evict(folder: Path) -> None:
    """Make the files durable and ask the kernel to forget their pages."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)


def file_system_of(folder: Path) -> str:
    """Return the type of the file system that a folder is on; ``?`` where it is not told."""
    try:
        mounts = Path("/proc/self/mounts").read_text().splitlines()
    except OSError:
        return "?"
    path = folder.resolve()
    fields = [line.split() for line in mounts]
    over = [(len(where), kind) for _, where, kind, *_ in fields if path.is_relative_to(where)]
    return max(over, key=lambda found: found[0], default=(0, "?"))[1]


def _release_free_memory() -> None:
    """Let go of what was freed and is kept: to use it again would not show as a peak."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _status(name: str) -> int | None:
    try:
        text = (_PROCESS / "status").read_text()
    except OSError:
        return None
    for line in text.splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    return None


def _bytes_read(field: str) -> int | None:
    try:
        text = (_PROCESS / "io").read_text()
    except OSError:
        return None
    return next(int(line.split()[1]) for line in text.splitlines() if line.startswith(f"{field}:"))
