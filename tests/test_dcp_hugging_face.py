"""Safetensors checkpoints, beside torch's own reader and writer of them."""

from __future__ import annotations

import json
import warnings
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as torch_dcp
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.filesystem import FileSystem as TheirFileSystem
from torch.distributed.checkpoint.quantized_hf_storage import (
    QuantizedHuggingFaceStorageReader as TheirQuantizedReader,
)
from torch.distributed.tensor import DTensor, Shard, distribute_tensor, init_device_mesh

import shardpoint
import shardpoint.dcp as dcp
from ranks import RankPool
from shardpoint.dcp.hf_storage import (
    consolidate_safetensors_files,
    consolidate_safetensors_files_on_every_rank,
)
from shardpoint.errors import CheckpointExistsError, NotSupportedError, PlanError

PACKAGES = {"torch": torch_dcp, "shardpoint": dcp}
MAPPING = {"embed": 1, "column": 1, "half": 2, "whole": 2, "ids": 3, "scalar": 3}


def whole_state(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "embed": torch.randn(7, 4, generator=generator),
        "column": torch.randn(5, 6, generator=generator).to(torch.bfloat16),
        "half": torch.randn(9, generator=generator).to(torch.float16),
        "whole": torch.randn(3, 2, generator=generator),
        "ids": torch.arange(11) + seed,
        "scalar": torch.tensor(2.5),
    }


def state(seed: int = 0, *, integers: bool = True) -> dict[str, torch.Tensor]:
    """Return the state as this rank has it."""
    wholes = whole_state(seed)
    if not integers:
        del wholes["ids"]
    if not dist.is_initialized():
        return wholes
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    axes = {"embed": 0, "column": 1, "half": 0, "ids": 0}
    return {
        key: distribute_tensor(value, mesh, [Shard(axes[key])]) if key in axes else value
        for key, value in wholes.items()
    }


def blank(values: dict[str, Any]) -> dict[str, Any]:
    return {key: torch.zeros_like(value) for key, value in values.items()}


def full(value: torch.Tensor) -> torch.Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value


def save(package: str, folder: str, seed: int = 0, **options: Any) -> None:
    integers = options.pop("integers", True)
    writer = PACKAGES[package].HuggingFaceStorageWriter(folder, **options)
    values = state(seed, integers=integers)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if package == "torch" else "error")
        PACKAGES[package].save(values, storage_writer=writer)


def load(package: str, folder: str, seed: int = 0) -> list[str]:
    """Load into this rank's layout; return the keys that differ."""
    wanted = state(seed)
    target = blank(wanted)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if package == "torch" else "error")
        reader = PACKAGES[package].HuggingFaceStorageReader(folder)
        PACKAGES[package].load(target, storage_reader=reader)
    return [key for key in wanted if not torch.equal(full(target[key]), full(wanted[key]))]


def names(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def headers(folder: Path) -> dict[str, tuple[set[str], dict[str, str]]]:
    """Return each file's tensors and metadata."""
    found = {}
    for path in folder.rglob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            found[path.name] = (set(file.keys()), file.metadata())
    return found


def parsed(metadata: dict[str, str]) -> dict[str, Any]:
    return {**metadata, "DCP_SHARDING_INFO": json.loads(metadata["DCP_SHARDING_INFO"])}


@pytest.mark.parametrize("mapping", [None, MAPPING])
def test_full_state_gives_torchs_files(tmp_path: Path, mapping: Any) -> None:
    for package in PACKAGES:
        save(package, str(tmp_path / package), fqn_to_index_mapping=mapping)
    assert names(tmp_path / "shardpoint") == names(tmp_path / "torch")
    ours, theirs = headers(tmp_path / "shardpoint"), headers(tmp_path / "torch")
    for name in theirs:
        assert ours[name][0] == theirs[name][0]
        assert parsed(ours[name][1]) == parsed(theirs[name][1])
    index = [
        json.loads((tmp_path / p / "model.safetensors.index.json").read_bytes()) for p in PACKAGES
    ]
    assert index[0] == index[1]
    for package in PACKAGES:
        assert load(package, str(tmp_path / "shardpoint")) == []
        assert load("shardpoint", str(tmp_path / package)) == []


@pytest.mark.parametrize("mapping", [None, MAPPING])
def test_shards_are_torchs(pool: RankPool, tmp_path: Path, mapping: Any) -> None:
    for package in PACKAGES:
        options = {"save_distributed": True, "fqn_to_index_mapping": mapping}
        pool.run(2, _save_with, package, str(tmp_path / package), options)
    assert names(tmp_path / "shardpoint") == names(tmp_path / "torch")
    ours, theirs = headers(tmp_path / "shardpoint"), headers(tmp_path / "torch")
    sharded = ("embed", "column", "half", "ids")
    for name in theirs:
        info = [parsed(found[name][1])["DCP_SHARDING_INFO"] for found in (ours, theirs)]
        for key in sharded:
            assert info[0].get(key) == info[1].get(key)
    for world_size in (1, 4):
        for package in PACKAGES:
            folder = str(tmp_path / "shardpoint")
            assert pool.run(world_size, load, package, folder) == [[]] * world_size


def _save_with(package: str, folder: str, options: dict[str, Any], seed: int = 0) -> None:
    save(package, folder, seed, **options)


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("mapping", [None, MAPPING])
def test_ranks_write_full_files_together(
    pool: RankPool, tmp_path: Path, world_size: int, mapping: Any
) -> None:
    options = {
        "save_distributed": True,
        "enable_consolidation": True,
        "fqn_to_index_mapping": mapping,
    }
    pool.run(world_size, _save_with, "shardpoint", str(tmp_path), options)
    found = {}
    for path in tmp_path.glob("*.safetensors"):
        found.update(load_file(path))
        with safe_open(path, framework="pt") as file:
            assert file.metadata() == {"format": "pt"}
    wanted = whole_state()
    assert found.keys() == wanted.keys()
    for key in wanted:
        assert torch.equal(found[key], wanted[key]), key
    count = 1 if mapping is None else 3
    assert names(tmp_path) == [
        *(f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)),
        "model.safetensors.index.json",
    ]
    assert pool.run(2, load, "shardpoint", str(tmp_path)) == [[], []]
    assert load("torch", str(tmp_path)) == []


def test_consolidation_agrees_with_torchs(pool: RankPool, tmp_path: Path) -> None:
    # without integers: torch 2.13 cannot consolidate those
    mapping = {key: number for key, number in MAPPING.items() if key != "ids"}
    options = {
        "save_distributed": True,
        "enable_consolidation": True,
        "fqn_to_index_mapping": mapping,
        "integers": False,
    }
    for package in PACKAGES:
        pool.run(2, _save_with, package, str(tmp_path / package), options)
    tops = [[n for n in names(tmp_path / p) if "/" not in n] for p in PACKAGES]
    assert tops[0] == tops[1]
    for name in tops[0]:
        paths = [tmp_path / package / name for package in PACKAGES]
        if name.endswith(".json"):
            contents = [json.loads(path.read_bytes()) for path in paths]
            assert contents[0] == contents[1]
        else:
            theirs, ours = (load_file(path) for path in paths)
            assert theirs.keys() == ours.keys()
            assert all(torch.equal(theirs[key], ours[key]) for key in theirs if theirs[key].dim())


def _consolidate(source: str, target: str) -> None:
    consolidate_safetensors_files_on_every_rank(source, target, MAPPING)


def test_shards_are_consolidated_afterwards(pool: RankPool, tmp_path: Path) -> None:
    pool.run(2, _save_with, "torch", str(tmp_path / "shards"), {"save_distributed": True})
    consolidate_safetensors_files(tmp_path / "shards", tmp_path / "one", MAPPING, num_threads=2)
    pool.run(2, _consolidate, str(tmp_path / "shards"), str(tmp_path / "many"))
    assert names(tmp_path / "one") == names(tmp_path / "many")
    for name in names(tmp_path / "one"):
        one, many = (tmp_path / folder / name for folder in ("one", "many"))
        if name.endswith(".json"):
            assert json.loads(one.read_bytes()) == json.loads(many.read_bytes())
        else:
            assert one.read_bytes() == many.read_bytes()
    assert load("torch", str(tmp_path / "one")) == []
    with pytest.raises(PlanError, match=r"'ids'(.|\n)*'nothing'"):
        consolidate_safetensors_files(
            tmp_path / "shards",
            tmp_path / "bad",
            {**{k: 1 for k in MAPPING if k != "ids"}, "nothing": 1},
        )


class PlainFiles(TheirFileSystem):
    """Local files through a program's own file system, which cannot share them."""


def _save_through_plain_files(folder: str) -> None:
    writer = dcp.HuggingFaceStorageWriter(
        folder, save_distributed=True, enable_consolidation=True, fqn_to_index_mapping=MAPPING
    )
    writer.fs = PlainFiles()
    dcp.save(state(), storage_writer=writer)


def test_stores_that_cannot_share_files_get_a_second_pass(pool: RankPool, tmp_path: Path) -> None:
    pool.run(2, _save_through_plain_files, str(tmp_path))
    assert sum(name.startswith("sharded/shard-") for name in names(tmp_path)) == 6
    found = {}
    for path in tmp_path.glob("*.safetensors"):
        found.update(load_file(path))
    assert all(torch.equal(found[key], value) for key, value in whole_state().items())


def test_saving_to_a_url(tmp_path: Path) -> None:
    url = "memory://test-hugging-face/model"
    for seed in (1, 2):
        writer = dcp.HuggingFaceStorageWriter(url, fqn_to_index_mapping=MAPPING)
        dcp.save(whole_state(seed), storage_writer=writer)
        target = blank(whole_state())
        dcp.load(target, storage_reader=dcp.HuggingFaceStorageReader(url))
        assert all(torch.equal(target[key], value) for key, value in whole_state(seed).items())
    with shardpoint.open(url) as checkpoint:
        assert checkpoint.verify().ok


def test_overwriting_leaves_only_the_new_files(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / ".model-00001-of-00001.safetensors.0123456789abcdef.tmp").write_bytes(b"crashed")
    save("shardpoint", str(tmp_path), 1, fqn_to_index_mapping=MAPPING)
    save("shardpoint", str(tmp_path), 2)
    assert names(tmp_path) == [
        "config.json",
        "model-00001-of-00001.safetensors",
        "model.safetensors.index.json",
    ]
    assert load("shardpoint", str(tmp_path), 2) == []
    with pytest.raises(dcp.CheckpointException) as caught:
        save("shardpoint", str(tmp_path), 3, save_distributed=True)
    assert isinstance(caught.value.failures[0][0], CheckpointExistsError)


class FailingPlanner(dcp.DefaultSavePlanner):
    def resolve_data(self, write_item: Any) -> Any:
        if write_item.index.fqn == "half" and dist.get_rank() == 1:
            raise ValueError("no data")
        return super().resolve_data(write_item)


def _fail(folder: str, options: dict[str, Any]) -> str:
    writer = dcp.HuggingFaceStorageWriter(folder, **options)
    try:
        dcp.save(state(), storage_writer=writer, planner=FailingPlanner())
    except dcp.CheckpointException as error:
        return str(error)
    return ""


@pytest.mark.parametrize("together", [True, False])
def test_failed_save_leaves_the_old_files_alone(
    pool: RankPool, tmp_path: Path, together: bool
) -> None:
    options = {"save_distributed": True, "enable_consolidation": together}
    pool.run(2, _save_with, "shardpoint", str(tmp_path), options, 1)
    before = {name: (tmp_path / name).read_bytes() for name in names(tmp_path)}
    for message in pool.run(2, _fail, str(tmp_path), options):
        assert "no data" in message
    assert {name: (tmp_path / name).read_bytes() for name in names(tmp_path)} == before


def test_what_safetensors_cannot_hold_is_named(tmp_path: Path) -> None:
    values = {"a": torch.zeros(1), "step": 3, "wide": torch.zeros(1, dtype=torch.complex128)}
    with pytest.raises(dcp.CheckpointException) as caught:
        dcp.save(values, storage_writer=dcp.HuggingFaceStorageWriter(tmp_path))
    assert isinstance(caught.value.failures[0][0], NotSupportedError)
    assert "'step'" in str(caught.value)
    assert "complex128" in str(caught.value)
    writer = dcp.HuggingFaceStorageWriter(tmp_path, fqn_to_index_mapping={"a": 1})
    with pytest.raises(dcp.CheckpointException, match="'b'"):
        dcp.save({"a": torch.zeros(1), "b": torch.zeros(1)}, storage_writer=writer)
    assert names(tmp_path) == []


def _load_rows(folder: str) -> int:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    target = {"weight": distribute_tensor(torch.zeros(1024, 256), mesh, [Shard(0)])}
    report = dcp.load(target, storage_reader=dcp.HuggingFaceStorageReader(folder))
    assert torch.equal(target["weight"].full_tensor(), torch.arange(1024 * 256.0).view(1024, 256))
    return report.bytes_read


def test_ranks_read_only_their_rows(pool: RankPool, tmp_path: Path) -> None:
    save_file({"weight": torch.arange(1024 * 256.0).view(1024, 256)}, tmp_path / "m.safetensors")
    assert pool.run(2, _load_rows, str(tmp_path)) == [512 * 256 * 4] * 2


def quantised(folder: Path, *, apart: bool, scale_dtype: torch.dtype = torch.float32) -> None:
    """Write a matrix of 8-bit floats with scales, and a plain one."""
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(300, 200, generator=generator).to(torch.float8_e4m3fn)
    scales = torch.rand(3, 2, generator=generator).to(scale_dtype) + 0.5
    files = {
        "1.safetensors": {"layer.weight": weight, "plain": torch.arange(4.0)},
        "2.safetensors": {"layer.weight_scale_inv": scales},
    }
    if not apart:
        files = {"1.safetensors": {**files["1.safetensors"], **files["2.safetensors"]}}
    weight_map = {}
    for name, tensors in files.items():
        save_file(tensors, folder / name)
        weight_map.update(dict.fromkeys(tensors, name))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


@contextmanager
def quiet() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("target_dtype", [torch.float32, torch.bfloat16])
def test_dequantised_as_torch_does(
    tmp_path: Path, apart: bool, scale_dtype: torch.dtype, target_dtype: torch.dtype
) -> None:
    quantised(tmp_path, apart=apart, scale_dtype=scale_dtype)
    results = []
    for package, kind in (
        (torch_dcp, TheirQuantizedReader),
        (dcp, dcp.QuantizedHuggingFaceStorageReader),
    ):
        target = {
            "layer.weight": torch.zeros(300, 200, dtype=target_dtype),
            "plain": torch.zeros(4),
        }
        with quiet():
            reader = kind(str(tmp_path), target_dtype=target_dtype)
            package.load(target, storage_reader=reader, no_dist=True)
        results.append(target)
    for key in results[0]:
        assert torch.equal(results[0][key], results[1][key])
    assert results[1]["layer.weight"].abs().sum() > 0


def _load_quantised(package: str, folder: str, axis: int) -> torch.Tensor:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    target = {"layer.weight": distribute_tensor(torch.zeros(300, 200), mesh, [Shard(axis)])}
    kind = TheirQuantizedReader if package == "torch" else dcp.QuantizedHuggingFaceStorageReader
    with quiet():
        PACKAGES[package].load(target, storage_reader=kind(folder))
    found: torch.Tensor = target["layer.weight"].full_tensor()
    return found


@pytest.mark.parametrize("axis", [0, 1])
def test_slices_are_dequantised_with_scales_of_another_file(
    pool: RankPool, tmp_path: Path, axis: int
) -> None:
    quantised(tmp_path, apart=True)
    theirs = pool.run(1, _load_quantised, "torch", str(tmp_path), axis)[0]
    for found in pool.run(4, _load_quantised, "shardpoint", str(tmp_path), axis):
        assert torch.equal(found, theirs)


def test_int8_weights_and_other_block_sizes(tmp_path: Path) -> None:
    weight = torch.arange(-60, 60, dtype=torch.int8).view(12, 10)
    scales = torch.arange(1.0, 10.0).view(3, 3)
    save_file({"w.weight": weight, "w.weight_scale_inv": scales}, tmp_path / "m.safetensors")
    target = {"w.weight": torch.zeros(12, 10)}
    reader = dcp.QuantizedHuggingFaceStorageReader(tmp_path, block_size=4)
    dcp.load(target, storage_reader=reader)
    spread = scales.repeat_interleave(4, 0).repeat_interleave(4, 1)[:, :10]
    assert torch.equal(target["w.weight"], weight * spread)
    with pytest.raises(dcp.CheckpointException, match="wanted is \\(1, 1\\)"):
        dcp.load(target, storage_reader=dcp.QuantizedHuggingFaceStorageReader(tmp_path))


def _mxfp4(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Dequantise in the plainest way."""
    values = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    values += [-value for value in values]
    out = torch.empty(*blocks.shape, 2)
    for where in torch.cartesian_prod(*map(torch.arange, blocks.shape)).tolist():
        byte = int(blocks[tuple(where)])
        power = 2.0 ** (int(scales[tuple(where[:-1])]) - 127)
        out[tuple(where)] = torch.tensor([values[byte & 15] * power, values[byte >> 4] * power])
    return out.flatten(-3)


def _load_mxfp4(folder: str, axis: int) -> torch.Tensor:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    target = {"x_blocks": distribute_tensor(torch.zeros(3, 4, 48), mesh, [Shard(axis)])}
    dcp.load(target, storage_reader=dcp.QuantizedHuggingFaceStorageReader(folder))
    found: torch.Tensor = target["x_blocks"].full_tensor()
    return found


@pytest.mark.parametrize("axis", [0, 2])
def test_mxfp4_weights_and_their_slices(pool: RankPool, tmp_path: Path, axis: int) -> None:
    generator = torch.Generator().manual_seed(7)
    blocks = torch.randint(0, 256, (3, 4, 3, 8), generator=generator).to(torch.uint8)
    scales = torch.randint(120, 134, (3, 4, 3), generator=generator).to(torch.uint8)
    save_file({"x_blocks": blocks}, tmp_path / "1.safetensors")
    save_file({"x_scales": scales}, tmp_path / "2.safetensors")
    wanted = _mxfp4(blocks, scales)
    target = {"x_blocks": torch.zeros(48, 4, 3).permute(2, 1, 0)}
    dcp.load(target, storage_reader=dcp.QuantizedHuggingFaceStorageReader(tmp_path))
    assert torch.equal(target["x_blocks"], wanted)
    for found in pool.run(4, _load_mxfp4, str(tmp_path), axis):
        assert torch.equal(found, wanted)
