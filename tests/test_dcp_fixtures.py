"""`shardpoint.dcp.load` of every checkpoint that a torch release wrote, in any layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, init_device_mesh

import shardpoint.dcp as dcp
from dcp_states import differences
from fixture_support import Fixture, decode_object, public_fixtures
from ranks import RankPool
from shardpoint.dcp._layouts import dtensor_box
from shardpoint.dcp._tensors import wrap
from shardpoint.dtypes import dtype_named
from shardpoint.tree import unflatten

PLACES = [(fixture, place) for fixture in public_fixtures() for place in fixture.places]
PLACE_NAMES = [f"{fixture}-{place.name}" for fixture, place in PLACES]
SHARED = [fixture for fixture in public_fixtures() if fixture.world_size > 1]


def _torch(array: np.ndarray, dtype: str) -> torch.Tensor:
    return wrap(array.copy(), dtype_named(dtype))


def wanted(fixture: Fixture) -> dict[str, Any]:
    """Every value in full, by flat key."""
    values: dict[str, Any] = {
        key: _torch(array, fixture.expected["tensors"][key]["dtype"])
        for key, array in fixture.tensors.items()
    }
    for key, form in fixture.objects.items():
        values[key] = decode_object(
            form,
            tensor=_torch,
            parameter=lambda array, dtype: torch.nn.Parameter(_torch(array, dtype)),
            size=torch.Size,
            dtype=lambda name: getattr(torch, name),
            device=torch.device,
        )
    return values


def nested(fixture: Fixture, values: dict[str, Any]) -> dict[str, Any]:
    paths = {key: path or (key,) for key, path in fixture.paths.items()}
    return unflatten(values, paths)


def blanked(value: Any) -> Any:
    """The same structure with other values."""
    if isinstance(value, torch.Tensor):
        raw = torch.zeros(value.numel() * value.element_size(), dtype=torch.uint8)
        return raw.view(value.dtype).reshape(value.shape)
    if isinstance(value, dict):
        return type(value)((key, blanked(item)) for key, item in value.items())
    return "not loaded"


def planner_for(fixture: Fixture) -> dcp.DefaultLoadPlanner:
    return dcp.DefaultLoadPlanner(flatten_state_dict=not fixture.planner_data_is_none)


@pytest.mark.parametrize(("fixture", "place"), PLACES, ids=PLACE_NAMES)
def test_every_value_is_the_one_that_was_saved(fixture: Fixture, place: Path) -> None:
    values = wanted(fixture)
    state = nested(fixture, {key: blanked(value) for key, value in values.items()})
    report = dcp.load(state, checkpoint_id=place, planner=planner_for(fixture))
    assert differences(state, nested(fixture, values)) == []
    assert report.missing == report.unexpected == ()


def _placements(shape: tuple[int, ...], variant: int, axes: int) -> list[Placement]:
    """Another layout for each tensor and variant."""
    if not shape:
        return [Replicate()] * axes
    choices: list[Placement] = [*(Shard(axis) for axis in range(len(shape))), Replicate()]
    return [choices[(variant + axis + sum(shape)) % len(choices)] for axis in range(axes)]


def _load_in_layout(name: str, mesh_shape: tuple[int, ...], variant: int) -> list[str]:
    """Load with every tensor as a DTensor; return the keys whose local part is wrong."""
    fixture = next(f for f in public_fixtures() if f.name == name)
    mesh = init_device_mesh("cpu", mesh_shape)
    values = wanted(fixture)
    targets: dict[str, Any] = {}
    for key, value in values.items():
        if not isinstance(value, torch.Tensor):
            targets[key] = blanked(value)
            continue
        placements = _placements(tuple(value.shape), variant, len(mesh_shape))
        targets[key] = dist.tensor.zeros(
            value.shape, dtype=value.dtype, device_mesh=mesh, placements=placements
        )
    state = nested(fixture, targets)
    dcp.load(state, checkpoint_id=fixture.checkpoint, planner=planner_for(fixture))
    parts = {}
    for key, value in values.items():
        target = targets[key]
        if isinstance(target, DTensor):
            for axis, (start, size) in enumerate(zip(*dtensor_box(target), strict=True)):
                value = value.narrow(axis, start, size)
            targets[key] = target.to_local()
        else:
            targets.pop(key)
            continue
        parts[key] = value
    loaded = {key: value for key, value in targets.items() if isinstance(value, torch.Tensor)}
    wrong = differences(loaded, parts)
    objects = {key: value for key, value in values.items() if not isinstance(value, torch.Tensor)}
    return wrong + differences(_only(state, fixture, objects), nested(fixture, objects))


def _only(state: Any, fixture: Fixture, keys: dict[str, Any]) -> Any:
    found = {}
    for key in keys:
        value = state
        for part in fixture.paths[key] or (key,):
            value = value[part]
        found[key] = value
    return nested(fixture, found)


@pytest.mark.parametrize("mesh_shape", [(1,), (2,), (3,), (4,), (2, 2)], ids=str)
@pytest.mark.parametrize("fixture", SHARED, ids=str)
def test_other_layouts_get_the_same_values(
    pool: RankPool, fixture: Fixture, mesh_shape: tuple[int, ...]
) -> None:
    world_size = int(np.prod(mesh_shape))
    for variant in range(2):
        found = pool.run(world_size, _load_in_layout, fixture.name, mesh_shape, variant)
        assert found == [[]] * world_size
