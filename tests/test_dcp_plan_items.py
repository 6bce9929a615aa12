"""The items of plans are lists, for whatever planners do with lists."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import shardpoint.dcp as dcp
from shardpoint.dcp.planner import SavePlan, WriteItem

STATE = {"b": torch.ones(2), "a": torch.arange(3.0), "c": "text", "d": torch.zeros(2, 2)}


def save_plan() -> SavePlan:
    planner = dcp.DefaultSavePlanner()
    planner.set_up_planner(dict(STATE))
    return planner.create_local_plan()


def plain(plan: SavePlan) -> list[WriteItem]:
    """The same items in a list that was never anything else."""
    return [plan.items[row] for row in range(len(plan.items))]


def _sorted(items: list[Any]) -> Any:
    items.sort(key=lambda item: item.index.fqn)
    return items


def _assigned(items: list[Any]) -> Any:
    items[1:3] = items[:1] * 2
    return items


def _appended(items: list[Any]) -> Any:
    items.append(items[0])
    items.extend(items[1:])
    items += items[:1]
    return items


def _removed(items: list[Any]) -> Any:
    items.remove(items[1])
    del items[0]
    return [items.pop(), items]


def _reversed(items: list[Any]) -> Any:
    items.reverse()
    return items


@pytest.mark.parametrize(
    "use",
    [
        *(_sorted, _assigned, _appended, _removed, _reversed),
        lambda items: items + items[:1],
        lambda items: items[:1] + items,
        lambda items: [*items, *items],
        lambda items: items * 2,
        lambda items: 2 * items,
        lambda items: list(reversed(items)),
        lambda items: sorted(items, key=lambda item: item.index.fqn),
        lambda items: [items.index(items[2]), items.count(items[1]), items[0] in items],
        lambda items: [len(items), bool(items), items[-1], items[::2], items == list(items)],
        lambda items: [list(items) == items, items != items[:1], [*items] == items.copy()],
        lambda items: tuple(items),
        lambda items: dict(enumerate(items)),
        lambda items: list(itertools.pairwise(items)),
        lambda items: copy.copy(items),
        lambda items: copy.deepcopy(items),
        lambda items: pickle.loads(pickle.dumps(items)),
        lambda items: repr(items),
        lambda items: dataclasses.asdict(SavePlan(items)),
        lambda items: [[*first, *rest] for [*first], *rest in [(items,)]],
    ],
)
def test_items_do_what_a_list_does(use: Callable[[list[Any]], Any]) -> None:
    plan = save_plan()
    assert isinstance(plan.items, list)
    wanted = use(plain(save_plan()))
    assert use(plan.items) == wanted
    assert use(save_plan().items) == use(plain(save_plan()))


def test_a_list_of_another_table_is_compared_and_joined() -> None:
    one, other = save_plan().items, save_plan().items
    assert one == other
    assert save_plan() == save_plan()
    assert plain(save_plan()) + save_plan().items == save_plan().items * 2
    joined: list[WriteItem] = []
    joined += save_plan().items
    joined.extend(save_plan().items)
    assert joined == one + other


def test_a_copy_of_a_plan_keeps_what_was_changed() -> None:
    plan = save_plan()
    object.__setattr__(plan.items[0], "bytes_io_data", "mark")
    for other in (copy.deepcopy(plan), copy.copy(plan)):
        assert other.items[0].bytes_io_data == "mark"
    other = copy.deepcopy(save_plan())
    other.items.pop()
    assert len(save_plan().items) == len(other.items) + 1


class Halving(dcp.DefaultSavePlanner):
    """Drops, sorts and replaces items in place, as programs do with lists."""

    def create_local_plan(self) -> SavePlan:
        plan = super().create_local_plan()
        assert isinstance(plan.items, list)
        plan.items[:] = [item for item in plan.items if item.index.fqn != "c"]
        plan.items.sort(key=lambda item: item.index.fqn)
        plan.items.pop()
        return dataclasses.replace(plan, items=plan.items + plan.items[:0])


def test_a_planner_changes_its_items_in_place(tmp_path: Path) -> None:
    dcp.save(dict(STATE), checkpoint_id=tmp_path, planner=Halving())
    metadata = dcp.FileSystemReader(tmp_path).read_metadata()
    assert sorted(metadata.state_dict_metadata) == ["a", "b"]


class Reordering(dcp.DefaultLoadPlanner):
    def create_local_plan(self) -> dcp.LoadPlan:
        plan = super().create_local_plan()
        assert isinstance(plan.items, list)
        plan.items.sort(key=lambda item: item.dest_index.fqn)
        plan.items = [item for item in plan.items if item.dest_index.fqn != "b"]
        return plan


def test_a_load_planner_changes_its_items(tmp_path: Path) -> None:
    dcp.save(dict(STATE), checkpoint_id=tmp_path)
    target = {**{key: torch.full_like(STATE[key], 7) for key in "abd"}, "c": ""}
    dcp.load(target, checkpoint_id=tmp_path, planner=Reordering())
    assert target["c"] == "text"
    assert [target[key].flatten()[0].item() for key in "abd"] == [0, 7, 0]
