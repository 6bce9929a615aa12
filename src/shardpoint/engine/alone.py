"""Some chunks by themselves, as if each were a tensor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from shardpoint.index import CheckpointIndex, Chunks, Objects, Payloads, Tensors

__all__ = ["chunks_alone"]


def chunks_alone(index: CheckpointIndex, chunk_rows: Sequence[int]) -> CheckpointIndex:
    """Return an index in which row `i` is a tensor that is the `i`-th of these chunks.

    Reading from it needs no look at the other chunks of their tensors, of which there may be
    thousands. Several rows may have one key. Each chunk must have a file. There are no objects.
    """
    picked = np.asarray(chunk_rows, np.int64)
    count = len(picked)
    tensors, chunks = index.tensors, index.chunks
    rows = chunks.tensor[picked]
    numbers, file = np.unique(chunks.file[picked], return_inverse=True)
    own = Tensors(
        keys=[tensors.keys[row] for row in rows.tolist()],
        dtype=tensors.dtype[rows],
        ndim=tensors.ndim[rows],
        shape=chunks.sizes[picked],
        first_chunk=np.arange(count + 1, dtype=np.int64),
        requires_grad=tensors.requires_grad[rows],
        pin_memory=tensors.pin_memory[rows],
        memory_format=tensors.memory_format[rows],
    )
    parts = Chunks(
        tensor=np.arange(count, dtype=np.int64),
        offsets=np.zeros_like(chunks.offsets[picked]),
        sizes=chunks.sizes[picked],
        file=file.astype(np.int32),
        record_offset=chunks.record_offset[picked],
        record_length=chunks.record_length[picked],
        container=chunks.container[picked],
        transform=chunks.transform[picked],
        payloads=None if chunks.payloads is None else _payloads(chunks.payloads, picked),
        record_checksum=None if chunks.record_checksum is None else chunks.record_checksum[picked],
    )
    return replace(
        index,
        tensors=own,
        chunks=parts,
        files=[index.files[number] for number in numbers.tolist()],
        objects=Objects(
            keys=[],
            file=np.zeros(0, np.int32),
            record_offset=np.zeros(0, np.int64),
            record_length=np.zeros(0, np.int64),
            transform=np.zeros(0, np.int16),
        ),
    )


def _payloads(payloads: Payloads, picked: npt.NDArray[np.int64]) -> Payloads:
    return Payloads(
        offset=payloads.offset[picked],
        strides=payloads.strides[picked],
        length=payloads.length[picked],
        checksum=payloads.checksum[picked],
        flags=payloads.flags[picked],
    )
