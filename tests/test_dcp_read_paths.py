"""Loading by columns and item by item gives the same, and neither needs much memory."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import shardpoint.dcp as dcp
from shardpoint.dcp._read_items import ReadTable
from shardpoint.dcp.metadata import MetadataIndex
from shardpoint.engine.opening import open_index


class _ItemByItem(dcp.DefaultLoadPlanner):
    """Changes nothing, but the reader cannot know."""

    def lookup_tensor(self, index: MetadataIndex) -> torch.Tensor:
        return super().lookup_tensor(index)


def _state() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(3)

    def random(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    return {
        "plain": random(5, 7),
        "large": random(300, 401),
        "bf16": random(33, 3, dtype=torch.bfloat16),
        "scalar": torch.tensor(7),
        "empty": torch.zeros(0, 4),
        "bool": random(9) > 0,
        "complex": torch.complex(random(4, 4), random(4, 4)),
        "turned": random(6, 8).t(),
        "parameter": torch.nn.Parameter(random(3)),
        "nested": {"step": 3, "rate": 0.25, "big": 1 << 40, "name": "adam", "on": True, "no": None},
    }


def _targets() -> dict[str, Any]:
    """Memory of every kind: strided, of other dtypes, lazily conjugated."""
    return {
        "plain": torch.zeros(7, 5).t(),
        "large": torch.zeros(600, 802)[::2, ::2],
        "bf16": torch.zeros(33, 3, dtype=torch.float64),
        "scalar": torch.tensor(0),
        "empty": torch.zeros(0, 4),
        "bool": torch.zeros(9, dtype=torch.bool),
        "complex": torch.zeros(4, 4, dtype=torch.complex64).conj(),
        "turned": torch.zeros(8, 6),
        "parameter": torch.nn.Parameter(torch.zeros(3)),
        "nested": {"step": 0, "rate": 0.0, "big": 0, "name": "", "on": False, "no": 1},
    }


def _equal(found: Any, wanted: Any) -> bool:
    if isinstance(wanted, dict):
        return found.keys() == wanted.keys() and all(_equal(found[k], wanted[k]) for k in wanted)
    if isinstance(wanted, torch.Tensor):
        return torch.equal(found.to(wanted.dtype), wanted)
    return type(found) is type(wanted) and found == wanted


def test_columns_and_items_give_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = _state()
    dcp.save(saved, checkpoint_id=tmp_path)
    by_item, by_column = _targets(), _targets()
    item_report = dcp.load(by_item, checkpoint_id=tmp_path, planner=_ItemByItem())

    def no_item(self: ReadTable, columns: Any, row: int) -> Any:
        raise RuntimeError("an item was made")

    monkeypatch.setattr(ReadTable, "_make", no_item)
    versions = {k: v._version for k, v in by_column.items() if isinstance(v, torch.Tensor)}
    column_report = dcp.load(by_column, checkpoint_id=tmp_path)
    assert _equal(by_item, saved)
    assert _equal(by_column, saved)
    assert column_report.bytes_read <= item_report.bytes_read
    for key, version in versions.items():
        assert by_column[key]._version > version, key
    with pytest.raises(dcp.CheckpointException, match="an item was made"):
        dcp.load(by_item, checkpoint_id=tmp_path, planner=_ItemByItem())


def test_a_plan_that_was_looked_at_is_carried_out_item_by_item(tmp_path: Path) -> None:
    saved = _state()
    dcp.save(saved, checkpoint_id=tmp_path)

    class Looking(dcp.DefaultLoadPlanner):
        def finish_plan(self, central_plan: Any) -> Any:
            plan = super().finish_plan(central_plan)
            plan.items = [item for item in plan.items if item.dest_index.fqn != "plain"]
            return plan

    target = _targets()
    dcp.load(target, checkpoint_id=tmp_path, planner=Looking())
    assert not target["plain"].any()
    target["plain"] = saved["plain"]
    assert _equal(target, saved)


@pytest.mark.parametrize("planner", [dcp.DefaultLoadPlanner, _ItemByItem])
@pytest.mark.parametrize("kind", ["dtype", "strides", "plain"])
def test_memory_beside_the_targets_is_bounded(tmp_path: Path, planner: Any, kind: str) -> None:
    """For tensors far larger than all buffers together."""
    shape = (4096, 8192)
    saved = torch.arange(shape[0] * shape[1], dtype=torch.int32).view(shape).view(torch.float32)
    dcp.save({"x": saved}, checkpoint_id=tmp_path)
    target = {
        "dtype": lambda: torch.zeros(shape, dtype=torch.float64),
        "strides": lambda: torch.zeros(shape[::-1]).t(),
        "plain": lambda: torch.zeros(shape),
    }[kind]()
    tracemalloc.start()
    try:
        dcp.load({"x": target}, checkpoint_id=tmp_path, planner=planner())
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert torch.equal(target.to(torch.float32), saved)
    assert peak < 40 << 20


@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_a_flipped_byte_of_a_value_is_found_by_the_load_of_it(
    flip_place: tuple[Path, dict[str, Any]], data: st.DataObject
) -> None:
    """With the index that a save writes: of objects any byte, of tensors any of their elements,
    wherever they go to.
    """
    folder, saved = flip_place
    index, _ = open_index(folder)
    payloads, objects = index.chunks.payloads, index.objects
    assert payloads is not None
    if data.draw(st.booleans()):
        row = data.draw(st.integers(0, len(objects) - 1))
        start, length = int(objects.record_offset[row]), int(objects.record_length[row])
        file = objects.file[row]
    else:
        row = data.draw(st.sampled_from(np.flatnonzero(payloads.length).tolist()))
        start, length = int(payloads.offset[row]), int(payloads.length[row])
        file = index.chunks.file[row]
    position = start + data.draw(st.integers(0, length - 1))
    path = folder / index.files[file]
    original = path.read_bytes()
    changed = bytearray(original)
    changed[position] ^= 1 << data.draw(st.integers(0, 7))
    planner = data.draw(st.sampled_from([dcp.DefaultLoadPlanner, _ItemByItem]))
    target = data.draw(st.sampled_from([_targets, _zeros]))()
    path.write_bytes(changed)
    try:
        with pytest.raises(dcp.CheckpointException, match=r"key '"):
            dcp.load(target, checkpoint_id=folder, planner=planner())
    finally:
        path.write_bytes(original)
    dcp.load(target, checkpoint_id=folder, planner=planner())
    assert _equal(target, saved)


def _zeros() -> dict[str, Any]:
    state = _state()
    return {k: torch.zeros_like(v) if isinstance(v, torch.Tensor) else v for k, v in state.items()}


@pytest.fixture(scope="module")
def flip_place(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("place")
    saved = _state()
    dcp.save(saved, checkpoint_id=folder)
    return folder, saved
