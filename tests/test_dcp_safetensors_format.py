"""`SerializationFormat.SAFETENSORS`: the layout is torch's, and what torch loses is kept."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.distributed.checkpoint as torch_dcp
from torch.distributed.checkpoint.filesystem import SerializationFormat as TheirFormat
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import shardpoint
import shardpoint.dcp as dcp
from ranks import RankPool
from shardpoint.dcp.filesystem import SerializationFormat
from shardpoint.dtypes import BY_CODE
from shardpoint.errors import CorruptionError, NotSupportedError
from shardpoint.formats.safetensors import SafetensorsHeader, read_header, written_order


def _state() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(3)
    return {
        "b": torch.randn(50, 40, generator=generator),
        "a": torch.randn(7, generator=generator).to(torch.bfloat16),
        "wide": torch.arange(5),
        "flags": torch.tensor([True, False]),
        "eight": torch.randn(3, 4, generator=generator).to(torch.float8_e4m3fn),
        "empty": torch.zeros(0, 4),
        "scalar": torch.tensor(2.5, dtype=torch.float64),
        "step": 7,
        "names": ["x", "y"],
    }


def _save(package: Any, path: Path, state: dict[str, Any], **options: Any) -> None:
    kind = SerializationFormat if package is dcp else TheirFormat
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's: no process group
        package.save(
            state,
            storage_writer=package.FileSystemWriter(
                path, serialization_format=kind.SAFETENSORS, **options
            ),
        )


def _headers(path: Path) -> dict[str, SafetensorsHeader]:
    """Return the header of each file's image."""
    found = {}
    for file in sorted(path.glob("*.distcp")):
        data = file.read_bytes()
        start = data.index(b'{"__metadata__"') - 8
        found[file.name] = read_header(
            lambda at, n, data=data: data[at : at + n], len(data), offset=start, file=file.name
        )
    return found


def _places(path: Path) -> dict[Any, tuple[str, int, int]]:
    metadata = torch_dcp.FileSystemReader(path).read_metadata()
    return {
        index: (info.relative_path, info.offset, info.length)
        for index, info in metadata.storage_data.items()
    }


def test_layout_is_torchs(tmp_path: Path) -> None:
    theirs, ours = tmp_path / "torch", tmp_path / "ours"
    for package, path in ((torch_dcp, theirs), (dcp, ours)):
        _save(package, path, _state())
    assert _places(theirs) == _places(ours)
    headers = _headers(ours)
    assert _headers(theirs) == headers
    for name in headers:
        assert (ours / name).stat().st_size == (theirs / name).stat().st_size


def test_several_files(tmp_path: Path) -> None:
    _save(dcp, tmp_path, _state(), thread_count=2)
    names = [set(header.tensors) for header in _headers(tmp_path).values()]
    assert len(names) == 2
    assert set.union(*names) == {k for k, v in _state().items() if isinstance(v, torch.Tensor)}
    assert shardpoint.open(tmp_path).verify().ok


@pytest.mark.parametrize("package", [torch_dcp, dcp], ids=["torch", "ours"])
def test_values_come_back(package: Any, tmp_path: Path) -> None:
    _save(package, tmp_path, _state())
    target = {
        key: torch.full_like(value.float(), 9).to(value.dtype)
        if isinstance(value, torch.Tensor)
        else value
        for key, value in _state().items()
    } | {"step": 0, "names": ["", ""]}
    dcp.load(target, checkpoint_id=tmp_path)
    for key, value in _state().items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(target[key].float(), value.float()), key
        else:
            assert target[key] == value
    checkpoint = shardpoint.open(tmp_path)
    assert checkpoint.verify().ok
    assert np.array_equal(checkpoint.read("b", (slice(3, 5),)), _state()["b"][3:5].numpy())


def test_any_strides_are_written_row_major(tmp_path: Path) -> None:
    """safetensors itself refuses tensors that are not contiguous."""
    whole = torch.arange(24.0).reshape(2, 3, 4)
    state = {"t": whole.permute(2, 0, 1), "gaps": whole[:, ::2], "same": whole[:1].expand(5, 3, 4)}
    _save(dcp, tmp_path, state)
    checkpoint = shardpoint.open(tmp_path)
    for key, value in state.items():
        assert np.array_equal(checkpoint[key], value.numpy()), key


def test_files_are_read_without_their_index(tmp_path: Path) -> None:
    _save(dcp, tmp_path, _state())
    (index,) = tmp_path.glob("*.index")
    index.unlink()
    checkpoint = shardpoint.open(tmp_path)
    assert np.array_equal(checkpoint["b"], _state()["b"].numpy())
    assert checkpoint.verify().ok


def test_damage_is_found(tmp_path: Path) -> None:
    _save(dcp, tmp_path, _state())
    (file,) = tmp_path.glob("*.distcp")
    data = bytearray(file.read_bytes())
    at = data.index(_state()["b"].numpy().tobytes()) + 5000
    data[at] ^= 4
    file.write_bytes(data)
    checkpoint = shardpoint.open(tmp_path)
    assert [problem.key for problem in checkpoint.verify().problems] == ["b"]
    with pytest.raises(CorruptionError, match="'b'"):
        checkpoint["b"]


def test_extensions_and_images_exclude_each_other() -> None:
    with pytest.raises(NotSupportedError, match="extensions"):
        dcp.FileSystemWriter(
            "nowhere",
            _extensions=[dcp.extension.ZStandard()],
            serialization_format=SerializationFormat.SAFETENSORS,
        )


def _two_chunks_of_one_key(path: Path) -> None:
    from torch.distributed._shard.sharded_tensor import Shard as TensorShard
    from torch.distributed._shard.sharded_tensor import ShardedTensor

    metadata = [[0, 0], [1, 0]]
    shards = [
        TensorShard.from_tensor_and_offsets(torch.full((1, 3), 1.0 + at[0]), at, 0)
        for at in metadata
    ]
    state = {"s": ShardedTensor._init_from_local_shards(shards, 2, 3)}
    _save(dcp, path, state)


def _sharded(path: Path) -> None:
    mesh = init_device_mesh("cpu", (2,))
    full = torch.arange(60.0).reshape(10, 6)
    state = {"w": distribute_tensor(full, mesh, [Shard(1)]), "n": torch.ones(3), "step": 5}
    _save(dcp, path, state)
    target = {"w": distribute_tensor(torch.zeros(10, 6), mesh, [Shard(0)]), "n": torch.zeros(3)}
    dcp.load(target, checkpoint_id=path)
    assert torch.equal(target["w"].full_tensor(), full)
    assert torch.equal(target["n"], torch.ones(3))


def test_ranks_save_and_reshard(pool: RankPool, tmp_path: Path) -> None:
    pool.run(2, _sharded, tmp_path)
    checkpoint = shardpoint.open(tmp_path)
    assert np.array_equal(checkpoint["w"], np.arange(60, dtype=np.float32).reshape(10, 6))
    assert checkpoint.verify().ok
    offsets = [chunk.offsets for chunk in checkpoint.info("w").chunks]
    assert offsets == [(0, 0), (0, 3)]


def test_two_chunks_of_one_tensor_on_a_rank_are_kept(pool: RankPool, tmp_path: Path) -> None:
    """torch 2.13 writes the last one only."""
    pool.run(1, _two_chunks_of_one_key, tmp_path)
    assert shardpoint.open(tmp_path)["s"].tolist() == [[1.0] * 3, [2.0] * 3]


def test_order_of_dtypes_is_that_of_safetensors() -> None:
    dtypes = {d.name: d for d in BY_CODE if d.safetensors_name and hasattr(torch, d.name)}
    tensors = {
        name: torch.zeros(8, dtype=torch.uint8).view(getattr(torch, name)) for name in dtypes
    }
    data = safetensors.torch.save(tensors)
    header = read_header(lambda at, n: data[at : at + n], len(data), file="")
    places = sorted(header.tensors, key=lambda name: header.tensors[name].start)
    assert written_order(dtypes) == places
    assert len(places) > 15
