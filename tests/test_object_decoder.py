"""Objects out of torch.save's pickles: what training state is made of, and nothing else."""

from __future__ import annotations

import argparse
import collections
import contextlib
import datetime
import enum
import io
import math
import pathlib
import pickle
import subprocess
import sys
import time
import types
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fixture_support import (
    HOSTILE,
    Fixture,
    assert_same_object,
    public_fixtures,
)
from fixture_support import decode_object as decode_expected
from shardpoint.errors import (
    ForbiddenContentError,
    FormatError,
    LimitExceededError,
    NotSupportedError,
    ShardpointError,
)
from shardpoint.formats.object_decoder import (
    DeviceValue,
    DTypeValue,
    LayoutValue,
    NumpyFactory,
    StorageReference,
    TensorDescription,
    TensorSize,
    decode_object,
    read_tensor_description,
)

PROTOCOLS = [2, 3, 4, 5]


def decode(
    data: bytes,
    storages: Mapping[str, bytes] | None = None,
    allowed: Mapping[str, Callable[..., Any]] | None = None,
) -> Any:
    return decode_object(
        data,
        load_storage=lambda dtype, key, location, count: (storages or {})[key],
        source="key 'k'",
        factory=NumpyFactory(),
        allowed=allowed or {},
    )


def decode_record(record: bytes) -> Any:
    with zipfile.ZipFile(io.BytesIO(record)) as archive:
        return decode_object(
            archive.read("archive/data.pkl"),
            load_storage=lambda dtype, key, location, count: archive.read(f"archive/data/{key}"),
            source="key 'k'",
            factory=NumpyFactory(),
            allowed={},
        )


def saved(value: Any, protocol: int = 2) -> bytes:
    torch = pytest.importorskip("torch")
    buffer = io.BytesIO()
    torch.save(value, buffer, pickle_protocol=protocol)
    return buffer.getvalue()


def pickle_of(record: bytes) -> bytes:
    return zipfile.ZipFile(io.BytesIO(record)).read("archive/data.pkl")


# zipfile cannot read records whose checksums are left out; other tests read those.
ZIPPED = [f for f in public_fixtures() if f.is_dcp and f.case not in ("zstd_w2", "crc_off_w1")]
WITH_OBJECTS = [f for f in ZIPPED if f.objects]


@pytest.mark.parametrize("fixture", WITH_OBJECTS, ids=str)
def test_every_object_of_every_release(fixture: Fixture) -> None:
    for key, entry in fixture.expected["objects"].items():
        place = entry["storage"]
        content = (fixture.checkpoint / place["relative_path"]).read_bytes()
        record = content[place["offset"] : place["offset"] + place["length"]]
        wanted = decode_expected(entry["value"], size=TensorSize, dtype=DTypeValue)
        assert_same_object(decode_record(record), wanted, key)


@pytest.mark.parametrize("fixture", [f for f in ZIPPED if f.expected["format"] == "fs"], ids=str)
def test_every_tensor_record_is_described(fixture: Fixture) -> None:
    for key, entry in fixture.expected["tensors"].items():
        for chunk in entry["chunks"]:
            place = chunk["storage"]
            content = (fixture.checkpoint / place["relative_path"]).read_bytes()
            record = content[place["offset"] : place["offset"] + place["length"]]
            description = read_tensor_description(pickle_of(record), source=key)
            assert description.dtype.name == entry["dtype"]
            assert list(description.shape) == chunk["sizes"]
            assert description.storage_key == "0"
            assert description.storage_offset == 0
            count = math.prod(chunk["sizes"])
            assert description.storage_nbytes == count * description.dtype.itemsize


class Named(enum.Enum):
    FIRST = 1


VALUES = [
    None,
    True,
    -1,
    2**70,
    -(2**70),
    0.1,
    1 + 2j,
    "text",
    b"",
    b"ab\xff",
    bytearray(b"xy"),
    bytearray(),
    [1, [2]],
    (1, (2, ())),
    {"a": {1: None}},
    {1, 2},
    set(),
    frozenset({3}),
    slice(1, None, 2),
    range(3, 9, 2),
    datetime.datetime(2020, 1, 2, 3, 4, 5, 6),
    datetime.datetime(2020, 1, 2, tzinfo=datetime.UTC),
    datetime.date(2020, 1, 1),
    datetime.time(3, 4),
    datetime.timedelta(3, 4, 5),
    datetime.timezone(datetime.timedelta(hours=2), "x"),
    pathlib.PurePosixPath("a/b"),
    pathlib.PureWindowsPath("c:\\x"),
    pathlib.Path("/a/b"),
    collections.OrderedDict([("z", 1), ("a", 2)]),
    collections.Counter("aab"),
    collections.defaultdict(list, {"a": [1]}),
    collections.defaultdict(None, {"a": 1}),
    collections.deque([1, 2], 5),
    collections.deque([1]),
    np.float32(1.5),
    np.int64(3),
    np.bool_(True),
    np.float64(2),
    np.complex64(1j),
    np.str_("abc"),
]


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("value", VALUES, ids=lambda v: f"{type(v).__name__}-{v!r:.20}")
def test_harmless_values_come_out_as_they_went_in(value: Any, protocol: int) -> None:
    result = decode(pickle.dumps([value, value], protocol))
    assert result == [value, value]
    assert type(result[0]) is type(value)
    if isinstance(value, collections.defaultdict):
        assert result[0].default_factory is value.default_factory
    if isinstance(value, collections.deque):
        assert result[0].maxlen == value.maxlen


ARRAYS = [
    np.arange(6).reshape(2, 3),
    np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    np.zeros((0, 3), np.float16),
    np.array(["ab", "c"]),
    np.array([b"ab"]),
    np.array(3.0),
    np.arange(3, dtype=">i4"),
    np.array([True, False]),
    np.array([1 + 2j]),
]


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("array", ARRAYS, ids=lambda a: f"{a.dtype}-{a.shape}")
def test_numpy_arrays(array: Any, protocol: int) -> None:
    data = pickle.dumps({"a": array, "again": array}, protocol)
    result, wanted = decode(data), pickle.loads(data)
    np.testing.assert_array_equal(result["a"], wanted["a"])
    assert result["a"].dtype == wanted["a"].dtype
    assert result["a"].flags.f_contiguous == wanted["a"].flags.f_contiguous
    assert result["a"] is result["again"]


@pytest.mark.parametrize(
    "value",
    [
        np.array([object()]),
        np.zeros(2, [("a", "i4")]),
        np.array(["2020-01-01"], "datetime64[D]"),
        np.dtype("f4"),
    ],
    ids=["objects", "records", "dates", "dtype"],
)
def test_other_kinds_of_numpy_values_are_refused(value: Any) -> None:
    with pytest.raises((NotSupportedError, ForbiddenContentError)):
        decode(pickle.dumps(value, 4))


def test_numpy_array_is_not_made_by_the_shape_it_claims() -> None:
    data = pickle.dumps(np.zeros(8, np.uint8), 2)
    assert data.count(b"(K\x01K\x08\x85") == 1
    huge = data.replace(b"(K\x01K\x08\x85", b"(K\x01J\xff\xff\xff\x7f\x85")
    with pytest.raises(FormatError, match="8 bytes"):
        decode(huge)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_torch_values(protocol: int) -> None:
    torch = pytest.importorskip("torch")
    base = torch.arange(12.0)
    value = {
        "tensor": base.reshape(3, 4).t(),
        "view": base[4:8],
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "size": torch.Size([1, 2]),
        "dtype": torch.bfloat16,
        "devices": [torch.device("cuda:1"), torch.device("cpu")],
        "layout": torch.strided,
        "bfloat16": torch.tensor([1.5], dtype=torch.bfloat16),
        "uint16": torch.tensor([1, 2]).to(torch.uint16),
        "float8": torch.tensor([1.5]).to(torch.float8_e5m2),
        "conjugate": torch.tensor([1 + 2j]).conj(),
        "negative": torch.tensor([1 + 2j]).conj().imag,
        "expanded": torch.ones(1).expand(3, 4),
        "scalar": torch.tensor(7),
        "empty": torch.ones(0, 3),
    }
    result = decode_record(saved(value, protocol))
    np.testing.assert_array_equal(result["tensor"], value["tensor"].numpy())
    np.testing.assert_array_equal(result["view"], [4, 5, 6, 7])
    assert np.shares_memory(result["tensor"], result["view"])
    np.testing.assert_array_equal(result["parameter"], [1, 1])
    assert result["size"] == (1, 2)
    assert isinstance(result["size"], TensorSize)
    assert result["dtype"] == DTypeValue("bfloat16")
    assert result["devices"] == [DeviceValue("cuda", 1), DeviceValue("cpu")]
    assert [str(device) for device in result["devices"]] == ["cuda:1", "cpu"]
    assert result["layout"] == LayoutValue("strided")
    assert result["bfloat16"].dtype == ml_dtypes.bfloat16
    assert float(result["bfloat16"][0]) == 1.5
    assert result["uint16"].tolist() == [1, 2]
    assert result["uint16"].dtype == np.uint16
    assert result["float8"].dtype == ml_dtypes.float8_e5m2
    assert result["conjugate"].tolist() == [1 - 2j]
    assert result["negative"].tolist() == [-2.0]
    np.testing.assert_array_equal(result["expanded"], np.ones((3, 4)))
    assert result["scalar"].shape == ()
    assert int(result["scalar"]) == 7
    assert result["empty"].shape == (0, 3)


def test_versions_in_a_state_dict_are_kept() -> None:
    torch = pytest.importorskip("torch")
    state = torch.nn.Linear(2, 2).state_dict()
    result = decode_record(saved(state))
    assert list(result) == ["weight", "bias"]
    assert result._metadata == state._metadata


def test_tensor_with_attributes_loses_only_those() -> None:
    torch = pytest.importorskip("torch")
    tensor = torch.ones(2)
    tensor.note = "x"
    assert decode_record(saved(tensor)).tolist() == [1, 1]


def test_description_of_a_tensor() -> None:
    torch = pytest.importorskip("torch")
    base = torch.zeros(24, dtype=torch.complex64)
    record = saved(base[4:].reshape(4, 5).t().conj())
    found = read_tensor_description(pickle_of(record), source="x")
    assert (found.dtype.name, found.storage_key) == ("complex64", "0")
    assert (found.shape, found.strides, found.storage_offset) == ((5, 4), (1, 5), 4)
    assert found.storage_nbytes == 24 * 8
    assert (found.conjugate, found.negative, found.parameter) == (True, False, False)
    parameter = saved(torch.nn.Parameter(torch.ones(2, 3), requires_grad=True))
    found = read_tensor_description(pickle_of(parameter), source="x")
    assert (found.parameter, found.requires_grad, found.shape) == (True, True, (2, 3))


def test_description_of_something_else_is_refused() -> None:
    with pytest.raises(FormatError, match="holds a list, not a tensor"):
        read_tensor_description(pickle.dumps([1]), source="x")


def test_tensors_can_be_described_in_place() -> None:
    torch = pytest.importorskip("torch")
    seen: list[tuple[TensorDescription, StorageReference]] = []

    def make(description: TensorDescription, storage: StorageReference) -> str:
        seen.append((description, storage))
        return description.storage_key

    def load(*_: Any) -> bytes:
        raise AssertionError("nothing is to be loaded")

    result = decode_object(
        pickle_of(saved({"a": torch.ones(2), "b": [torch.ones(3)]})),
        load_storage=load,
        source="x",
        factory=NumpyFactory(),
        allowed={},
        make_tensor=make,
    )
    assert result == {"a": "0", "b": ["1"]}
    assert [d.shape for d, _ in seen] == [(2,), (3,)]
    assert [s.location for _, s in seen] == ["cpu", "cpu"]


# Hostile pickles.


@pytest.mark.parametrize(
    ("case", "key", "name"),
    [
        ("bytes_pickle", "cfg.name", "posix.system"),
        ("bytes_dotted", "step", "torch.serialization.os.system"),
        ("bytes_unknown_class", "cfg.name", "myproject.config.Config"),
    ],
)
def test_tampered_objects_are_refused(case: str, key: str, name: str) -> None:
    pytest.importorskip("torch.distributed.checkpoint.metadata")
    checkpoint = HOSTILE / case / "ckpt"
    metadata = pickle.loads((checkpoint / ".metadata").read_bytes())
    place = next(p for index, p in metadata.storage_data.items() if index.fqn == key)
    record = (checkpoint / place.relative_path).read_bytes()[place.offset :][: place.length]
    with pytest.raises(ForbiddenContentError) as caught:
        decode_record(record)
    assert caught.value.qualified_name == name
    assert name in str(caught.value)
    assert f"allowed={{'{name}'" in str(caught.value)
    assert not pathlib.Path("PWNED").exists()
    assert "myproject" not in sys.modules


@pytest.mark.parametrize(
    "name",
    [
        "os\nsystem",
        "builtins\neval",
        "__builtin__\neval",
        "builtins\ngetattr",
        "builtins\nopen",
        "torch\nload",
        "torch.storage\n_load_from_bytes",
        "torch._utils\nos.system",
        "numpy\nload",
        "numpy.core.multiarray\nfromfile",
        "collections\nnamedtuple",
        "functools\npartial",
        "_codecs\nlookup",
        "datetime\nsys.modules",
        "copyreg\n_reconstructor",
    ],
)
def test_names_off_the_list_are_refused(name: str) -> None:
    with pytest.raises(ForbiddenContentError, match="key 'k'"):
        decode(b"c" + name.encode() + b"\n.")


def test_classes_are_no_values() -> None:
    for name in (b"builtins\nlist", b"torch\nFloatStorage", b"torch._utils\n_rebuild_tensor_v2"):
        with pytest.raises(ForbiddenContentError, match="as a value"):
            decode(b"](c" + name + b"\ne.")


def test_other_kinds_of_tensors_are_named() -> None:
    torch = pytest.importorskip("torch")
    sparse = torch.eye(2).to_sparse()
    with pytest.raises(NotSupportedError, match="_rebuild_sparse_tensor"):
        decode_record(saved(sparse))


_STORAGE = (
    b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpu%stQ"
)


def tensor_pickle(
    *, count: bytes = b"K\x06", offset: bytes = b"K\x00", shape: bytes = b"K\x02K\x03\x86",
    strides: bytes = b"K\x03K\x01\x86", rest: bytes = b"\x89N",
) -> bytes:  # fmt: skip
    storage = _STORAGE % count
    return (
        b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + offset + shape + strides + rest + b"tR."
    )


STORAGE = {"0": np.arange(6, dtype="<f4").tobytes()}


def test_tensor_pickle_of_these_tests_is_a_good_one() -> None:
    assert decode(tensor_pickle(), STORAGE).tolist() == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize(
    "changes",
    [
        {"strides": b"J\x00\x00\x00\x40K\x01\x86"},
        {"offset": b"K\x01"},
        {"offset": b"J\xff\xff\xff\xff"},
        {"offset": b"\x88"},
        {"shape": b"K\x02K\x04\x86"},
        {"shape": b"J\xff\xff\xff\xffK\x03\x86"},
        {"shape": b"K\x06\x85"},
        {"shape": b"(" + b"K\x01" * 100 + b"t", "strides": b"(" + b"K\x01" * 100 + b"t"},
        {"strides": b"J\xff\xff\xff\xffK\x01\x86"},
        {"strides": b"N"},
        {"count": b"K\x05"},
        {"count": b"\x88"},
        {"count": b"J\xff\xff\xff\xff"},
        {"count": b"\x8a\x09\xff\xff\xff\xff\xff\xff\xff\xff\x7f"},
        {"rest": b"K\x01N"},
        {"rest": b"\x89"},
        {"rest": b"\x89K\x05"},
        {"rest": b"\x89NK\x05"},
    ],
)
def test_views_that_leave_their_storage_are_refused(changes: dict[str, bytes]) -> None:
    with pytest.raises(FormatError, match="key 'k'") as caught:
        decode(tensor_pickle(**changes), STORAGE)
    with pytest.raises(FormatError):
        read_tensor_description(tensor_pickle(**changes), source="x")
    assert str(caught.value)


def test_tensor_metadata_that_nobody_knows_is_refused() -> None:
    with pytest.raises(NotSupportedError, match="'other'"):
        decode(tensor_pickle(rest=b"\x89N}X\x05\x00\x00\x00otherK\x01s"), STORAGE)


def test_storage_of_another_size_is_refused() -> None:
    with pytest.raises(FormatError, match="has 12 bytes, the pickle says 24"):
        decode(tensor_pickle(), {"0": STORAGE["0"][:12]})


def test_expanded_tensor_is_a_view_whatever_its_shape() -> None:
    data = tensor_pickle(
        count=b"K\x06", shape=b"J\x00\x00\x00\x40J\x00\x00\x00\x40\x86", strides=b"K\x00K\x00\x86"
    )
    result = decode(data, STORAGE)
    assert result.shape == (1 << 30, 1 << 30)
    assert result.strides == (0, 0)


def test_empty_tensor_may_have_any_strides() -> None:
    data = tensor_pickle(count=b"K\x00", shape=b"K\x00K\x03\x86", offset=b"K\x09")
    assert decode(data, {"0": b""}).shape == (0, 3)


@pytest.mark.parametrize(
    "data",
    [
        b"N" + b"2\x86" * 60 + b".",
        b"]" * 100_000 + b"a" * 99_999 + b".",
        b"N" + b"\x85" * 100_000 + b".",
        # A set of the same list, a hundred thousand times.
        b"](" + b"K\x01" * 1 + b"e0](" + b"K\x01" * 90_000 + b"eq\x010("
        + b"c__builtin__\nset\nh\x01\x85R" * 2000 + b"l.",
        b"X\x40\x42\x0f\x00" + b"x" * 1_000_000 + b"q\x010("
        + b"c_codecs\nencode\n(h\x01X\x06\x00\x00\x00latin1tR" * 3000 + b"l.",
    ],
    ids=["doubling", "deep lists", "deep tuples", "many sets", "many bytes"],
)  # fmt: skip
def test_small_pickles_cost_little(data: bytes) -> None:
    started = time.monotonic()
    with pytest.raises(LimitExceededError, match="key 'k'"):
        decode(data)
    assert time.monotonic() - started < 10


def test_large_allocations_by_number_are_refused() -> None:
    for call in (b"cbuiltins\nbytearray\n", b"cbuiltins\nbytes\n", b"cbuiltins\nlist\n"):
        with pytest.raises(FormatError):
            decode(call + b"\x8a\x06\x00\x00\x00\x00\x00\x10\x85R.")


def test_attributes_that_hide_methods_are_refused() -> None:
    data = b"ccollections\nOrderedDict\n)R}X\x05\x00\x00\x00itemsK\x01sb."
    with pytest.raises(FormatError, match="attributes"):
        decode(data)


def test_state_of_plain_values_is_refused() -> None:
    with pytest.raises(ForbiddenContentError, match="state"):
        decode(b"]}b.")


# What the caller allows.


@dataclass
class Config:
    rate: float
    steps: list[int]


class WithState:
    def __getstate__(self) -> Any:
        return ("state", 1)

    def __setstate__(self, state: Any) -> None:
        self.restored = state


class Slotted:
    __slots__ = ("a",)


class Failing:
    def __setstate__(self, state: Any) -> None:
        raise OSError("no such thing")


def allow(*classes: type) -> dict[str, Callable[..., Any]]:
    return {f"{c.__module__}.{c.__qualname__}": c for c in classes}


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_allowed_classes_are_made(protocol: int) -> None:
    slotted = Slotted()
    slotted.a = 5
    value = [Config(0.1, [1]), Named.FIRST, WithState(), slotted]
    data = pickle.dumps(value, protocol)
    with pytest.raises(ForbiddenContentError, match="Config"):
        decode(data)
    result = decode(data, allowed=allow(Config, Named, WithState, Slotted))
    assert result[:2] == [Config(0.1, [1]), Named.FIRST]
    assert result[2].restored == ("state", 1)
    assert result[3].a == 5


@pytest.mark.parametrize("protocol", range(2, 6))
def test_namespaces_are_bags_of_attributes(protocol: int) -> None:
    inner = types.SimpleNamespace(x=[1, {"y": 2}])
    value = argparse.Namespace(lr=0.5, inner=inner, same=inner, none=None)
    found = decode(pickle.dumps(value, protocol))
    assert found == value
    assert found.inner is found.same
    assert type(found.inner) is types.SimpleNamespace


@pytest.mark.parametrize(
    "data",
    [
        b"\x80\x02cargparse\nNamespace\n.",  # the class itself
        b"\x80\x02cargparse\nNamespace\n)\x81}U\x09__class__cargparse\nNamespace\nsb.",
        b"\x80\x02cargparse\nNamespace\n)\x81}U\x09__class__U\x01asb.",
        b"\x80\x02cargparse\nNamespace\n)\x81}U\x08__dict__K\x01sb.",
        b"\x80\x02cargparse\nNamespace\n)\x81q\x00}U\x01ah\x00sb.",  # holds itself
        b"\x80\x02cargparse\nNamespace\n)\x81}U\x01acos\nsystem\nsb.",
        b"\x80\x02cargparse\nArgumentParser\n)R.",
        b"\x80\x02cargparse\nNamespace\nq\x00"
        + b"h\x00)\x81}U\x01a" * 5000
        + b"K\x01"
        + b"sb" * 5000
        + b".",
    ],
)
def test_namespaces_are_no_way_to_anything_else(data: bytes) -> None:
    with pytest.raises(ShardpointError):
        decode(data)


def test_what_an_allowed_class_raises_is_a_format_error() -> None:
    failing = Failing()
    failing.x = 1  # type: ignore[attr-defined]
    with pytest.raises(FormatError, match=r"Failing.*no such thing") as caught:
        decode(pickle.dumps(failing, 4), allowed=allow(Failing))
    assert isinstance(caught.value.__cause__, OSError)


def test_allowed_classes_get_no_unbounded_values() -> None:
    state = b"}X\x01\x00\x00\x00aN" + b"2\x86" * 60 + b"sb."
    data = b"ctests\nConfig\n)\x81" + state
    with pytest.raises(LimitExceededError):
        decode(data, allowed={"tests.Config": Config})


_GOOD = [
    pickle.dumps(VALUES, 2),
    pickle.dumps([ARRAYS[:4], VALUES[-12:]], 4),
    tensor_pickle(),
]


@given(
    st.sampled_from(_GOOD).flatmap(
        lambda data: st.builds(
            lambda position, new: data[:position] + new + data[position + len(new) :],
            st.integers(0, len(data) - 1),
            st.binary(min_size=1, max_size=3),
        )
    )
)
def test_damaged_pickles_give_a_value_or_our_own_error(data: bytes) -> None:
    storages = collections.defaultdict(bytes, STORAGE)
    with contextlib.suppress(ShardpointError):
        decode(data, storages)


def test_module_never_imports_torch() -> None:
    code = "import sys, shardpoint.formats.object_decoder; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


class Pieces:
    """Opcodes of protocol 2 and before, to be joined to what nobody would save."""

    @staticmethod
    def call(name: str, *arguments: bytes) -> bytes:
        module, _, attribute = name.rpartition(".")
        return f"c{module}\n{attribute}\n(".encode() + b"".join(arguments) + b"tR"

    @staticmethod
    def value(value: Any) -> bytes:
        return pickle.dumps(value, 2)[2:-1]

    @classmethod
    def dtype(cls, name: str) -> bytes:
        made = cls.call("numpy.dtype", cls.value(name), b"\x89", b"\x88")
        return made + cls.value((3, "<", None, None, None, -1, -1, 0)) + b"b"


def whole(opcodes: bytes) -> bytes:
    return b"\x80\x02" + opcodes + b"."


_CALL, _VALUE = Pieces.call, Pieces.value
_MODULUS = sys.hash_info.modulus


@pytest.mark.parametrize(
    "keys",
    [
        [_VALUE(number * _MODULUS) for number in range(20_000)],
        [_VALUE(tuple(-1 - (n >> bit & 1) for bit in range(13))) for n in range(1 << 13)],
        [_CALL("builtins.complex", _VALUE(-1000003 * n), _VALUE(n)) for n in range(10_000)],
    ],
    ids=["ints", "tuples", "complex"],
)
@pytest.mark.parametrize("kind", ["dict", "items", "set", "frozenset", "call"])
def test_keys_of_one_hash_are_bounded(keys: list[bytes], kind: str) -> None:
    # Each is compared with all before it: a megabyte of them would take minutes.
    members = b"".join(keys)
    content = {
        "dict": b"}(" + b"".join(key + b"N" for key in keys) + b"u",
        "items": b"}" + b"".join(key + b"Ns" for key in keys),
        "set": b"\x8f(" + members + b"\x90",
        "frozenset": b"(" + members + b"\x91",
        "call": _CALL("builtins.set", b"](" + members + b"e"),
    }[kind]
    with pytest.raises(LimitExceededError, match="more than its size can explain"):
        decode(whole(content))


def test_many_dicts_with_the_same_unusual_keys_are_no_attack() -> None:
    value = [{(n, -1): n, (n, -2): n, _MODULUS * n: n, 1j * n: 0} for n in range(5)] * 400
    value = [dict(one) for one in value]
    assert decode(pickle.dumps(value)) == value


@pytest.mark.parametrize(
    "opcodes",
    [
        _CALL("torch.device", _VALUE("cuda:99999")),  # torch would make -97 of it
        _CALL("torch.device", _VALUE("cuda"), _VALUE(200)),
        _CALL("torch.device", _VALUE("cuda:1"), _VALUE(2)),
        _CALL("torch.Size", _VALUE((2**70,))),
        _CALL(
            "numpy._core.numeric._frombuffer",
            _CALL("builtins.bytes"),
            Pieces.dtype("S0"),
            _VALUE((10**9,)),
            _VALUE("C"),
        ),
        _CALL("numpy._core.multiarray.scalar", Pieces.dtype("U1"), b"C\x04\xff\xff\xff\xff"),
        b"S'\\d'\n",  # Python would warn
    ],
)
def test_values_that_numpy_or_torch_would_choke_on_are_refused(opcodes: bytes) -> None:
    with pytest.raises(FormatError):
        decode(whole(opcodes))


class Touchy(dict[Any, Any]):
    def __setitem__(self, key: Any, value: Any) -> None:
        raise OSError(key)


class Rude(list[Any]):
    def extend(self, items: Any) -> None:
        raise OSError(items)


class Unhashable:
    def __hash__(self) -> int:
        raise OSError

    def __len__(self) -> int:
        return 1 << 60


@pytest.mark.parametrize("name", ["Touchy", "Rude", "Unhashable"])
def test_whatever_an_allowed_class_raises_is_an_error_of_the_checkpoint(name: str) -> None:
    made = f"cx\n{name}\n)\x81".encode("latin-1")
    filled = {"Touchy": made + b"NNs", "Rude": made + b"Na", "Unhashable": b"}" + made + b"Ns"}
    with pytest.raises(FormatError, match="OSError"):
        decode(whole(filled[name]), allowed={f"x.{name}": globals()[name]})


def test_what_an_allowed_class_calls_its_length_does_not_count() -> None:
    made = b"cx\nUnhashable\n)\x81"
    held = whole(made + b"}" + Pieces.value("part") + made + b"sb")
    assert type(vars(decode(held, allowed={"x.Unhashable": Unhashable}))["part"]) is Unhashable
