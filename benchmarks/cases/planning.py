"""The coordinator's planning of a save of many ranks, simulated without processes.

Each contender gets the ranks' local plans in the form in which its own local planning makes
them, and does what its coordinator does with them: duplicates are removed, the rest is
checked and becomes the metadata and one plan for each rank. Sending is not part of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from measuring import Measurement, measure
from synthetic import Chunk, chunks, plans
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner as TorchSavePlanner

from cases import Case, Job
from shardpoint.dcp._write_items import WriteTable, columns_of
from shardpoint.dcp.default_planner import DefaultSavePlanner
from shardpoint.dcp.planner import SavePlan
from shardpoint.planning.save import deduplicate, merge

__all__ = ["CASES"]


def _run(job: Job) -> dict[str, Measurement]:
    ranks, tensors = job.settings.ranks, job.settings.tensors
    operation = _OPERATIONS[job.contender](plans(ranks, tensors))
    results: list[Any] = []
    result = measure(lambda: results.append(operation()))
    items, found = _OUTCOMES[job.contender](results.pop())
    _check(ranks, tensors, items, found)
    return {"plan": result}


def _torch(local: list[Any]) -> Callable[[], Any]:
    planner = TorchSavePlanner()
    return lambda: planner.create_global_plan(local)


def _shardpoint(local: list[Any]) -> Callable[[], Any]:
    planner = DefaultSavePlanner()
    ours = [SavePlan(WriteTable(columns_of(p.items)), planner_data=p.planner_data) for p in local]
    return lambda: planner.create_global_plan(ours)


def _columns(local: list[Any]) -> Callable[[], Any]:
    columns = [columns_of(plan.items) for plan in local]

    def plan() -> Any:
        kept = deduplicate(columns, lowest_rank=False)
        left = [rows.take(keep) for rows, keep in zip(columns, kept, strict=True)]
        return left, merge(left, check_coverage=True)[1]

    return plan


def _outcome_of_objects(outcome: Any) -> tuple[list[int], set[Chunk]]:
    made, metadata = outcome
    found = {
        (key, tuple(chunk.offsets), tuple(chunk.sizes))
        for key, entry in metadata.state_dict_metadata.items()
        if key != "step"
        for chunk in entry.chunks
    }
    return [len(plan.items) for plan in made], found


def _outcome_of_columns(outcome: Any) -> tuple[list[int], set[Chunk]]:
    left, index = outcome
    keys = [index.tensors.keys[row] for row in index.chunks.tensor.tolist()]
    boxes = zip(keys, index.chunks.offsets.tolist(), index.chunks.sizes.tolist(), strict=True)
    return [len(rows) for rows in left], {(key, tuple(o), tuple(s)) for key, o, s in boxes}


def _check(ranks: int, tensors: int, items: list[int], found: set[Chunk]) -> None:
    """Compare the metadata with what the ranks have, and see that each chunk is written once."""
    expected = chunks(ranks, tensors)
    if found != expected:
        raise ValueError("the metadata does not have the chunks of the ranks")
    if len(items) != ranks or sum(items) != len(expected) + 1:
        raise ValueError(f"{sum(items)} items are written, {len(expected) + 1} are needed")


_OPERATIONS = {"torch": _torch, "shardpoint": _shardpoint, "shardpoint columns": _columns}
_OUTCOMES = {
    "torch": _outcome_of_objects,
    "shardpoint": _outcome_of_objects,
    "shardpoint columns": _outcome_of_columns,
}

CASES = [Case("planning", "coordinator's planning", tuple(_OPERATIONS), _run)]
