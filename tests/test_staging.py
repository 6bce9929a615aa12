"""Stagers: what a copy shares, what it does not, and which memory it uses."""

from __future__ import annotations

import copy
import errno
import gc
import io
import os
import re
from collections import OrderedDict, UserDict, defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dcp_states import differences, objects, plain, values
from shardpoint.dcp import FileSystemWriter, _slabs
from shardpoint.dcp.staging import (
    AsyncStager,
    BlockingAsyncStager,
    DefaultStager,
    StagingOptions,
    release_staging_memory,
)
from shardpoint.errors import PlanError, StorageError

BLOCKING = StagingOptions(use_async_staging=False)


@pytest.fixture(autouse=True)
def _fresh_memory() -> None:
    release_staging_memory()


def test_defaults_work_without_an_accelerator() -> None:
    stager = DefaultStager()
    state = {**plain(), **objects()}
    future: Any = stager.stage(state)
    stager.synchronize_staging()
    assert future.done()
    assert differences(future.result(), state) == []
    stager.close()


def test_copies_of_shared_memory_share_memory() -> None:
    base = torch.arange(20_000.0)
    staged = BlockingAsyncStager().stage(
        {"whole": base, "part": base[10:20], "same": base, "other": torch.zeros(100)}
    )
    staged["part"].fill_(-1)
    assert staged["whole"][10:20].tolist() == [-1] * 10
    assert staged["same"].data_ptr() == staged["whole"].data_ptr()
    assert staged["other"].sum() == 0
    assert base[10] == 10


def test_a_copy_has_no_more_memory_than_the_tensor_reaches() -> None:
    large = torch.arange(1_000_000.0).reshape(1000, 1000)
    staged = BlockingAsyncStager().stage(
        {"row": large[3], "columns": large[:, :2], "far": large[::500], "one": large[0, :1]}
    )
    assert staged["row"].untyped_storage().nbytes() == 4000
    assert staged["columns"].untyped_storage().nbytes() == 8000
    assert staged["far"].untyped_storage().nbytes() == 8000
    for key, tensor in staged.items():
        stream = io.BytesIO()
        torch.save(tensor, stream)
        assert stream.tell() < 20_000, key


def test_strides_gradients_and_parameters_stay() -> None:
    state = {
        "transposed": torch.ones(3, 4).t(),
        "channels": torch.ones(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "gradient": torch.ones(2, requires_grad=True),
        "not a leaf": torch.ones(2, requires_grad=True) * 2,
        "parameter": nn.Parameter(torch.ones(2)),
        "frozen": nn.Parameter(torch.ones(2), requires_grad=False),
        "empty": torch.ones(0, 3),
        "scalar": torch.tensor(3),
        "expanded": torch.ones(1).expand(5),
    }
    staged = BlockingAsyncStager().stage(state)
    for key, tensor in state.items():
        assert staged[key].stride() == tensor.stride(), key
        assert staged[key].requires_grad == tensor.requires_grad, key
        assert type(staged[key]) is type(tensor), key
        assert torch.equal(staged[key], tensor), key


@pytest.mark.parametrize(("shape", "strides"), [((1,), (0,)), ((2, 2), (1, 2)), ((2, 3), (3, 1))])
def test_strides_stay_where_memory_is_shared_at_odd_places(
    shape: tuple[int, ...], strides: tuple[int, ...]
) -> None:
    base = torch.arange(400.0)
    tensor = torch.as_strided(base, shape, strides, 3)
    halves = torch.as_strided(base.view(torch.int16), (2,), (1,), 5)  # begins before the tensor
    staged = BlockingAsyncStager().stage({"tensor": tensor, "halves": halves})
    assert staged["tensor"].stride() == strides
    assert torch.equal(staged["tensor"], tensor)
    assert torch.equal(staged["halves"], halves)


def test_containers_keep_their_kind_and_objects_are_copied() -> None:
    state = {
        "ordered": OrderedDict(b=torch.ones(1), a=1),
        "default": defaultdict(list, {"x": [torch.ones(1)]}),
        "user": UserDict({"x": torch.ones(1)}),
        "tuple": (torch.ones(1), [1]),
        "set": {1},
        "stream": io.BytesIO(b"abc"),
    }
    staged = BlockingAsyncStager().stage(state)
    for key, value in state.items():
        assert type(staged[key]) is type(value), key
        assert staged[key] is not value, key
    state["tuple"][1].append(2)  # type: ignore[union-attr, index]
    state["ordered"]["b"].zero_()  # type: ignore[index]
    state["user"]["x"].zero_()  # type: ignore[index]
    assert staged["tuple"][1] == [1]
    assert staged["ordered"]["b"] == 1
    assert staged["user"]["x"] == 1
    assert staged["stream"].getvalue() == b"abc"


class Quantized(torch.Tensor):
    """A subclass that is made of two tensors."""

    @staticmethod
    def __new__(cls, codes: torch.Tensor, scale: torch.Tensor) -> Any:
        made = torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=scale.dtype)
        made.codes, made.scale = codes, scale
        return made

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["codes", "scale"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, torch.Tensor], *_: Any) -> Any:
        return Quantized(inner["codes"], inner["scale"])

    @classmethod
    def __torch_dispatch__(cls, function: Any, *_: Any, **__: Any) -> Any:
        raise NotImplementedError(function)


def test_tensor_subclass_is_copied_by_its_parts() -> None:
    original = Quantized(values("codes", 8, dtype=torch.int8), torch.ones(1))
    staged = BlockingAsyncStager().stage({"q": original})["q"]
    assert type(staged) is Quantized
    assert torch.equal(staged.codes, original.codes)
    original.codes.zero_()
    assert not torch.equal(staged.codes, original.codes)


class Wrapper(torch.Tensor):
    """A subclass that knows no operation at all, not even copying."""

    @staticmethod
    def __new__(cls, rows: torch.Tensor) -> Any:
        made = torch.Tensor._make_wrapper_subclass(cls, (9, *rows.shape), dtype=rows.dtype)
        made.rows, made.note = rows, ["a"]
        return made

    @classmethod
    def __torch_dispatch__(cls, function: Any, *_: Any, **__: Any) -> Any:
        raise NotImplementedError(function)


def test_wrapper_subclass_is_copied_by_its_attributes() -> None:
    original = Wrapper(torch.ones(4))
    staged = BlockingAsyncStager().stage({"w": original})["w"]
    original.rows.zero_()
    original.note.append("b")
    assert type(staged) is Wrapper
    assert staged.shape == (9, 4)
    assert staged.rows.tolist() == [1] * 4
    assert staged.note == ["a"]


def test_memory_is_used_again_when_the_copy_is_gone() -> None:
    state = {"x": torch.ones(10_000)}
    first = BlockingAsyncStager().stage(state)
    address = first["x"].data_ptr()
    second = BlockingAsyncStager().stage(state)  # the first is still there
    assert second["x"].data_ptr() != address
    del first
    gc.collect()
    third = BlockingAsyncStager().stage(state)
    assert third["x"].data_ptr() == address


def test_part_of_a_copy_keeps_its_memory() -> None:
    state = {"x": torch.ones(10_000), "y": torch.full((10_000,), 7.0)}
    part = BlockingAsyncStager().stage(state)["y"]
    gc.collect()
    BlockingAsyncStager().stage({"z": torch.zeros(20_000)})
    assert part.tolist() == [7.0] * 10_000


@pytest.mark.parametrize(
    "stager", [DefaultStager(BLOCKING), BlockingAsyncStager(cache_staged_state_dict=True)]
)
def test_keeping_stager_overwrites_its_copy(stager: Any) -> None:
    first = stager.stage({"x": torch.ones(10_000)})
    stager.stage({"x": torch.zeros(10_000)})
    assert first["x"].sum() == 0
    larger = stager.stage({"x": torch.ones(10_000_000)})
    assert larger["x"].sum() == 10_000_000
    stager.close()


def test_released_memory_is_given_back() -> None:
    BlockingAsyncStager().stage({"x": torch.ones(10)})
    gc.collect()
    assert len(_slabs._free) == 1
    release_staging_memory()
    assert len(_slabs._free) == 0


def test_type_check_refuses_other_objects() -> None:
    stager = BlockingAsyncStager(type_check=True)
    assert stager.stage({"a": [1, "x", None, {"t": torch.ones(1)}]})["a"][1] == "x"
    with pytest.raises(PlanError, match="set cannot be staged"):
        stager.stage({"a": {1}})


def test_large_tensors_are_copied_whole() -> None:
    state = {"x": torch.arange(20_000_000), "y": torch.arange(9_000_001.0)}
    staged = BlockingAsyncStager().stage(state)
    assert all(torch.equal(staged[key], state[key]) for key in state)


SHARED = StagingOptions(
    use_pinned_memory=False,
    use_shared_memory=True,
    use_async_staging=False,
    use_non_blocking_copy=False,
)


def test_new_shared_memory_is_written_through_its_file_and_touched_later(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pwrite, written = os.pwrite, []

    def partly(file: int, data: Any, offset: int) -> int:
        written.append(offset)
        return pwrite(file, memoryview(data).cast("B")[: 3 << 20], offset)

    monkeypatch.setattr(os, "pwrite", partly)
    state = {"x": torch.arange(9_000_000), "y": torch.arange(70_001.0), "z": torch.ones(3)}
    for number in range(2):
        staged: Any = DefaultStager(SHARED).stage(state)
        assert all(torch.equal(staged[key], state[key]) for key in state), number
        assert bool(written) == (number == 0)
        written.clear()
        del staged
        gc.collect()


def test_shared_memory_that_cannot_be_had_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", refuse)
    with pytest.raises(StorageError, match="cannot copy the state to shared memory: No space"):
        DefaultStager(SHARED).stage({"x": torch.ones(1_000_000)})


@pytest.mark.skipif(
    tuple(map(int, os.uname().release.split(".")[:2])) < (5, 14),
    reason="the kernel cannot be asked for it",
)
def test_pages_written_through_the_file_can_be_mapped_before_the_next_copy() -> None:
    slab = _slabs.lease(8 << 20, shared=True, pinned=False).slab
    assert slab.file is not None
    os.pwrite(slab.file, b"x" * slab.size, 0)

    def resident() -> int:
        found = Path("/proc/self/smaps").read_text().partition(f"{slab.address:x}-")[2]
        return 1024 * int(re.findall(r"Rss: +(\d+) kB", found)[0])

    before = resident()
    slab.is_untouched = False
    slab.map_pages()
    assert (before, resident()) == (0, slab.size)


def test_file_system_writer_is_a_stager_that_can_be_copied() -> None:
    writer = FileSystemWriter("x", cache_staged_state_dict=True)
    assert isinstance(writer, AsyncStager)
    assert isinstance(writer, BlockingAsyncStager)
    assert not writer.should_synchronize_after_execute
    writer.stage({"x": torch.ones(3)})
    other = copy.deepcopy(writer)
    assert other.state_dict_cache is None
    assert other.stage({"x": torch.ones(3)})["x"].sum() == 3
    writer.synchronize_staging()
    writer.close()


@pytest.mark.parametrize("shared", [False, True])
def test_memory_that_is_not_there_is_named(shared: bool) -> None:
    with pytest.raises(
        StorageError, match=r"cannot get \d{18} bytes of .*memory to copy the state"
    ):
        _slabs.lease(1 << 57, shared=shared, pinned=False)
