"""Seconds, peak memory and bytes read of one operation in this process."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Measurement", "evict", "measure", "scaled"]

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
    needed_bytes
        Bytes of the values that were asked for; None where the case has no such number.
    sent_bytes
        Bytes that one rank exchanges with the others; None where nothing was counted.
    """

    seconds: float
    processor_seconds: float
    peak_bytes: int | None
    read_bytes: int | None
    needed_bytes: int | None = None
    sent_bytes: int | None = None


def measure(
    operation: Callable[[], object],
    *,
    needed_bytes: int | None = None,
    before: Callable[[], object] = lambda: None,
) -> Measurement:
    """Run an operation once; `before` is run first, outside the measurement.

    Garbage collection stays on: what it costs, a program pays as well.
    """
    gc.collect()
    before()
    with suppress(OSError):
        (_PROCESS / "clear_refs").write_text("5")  # the peak becomes what is resident now
    resident = _status("VmRSS")
    read = _bytes_read()
    started, processor = time.perf_counter(), time.process_time()
    operation()
    seconds, processor = time.perf_counter() - started, time.process_time() - processor
    read_after, peak = _bytes_read(), _status("VmHWM")
    return Measurement(
        seconds,
        processor,
        None if peak is None or resident is None else max(0, peak - resident),
        None if read is None or read_after is None else read_after - read,
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


def _status(name: str) -> int | None:
    try:
        text = (_PROCESS / "status").read_text()
    except OSError:
        return None
    for line in text.splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    return None


def _bytes_read() -> int | None:
    try:
        text = (_PROCESS / "io").read_text()
    except OSError:
        return None
    return int(text.split("rchar:")[1].split()[0])
