"""Planning at many ranks, simulated without processes and without a network.

The coordinator gets what every rank would send it, in the very bytes, and does all that it does in
a save: it decodes the local plans, removes duplicates, balances, checks, makes the metadata, and
encodes every rank's part. torch does that with pickled lists of objects. `finish` is the other
thing that it does: the results of all ranks become the metadata file.

Besides, what one rank does for itself: its plan of a save, and its plan of a load after the number
of ranks has halved.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from contenders import library
from measuring import Measurement, measure, scaled
from synthetic import COLUMNS, Chunk, chunks, index_of_many, key_of, metadata_of_many, plans
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from cases import Case, Job
from shardpoint.coordination import gather_scatter
from shardpoint.dcp._metadata_view import metadata_of
from shardpoint.dcp._paths import Paths
from shardpoint.dcp._write_items import WriteTable, columns_of
from shardpoint.dcp._write_results import ResultColumns, ResultTable
from shardpoint.dcp.filesystem import _StorageInfo
from shardpoint.dcp.planner import SavePlan
from shardpoint.index import UNKNOWN, Payloads
from shardpoint.planning.placing import Written

__all__ = ["CASES"]

_TORCH_RANKS = 512
_RECORD = 4096


def _run(job: Job, *, ranks: int) -> dict[str, Measurement]:
    name = job.contender.partition(",")[0]
    simulated = min(ranks, _TORCH_RANKS) if name == "torch" else ranks
    if name == "torch":
        results = _torch_coordinator(simulated, job)
    else:
        results = _shardpoint_coordinator(simulated, job)
    if simulated != ranks:
        return {key: scaled(found, ranks / simulated) for key, found in results.items()}
    return {**results, **_one_rank(name, ranks, job.settings.tensors)}


def _torch_coordinator(ranks: int, job: Job) -> dict[str, Measurement]:
    from torch.distributed.checkpoint import FileSystemWriter
    from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
    from torch.distributed.checkpoint.filesystem import _StorageInfo as TorchPlace
    from torch.distributed.checkpoint.storage import WriteResult

    sent = [pickle.dumps(plan) for plan in plans(ranks, job.settings.tensors)]
    planner = DefaultSavePlanner()
    outcome: list[Any] = []

    def plan() -> None:
        local = [pickle.loads(payload) for payload in sent]
        made, metadata = planner.create_global_plan(local)
        outcome.extend([[pickle.dumps(plan) for plan in made], metadata])

    planning = measure(plan)
    answers, metadata = outcome
    made = [pickle.loads(answer) for answer in answers]
    _check(ranks, job.settings.tensors, [len(plan.items) for plan in made], metadata)
    results = [
        pickle.dumps(
            [
                WriteResult(
                    item.index, _RECORD, TorchPlace(f"__{rank}_0.distcp", _RECORD * n, _RECORD)
                )
                for n, item in enumerate(plan.items)
            ]
        )
        for rank, plan in enumerate(made)
    ]
    del made, answers, outcome[:]
    sent.clear()
    job.folder.joinpath("c").mkdir()
    writer = FileSystemWriter(job.folder / "c", sync_files=False)
    finishing = measure(lambda: writer.finish(metadata, [pickle.loads(part) for part in results]))
    return {"coordinator's plan": planning, "coordinator's finish": finishing}


def _shardpoint_coordinator(ranks: int, job: Job) -> dict[str, Measurement]:
    from shardpoint.dcp import FileSystemWriter
    from shardpoint.dcp.default_planner import DefaultSavePlanner

    sent = [_sent(ranks, rank, partial(_local_plan, ranks, rank, job)) for rank in range(ranks)]
    planner = DefaultSavePlanner()
    outcome: list[Any] = []

    def combine(local: list[SavePlan]) -> list[SavePlan]:
        made, metadata = planner.create_global_plan(local)
        outcome.extend([[len(plan.items) for plan in made], metadata])
        return made

    own = _local_plan(ranks, 0, job)
    coordinator = _Coordinator(ranks, 0, sent)
    planning = measure(lambda: gather_scatter(coordinator, "plan", lambda: own, combine))
    items, metadata = outcome
    if ranks <= _TORCH_RANKS:
        _check(ranks, job.settings.tensors, items, metadata)
    elif sum(items) != len(index_of_many(ranks, job.settings.tensors).chunks) + 1:
        raise ValueError(f"{sum(items)} items are written, which is not each chunk once")
    del coordinator
    sent.clear()
    results = [_sent(ranks, rank, partial(_results, ranks, rank, job)) for rank in range(ranks)]
    writer = FileSystemWriter(job.folder / "c", sync_files=False)
    writer.storage.prepare()

    def collect(parts: list[Any]) -> list[None]:
        writer.finish(metadata, parts)
        return [None] * ranks

    coordinator = _Coordinator(ranks, 0, results)
    first = _results(ranks, 0, job)
    finishing = measure(lambda: gather_scatter(coordinator, "write", lambda: first, collect))
    return {"coordinator's plan": planning, "coordinator's finish": finishing}


class _Sent(Exception):
    pass


class _Coordinator:
    """The process group as one rank of it sees it; of the others there are only the bytes."""

    coordinator_rank = 0

    def __init__(self, world_size: int, rank: int, received: Sequence[bytes]) -> None:
        self.world_size = world_size
        self.rank = rank
        self.is_coordinator = rank == 0
        self.received = received
        self.payload = b""
        self.scattered: Sequence[bytes] = ()

    def begin(self, step: str) -> None:
        pass

    def gather(self, payload: bytes) -> list[bytes] | None:
        self.payload = payload
        return [payload, *self.received[1:]] if self.is_coordinator else None

    def scatter(self, payloads: Sequence[bytes] | None) -> bytes:
        if payloads is None:
            raise _Sent
        self.scattered = payloads
        return payloads[0]

    def broadcast(self, payload: bytes | None) -> bytes:
        if payload is None:
            raise _Sent
        return payload


def _sent(ranks: int, rank: int, local: Callable[[], Any]) -> bytes:
    """Return the bytes that a rank sends in a gather; rank 0 sends none."""
    if rank == 0:
        return b""
    coordinator = _Coordinator(ranks, rank, ())
    try:
        gather_scatter(coordinator, "plan", local, lambda parts: parts)
    except _Sent:
        return coordinator.payload
    raise ValueError("a simulated rank did not wait for its answer")


def _local_plan(ranks: int, rank: int, job: Job) -> SavePlan:
    """Return the plan of one rank in the form that its own planner gives it."""
    template = _templates.get(ranks)
    if template is None:
        template = _templates[ranks] = plans_of_one(ranks, job.settings.tensors)
    columns = columns_of(template.items)
    shifted = columns.offsets.copy()
    shifted[columns.sizes[:, 0] < columns.shape[:, 0], 0] = rank
    columns = replace(columns, keys=[*columns.keys], offsets=shifted)
    paths = Paths(template.planner_data)
    if rank:
        keep = np.arange(len(columns)) < len(columns) - 1  # only rank 0 has the scalar
        columns = columns.take(keep)
        del paths["step"]
    return SavePlan(WriteTable.from_columns(columns), planner_data=paths)


_templates: dict[int, Any] = {}


def plans_of_one(ranks: int, tensors: int) -> Any:
    """Return rank 0's plan, in torch's classes, without making those of all others."""
    return next(iter(plans(ranks, tensors, only=1)))


def _results(ranks: int, rank: int, job: Job) -> ResultTable:
    """Return what a rank says of its writes: one file, records of one size, with checksums."""
    if ranks not in _indexes:
        _indexes[ranks] = index_of_many(ranks, job.settings.tensors)
    index = _indexes[ranks]
    rows = _rows_by_rank(ranks, index)[rank]
    count = len(rows)
    keys = [index.tensors.keys[row] for row in index.chunks.tensor[rows].tolist()]
    is_object = np.zeros(count + (rank == 0), np.bool_)
    offsets = index.chunks.offsets[rows]
    if rank == 0:
        keys.append("step")
        is_object[-1] = True
        offsets = np.vstack([offsets, np.zeros((1, offsets.shape[1]), np.int64)])
    total = len(keys)
    numbers = np.arange(total)
    return ResultTable.from_columns(
        ResultColumns(
            Written(
                keys=keys,
                is_object=is_object,
                ndim=np.where(is_object, 0, 2).astype(np.int16),
                offsets=offsets,
                file=[f"__{rank}_0.distcp"] * total,
                offset=_RECORD * numbers,
                length=np.full(total, _RECORD),
                transforms=[()] * total,
                payloads=Payloads(
                    offset=np.where(is_object, UNKNOWN, _RECORD * numbers + 1024),
                    strides=np.tile(np.array([[COLUMNS, 1]]), (total, 1)),
                    length=np.where(is_object, UNKNOWN, 2 * COLUMNS),
                    checksum=np.where(is_object, UNKNOWN, numbers),
                    flags=np.zeros(total, np.uint8),
                ),
                record_checksum=numbers.copy(),
            ),
            _StorageInfo,
        )
    )


_indexes: dict[int, Any] = {}
_rows: dict[int, list[Any]] = {}


def _rows_by_rank(ranks: int, index: Any) -> list[Any]:
    if ranks not in _rows:
        file = index.chunks.file
        order = np.argsort(file, kind="stable")
        bounds = np.searchsorted(file[order], np.arange(ranks + 1))
        _rows[ranks] = [order[a:b] for a, b in pairwise(bounds)]
    return _rows[ranks]


def _check(ranks: int, tensors: int, items: list[int], metadata: Any) -> None:
    """Compare the metadata with what the ranks have, and see that each chunk is written once."""
    expected = chunks(ranks, tensors)
    found: set[Chunk] = {
        (key, tuple(chunk.offsets), tuple(chunk.sizes))
        for key, entry in metadata.state_dict_metadata.items()
        if key != "step"
        for chunk in entry.chunks
    }
    if found != expected:
        raise ValueError("the metadata does not have the chunks of the ranks")
    if len(items) != ranks or sum(items) != len(expected) + 1:
        raise ValueError(f"{sum(items)} items are written, {len(expected) + 1} are needed")


def _one_rank(name: str, ranks: int, tensors: int) -> dict[str, Measurement]:
    """Plan a save as rank 1 of all, and a load as rank 1 of half as many."""
    planner = library(name).default_planner
    results: list[Any] = []
    with _fake_group(ranks):
        state = _sharded(ranks, ranks, tensors)
        planner.create_default_local_save_plan(state, False)  # the first time is the warm-up
        saving = measure(
            lambda: results.append(planner.create_default_local_save_plan(state, False))
        )
    if len(results.pop().items) != tensors:
        raise ValueError("the local plan does not have every tensor once")
    if name == "torch":
        metadata: Any = metadata_of_many(ranks, tensors)
    else:
        metadata = metadata_of(index_of_many(ranks, tensors), _StorageInfo)
    half = ranks // 2
    with _fake_group(half):
        state = _sharded(half, ranks, tensors)
        loading = measure(
            lambda: results.append(planner.create_default_local_load_plan(state, metadata))
        )
    wanted = sum(2 if number % 20 else 1 for number in range(tensors))
    if len(results.pop().items) != wanted:
        raise ValueError("the load plan does not have two rows of every sharded tensor")
    return {"one rank's save plan": saving, "one rank's load plan, half as many": loading}


@contextmanager
def _fake_group(ranks: int) -> Iterator[None]:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=ranks)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _sharded(ranks: int, rows: int, tensors: int) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (ranks,))
    part = torch.zeros(rows // ranks, COLUMNS, dtype=torch.bfloat16)
    whole = torch.zeros(rows, COLUMNS, dtype=torch.bfloat16)
    return {
        key_of(number): (
            DTensor.from_local(part, mesh, [Shard(0)], run_check=False)
            if number % 20
            else DTensor.from_local(whole, mesh, [Replicate()], run_check=False)
        )
        for number in range(tensors)
    }


def _case(ranks: int) -> Case:
    is_large = ranks > _TORCH_RANKS
    return Case(
        f"plan-{ranks}",
        f"{ranks:,} ranks",
        ("torch, extrapolated" if is_large else "torch", "shardpoint"),
        partial(_run, ranks=ranks),
        most_rounds=1 if is_large else None,
    )


CASES = [_case(64), _case(512), _case(4096)]
