"""``.metadata`` of every release: read field for field, written so that torch reads it."""

from __future__ import annotations

import gc
import io
import json
import pathlib
import pickle
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fixture_support import HOSTILE, Fixture, hostile_fixtures, public_fixtures
from shardpoint.dtypes import BY_CODE, BY_NAME
from shardpoint.errors import (
    ForbiddenContentError,
    FormatError,
    LimitExceededError,
    NotSupportedError,
)
from shardpoint.formats import dcp_metadata
from shardpoint.formats.dcp_metadata import (
    read_metadata,
    read_per_rank_metadata,
    write_metadata,
)
from shardpoint.index import (
    NO_FILE,
    CheckpointIndex,
    ChunkEntry,
    Container,
    ObjectEntry,
    TensorEntry,
    build_index,
)

ALL = [f for f in public_fixtures() if f.is_dcp]
COLLECTIVE = [f for f in ALL if f.expected["metadata_files"] == [".metadata"]]
PER_RANK = [f for f in ALL if f not in COLLECTIVE]


def read_fixture(fixture: Fixture) -> CheckpointIndex:
    parts = {
        name: (fixture.checkpoint / name).read_bytes()
        for name in fixture.expected["metadata_files"]
    }
    if fixture in PER_RANK:
        return read_per_rank_metadata(parts)
    return read_metadata(parts[".metadata"], file=".metadata")


def storage_of(index: CheckpointIndex, columns: Any, row: int) -> dict[str, Any] | None:
    if columns.file[row] == NO_FILE:
        return None
    storage: dict[str, Any] = {
        "relative_path": index.files[columns.file[row]],
        "offset": int(columns.record_offset[row]),
        "length": int(columns.record_length[row]),
    }
    if columns.transform[row]:
        storage["transform_descriptors"] = list(index.transforms[columns.transform[row]])
    return storage


def tensors_of(index: CheckpointIndex) -> dict[str, Any]:
    """The tensors in the form of expected.json."""
    result = {}
    for row, key in enumerate(index.tensors.keys):
        axes = index.tensors.ndim[row]
        result[key] = {
            "dtype": index.tensors.dtype_of(row).name,
            "shape": list(index.tensors.shape_of(row)),
            "chunks": [
                {
                    "offsets": index.chunks.offsets[i, :axes].tolist(),
                    "sizes": index.chunks.sizes[i, :axes].tolist(),
                    "storage": storage_of(index, index.chunks, i),
                }
                for i in range(index.tensors.first_chunk[row], index.tensors.first_chunk[row + 1])
            ],
        }
    return result


def objects_of(index: CheckpointIndex) -> dict[str, Any]:
    return {
        key: storage_of(index, index.objects, row) for row, key in enumerate(index.objects.keys)
    }


def as_plain(index: CheckpointIndex) -> dict[str, Any]:
    """Everything in an index, comparable."""
    tensors = index.tensors
    return {
        "tensors": tensors_of(index),
        "objects": objects_of(index),
        "flags": (
            tensors.requires_grad.tolist(),
            tensors.pin_memory.tolist(),
            tensors.memory_format.tolist(),
        ),
        "key_order": list(index.key_order),
        "paths": index.paths,
        "planner_data": index.planner_data,
        "storage_meta": index.storage_meta,
        "version": index.version,
    }


@pytest.mark.parametrize("fixture", ALL, ids=str)
def test_every_field_is_read(fixture: Fixture) -> None:
    index, expected = read_fixture(fixture), fixture.expected
    wanted = {
        key: {
            "dtype": entry["dtype"],
            "shape": entry["shape"],
            "chunks": [
                {name: chunk[name] for name in ("offsets", "sizes", "storage")}
                for chunk in entry["chunks"]
            ],
        }
        for key, entry in expected["tensors"].items()
    }
    assert tensors_of(index) == wanted
    assert objects_of(index) == {k: e["storage"] for k, e in expected["objects"].items()}
    assert set(index.key_order) == fixture.keys
    assert len(index.key_order) == len(fixture.keys)
    if fixture.planner_data_is_none:
        assert index.paths is None
    else:
        # 2.3 has paths of keys that other ranks had and it did not write.
        unwritten = set(expected.get("not_in_checkpoint", ()))
        assert index.paths is not None
        assert {k: v for k, v in index.paths.items() if k not in unwritten} == fixture.paths
    assert index.version == expected.get("dcp_version", "1.0.0")
    assert list(index.metadata_files) == expected["metadata_files"]
    assert index.source == ("dcp-per-rank" if fixture in PER_RANK else "dcp")
    assert index.transforms[0] == ()
    if fixture.release.startswith("2.3"):
        assert index.storage_meta is None
    else:
        assert index.storage_meta is not None
        assert str(index.storage_meta["checkpoint_id"]) == expected["saved_to"]


@pytest.mark.parametrize("fixture", ALL, ids=str)
def test_what_is_written_reads_the_same(fixture: Fixture) -> None:
    index = read_fixture(fixture)
    again = read_metadata(write_metadata(index), file=".metadata")
    assert as_plain(again) == as_plain(index)


class _AnyPython(pickle.Unpickler):
    """Reads paths that another version of Python wrote."""

    def find_class(self, module: str, name: str) -> Any:
        return super().find_class("pathlib" if module == "pathlib._local" else module, name)


def fields_of(value: Any) -> Any:
    """Everything in torch's objects: their __eq__ leaves some fields out."""
    if isinstance(value, dict):
        return {fields_of(k): fields_of(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return (type(value).__name__, *map(fields_of, value))
    if type(value).__module__.startswith("torch.distributed"):
        return (type(value).__name__, *((k, _key(fields_of(v))) for k, v in vars(value).items()))
    return value


def _key(value: Any) -> Any:
    return tuple(value.items()) if isinstance(value, dict) else value


def storage_as_set(metadata: Any) -> Any:
    """With storage_data in no order: it is looked up, never walked."""
    fields = dict(vars(metadata))
    fields["storage_data"] = frozenset(fields_of(fields["storage_data"]).items())
    return {name: fields_of(value) for name, value in fields.items()}


@pytest.mark.parametrize("fixture", COLLECTIVE, ids=str)
def test_torch_reads_what_is_written_as_its_own(
    fixture: Fixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    metadata = pytest.importorskip("torch.distributed.checkpoint.metadata")
    data = (fixture.checkpoint / ".metadata").read_bytes()
    ours = pickle.loads(write_metadata(read_metadata(data, file=".metadata")))
    if fixture.release.startswith("2.15"):
        properties = metadata.TensorProperties
        original = properties.__setstate__
        monkeypatch.setattr(properties, "__setstate__", lambda s, state: original(s, state[:5]))
    theirs = _AnyPython(io.BytesIO(data)).load()
    assert storage_as_set(ours) == storage_as_set(theirs)


def hostile(prefix: str) -> list[Any]:
    return [f for f in hostile_fixtures() if f.name.startswith(prefix)]


@pytest.mark.parametrize("fixture", hostile("meta_") + hostile("truncated_metadata"), ids=str)
def test_tampered_metadata_is_refused(fixture: Any) -> None:
    data = (fixture.checkpoint / ".metadata").read_bytes()
    if fixture.expectation["stage"] == "unflatten":
        read_metadata(data, file=".metadata")
        return
    with pytest.raises(FormatError, match=r"\.metadata") as caught:
        read_metadata(data, file=".metadata")
    if fixture.expectation["kind"] == "code-execution":
        assert isinstance(caught.value, ForbiddenContentError)
    if fixture.name == "meta_unknown_class":
        assert isinstance(caught.value, ForbiddenContentError)
        assert caught.value.qualified_name == "acme.ckpt.ShardInfo"
        assert "acme.ckpt.ShardInfo" in str(caught.value)
    if fixture.name == "meta_field_types":
        assert "'model.layers.0.weight'" in str(caught.value)


_MEASURE = """
import json, sys, time
from pathlib import Path
from shardpoint.errors import FormatError
from shardpoint.formats.dcp_metadata import read_metadata
result = {}
for path in sorted(Path(sys.argv[1]).glob("meta_*/ckpt/.metadata")):
    started = time.process_time()
    try:
        read_metadata(path.read_bytes(), file=".metadata")
    except FormatError:
        pass
    result[path.parts[-3]] = time.process_time() - started
status = Path("/proc/self/status")  # what getrusage gives counts the parent process, too
peak = status.read_text().split("VmHWM:")[1].split()[0] if status.exists() else 0
result["peak"] = int(peak) / 1024
print(json.dumps([result, sorted(sys.modules)]))
"""


def test_tampered_metadata_costs_little_and_imports_nothing() -> None:
    output = subprocess.run(
        [sys.executable, "-c", _MEASURE, str(HOSTILE)], check=True, capture_output=True, text=True
    ).stdout
    result, modules = json.loads(output)
    assert result.pop("peak") < 300
    assert max(result.values()) < 2, result
    assert len(result) == 18
    assert not {"torch", "acme", "hubconf"} & set(modules)
    assert not Path("PWNED").exists()


def test_own_metadata_module_never_imports_torch() -> None:
    code = "import sys, shardpoint.formats.dcp_metadata; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


# What follows builds pickles of torch's classes with wrong fields, by way of torch.


def torch_metadata(**changes: Any) -> Any:
    torch = pytest.importorskip("torch")
    metadata = pytest.importorskip("torch.distributed.checkpoint.metadata")
    filesystem = pytest.importorskip("torch.distributed.checkpoint.filesystem")
    chunk = metadata.ChunkStorageMetadata(torch.Size([0, 0]), torch.Size([2, 3]))
    tensor = metadata.TensorStorageMetadata(
        metadata.TensorProperties(torch.float32), torch.Size([2, 3]), [chunk]
    )
    index = metadata.MetadataIndex("w", torch.Size([0, 0]), 0)
    place = filesystem._StorageInfo("__0_0.distcp", 5, 7)
    whole = metadata.Metadata({"w": tensor}, {"w": ("w",)}, {index: place})
    targets = {
        "chunk": chunk,
        "tensor": tensor,
        "properties": tensor.properties,
        "index": index,
        "place": place,
        "metadata": whole,
    }
    for name, value in changes.items():
        target, attribute = name.split("__")
        object.__setattr__(targets[target], attribute, value)
    return whole


WRONG_FIELDS = [
    ("place__offset", "5", "offset of its storage entry is '5', not an int", True),
    ("place__offset", True, "not an int", True),
    ("place__offset", 1 << 64, "64 bits", True),
    ("place__length", 1.0, "length", True),
    ("place__length", None, "length", True),
    ("place__relative_path", 3, "relative_path", True),
    ("place__relative_path", b"x", "relative_path", True),
    ("place__transform_descriptors", "stream.zstd/1", "not a list", True),
    ("place__transform_descriptors", [1], "transform descriptor", True),
    ("place__unheard_of", 1, "unknown field 'unheard_of'", True),
    ("chunk__offsets", None, "offsets of chunk 0", True),
    ("chunk__offsets", [0, 0], "offsets of chunk 0 is a list", True),
    ("chunk__sizes", (2, False), "sizes of chunk 0 is False", True),
    ("chunk__sizes", (2, "3"), "sizes of chunk 0 is '3'", True),
    ("chunk__sizes", (2,), "the tensor has shape", True),
    ("tensor__size", (2, 2.5), "size is 2.5", True),
    ("tensor__chunks", None, "chunks is None", True),
    ("tensor__chunks", [None], "chunk 0 is None", True),
    ("tensor__properties", "x", "properties", True),
    ("properties__dtype", "float32", "dtype is 'float32'", True),
    ("properties__requires_grad", 1, "requires_grad", True),
    ("properties__pin_memory", None, "pin_memory", True),
    ("properties__layout", "strided", "layout", True),
    ("index__fqn", 5, "fqn", False),
    ("index__offset", "00", "offset of its index", True),
    ("metadata__state_dict_metadata", [], "state_dict_metadata", False),
    ("metadata__state_dict_metadata", {5: None}, "key of state_dict_metadata", False),
    ("metadata__state_dict_metadata", {"w": None}, "not TensorStorageMetadata", True),
    ("metadata__storage_data", [], "storage_data", False),
    ("metadata__storage_data", {"w": None}, "storage_data", False),
    ("metadata__storage_meta", "x", "storage_meta", False),
    ("metadata__version", 1, "version", False),
]


@pytest.mark.parametrize(("field", "value", "message", "names_key"), WRONG_FIELDS)
def test_fields_of_a_wrong_type_are_named(
    field: str, value: Any, message: str, names_key: bool
) -> None:
    data = pickle.dumps(torch_metadata(**{field: value}), 4)
    with pytest.raises(FormatError) as caught:
        read_metadata(data, file="some/.metadata")
    assert message in str(caught.value)
    assert "file 'some/.metadata'" in str(caught.value)
    if names_key:
        assert "key 'w'" in str(caught.value)


def test_too_many_axes_are_refused() -> None:
    data = pickle.dumps(torch_metadata(tensor__size=(1,) * 1000), 4)
    with pytest.raises(LimitExceededError, match="1000 axes"):
        read_metadata(data, file=".metadata")


def test_unknown_dtype_is_named() -> None:
    torch = pytest.importorskip("torch")
    data = pickle.dumps(torch_metadata(properties__dtype=torch.quint8), 4)
    with pytest.raises(NotSupportedError, match=r"torch\.quint8"):
        read_metadata(data, file=".metadata")


def test_sparse_layout_is_named() -> None:
    torch = pytest.importorskip("torch")
    data = pickle.dumps(torch_metadata(properties__layout=torch.sparse_coo), 4)
    with pytest.raises(NotSupportedError, match=r"key 'w'.*sparse_coo"):
        read_metadata(data, file=".metadata")


def test_unset_fields_of_newer_releases_are_ignored() -> None:
    data = pickle.dumps(torch_metadata(tensor__unheard_of=None), 4)
    assert tensors_of(read_metadata(data, file=".metadata"))["w"]["shape"] == [2, 3]


def test_fields_of_storage_meta_that_are_not_known_are_kept(tmp_path: Path) -> None:
    dcp = pytest.importorskip("shardpoint.dcp")
    dcp.save({"n": 5}, checkpoint_id=tmp_path, no_dist=True)
    metadata = tmp_path / ".metadata"
    metadata.write_bytes(metadata.read_bytes().replace(b"save_id", b"newer__"))
    state = {"n": 0}
    dcp.load(state, checkpoint_id=tmp_path, no_dist=True)
    assert state == {"n": 5}
    meta = dcp.FileSystemReader(tmp_path).read_metadata().storage_meta
    assert meta.save_id is None
    assert len(meta.newer__) == 32


def test_classes_of_older_checkpoints_are_read() -> None:
    data = pickle.dumps(torch_metadata(), 2)
    old = data.replace(
        b"ctorch.distributed.checkpoint.metadata\nTensorProperties\n",
        b"ctorch.distributed._shard.sharded_tensor.metadata\nTensorProperties\n",
    ).replace(
        b"ctorch.distributed.checkpoint.metadata\n_MEM_FORMAT_ENCODING\n",
        b"ctorch.distributed._shard.sharded_tensor.metadata\nMEM_FORMAT_ENCODING\n",
    )
    assert old.count(b"_shard.sharded_tensor") == 2
    assert as_plain(read_metadata(old, file="x")) == as_plain(read_metadata(data, file="x"))


@pytest.mark.parametrize("protocol", range(2, 6))
def test_every_pickle_protocol_is_read(protocol: int) -> None:
    index = read_metadata(pickle.dumps(torch_metadata(), protocol), file=".metadata")
    assert tensors_of(index)["w"]["chunks"][0]["storage"] == {
        "relative_path": "__0_0.distcp",
        "offset": 5,
        "length": 7,
    }


def test_entry_without_offset_belongs_to_the_chunk_it_counts() -> None:
    index = read_metadata(pickle.dumps(torch_metadata(index__offset=None), 4), file="x")
    assert index.files == ["__0_0.distcp"]
    assert index.chunks.file.tolist() == [0]


def test_chunk_without_storage_has_no_file() -> None:
    data = pickle.dumps(torch_metadata(metadata__storage_data={}), 4)
    index = read_metadata(data, file="x")
    assert index.chunks.file.tolist() == [NO_FILE]
    assert as_plain(read_metadata(write_metadata(index), file="x")) == as_plain(index)


def test_another_class_on_top_is_named() -> None:
    with pytest.raises(FormatError, match="holds a dict, not a Metadata"):
        read_metadata(pickle.dumps({}), file="x")


def part(rank: int, **changes: Any) -> bytes:
    entry = TensorEntry(
        changes.get("key", "w"),
        BY_NAME[changes.get("dtype", "float32")],
        changes.get("shape", (4, 2)),
        [ChunkEntry(changes.get("offsets", (0, 0)), (2, 2), f"__{rank}_0.distcp", 10 * rank, 9)],
    )
    objects = [ObjectEntry("o", f"__{rank}_0.distcp", rank, 1)]
    if changes.get("object_as_tensor"):
        entry, objects = replace(entry, key="o"), []
    keys = [entry.key, *(o.key for o in objects)]
    index = build_index(
        [entry],
        objects,
        key_order=keys,
        paths=changes.get("paths", {key: (key,) for key in keys}),
        storage_meta=None,
        version="1.0.0",
        source="dcp",
        metadata_files=[],
    )
    return write_metadata(index)


def test_ranks_are_joined_in_the_order_of_their_numbers() -> None:
    parts = {
        "__10.metadata": part(10, offsets=(2, 0)),
        "__2.metadata": part(2),
        "__9.metadata": part(9, key="only9", shape=(4, 2)),
    }
    index = read_per_rank_metadata(parts)
    assert list(index.metadata_files) == ["__2.metadata", "__9.metadata", "__10.metadata"]
    chunks = tensors_of(index)["w"]["chunks"]
    assert [c["storage"]["relative_path"] for c in chunks] == ["__2_0.distcp", "__10_0.distcp"]
    assert objects_of(index)["o"]["relative_path"] == "__2_0.distcp"
    assert list(index.key_order) == ["w", "o", "only9"]
    assert index.paths == {"w": ("w",), "o": ("o",), "only9": ("only9",)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": "float64"}, "another rank has float32"),
        ({"shape": (8, 2)}, r"shape \(8, 2\)"),
        ({"paths": {"w": ("x",), "o": ("o",)}}, "ranks differ in its path"),
        ({"paths": None}, "flattened"),
        ({"object_as_tensor": True}, "elsewhere an object"),
    ],
)
def test_ranks_that_disagree_are_refused(changes: Mapping[str, Any], message: str) -> None:
    with pytest.raises(FormatError, match=message):
        read_per_rank_metadata({"__0.metadata": part(0), "__1.metadata": part(1, **changes)})


MORE_THAN_PATHS: list[tuple[Any, Any]] = [
    ([{"rank": 0, "keys": ("w",)}, {"rank": 1, "keys": ()}], None),
    ([("w",)], None),
    ({"w": ("a", "w"), "epoch": 3, "gone": ("gone",)}, {"w": ("a", "w")}),
    ({"w": ("w",), 5: ("x",)}, {"w": ("w",)}),
    ({"other": ("o",), "epoch": 3}, None),
    ({"w": "w"}, None),
    ({"w": ("a", 1.5)}, None),
    ({"w": ("a", True)}, None),
    ({"w": ()}, None),
    ({("a", 1): {1, 2}, None: frozenset({b"x"})}, None),
    ([1 << 3000, -(1 << 70), 300, 70000, -1, 0.5, -0.0, "x" * 300, b"x" * 300, b"", None], None),
    ("text", None),
    (False, None),
    (0, None),
    ((), None),
]


@pytest.mark.parametrize(("data", "paths"), MORE_THAN_PATHS, ids=repr)
def test_planner_data_that_is_more_than_paths_is_kept(data: Any, paths: Any) -> None:
    index = read_metadata(part(0), file="x")
    written = write_metadata(replace(index, paths={"w": ("unused",)}, planner_data=data))
    again = read_metadata(written, file="x")
    assert repr(again.planner_data) == repr(data) or again.planner_data == data
    assert type(again.planner_data) is type(data)
    assert again.paths == paths
    third = read_metadata(write_metadata(again), file="x")
    assert as_plain(third) == as_plain(again)


@pytest.mark.parametrize(("data", "paths"), MORE_THAN_PATHS, ids=repr)
@pytest.mark.parametrize("protocol", [4, 5])
def test_planner_data_of_torch_is_read_and_written_back(
    data: Any, paths: Any, protocol: int
) -> None:
    original = torch_metadata(metadata__planner_data=data)
    index = read_metadata(pickle.dumps(original, protocol), file="x")
    assert (index.planner_data, index.paths) == (data, paths)
    written = pickle.loads(write_metadata(index))
    assert written.planner_data == data
    assert type(written.planner_data) is type(data)
    assert pickle._loads(write_metadata(index)).planner_data == data  # type: ignore[attr-defined]


@pytest.mark.parametrize("data", [None, {}, {"w": ("w", 0), "gone": ("gone",)}])
def test_planner_data_that_is_paths_stays_paths(data: Any) -> None:
    index = read_metadata(pickle.dumps(torch_metadata(metadata__planner_data=data), 4), file="x")
    assert index.planner_data is None
    assert index.paths == data
    assert pickle.loads(write_metadata(index)).planner_data == data


def nested(levels: int) -> Any:
    value: Any = []
    for _ in range(levels - 1):
        value = [value]
    return value


def doubled(levels: int) -> Any:
    value: Any = [0]
    for _ in range(levels):
        value = [value, value]
    return value


def endless() -> Any:
    value: list[Any] = []
    value.append(value)
    return value


def test_planner_data_may_be_nested_and_shared_within_limits() -> None:
    index = read_metadata(part(0), file="x")
    text = "t" * 100_000
    for data in (nested(200), doubled(10), [text] * 1000):
        written = write_metadata(replace(index, planner_data=data))
        assert read_metadata(written, file="x").planner_data == data
        assert len(written) < 300_000


UNWRITABLE = [
    ({"w": ("w",), "x": object()}, FormatError, "planner_data holds a object"),
    ([PurePosixPath("a")], FormatError, "PurePosixPath"),
    ([np.float64(1)], FormatError, "planner_data holds"),
    ({1: [bytearray(b"x")]}, FormatError, "bytearray"),
    ([1j], FormatError, "complex"),
    (len, FormatError, "builtin_function"),
    (OrderedDict(w=("w",)), FormatError, "OrderedDict"),
    (endless(), FormatError, "contains itself"),
    (nested(201), LimitExceededError, "planner_data: nested deeper than 200"),
    (doubled(60), LimitExceededError, "planner_data: has more than"),
]


@pytest.mark.parametrize(("data", "error", "message"), UNWRITABLE)
def test_planner_data_that_cannot_be_written_is_named(
    data: Any, error: type[FormatError], message: str
) -> None:
    index = read_metadata(part(0), file="x")
    with pytest.raises(error, match=message):
        write_metadata(replace(index, planner_data=data))


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        ({"w": ("w",), "x": PurePosixPath("a")}, FormatError, "planner_data holds a PurePosixPath"),
        ([[bytearray(b"x")]], FormatError, "bytearray"),
        (endless(), FormatError, "contains itself"),
        (nested(201), LimitExceededError, "nested deeper"),
        (doubled(60), LimitExceededError, "has more than"),
        ([1j], ForbiddenContentError, "complex"),
        ({"w": ("w",), "x": print}, ForbiddenContentError, "print"),
    ],
)
def test_planner_data_of_torch_that_is_not_plain_is_refused(
    data: Any, error: type[FormatError], message: str
) -> None:
    content = pickle.dumps(torch_metadata(metadata__planner_data=data), 5)
    with pytest.raises(error, match=message) as caught:
        read_metadata(content, file="some/.metadata")
    assert "some/.metadata" in str(caught.value)


def test_torch_objects_in_planner_data_are_refused() -> None:
    whole = torch_metadata()
    for data in (whole.state_dict_metadata, [whole.storage_data], [whole]):
        content = pickle.dumps(torch_metadata(metadata__planner_data=data), 4)
        with pytest.raises(FormatError, match=r"file 'x'.*planner_data holds a [A-Z_]"):
            read_metadata(content, file="x")


def test_planner_data_of_the_first_rank_that_has_any_is_kept() -> None:
    def rank(number: int, data: Any) -> bytes:
        index = read_metadata(part(number, offsets=(2 * number, 0)), file="x")
        return write_metadata(replace(index, planner_data=data))

    def joined(*parts: Any) -> CheckpointIndex:
        return read_per_rank_metadata(
            {f"__{i}.metadata": rank(i, data) for i, data in enumerate(parts)}
        )

    paths = {"w": ("w",), "o": ("o",)}
    index = joined(None, ["one"], ["two"])
    assert (index.planner_data, index.paths) == (["one"], paths)
    index = joined({"w": ("w",), "rank": 0}, {"o": ("o",), "rank": 1})
    assert (index.planner_data, index.paths) == ({"w": ("w",), "rank": 0}, paths)
    index = joined(["zero"], None)
    assert (index.planner_data, index.paths) == (["zero"], paths)
    index = joined(["zero"], ["one"])
    assert (index.planner_data, index.paths) == (["zero"], None)
    with pytest.raises(FormatError, match="ranks differ in its path"):
        joined({"w": ("w",), "rank": 0}, {"w": ("v",), "rank": 1})


texts = st.text(st.characters(codec="utf-8"), max_size=6)
numbers = st.one_of(st.integers(0, 300), st.integers(0, 2**63 - 1))


@st.composite
def indexes(draw: st.DrawFn) -> CheckpointIndex:
    keys = draw(st.lists(texts, unique=True, max_size=5))
    tensors, objects = [], []
    place = st.tuples(texts.map(lambda t: t + "f"), numbers, numbers, st.sampled_from([(), ("z",)]))
    for key in keys:
        if draw(st.booleans()):
            file, offset, length, transforms = draw(place)
            objects.append(ObjectEntry(key, file, offset, length, transforms))
            continue
        axes = draw(st.integers(0, 5))
        boxes = st.lists(numbers, min_size=axes, max_size=axes).map(tuple)
        chunks = []
        for offsets in draw(st.lists(boxes, unique=True, max_size=4)):
            file, offset, length, transforms = draw(place)
            entry = ChunkEntry(offsets, draw(boxes), file, offset, length, transforms=transforms)
            # Sizes of any number: without strides given, their products would not fit.
            chunks.append(replace(entry, strides=(0,) * axes))
        tensors.append(
            TensorEntry(
                key,
                draw(st.sampled_from(BY_CODE)),
                draw(boxes),
                chunks,
                draw(st.booleans()),
                draw(st.booleans()),
                draw(st.integers(0, 2)),
            )
        )
    path = st.lists(st.one_of(texts, numbers), min_size=1, max_size=5).map(tuple)
    paths = draw(st.none() | st.fixed_dictionaries(dict.fromkeys(keys, path)))
    return build_index(
        tensors,
        objects,
        key_order=keys,
        paths=paths,
        storage_meta=draw(
            st.none()
            | st.fixed_dictionaries(
                {
                    "checkpoint_id": st.none() | texts | st.just(PurePosixPath("/a/b.c")),
                    "modules": st.lists(texts, max_size=2),
                }
            )
        ),
        version=draw(st.none() | texts),
        source="dcp",
        metadata_files=[".metadata"],
    )


keys_of_plain = st.none() | st.booleans() | st.integers() | texts | st.binary(max_size=4)
plain_values = st.recursive(
    keys_of_plain | st.floats(allow_nan=False) | st.frozensets(keys_of_plain, max_size=3),
    lambda parts: st.one_of(
        st.lists(parts, max_size=3),
        st.lists(parts, max_size=3).map(tuple),
        st.dictionaries(keys_of_plain, parts, max_size=3),
        st.sets(keys_of_plain, max_size=3),
    ),
    max_leaves=12,
)


@given(index=indexes(), data=plain_values)
def test_any_plain_planner_data_survives(index: CheckpointIndex, data: Any) -> None:
    written = write_metadata(replace(index, paths=None, planner_data=data))
    again = read_metadata(written, file="x")
    # All proper paths, an empty dict among them, are read as paths.
    read = again.paths if again.planner_data is None else again.planner_data
    assert repr(read) == repr(data) or read == data


@given(index=indexes())
def test_any_index_survives_writing_and_reading(index: CheckpointIndex) -> None:
    data = write_metadata(index)
    again = read_metadata(data, file=".metadata")
    assert as_plain(again) == as_plain(index)
    for name in ("offsets", "sizes", "tensor", "record_offset", "record_length"):
        mine, theirs = getattr(again.chunks, name), getattr(index.chunks, name)
        assert mine.dtype == theirs.dtype
        np.testing.assert_array_equal(mine, theirs)
    np.testing.assert_array_equal(again.tensors.shape, index.tensors.shape)
    np.testing.assert_array_equal(again.tensors.first_chunk, index.tensors.first_chunk)


@given(index=indexes())
def test_any_written_index_is_read_by_the_standard_unpickler(index: CheckpointIndex) -> None:
    pytest.importorskip("torch.distributed.checkpoint.metadata")
    metadata = pickle.loads(write_metadata(index))
    assert list(metadata.state_dict_metadata) == list(index.key_order)
    stored = index.paths if index.planner_data is None else index.planner_data
    assert metadata.planner_data == stored
    assert len(metadata.storage_data) == len(index.chunks) + len(index.objects)


def test_paths_are_written_as_paths() -> None:
    index = replace(
        read_fixture(COLLECTIVE[0]), storage_meta={"checkpoint_id": PurePosixPath("runs/a/b")}
    )
    pytest.importorskip("torch.distributed.checkpoint.metadata")
    stored = pickle.loads(write_metadata(index)).storage_meta.checkpoint_id
    assert stored == pathlib.Path("runs/a/b")
    assert isinstance(stored, pathlib.Path)


def large_index() -> CheckpointIndex:
    count = 9_000
    tensors = [
        TensorEntry(
            f"layers.{i}.weight",
            BY_NAME["bfloat16"],
            (8 * 64, 32),
            [
                ChunkEntry((r * 64, 0), (64, 32), f"__{r}_0.distcp", i * 5000, 4997)
                for r in range(8)
            ],
        )
        for i in range(count // 8)
    ]
    return build_index(
        tensors,
        [],
        key_order=[t.key for t in tensors],
        paths=None,
        storage_meta=None,
        version="1.0.0",
        source="dcp",
        metadata_files=[".metadata"],
    )


def test_large_index_survives_and_garbage_is_collected_again() -> None:
    index = large_index()
    data = write_metadata(index)
    assert len(data) > 1 << 20
    assert gc.isenabled()
    assert as_plain(read_metadata(data, file=".metadata")) == as_plain(index)
    assert gc.isenabled()
    with pytest.raises(FormatError):
        read_metadata(data[:-1] + b"\xfe", file=".metadata")
    assert gc.isenabled()


def test_raw_chunks_cannot_be_written() -> None:
    index = read_fixture(COLLECTIVE[0])
    raw = replace(index.chunks, container=np.full(len(index.chunks), Container.RAW, np.uint8))
    with pytest.raises(NotSupportedError):
        write_metadata(replace(index, chunks=raw))


def test_storage_meta_that_no_reader_knows_cannot_be_written() -> None:
    index = replace(read_fixture(COLLECTIVE[0]), storage_meta={"modules": object()})
    with pytest.raises(FormatError, match="modules"):
        write_metadata(index)


def test_public_names() -> None:
    assert sorted(dcp_metadata.__all__) == [
        "read_metadata",
        "read_per_rank_metadata",
        "write_metadata",
    ]
