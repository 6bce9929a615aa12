"""State dicts of every kind, built alike on every rank, and how to compare them."""

from __future__ import annotations

import io
import zlib
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed._shard import sharded_tensor
from torch.distributed._shard.metadata import ShardMetadata
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed._shard.sharding_spec import ChunkShardingSpec, EnumerableShardingSpec
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, init_device_mesh
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

from shardpoint.dcp._state import flatten_state

__all__ = ["KINDS", "blank", "build", "differences", "values"]


def values(key: str, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Values that depend on the key alone, the same on every rank."""
    generator = torch.Generator().manual_seed(zlib.crc32(key.encode()))
    itemsize = dtype.itemsize
    count = torch.Size(shape).numel()
    if dtype.is_floating_point and itemsize > 1:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    if dtype.is_complex and itemsize > 4:
        return torch.randn(shape, generator=generator, dtype=torch.complex128).to(dtype)
    if dtype == torch.bool:
        return torch.randint(0, 2, shape, generator=generator).bool()
    raw = torch.randint(0, 256, (count * itemsize,), generator=generator, dtype=torch.uint8)
    return raw.view(dtype).reshape(shape)


DTYPES = (
    *(torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.bool),
    *(torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.uint8, torch.uint16, torch.uint32, torch.uint64),
    *(torch.complex64, torch.complex128),
    *(torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz),
)


def plain() -> dict[str, Any]:
    shared = values("shared", 24)
    complex_values = values("conj", 3, 2, dtype=torch.complex64)
    return {
        "dtypes": {str(d)[6:]: values(str(d), 3, 5, dtype=d) for d in DTYPES},
        "shapes": {
            "scalar": values("scalar"),
            "empty": values("empty", 0, 4),
            "one": values("one", 1),
            "transposed": values("transposed", 4, 6).t(),
            "strided": values("strided", 8, 9)[::2, 1::3],
            "expanded": values("expanded", 3, 1).expand(3, 4),
            "channels_last": values("cl", 2, 3, 4, 5).to(memory_format=torch.channels_last),
            "permuted": values("permuted", 2, 3, 4).permute(2, 0, 1),
            "whole": shared,
            "head": shared[:7],
            "tail": shared[8:].view(4, 4),
            "conjugate": complex_values.conj(),
            "negative": complex_values.conj().imag,
            "parameter": nn.Parameter(values("parameter", 2, 3)),
            "large": values("large", 300, 1000),
            "large_transposed": values("large_t", 300, 1000).t(),
        },
        "dotted.key": {"a.b": values("dotted", 2), "ключ": values("unicode", 2)},
        "list": [values("list", 3), 5, {"k": values("deep", 2), "j": "s"}, [values("d"), None]],
    }


def objects() -> dict[str, Any]:
    return {
        "int": 7,
        "big": 2**70 + 1,
        "negative": -1,
        "float": 0.1,
        "bool": True,
        "none": None,
        "str": "naïve ☃",
        "bytes": bytes(range(16)),
        "complex": 1 + 2j,
        "list": [1, 2.5, "x", None],
        "tuple": (1, (2, "b"), [3, {"c": 4}]),
        "set": {1, 2, 3},
        "size": torch.Size([2, 3]),
        "dtype": torch.bfloat16,
        "device": torch.device("cpu"),
        "ordered": OrderedDict([("z", 1), ("a", 2)]),
        "int_keys": {0: "zero", 1: {"x": 1}},
        "tensors": (values("in tuple", 2, 2), values("in tuple 2", 3, dtype=torch.int64)),
        "parameter": (nn.Parameter(values("p in tuple", 2)), "tag"),
        "long": "y" * 5000,
        "empty": {},
        "empty_list": [],
    }


def dtensor_1d() -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    rank = dist.get_rank()

    def sharded(key: str, axis: int, *shape: int, dtype: torch.dtype = torch.float32) -> DTensor:
        return distribute_tensor(values(key, *shape, dtype=dtype), mesh, [Shard(axis)])

    return {
        "dt": {
            "even": sharded("even", 0, 8, 4),
            "uneven": sharded("uneven", 0, 10, 7),
            "few_rows": sharded("few", 0, 3, 5),
            "one_row": sharded("one row", 0, 1, 5),
            "axis1": sharded("axis1", 1, 3, 11, dtype=torch.bfloat16),
            "axis2": sharded("axis2", 2, 2, 3, 9, dtype=torch.float16),
            "vector": sharded("vector", 0, 23, dtype=torch.int64),
            "replicated": distribute_tensor(values("replicated", 6, 4), mesh, [Replicate()]),
            "scalar": distribute_tensor(values("dt scalar"), mesh, [Replicate()]),
        },
        "plain": values("plain", 4, 3),
        f"of_rank_{rank}": {"t": values(f"rank {rank}", rank + 2), "seed": 100 + rank},
        "step": 10,
    }


def dtensor_2d() -> dict[str, Any]:
    world = dist.get_world_size()
    shape = {1: (1, 1), 2: (1, 2), 3: (1, 3), 4: (2, 2)}[world]
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("a", "b"))
    placements = {
        "rows_columns": [Shard(0), Shard(1)],
        "both_rows": [Shard(0), Shard(0)],
        "hybrid": [Replicate(), Shard(0)],
        "hybrid_columns": [Shard(1), Replicate()],
        "replicated": [Replicate(), Replicate()],
    }
    return {
        name: distribute_tensor(values(name, 7, 10), mesh, list(where))
        for name, where in placements.items()
    }


def submesh() -> dict[str, Any]:
    """A tensor on the first ranks only, and one on the last."""
    world = dist.get_world_size()
    state: dict[str, Any] = {"everywhere": values("everywhere", 3)}
    for name, ranks in (("front", range((world + 1) // 2)), ("back", range(world // 2, world))):
        mesh = dist.device_mesh.DeviceMesh("cpu", list(ranks))
        local = values(name, 5, 4)
        state[name] = DTensor.from_local(
            local.chunk(len(ranks))[list(ranks).index(dist.get_rank())]
            if dist.get_rank() in ranks
            else torch.empty(0),
            mesh,
            [Shard(0)],
            run_check=False,
            shape=torch.Size((5, 4)),
            stride=(4, 1),
        )
    return state


def sharded() -> dict[str, Any]:
    world, rank = dist.get_world_size(), dist.get_rank()
    workers = [f"rank:{r}/cpu" for r in range(world)]
    state: dict[str, Any] = {}
    for axis in (0, 1):
        tensor = sharded_tensor.empty(
            ChunkShardingSpec(dim=axis, placements=workers), 9, 10, dtype=torch.float32
        )
        whole = values(f"chunk {axis}", 9, 10)
        for shard in tensor.local_shards():
            shard.tensor.copy_(_box(whole, shard.metadata))
        state[f"chunk_{axis}"] = tensor
    tiles = [
        ShardMetadata([0, 0], [2, 10], workers[0]),
        ShardMetadata([2, 0], [7, 3], workers[rank if world == 1 else 1 % world]),
        ShardMetadata([2, 3], [7, 7], workers[world - 1]),
    ]
    tensor = sharded_tensor.empty(EnumerableShardingSpec(tiles), 9, 10, dtype=torch.float32)
    for shard in tensor.local_shards():
        shard.tensor.copy_(_box(values("tiles", 9, 10), shard.metadata))
    state["tiles"] = tensor
    return state


def _box(whole: torch.Tensor, box: ShardMetadata) -> torch.Tensor:
    for axis, (start, size) in enumerate(zip(box.shard_offsets, box.shard_sizes, strict=True)):
        whole = whole.narrow(axis, start, size)
    return whole


class Net(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, width, bias=True)
        self.norm = nn.LayerNorm(width)
        self.fc2 = nn.Linear(width, width, bias=False)
        self.register_buffer("calls", torch.tensor(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.norm(self.fc1(x)).relu())


def _trained(model: nn.Module, width: int) -> dict[str, Any]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for _ in range(2):
        model(values("batch", 4, width)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    model_state, optimizer_state = get_state_dict(model, optimizer)
    return {"model": model_state, "optim": optimizer_state, "step": 2}


def _net(width: int) -> Net:
    torch.manual_seed(0)
    return Net(width)


def fsdp2() -> dict[str, Any]:
    model = _net(5)
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    return _trained(model, 5)


def fsdp2_tp() -> dict[str, Any]:
    """Strided shards: tensor parallel inside, FSDP around it."""
    world = dist.get_world_size()
    shape = {1: (1, 1), 2: (1, 2), 3: (3, 1), 4: (2, 2)}[world]
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("dp", "tp"))
    model = _net(12)
    parallelize_module(model, mesh["tp"], {"fc1": ColwiseParallel(output_layouts=Replicate())})
    parallelize_module(model, mesh["tp"], {"fc2": RowwiseParallel(input_layouts=Replicate())})
    fully_shard(model, mesh=mesh["dp"])
    return _trained(model, 12)


KINDS: dict[str, Callable[[], dict[str, Any]]] = {
    "plain": plain,
    "objects": objects,
    "dtensor_1d": dtensor_1d,
    "dtensor_2d": dtensor_2d,
    "submesh": submesh,
    "sharded": sharded,
    "fsdp2": fsdp2,
    "fsdp2_tp": fsdp2_tp,
}


def build(kind: str) -> dict[str, Any]:
    """Return a state of that kind; every rank calls this."""
    return KINDS[kind]()


def blank(kind: str) -> dict[str, Any]:
    """Return a state of the same structure with other values everywhere."""
    return _blanked(build(kind))


def _blanked(value: Any) -> Any:
    if isinstance(value, dict):
        return type(value)((key, _blanked(item)) for key, item in value.items())
    if isinstance(value, list):
        return [_blanked(item) for item in value]
    if isinstance(value, ShardedTensor):
        for shard in value.local_shards():
            shard.tensor.zero_()
        return value
    if isinstance(value, DTensor):
        return DTensor.from_local(
            _other(value.to_local()),
            value.device_mesh,
            value.placements,
            run_check=False,
            shape=value.shape,
            stride=value.stride(),
        )
    if isinstance(value, torch.Tensor):
        return _other(value)
    return "not loaded"


def _other(tensor: torch.Tensor) -> torch.Tensor:
    size = tensor.numel() * tensor.element_size()
    raw = torch.zeros(size, dtype=torch.uint8)
    return raw.view(tensor.dtype).reshape(tensor.shape)


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Return the flat keys under which two states differ in any bit, on this rank."""
    left, right = flatten_state(one)[0], flatten_state(other)[0]
    found = [f"only in one: {key}" for key in left.keys() ^ right.keys()]
    found += [
        f"{key}: {left[key]!r} is not {right[key]!r}"[:300]
        for key in left.keys() & right.keys()
        if not _same(left[key], right[key])
    ]
    return sorted(found)


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, ShardedTensor):
        pairs = zip(one.local_shards(), other.local_shards(), strict=True)
        return all(_same(a.tensor, b.tensor) for a, b in pairs)
    if isinstance(one, DTensor):
        return isinstance(other, DTensor) and _same(one.to_local(), other.to_local())
    if isinstance(one, torch.Tensor):
        return (
            isinstance(other, torch.Tensor)
            and one.dtype == other.dtype
            and one.shape == other.shape
            and _bits(one) == _bits(other)
        )
    if isinstance(one, (tuple, list)):
        return (
            type(one) is type(other)
            and len(one) == len(other)
            and all(_same(a, b) for a, b in zip(one, other, strict=True))
        )
    if isinstance(one, io.BytesIO):
        return isinstance(other, io.BytesIO) and one.getvalue() == other.getvalue()
    if isinstance(one, float) and isinstance(other, float):
        return one.hex() == other.hex()  # nan too
    return type(one) is type(other) and bool(one == other)


def _bits(tensor: torch.Tensor) -> bytes:
    plain_tensor = tensor.detach().resolve_conj().resolve_neg().contiguous().clone()
    return plain_tensor.view(-1).view(torch.uint8).numpy().tobytes()
