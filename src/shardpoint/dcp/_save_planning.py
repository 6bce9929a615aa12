"""The plan step of a save: what ranks say of themselves first, and if last time's plan will do.

First every rank sends a few words, of a size that does not depend on its state: where it saves
to, and a fingerprint of what it would write. Where all of them are as they were in the last save,
every rank has its part of the plan already. Otherwise the plans themselves travel.

The fingerprint is of everything that a rank would send: keys, kinds, dtypes, shapes, boxes,
objects, paths, what planner and storage add to the plan, and the planner's class and options.
"""

from __future__ import annotations

import hashlib
import logging
import os
import secrets
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol

from shardpoint.coordination import Coordinator, WireWriter, gather_scatter
from shardpoint.dcp._metadata_view import index_of, metadata_of
from shardpoint.dcp._write_items import WriteTable
from shardpoint.dcp.default_planner import DefaultSavePlanner
from shardpoint.dcp.filesystem import FileSystemWriter
from shardpoint.dcp.metadata import Metadata
from shardpoint.dcp.planner import SavePlan, SavePlanner
from shardpoint.dcp.storage import StorageWriter
from shardpoint.errors import PlanError, Problem
from shardpoint.index import CheckpointIndex
from shardpoint.planning.save import WriteColumns

__all__ = ["PlanCache", "PlanningSave", "cache_of", "plan_together"]

logger = logging.getLogger(__name__)

_FINGERPRINT_BYTES = 32
_TOKEN_BYTES = 16


class PlanningSave(Protocol):
    """What the plan step needs of a save on one rank."""

    planner: SavePlanner
    writer: StorageWriter | None
    metadata: Metadata | None

    def plan_locally(self) -> SavePlan: ...

    def plan_globally(self, plans: list[SavePlan]) -> list[SavePlan]: ...


@dataclass(slots=True)
class PlanCache:
    """What the last save through one planner or one process group planned.

    Attributes
    ----------
    token
        Names that save, on all its ranks; empty where there was none.
    plan, columns
        This rank's part.
    fingerprints, index
        On the coordinator: all ranks', and what they make up.
    """

    token: bytes = b""
    plan: SavePlan | None = None
    columns: WriteColumns | None = None
    fingerprints: list[bytes] = field(default_factory=list)
    index: CheckpointIndex | None = None


class _Announcement(NamedTuple):  # tuples travel fastest
    """What a rank says first. Without a fingerprint it wants to plan anew."""

    place: str
    planner: str
    fingerprint: bytes
    token: bytes


class _Verdict(NamedTuple):
    """Which plan there will be: the one of that token, known already or to be made."""

    token: bytes
    is_known: bool
    storage_data: Any = None


_caches: weakref.WeakKeyDictionary[Any, PlanCache] = weakref.WeakKeyDictionary()


def cache_of(planner: SavePlanner | None, coordinator: Coordinator) -> PlanCache:
    """Return the cache of a program's planner; without one, of the process group."""
    owner = planner if planner is not None else getattr(coordinator, "group", None)
    try:
        return _caches.setdefault(owner, PlanCache())
    except TypeError:  # cannot be referred to weakly, or not be compared
        return PlanCache()


def plan_together(run: PlanningSave, coordinator: Coordinator, cache: PlanCache) -> SavePlan:
    """Plan a save on all ranks; return what this rank is to write.

    Raises
    ------
    RankFailedError
        If planning failed anywhere, or the ranks' parts do not fit together.
    """
    if coordinator.world_size == 1:
        return gather_scatter(coordinator, "plan", run.plan_locally, run.plan_globally)
    local: list[SavePlan] = []
    fingerprints: list[bytes] = []

    def announce() -> _Announcement:
        local.append(run.plan_locally())
        assert run.writer is not None
        return _Announcement(
            place=_place(run.writer),
            planner=_name(run.planner),
            fingerprint=_fingerprint(local[0], run.planner, run.writer),
            token=cache.token,
        )

    def decide(announced: list[_Announcement]) -> Sequence[_Verdict]:
        _check_places(announced)
        _log_planners(announced)
        fingerprints.extend(rank.fingerprint for rank in announced)
        return _verdicts(run, cache, fingerprints, announced)

    verdict = gather_scatter(coordinator, "plan", announce, decide)
    if verdict.is_known:
        assert cache.plan is not None
        assert cache.columns is not None
        items = WriteTable.from_columns(cache.columns)
        return replace(cache.plan, items=items, storage_data=verdict.storage_data)
    plan = gather_scatter(coordinator, "plan", lambda: local[0], run.plan_globally)
    _keep(cache, run, verdict.token, plan, fingerprints)
    return plan


def _verdicts(
    run: PlanningSave,
    cache: PlanCache,
    fingerprints: Sequence[bytes],
    announced: Sequence[_Announcement],
) -> list[_Verdict]:
    is_known = (
        cache.index is not None
        and all(rank.fingerprint and rank.token == cache.token for rank in announced)
        and list(fingerprints) == cache.fingerprints
    )
    if not is_known:
        token = secrets.token_bytes(_TOKEN_BYTES)
        return [_Verdict(token, is_known=False)] * len(announced)
    assert cache.index is not None
    assert run.writer is not None
    run.metadata = metadata_of(cache.index, None)
    plans = run.writer.prepare_global_plan([SavePlan([]) for _ in announced])
    return [_Verdict(cache.token, is_known=True, storage_data=plan.storage_data) for plan in plans]


def _keep(
    cache: PlanCache,
    run: PlanningSave,
    token: bytes,
    plan: SavePlan,
    fingerprints: Sequence[bytes],
) -> None:
    """Remember a plan; what programs may still change is not kept, but the columns of it."""
    is_ours = isinstance(plan.items, WriteTable)
    cache.token = token if is_ours else b""
    cache.columns = plan.items.columns if isinstance(plan.items, WriteTable) else None
    cache.plan = replace(plan, items=[], storage_data=None)
    cache.fingerprints = list(fingerprints)
    known = run.metadata is not None and getattr(run.metadata, "_index", None) is not None
    cache.index = index_of(run.metadata) if known and run.metadata is not None else None


def _fingerprint(plan: SavePlan, planner: SavePlanner, writer: StorageWriter) -> bytes:
    """Return a digest of what this rank would send; nothing where it has to be sent.

    A program's `create_global_plan` is called each time, unless its planner was made with
    `enable_plan_caching`; storage that looks at all plans gets to see them.
    """
    makes_own = type(planner).create_global_plan is not DefaultSavePlanner.create_global_plan
    if not isinstance(planner, DefaultSavePlanner) or not isinstance(plan.items, WriteTable):
        return b""
    if makes_own and not getattr(planner, "enable_plan_caching", False):
        return b""
    if type(writer).prepare_global_plan is not FileSystemWriter.prepare_global_plan:
        return b""
    options: Mapping[str, object] = {
        "planner": _name(planner),
        "lowest": planner.dedup_save_to_lowest_rank,
        "flatten": planner.flatten_state_dict,
    }
    try:
        payload = WireWriter().pack((options, plan))
    except Exception:  # noqa: BLE001  what cannot be sent is an error where it has to be
        return b""
    return hashlib.blake2b(payload, digest_size=_FINGERPRINT_BYTES).digest()


def _name(planner: SavePlanner) -> str:
    return f"{type(planner).__module__}.{type(planner).__qualname__}"


def _place(writer: StorageWriter) -> str:
    """Return where a writer of ours saves to, as all ranks should spell it."""
    if not isinstance(writer, FileSystemWriter):
        return ""
    place = os.fspath(writer.checkpoint_id)
    return place if "://" in place else os.path.abspath(place)


def _check_places(announced: Sequence[_Announcement]) -> None:
    places = _ranks_by(announced, lambda rank: rank.place)
    if len(places) > 1:
        problems = [Problem(f"{_ranks_text(who)} to {where!r}") for where, who in places.items()]
        raise PlanError("the ranks save to different places; give all the same", problems)


def _log_planners(announced: Sequence[_Announcement]) -> None:
    planners = _ranks_by(announced, lambda rank: rank.planner)
    if len(planners) > 1:
        text = ", ".join(f"{name} on {_ranks_text(who)}" for name, who in planners.items())
        logger.warning("the ranks save with different planners: %s", text)


def _ranks_by(
    announced: Sequence[_Announcement], value: Callable[[_Announcement], str]
) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for rank, announcement in enumerate(announced):
        found.setdefault(value(announcement), []).append(rank)
    return found


def _ranks_text(ranks: Sequence[int]) -> str:
    shown = ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" * (len(ranks) > 8))
    return f"rank{'s' * (len(ranks) > 1)} {shown}"
