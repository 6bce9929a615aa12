"""Which bytes a stored checksum covers, and the comparison with what was read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

from shardpoint.engine._payload import place_of
from shardpoint.errors import CorruptionError, Problem
from shardpoint.formats.checksum import crc32
from shardpoint.index import CheckpointIndex

__all__ = ["Blocks", "blocks_of", "damaged"]

_SPARE = 128 << 10


@dataclass(frozen=True, slots=True, eq=False)
class Blocks:
    """The checksums of one payload's blocks. Positions count from the payload's start.

    Attributes
    ----------
    size
        Of every block but the last.
    end
        Of the payload.
    values
        One CRC-32 a block.
    origin
        Where the payload begins in its file.
    index, chunk
        Whose it is, for messages.
    """

    size: int
    end: int
    values: Sequence[int]
    origin: int
    index: CheckpointIndex
    chunk: int

    def check(self, data: memoryview, start: int) -> None:
        """Compare the blocks that lie whole in `data`, which is at `start` of the payload.

        Raises
        ------
        CorruptionError
        """
        stop = start + len(data)
        for number in range(-(-start // self.size), -(-stop // self.size)):
            first = number * self.size
            last = min(first + self.size, self.end)
            if last > stop:
                return
            wanted, found = self.values[number], crc32(data[first - start : last - start])
            if found != wanted:
                first, last = self.origin + first, self.origin + last
                damaged(self.index, self.chunk, start=first, stop=last, wanted=wanted, found=found)

    def affordable(self, wanted: int, surplus: int, ratio: float) -> bool:
        """Whether `surplus` bytes may be read to check all of `wanted` ones."""
        return surplus <= max(_SPARE, ratio * wanted)

    def widen(self, start: int, stop: int, ratio: float) -> tuple[int, int]:
        """Return the span to read so that all of ``start:stop`` can be checked.

        That is up to the borders of blocks, unless it costs more than 128 KiB and more than
        `ratio` of what is wanted: then the span itself, of which the blocks inside are checked.
        """
        first = start - start % self.size
        last = min(-(-stop // self.size) * self.size, self.end)
        if self.affordable(stop - start, start - first + last - stop, ratio):
            return first, last
        return start, stop


def blocks_of(index: CheckpointIndex, chunk: int) -> Blocks | None:
    """Return the checksums of one chunk's blocks; None where there are none (or too few)."""
    blocks, payloads = index.chunks.blocks, index.chunks.payloads
    if blocks is None or payloads is None or blocks.block_size <= 0:
        return None
    first, last = blocks.first[chunk : chunk + 2].tolist()
    length = int(payloads.length[chunk])
    count = -(-length // blocks.block_size)
    if not count or last - first != count or first < 0 or last > len(blocks.values):
        return None
    return Blocks(
        size=blocks.block_size,
        end=length,
        values=blocks.values[first:last].tolist(),
        origin=int(payloads.offset[chunk]),
        index=index,
        chunk=chunk,
    )


def damaged(
    index: CheckpointIndex, chunk: int, *, start: int, stop: int, wanted: int, found: int
) -> NoReturn:
    """Raise the error that names key, file, byte range and both checksums."""
    place = place_of(index, chunk)
    message = (
        f"bytes {start} to {stop} are damaged: wanted CRC-32 {wanted:#010x}, found {found:#010x}"
    )
    raise CorruptionError(str(Problem(message, place.key, place.file, start)))
