"""What all tests share: the checkpoints under ``fixtures/`` and what a reader must get.

Nothing here imports torch, so that these helpers serve the tests that run without it.
"""

from __future__ import annotations

import functools
import json
import math
import struct
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from shardpoint.dtypes import dtype_named

__all__ = [
    "FIXTURES",
    "HOSTILE",
    "PUBLIC",
    "Fixture",
    "HostileFixture",
    "assert_same_array",
    "assert_same_object",
    "decode_object",
    "hostile_fixtures",
    "public_fixtures",
    "read_safetensors",
]

FIXTURES = Path(__file__).parent / "fixtures"
PUBLIC = FIXTURES / "public"
HOSTILE = FIXTURES / "hostile"

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Fixture:
    """One checkpoint that a torch release wrote."""

    name: str
    directory: Path
    expected: Mapping[str, Any] = field(repr=False)

    def __str__(self) -> str:
        return self.name

    @property
    def release(self) -> str:
        """torch's version as the folder has it: ``"2.13.0"`` or ``"2.13.0-py313"``."""
        return self.directory.parent.name

    @property
    def case(self) -> str:
        return self.directory.name

    @property
    def world_size(self) -> int:
        return int(self.expected["world_size"])

    @property
    def checkpoint(self) -> Path:
        """The folder with the checkpoint."""
        return self.directory / "ckpt"

    @property
    def places(self) -> list[Path]:
        """Everything that opens to the expected values: the folder, or each torch.save file."""
        if self.expected["format"] == "torch":
            return [self.checkpoint / name for name in sorted(self.expected["files"])]
        return [self.checkpoint]

    @property
    def is_dcp(self) -> bool:
        """Whether it has torch's pickled metadata (not Hugging Face, not torch.save)."""
        return self.expected["format"] in ("fs", "fs-safetensors")

    @property
    def planner_data_is_none(self) -> bool:
        """Whether it was saved without flattening."""
        return bool(self.expected.get("planner_data_is_none", False))

    @property
    def keys(self) -> set[str]:
        return {*self.expected["tensors"], *self.expected["objects"]}

    @property
    def paths(self) -> dict[str, tuple[str | int, ...] | None]:
        """Flat key to path; None for keys saved without one."""
        entries = {**self.expected["tensors"], **self.expected["objects"]}
        return {k: None if e["path"] is None else tuple(e["path"]) for k, e in entries.items()}

    @functools.cached_property
    def tensors(self) -> dict[str, Array]:
        """Every tensor in full, in its own dtype."""
        stored = read_safetensors(self.directory / "expected.safetensors")
        return {
            key: np.frombuffer(stored[key], dtype_named(entry["dtype"]).numpy).reshape(
                entry["shape"]
            )
            for key, entry in self.expected["tensors"].items()
        }

    @property
    def objects(self) -> dict[str, Any]:
        """Every object's value in the JSON form of expected.json; see `decode_object`."""
        return {key: entry["value"] for key, entry in self.expected["objects"].items()}


@dataclass(frozen=True)
class HostileFixture:
    """One checkpoint that was tampered with, and what a reader has to do about it."""

    name: str
    checkpoint: Path
    base: Fixture
    expectation: Mapping[str, Any] = field(repr=False)

    def __str__(self) -> str:
        return self.name


@functools.cache
def public_fixtures() -> tuple[Fixture, ...]:
    """Return all untouched checkpoints."""
    return tuple(
        _fixture(path.parent, f"{path.parent.parent.name}/{path.parent.name}")
        for path in sorted(PUBLIC.glob("*/*/expected.json"))
    )


@functools.cache
def hostile_fixtures() -> tuple[HostileFixture, ...]:
    """Return all checkpoints that were tampered with."""
    described = json.loads((HOSTILE / "hostile.json").read_text("utf-8"))["fixtures"]
    return tuple(
        HostileFixture(
            name,
            HOSTILE / name / "ckpt",
            _fixture(HOSTILE / "_base" / expectation["base"], expectation["base"]),
            expectation,
        )
        for name, expectation in sorted(described.items())
    )


@functools.cache
def _fixture(directory: Path, name: str) -> Fixture:
    expected = json.loads((directory / "expected.json").read_text("utf-8"))
    return Fixture(name, directory, expected)


def read_safetensors(path: Path) -> dict[str, bytes]:
    """Return the bytes of every tensor in a safetensors file.

    A reader of its own: the product's is under test, and the package's cannot give numpy
    arrays of 8-bit floats.
    """
    data = path.read_bytes()
    (header_length,) = struct.unpack_from("<Q", data)
    header = json.loads(data[8 : 8 + header_length])
    header.pop("__metadata__", None)
    start = 8 + header_length
    return {
        name: data[start + entry["data_offsets"][0] : start + entry["data_offsets"][1]]
        for name, entry in header.items()
    }


def decode_object(
    form: Any,
    *,
    tensor: Callable[[Array, str], Any] = lambda array, _: array,
    parameter: Callable[[Array, str], Any] = lambda array, _: array,
    size: Callable[[tuple[int, ...]], Any] = tuple,
    dtype: Callable[[str], Any] = str,
    device: Callable[[str], Any] = str,
) -> Any:
    """Turn the JSON form of an object into a value; the functions make what JSON lacks.

    `tensor` and `parameter` get a numpy array and torch's dtype name.
    """

    def decode(form: Any) -> Any:
        if isinstance(form, list):
            return [decode(item) for item in form]
        if not isinstance(form, dict):
            return form
        ((tag, content),) = form.items()
        return makers[tag](content)

    def array(content: Mapping[str, Any]) -> Array:
        raw = np.frombuffer(bytes.fromhex(content["hex"]), dtype_named(content["dtype"]).numpy)
        return raw.reshape(content["shape"])

    makers: dict[str, Callable[[Any], Any]] = {
        "__float__": float,
        "__complex__": lambda parts: complex(*parts),
        "__bytes__": bytes.fromhex,
        "__tuple__": lambda items: tuple(decode(item) for item in items),
        "__set__": lambda items: {decode(item) for item in items},
        "__dict__": lambda pairs: {decode(key): decode(value) for key, value in pairs},
        "__odict__": lambda pairs: OrderedDict((decode(k), decode(v)) for k, v in pairs),
        "__size__": lambda items: size(tuple(items)),
        "__dtype__": dtype,
        "__device__": device,
        "__tensor__": lambda content: tensor(array(content), content["dtype"]),
        "__parameter__": lambda content: parameter(array(content), content["dtype"]),
    }
    return decode(form)


def assert_same_array(found: Any, expected: Array, where: object = "") -> None:
    """Compare dtype, shape and every bit."""
    assert isinstance(found, np.ndarray), where
    assert found.dtype == expected.dtype, where
    assert found.shape == expected.shape, where
    assert found.tobytes() == expected.tobytes(), where


def assert_same_object(found: Any, expected: Any, where: object = "") -> None:
    """Compare two decoded objects: types of containers, order, floats by bits, arrays by bits."""
    if isinstance(expected, np.ndarray):
        assert_same_array(found, expected, where)
        return
    assert type(found) is type(expected), (where, found, expected)
    if isinstance(expected, dict):
        assert_same_object(list(found.items()), list(expected.items()), where)
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected), where
        for i, (left, right) in enumerate(zip(found, expected, strict=True)):
            assert_same_object(left, right, (where, i))
    elif isinstance(expected, float) and math.isnan(expected):
        assert math.isnan(found), where
    else:
        assert found == expected, where
