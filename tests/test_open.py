"""`shardpoint.open` on every checkpoint that a torch release wrote. Runs without torch."""

from __future__ import annotations

import itertools
import os
import pickle
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import shardpoint
from engine_support import grid, save
from fixture_support import (
    PUBLIC,
    Fixture,
    assert_same_array,
    assert_same_object,
    decode_object,
    public_fixtures,
)
from shardpoint import (
    Checkpoint,
    CheckpointKeyError,
    CheckpointNotFoundError,
    CorruptionError,
    PlanError,
    StorageError,
)
from shardpoint.dtypes import dtype_named
from shardpoint.formats.dcp_metadata import write_metadata
from shardpoint.formats.object_decoder import DeviceValue, DTypeValue, TensorSize
from shardpoint.index import ObjectEntry, TensorEntry, build_index
from shardpoint.storage import LocalStorage
from shardpoint.tree import unflatten

PLAIN = PUBLIC / "2.13.0" / "plain_w1" / "ckpt"
PLACES = [(fixture, place) for fixture in public_fixtures() for place in fixture.places]
PLACE_NAMES = [f"{fixture}-{place.name}" for fixture, place in PLACES]

every_place = pytest.mark.parametrize(("fixture", "place"), PLACES, ids=PLACE_NAMES)


def expected_object(fixture: Fixture, key: str) -> Any:
    return decode_object(
        fixture.objects[key], size=TensorSize, dtype=DTypeValue, device=DeviceValue
    )


def plain() -> Fixture:
    return next(f for f in public_fixtures() if f.checkpoint == PLAIN)


@every_place
def test_every_value_is_the_one_that_was_saved(fixture: Fixture, place: Path) -> None:
    checkpoint = shardpoint.open(place)
    assert set(checkpoint.keys()) == fixture.keys
    assert list(checkpoint) == list(checkpoint.keys())
    assert len(checkpoint) == len(fixture.keys)
    for key, expected in fixture.tensors.items():
        assert_same_array(checkpoint[key], expected, key)
    for key in fixture.objects:
        assert_same_object(checkpoint[key], expected_object(fixture, key), key)


@every_place
def test_info_tells_what_the_metadata_says(fixture: Fixture, place: Path) -> None:
    checkpoint = shardpoint.open(place)
    for key, entry in fixture.expected["tensors"].items():
        info = checkpoint.info(key)
        assert isinstance(info, shardpoint.TensorInfo)
        assert info.key == key
        assert info.shape == tuple(entry["shape"])
        assert info.dtype == entry["dtype"]
        assert info.nbytes == fixture.tensors[key].nbytes
        assert info.numpy_dtype == fixture.tensors[key].dtype
        assert info.path == (None if entry["path"] is None else tuple(entry["path"]))
        described = entry.get("consolidated_chunks", entry.get("chunks", []))
        if "per_rank" not in fixture.expected and described:
            assert {(c.offsets, c.sizes) for c in info.chunks} == {
                (tuple(c["offsets"]), tuple(c["sizes"])) for c in described
            }
        for chunk, storage in itertools.product(info.chunks, described):
            if "storage" in storage and chunk.offsets == tuple(storage["offsets"]):
                where = storage["storage"]
                assert chunk.file == where["relative_path"]
                assert chunk.transforms == tuple(where.get("transform_descriptors") or ())
                if fixture.expected["format"] == "fs":
                    assert chunk.record_offset == where["offset"]
                    assert chunk.record_length == where["length"]
    for key, entry in fixture.expected["objects"].items():
        info = checkpoint.info(key)
        assert isinstance(info, shardpoint.ObjectInfo)
        assert info.path == (None if entry["path"] is None else tuple(entry["path"]))
        if "storage" in entry:
            assert info.file == entry["storage"]["relative_path"]
            assert info.record_offset == entry["storage"]["offset"]
            assert info.nbytes == entry["storage"]["length"]


@every_place
def test_the_tree_is_the_nested_state(fixture: Fixture, place: Path) -> None:
    values: dict[str, Any] = {
        **fixture.tensors,
        **{key: expected_object(fixture, key) for key in fixture.objects},
    }
    paths = {key: (key,) if path is None else path for key, path in fixture.paths.items()}
    assert_same_tree(shardpoint.open(place).tree(), unflatten(values, paths))


def assert_same_tree(found: Any, expected: Any) -> None:
    """Compare without regard to the order of names, which expected.json does not keep."""
    if isinstance(expected, dict):
        assert type(found) is type(expected)
        assert set(found) == set(expected)
        for name, value in expected.items():
            assert_same_tree(found[name], value)
    elif isinstance(expected, list):
        assert isinstance(found, list)
        assert len(found) == len(expected)
        for left, right in zip(found, expected, strict=True):
            assert_same_tree(left, right)
    else:
        assert_same_object(found, expected)


@every_place
def test_nothing_is_wrong_with_what_torch_wrote(fixture: Fixture, place: Path) -> None:
    report = shardpoint.open(place).verify()
    assert report.problems == ()
    assert report.ok
    assert (report.tensors, report.objects) == (len(fixture.tensors), len(fixture.objects))
    assert report.bytes_read > 0
    assert "no problems" in str(report)


def test_keys_come_in_saved_order() -> None:
    keys = list(shardpoint.open(PLAIN).keys())
    tensors = list(plain().expected["tensors"])
    assert [key for key in keys if key in plain().expected["tensors"]] == tensors
    assert keys != sorted(keys)


def test_no_torch_is_needed_for_any_of_this() -> None:
    """The environment of the core has none; where there is one, test_layers looks."""
    assert shardpoint.open(PLAIN)["dtypes.bfloat16"].dtype.name == "bfloat16"


SLICED = [
    "shapes.transposed",
    "shapes.conj_view",
    "shapes.neg_view",
    "shapes.channels_last",
    "shapes.permuted_3d",
    "shapes.five_d",
    "shapes.scalar_f32",
    "shapes.empty_2x0x4_i16",
    "dtypes.complex128",
    "dtypes.float8_e4m3fn",
]

bound = st.none() | st.integers(-9, 9)
slices = st.builds(slice, bound, bound, st.sampled_from([None, 1, 2, 3, -1, -2]))


@pytest.mark.parametrize("key", SLICED)
def test_slices_are_those_of_numpy(key: str) -> None:
    checkpoint = shardpoint.open(PLAIN)
    whole = plain().tensors[key]

    @settings(max_examples=60)
    @given(st.data())
    def check(data: st.DataObject) -> None:
        def one_of_each(sizes: tuple[int, ...]) -> list[Any]:
            return [data.draw(slices | st.integers(-n, n - 1) if n else slices) for n in sizes]

        left = data.draw(st.integers(0, whole.ndim))
        right = data.draw(st.integers(left, whole.ndim))
        selection = one_of_each(whole.shape[:left])
        if data.draw(st.booleans()):
            selection += [..., *one_of_each(whole.shape[right:])]
        expected = np.asarray(whole[tuple(selection)])
        found = checkpoint.read(key, tuple(selection))
        assert_same_array(found, expected, selection)
        assert found.flags.writeable
        assert found.flags.c_contiguous

    check()


DISTRIBUTED = ["dtensor_1d_w4", "dtensor_2d_w4", "fsdp2_w2", "zstd_w2", "hf_dist_w2"]


@pytest.mark.parametrize("case", DISTRIBUTED)
def test_slices_across_chunks(case: str) -> None:
    fixture = next(f for f in public_fixtures() if f.name == f"2.13.0/{case}")
    checkpoint = shardpoint.open(fixture.checkpoint)
    for key, whole in fixture.tensors.items():
        part = tuple(slice(size // 4, size - size // 4) for size in whole.shape)
        assert_same_array(checkpoint.read(key, part), np.asarray(whole[part]), key)
        middle = tuple(size // 2 for size in whole.shape if size)
        if len(middle) == whole.ndim:
            assert_same_array(checkpoint.read(key, middle), np.asarray(whole[middle]), key)


@pytest.mark.parametrize(
    ("selection", "message"),
    [
        ((0, 0, 0), "3 slices for a tensor of shape"),
        ((99,), "out of range for axis 0"),
        ((0, -99), "out of range for axis 1"),
        ((..., ...), "more than one Ellipsis"),
        ((None,), "NoneType selects nothing"),
        ((True,), "bool selects nothing"),
        ((slice("a", None),), "slice indices"),
        ((slice(None, None, 0),), "zero"),
        (([0, 1],), "list selects nothing"),
        ([0, 1], "list selects nothing"),
        (1.0, "float selects nothing"),
    ],
)
def test_slices_that_do_not_fit_are_refused(selection: Any, message: str) -> None:
    with pytest.raises(PlanError, match=message) as caught:
        shardpoint.open(PLAIN).read("shapes.transposed", selection)
    assert "shapes.transposed" in str(caught.value)


def test_arrays_are_the_callers_own() -> None:
    checkpoint = shardpoint.open(PLAIN)
    first = checkpoint["dtypes.float32"]
    first[...] = 0
    assert_same_array(checkpoint["dtypes.float32"], plain().tensors["dtypes.float32"])


@pytest.mark.parametrize("name", ["full.pt", "full_legacy.pt"])
def test_objects_of_a_torch_save_file_are_the_callers_own(name: str) -> None:
    checkpoint = shardpoint.open(PUBLIC / "2.13.0" / "torch_save_w1" / "ckpt" / name)
    key = "optim.param_groups.0.params"
    checkpoint[key].append("changed")
    assert checkpoint[key] == [0, 1, 2, 3]


def test_objects_have_no_slices() -> None:
    with pytest.raises(PlanError, match=r"objects\.int"):
        shardpoint.open(PLAIN).read("objects.int", (0,))


def test_a_missing_key_names_similar_ones() -> None:
    checkpoint = shardpoint.open(PLAIN)
    assert "dtypes.float32" in checkpoint
    assert "dtypes.float33" not in checkpoint
    assert 3 not in checkpoint
    for use in (checkpoint.__getitem__, checkpoint.info, checkpoint.read):
        with pytest.raises(CheckpointKeyError, match=r"similar: 'dtypes.float32'"):
            use("dtypes.float33")
    with pytest.raises(CheckpointKeyError):
        checkpoint[["unhashable"]]  # type: ignore[index]


def test_a_prefix_selects_a_branch() -> None:
    checkpoint = shardpoint.open(PLAIN)
    branch = checkpoint.tree("objects.nested")
    assert branch == {"a": {"b": {"c": [1, 2, {"d": "deep"}]}}, "lr": 0.0003}
    assert checkpoint.tree("objects.nested.a.b.c.1") == 2
    assert checkpoint.tree("objects.nested.a.b.c") == [1, 2, {"d": "deep"}]
    with pytest.raises(CheckpointKeyError, match=r"prefix 'objects\.nest'"):
        checkpoint.tree("objects.nest")


def test_a_prefix_may_end_inside_a_dotted_name() -> None:
    fixture = next(f for f in public_fixtures() if f.name == "2.13.0/optim_w1")
    checkpoint = shardpoint.open(fixture.checkpoint)
    assert fixture.paths["model.fc1.weight"] == ("model", "fc1.weight")
    assert set(checkpoint.tree("model.fc1")) == {"weight", "bias"}
    assert_same_array(checkpoint.tree("model.fc1.weight"), fixture.tensors["model.fc1.weight"])
    flat = shardpoint.open(PUBLIC / "2.13.0" / "hf_full_w1" / "ckpt")
    assert set(flat.tree("model")) == {
        key.removeprefix("model.") for key in flat if key.startswith("model.")
    }


def test_a_closed_checkpoint_reads_nothing() -> None:
    with shardpoint.open(PLAIN) as checkpoint:
        assert isinstance(checkpoint, Checkpoint)
        assert checkpoint["top_int"] == 11
    for use in (
        lambda: checkpoint["top_int"],
        lambda: checkpoint["dtypes.float32"],
        checkpoint.tree,
        checkpoint.verify,
        checkpoint.file_sizes,
    ):
        with pytest.raises(StorageError, match="closed"):
            use()


@pytest.mark.parametrize("threads", [0, -1])
def test_threads_are_at_least_one(threads: int) -> None:
    with pytest.raises(PlanError, match="threads"):
        shardpoint.open(PLAIN, threads=threads)


def test_one_thread_gives_the_same() -> None:
    checkpoint = shardpoint.open(str(PLAIN), threads=1)
    for key, expected in plain().tensors.items():
        assert_same_array(checkpoint[key], expected, key)


def test_a_place_without_a_checkpoint(tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path / "nothing", tmp_path / "nothing.pt"):
        with pytest.raises(CheckpointNotFoundError) as caught:
            shardpoint.open(place)
        assert str(place) in str(caught.value)


def test_reprs_are_short_and_say_what_it_is() -> None:
    checkpoint = shardpoint.open(PLAIN)
    assert repr(checkpoint) == f"<Checkpoint {str(PLAIN)!r} (dcp): 50 tensors, 37 objects>"
    info = repr(checkpoint.info("dtypes.float32"))
    assert info == "TensorInfo('dtypes.float32', float32[5, 6], 120 bytes, 1 chunk in 1 file)"
    assert "1,261 bytes in '__0_0.distcp'" in repr(checkpoint.info("objects.int"))


def damaged(tmp_path: Path, key: str) -> Path:
    """Copy a checkpoint and flip one bit in the elements of a tensor."""
    place = tmp_path / "damaged"
    shutil.copytree(PLAIN, place)
    wanted = plain().tensors[key].tobytes()
    file = place / "__0_0.distcp"
    data = bytearray(file.read_bytes())
    assert data.count(wanted) == 1
    data[data.find(wanted)] ^= 1
    file.write_bytes(data)
    return place


def test_changed_bytes_are_found_unless_checksums_are_off(tmp_path: Path) -> None:
    place = damaged(tmp_path, "dtypes.float64")
    with pytest.raises(CorruptionError) as caught:
        shardpoint.open(place)["dtypes.float64"]
    assert "dtypes.float64" in str(caught.value)
    assert "__0_0.distcp" in str(caught.value)
    unchecked = shardpoint.open(place, verify=False)["dtypes.float64"]
    assert (unchecked != plain().tensors["dtypes.float64"]).sum() == 1


def test_verify_reports_every_problem_with_its_place(tmp_path: Path) -> None:
    place = damaged(tmp_path, "dtypes.float64")
    whole = shardpoint.open(PLAIN)
    step = whole.info("top_int")
    assert isinstance(step, shardpoint.ObjectInfo)
    assert step.file is not None
    with (place / step.file).open("r+b") as file:
        file.seek(step.record_offset)
        file.write(b"\0" * step.record_length)
    report = shardpoint.open(place, verify=False).verify()
    assert not report.ok
    assert {problem.key for problem in report.problems} == {"dtypes.float64", "top_int"}
    assert {problem.file for problem in report.problems} == {"__0_0.distcp"}
    assert all(problem.offset is not None for problem in report.problems)
    assert "2 problems" in str(report)


def test_verify_reports_a_missing_file(tmp_path: Path) -> None:
    source = PUBLIC / "2.13.0" / "dtensor_2d_w4" / "ckpt"
    place = tmp_path / "part"
    shutil.copytree(source, place)
    (place / "__3_0.distcp").unlink()
    report = shardpoint.open(place).verify()
    assert report.problems
    assert any(problem.file == "__3_0.distcp" for problem in report.problems)


def test_a_quick_look_reads_no_data(tmp_path: Path) -> None:
    place = damaged(tmp_path, "dtypes.float64")
    checkpoint = shardpoint.open(place)
    assert not checkpoint.verify().ok
    report = checkpoint.verify(quick=True)
    assert report.ok
    assert (report.chunks_read, report.bytes_read) == (0, 0)
    assert (report.tensors, report.objects) == (len(plain().tensors), len(plain().objects))


def test_a_quick_look_finds_missing_and_short_files(tmp_path: Path) -> None:
    place = tmp_path / "part"
    shutil.copytree(PUBLIC / "2.13.0" / "dtensor_2d_w4" / "ckpt", place)
    (place / "__3_0.distcp").unlink()
    short = place / "__2_0.distcp"
    os.truncate(short, short.stat().st_size - 1)
    report = shardpoint.open(place).verify(quick=True)
    assert {problem.file for problem in report.problems} == {"__2_0.distcp", "__3_0.distcp"}


def test_verification_tells_how_far_it_is() -> None:
    told: list[tuple[int, int]] = []
    shardpoint.open(PLAIN).verify(progress=lambda done, total: told.append((done, total)))
    assert told
    assert told == sorted(told)
    assert told[-1][0] == told[-1][1] >= sum(array.nbytes for array in plain().tensors.values())
    told.clear()
    shardpoint.open(PLAIN).verify(quick=True, progress=lambda done, total: told.append((0, 0)))
    assert told == []


def test_file_sizes_name_what_is_missing(tmp_path: Path) -> None:
    place = tmp_path / "part"
    shutil.copytree(PUBLIC / "2.13.0" / "dtensor_2d_w4" / "ckpt", place)
    (place / "__3_0.distcp").unlink()
    sizes = shardpoint.open(place).file_sizes()
    assert sizes.pop("__3_0.distcp") is None
    assert next(iter(sizes)) == ".metadata"
    assert sizes == {path.name: path.stat().st_size for path in place.iterdir()}


def test_classes_can_be_allowed_by_name() -> None:
    class Config:
        pass

    place = PUBLIC.parent / "hostile" / "bytes_unknown_class" / "ckpt"
    with pytest.raises(shardpoint.ForbiddenContentError, match=r"myproject\.config\.Config"):
        shardpoint.open(place)["cfg.name"]
    value = shardpoint.open(place, allowed={"myproject.config.Config": Config})["cfg.name"]
    assert isinstance(value, Config)


def test_a_problems_place_is_said_once(tmp_path: Path) -> None:
    place = damaged(tmp_path, "dtypes.float64")
    entry = shardpoint.open(PLAIN).info("top_int")
    assert isinstance(entry, shardpoint.ObjectInfo)
    with (place / "__0_0.distcp").open("r+b") as file:
        file.seek(entry.record_offset)
        file.write(b"\0" * entry.record_length)
    report = shardpoint.open(place).verify()
    assert len(report.problems) == 2
    for problem in report.problems:
        assert str(problem).count(repr(problem.key)) == 1
        assert str(problem).count(repr(problem.file)) == 1


def test_many_bad_chunks_of_one_tensor_are_each_reported(tmp_path: Path) -> None:
    array = np.arange(2048, dtype=np.float32).reshape(256, 8)
    chunks = grid("x", array.shape, [list(range(4, 256, 4)), []])
    index = save(LocalStorage(tmp_path), {"x": array}, chunks)
    for row in range(len(index.chunks)):
        file = tmp_path / index.files[index.chunks.file[row]]
        at = int(index.chunks.record_offset[row])
        data = bytearray(file.read_bytes())
        position = data.index(array[4 * row : 4 * row + 4].tobytes(), at)
        data[position] ^= 1
        file.write_bytes(data)
    (tmp_path / ".metadata").write_bytes(write_metadata(index))
    report = shardpoint.open(tmp_path).verify()
    assert len(report.problems) == report.chunks == report.chunks_read == 64
    assert {(problem.key, problem.file) for problem in report.problems} == {
        ("x", "__0_0.distcp"),
        ("x", "__1_0.distcp"),
    }


def test_verify_reads_neighbouring_objects_together(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    open_file = LocalStorage.open
    monkeypatch.setattr(
        LocalStorage, "open", lambda self, name: opened.append(name) or open_file(self, name)
    )
    checkpoint = shardpoint.open(PLAIN)
    assert len(checkpoint.index.objects) > 3
    opened.clear()
    checkpoint.tree()
    assert opened == ["__0_0.distcp"] * 2
    opened.clear()
    assert checkpoint.verify().ok
    assert opened == ["__0_0.distcp"] * 2


@pytest.mark.parametrize("protocol", [2, 5])
def test_a_handle_is_pickled_as_where_it_lies(
    protocol: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(PLAIN, tmp_path / "ckpt")
    monkeypatch.chdir(tmp_path)
    checkpoint = shardpoint.open("ckpt", threads=3, verify=False)
    data = pickle.dumps(checkpoint, protocol)
    assert len(data) < 1000
    monkeypatch.chdir("/")
    again = pickle.loads(data)
    assert again.location == checkpoint.location
    assert_same_array(again["dtypes.float64"], plain().tensors["dtypes.float64"], "dtypes.float64")
    checkpoint.close()
    with pytest.raises(StorageError, match="closed"):
        pickle.dumps(checkpoint, protocol)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"path": os.fsencode(PLAIN)}, "a path must be a str"),
        ({"threads": "a"}, "threads must be an int"),
        ({"threads": 1.5}, "threads must be an int"),
        ({"threads": True}, "threads must be an int"),
        ({"allowed": ["a.B"]}, "allowed must map"),
        ({"allowed": {"a.B": "a.B"}}, "allowed must map"),
        ({"allowed": {int: int}}, "allowed must map"),
    ],
)
def test_arguments_of_another_kind_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        shardpoint.open(**{"path": PLAIN, **arguments})


def test_a_prefix_of_another_kind_is_refused() -> None:
    with pytest.raises(TypeError, match="a prefix must be a str, not int"):
        shardpoint.open(PLAIN).tree(3)  # type: ignore[arg-type]


def test_a_missing_key_is_not_compared_with_millions(monkeypatch: pytest.MonkeyPatch) -> None:
    index = build_index(
        [],
        [ObjectEntry(f"k{i}", None, value=i) for i in range(20_000)],
        key_order=[f"k{i}" for i in range(20_000)],
        paths=None,
        storage_meta=None,
        version=None,
        source="torch",
        metadata_files=[],
    )
    checkpoint = Checkpoint(index, LocalStorage(PLAIN), allowed={}, verify=True, threads=1)
    compared: list[int] = []

    def count(word: str, possibilities: Any, **_: Any) -> list[str]:
        compared.append(len(word))
        compared.append(len(list(possibilities)))
        return []

    monkeypatch.setattr("difflib.get_close_matches", count)
    with pytest.raises(CheckpointKeyError):
        checkpoint["k" * 100_000]
    letters, keys = compared
    assert letters <= 1000
    assert keys <= 10_000


def of_shape(shape: tuple[int, ...]) -> Checkpoint:
    """Return a checkpoint whose index names one tensor without chunks."""
    index = build_index(
        [TensorEntry("x", dtype_named("float32"), shape, [])],
        [],
        key_order=["x"],
        paths=None,
        storage_meta=None,
        version=None,
        source="dcp",
        metadata_files=[],
    )
    return Checkpoint(index, LocalStorage(PLAIN), allowed={}, verify=True, threads=1)


def test_a_negative_shape_is_the_same_error_everywhere() -> None:
    checkpoint = of_shape((-3, 4))
    message = r"the shape \(-3, 4\) has a negative number"
    report = checkpoint.verify()
    assert [problem.key for problem in report.problems] == ["x"]
    assert re.search(message, str(report.problems[0]))
    for read in (lambda: checkpoint["x"], checkpoint.tree, lambda: checkpoint.read("x", slice(1))):
        with pytest.raises(PlanError, match=message):
            read()


def test_an_empty_shape_that_only_torch_has_is_no_damage() -> None:
    checkpoint = of_shape((1 << 62, 0, 1 << 62))
    assert checkpoint.verify().ok
    with pytest.raises(shardpoint.LimitExceededError, match="numpy has no array"):
        checkpoint["x"]
    assert checkpoint.read("x", (slice(2), slice(None), 3)).shape == (2, 0)
