"""Records of plain numbers, many of one length at once, by vector operations.

An optimizer has a number for each of its tensors. Their records differ in nothing but the
number and its checksums, so all are compared with one template in one go.
"""

from __future__ import annotations

import functools

import numpy as np
import numpy.typing as npt

from shardpoint.formats._known_records import object_template, pickle_length
from shardpoint.formats.checksum import crc32_of_each
from shardpoint.formats.number_pickles import FLOAT_BEGIN, FLOAT_SIZE, UNKNOWN_PICKLE, number_of

__all__ = ["numbers_in"]

ByteArray = npt.NDArray[np.uint8]


def numbers_in(
    records: ByteArray, verified: npt.NDArray[np.bool_]
) -> list[float | int | bool | object | None]:
    """Return the numbers that records hold; `UNKNOWN_PICKLE` for all that is not certain.

    Parameters
    ----------
    records
        ``uint8[k, n]``: records of one length.
    verified
        ``bool[k]``: those whose bytes are known to be right; of the others the pickle's
        checksum is compared.
    """
    count, size = records.shape
    length = pickle_length(records[0].data) if count else None
    if length is None:
        return [UNKNOWN_PICKLE] * count
    template = _template(length)
    if len(template.data) != size:
        return [UNKNOWN_PICKLE] * count
    known = ~((records ^ template.data) & template.mask).any(axis=1)
    pickles = np.ascontiguousarray(records[:, template.pickle_at : template.pickle_at + length])
    first, second = (_field(records, at) for at in template.crcs_at)
    known &= first == second
    unsure = np.flatnonzero(known & ~verified)
    known[unsure] = first[unsure] == crc32_of_each(row.data for row in pickles[unsure])
    if length == FLOAT_SIZE and (pickles[:, :3] == np.frombuffer(FLOAT_BEGIN, np.uint8)).all():
        known &= pickles[:, -1] == ord(".")
        found: list[object] = pickles[:, 3:11].copy().view(">f8").ravel().tolist()
    else:
        found = [number_of(row.tobytes()) for row in pickles]
    for row in np.flatnonzero(~known).tolist():
        found[row] = UNKNOWN_PICKLE
    return found


class _Template:
    """What all records of pickles of one length have in common: `data` where `mask` is set."""

    def __init__(self, length: int) -> None:
        template = object_template(length)
        pieces, mask = [], []
        at, starts = 0, []
        sizes = iter(template.field_sizes())
        for constant in template.constants:
            pieces.append(constant)
            mask.append(b"\xff" * len(constant))
            at += len(constant)
            field = next(sizes, 0)
            starts.append(at)
            pieces.append(bytes(field))
            mask.append(bytes(field))
            at += field
        self.data = np.frombuffer(b"".join(pieces), np.uint8)
        self.mask = np.frombuffer(b"".join(mask), np.uint8)
        # In the order of the record: the pickle, its descriptor's CRC-32, the fingerprint and
        # its CRC-32, then the directory's two.
        self.pickle_at = starts[0]
        self.crcs_at = starts[1], starts[4]


@functools.lru_cache(maxsize=256)
def _template(length: int) -> _Template:
    return _Template(length)


def _field(records: ByteArray, at: int) -> npt.NDArray[np.uint32]:
    field: npt.NDArray[np.uint32] = records[:, at : at + 4].copy().view("<u4").ravel()
    return field
