"""One eighth of every tensor of a checkpoint: rows, and columns.

What one of 8 ranks loads that shard the tensors another way than they were saved. The other
ranks are not there: a fake process group says that there are 8, and `no_dist` that nothing
is to be sent.
"""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import raw
import torch
import torch.distributed as dist
from contenders import LIBRARIES, given, load, save, warm_up
from measuring import Measurement, evict, measure
from states import buffer_of, check_equal, large, tensor_bytes
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from cases import Case, Job

__all__ = ["CASES"]

_PARTS = 8
_PART = 3
_CONTENDERS = ("torch", "shardpoint", "safetensors", "raw")
_WHOLE = "raw, whole rows"
_BLOCK = 1 << 20


def _prepare(job: Job) -> None:
    """Let each contender write what it will read."""
    state = large(job.settings.size_mb)
    for contender in _CONTENDERS:
        save(contender, given(contender, state), job.folder / contender, sync=False)


def _run(job: Job, *, axis: int) -> dict[str, Measurement]:
    saved = {
        key: tensor.chunk(_PARTS, axis)[_PART].contiguous()
        for key, tensor in large(job.settings.size_mb).items()
    }
    target = {key: torch.zeros_like(part) for key, part in saved.items()}
    warm_up(job.contender, job.folder / "tiny")
    place = job.prepared / job.contender.partition(", ")[0]
    if job.contender in LIBRARIES:
        state = _sharded(target, axis)
        operation = partial(load, job.contender, state, place, no_dist=True)
    elif job.contender == "safetensors":
        operation = partial(_safetensors, target, place, axis)
    elif job.contender == _WHOLE:
        operation = partial(_whole_rows, target, place / "raw0")
    else:
        operation = partial(raw.read, place / "raw0", *_runs(target, axis))
    result = measure(
        operation,
        needed_bytes=tensor_bytes(target),
        before=lambda: evict(place) if job.settings.cold else None,
    )
    check_equal(target, saved)
    return {"load": result}


def _sharded(parts: dict[str, torch.Tensor], axis: int) -> dict[str, Any]:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=_PART, world_size=_PARTS)
    mesh = init_device_mesh("cpu", (_PARTS,))
    return {
        key: DTensor.from_local(part, mesh, [Shard(axis)], run_check=False)
        for key, part in parts.items()
    }


def _safetensors(target: dict[str, torch.Tensor], place: Path, axis: int) -> None:
    from safetensors import safe_open

    with safe_open(place / "model.safetensors", framework="pt") as file:
        for key, part in target.items():
            size = part.shape[axis]
            box = [slice(None)] * part.dim()
            box[axis] = slice(_PART * size, (_PART + 1) * size)
            part.copy_(file.get_slice(key)[tuple(box)])


def _runs(target: dict[str, torch.Tensor], axis: int) -> tuple[list[memoryview], list[int]]:
    """Return where each contiguous run of the needed bytes goes, and where it is in the file."""
    buffers: list[memoryview] = []
    offsets: list[int] = []
    start = 0
    for part in target.values():
        whole = part.nbytes * _PARTS
        memory = buffer_of(part)
        runs = 1 if axis == 0 else part.shape[0]
        length = len(memory) // runs
        buffers += [memory[at : at + length] for at in range(0, len(memory), length)]
        offsets += [start + (row * _PARTS + _PART) * length for row in range(runs)]
        start += whole
    return buffers, offsets


def _whole_rows(target: dict[str, torch.Tensor], path: Path) -> None:
    """Read all bytes, through a buffer that stays in cache, and copy the columns out of it."""
    works: list[tuple[int, np.ndarray]] = []
    start = 0
    for part in target.values():
        into = part.view(torch.uint8).numpy()
        rows = _BLOCK // (into.shape[1] * _PARTS)
        works += [
            (start + first * into.shape[1] * _PARTS, into[first : first + rows])
            for first in range(0, len(into), rows)
        ]
        start += part.nbytes * _PARTS
    descriptor = os.open(path, os.O_RDONLY)

    def move(numbers: range) -> None:
        buffer = np.empty(_BLOCK, np.uint8)
        for offset, into in (works[number] for number in numbers):
            data = buffer[: into.size * _PARTS]
            if os.preadv(descriptor, [data], offset) != len(data):
                raise OSError(f"the file ends at {offset}")
            width = into.shape[1]
            into[...] = data.reshape(len(into), -1)[:, _PART * width : (_PART + 1) * width]

    try:
        raw.side_by_side(move, len(works))
    finally:
        os.close(descriptor)


CASES = [
    Case("rows", "1/8 of each tensor, rows", _CONTENDERS, partial(_run, axis=0), _prepare),
    Case(
        "columns",
        "1/8 of each tensor, columns",
        (*_CONTENDERS, _WHOLE),
        partial(_run, axis=1),
        _prepare,
    ),
]
