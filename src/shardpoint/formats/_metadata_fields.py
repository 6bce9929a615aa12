"""The fields of a torch ``Metadata``, checked one by one: records in, plain values out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any, NoReturn, TypeAlias, TypeVar

from shardpoint.dtypes import DType
from shardpoint.errors import FormatError, LimitExceededError, NotSupportedError
from shardpoint.formats._metadata_records import (
    BytesRecord,
    ChunkRecord,
    IndexRecord,
    Layout,
    MemoryFormat,
    MetadataRecord,
    PropertiesRecord,
    Record,
    StorageMetaRecord,
    StorageRecord,
    TensorRecord,
)
from shardpoint.formats._pickle_guards import DEFAULT_LIMITS, describe
from shardpoint.formats._planner_data import split_planner_data

__all__ = ["Checker", "MetadataFields", "Place", "TensorFields", "check_metadata"]

_R = TypeVar("_R", bound=Record)

Place: TypeAlias = tuple[str, int, int, tuple[str, ...]]
"""File name, byte offset, length, transform descriptors."""

_Offsets: TypeAlias = tuple[int, ...]

_LOWEST, _HIGHEST = -(2**63), 2**63 - 1
_FIELDS: Mapping[type[Record], frozenset[str]] = {
    MetadataRecord: frozenset(
        {"state_dict_metadata", "planner_data", "storage_data", "storage_meta", "version"}
    ),
    TensorRecord: frozenset({"properties", "size", "chunks"}),
    ChunkRecord: frozenset({"offsets", "sizes"}),
    BytesRecord: frozenset(),
    IndexRecord: frozenset({"fqn", "index", "offset"}),
    StorageRecord: frozenset({"relative_path", "offset", "length", "transform_descriptors"}),
}


@dataclass(slots=True)
class TensorFields:
    """One tensor: chunk `i` has ``offsets[i]``, ``sizes[i]`` and ``places[i]``."""

    key: str
    dtype: DType
    shape: tuple[int, ...]
    requires_grad: bool
    pin_memory: bool
    memory_format: int
    offsets: list[tuple[int, ...]] = field(default_factory=list)
    sizes: list[tuple[int, ...]] = field(default_factory=list)
    places: list[Place | None] = field(default_factory=list)


@dataclass(slots=True)
class MetadataFields:
    """A whole ``Metadata``; `planner_data` is None where that is paths, or nothing."""

    file: str
    key_order: list[str]
    tensors: list[TensorFields]
    objects: dict[str, Place | None]
    paths: dict[str, tuple[str | int, ...]] | None
    planner_data: Any
    storage_meta: dict[str, Any] | None
    version: str | None


class Checker:
    """Checks one file's metadata; every complaint names the file and the key."""

    def __init__(self, file: str, *, size: int) -> None:
        self.file = file
        self.size = size
        self.chunks_left = size
        # Where chunks lie, by offset; and by position in the tensor's list, where the
        # entry has no offset.
        self.by_offset: dict[tuple[str, _Offsets], Place] = {}
        self.by_position: dict[tuple[str, int | None], Place] = {}

    def fail(self, message: str, key: str | None = None) -> NoReturn:
        about = f"file {self.file!r}" if key is None else f"key {key!r}, file {self.file!r}"
        raise FormatError(f"{about}: {message}")

    def fields(self, record: Any, kind: type[_R], what: str, key: str | None) -> dict[str, Any]:
        if type(record) is not kind:
            self.fail(f"{what} is {_name(record)}, not {kind.torch_name}", key)
        state = record.state
        if state is None:
            state = {}
        if type(state) is not dict:
            self.fail(f"{what} has {describe(state)} as its fields, not a dict", key)
        known = _FIELDS[kind]
        if not known.issuperset(state):
            for name, value in state.items():
                # A newer release may add a field; what it leaves unset changes nothing.
                if name not in known and value is not None:
                    self.fail(f"{what} has the unknown field {describe(name)}", key)
        return state

    def number(self, value: Any, what: str, key: str) -> int:
        if type(value) is not int:
            self.fail(f"{what} is {describe(value)}, not an int", key)
        if not _LOWEST <= value <= _HIGHEST:
            self.fail(f"{what} is {describe(value)}, which does not fit into 64 bits", key)
        return value

    def numbers(self, value: Any, what: str, key: str) -> tuple[int, ...]:
        if type(value) is not tuple:
            self.fail(f"{what} is {describe(value)}, not a torch.Size", key)
        if len(value) > DEFAULT_LIMITS.max_axes:
            raise LimitExceededError(
                f"key {key!r}, file {self.file!r}: {what} has {len(value)} axes; "
                f"at most {DEFAULT_LIMITS.max_axes} are possible"
            )
        for number in value:
            if type(number) is not int or not _LOWEST <= number <= _HIGHEST:
                self.number(number, what, key)
        return value

    def text(self, value: Any, what: str, key: str | None) -> str:
        if type(value) is not str:
            self.fail(f"{what} is {describe(value)}, not a str", key)
        return value

    def flag(self, value: Any, what: str, key: str) -> bool:
        if type(value) is not bool:
            self.fail(f"{what} is {describe(value)}, not a bool", key)
        return value

    def entries(self, record: Any) -> tuple[dict[str, Any], dict[Any, Any]]:
        """Return the fields of a ``Metadata``, and of them ``state_dict_metadata``."""
        state = self.fields(record, MetadataRecord, "the metadata", None)
        entries = state.get("state_dict_metadata")
        if type(entries) is not dict:
            self.fail(f"state_dict_metadata is {describe(entries)}, not a dict")
        return state, entries

    def is_object(self, key: Any, entry: Any) -> bool:
        """Return whether an entry of ``state_dict_metadata`` is an object."""
        self.text(key, "a key of state_dict_metadata", None)
        if type(entry) is not BytesRecord:
            return False
        self.fields(entry, BytesRecord, "the object", key)
        return True

    def whole(
        self,
        state: Mapping[str, Any],
        entries: Mapping[str, Any],
        tensors: list[TensorFields],
        objects: dict[str, Place | None],
    ) -> MetadataFields:
        """Return all that there is, the remaining fields checked."""
        version = state.get("version")
        paths, planner_data = split_planner_data(
            state.get("planner_data"), keys=entries, source=f"file {self.file!r}"
        )
        return MetadataFields(
            file=self.file,
            key_order=list(entries),
            tensors=tensors,
            objects=objects,
            paths=paths,
            planner_data=planner_data,
            storage_meta=self.storage_meta(state.get("storage_meta")),
            version=None if version is None else self.text(version, "version", None),
        )

    def tensor(self, key: str, record: Any) -> TensorFields:
        tensor, chunks = self.tensor_and_chunks(key, record)
        for position, chunk in enumerate(chunks):
            offsets, sizes = self.box(tensor, position, chunk)
            tensor.offsets.append(offsets)
            tensor.sizes.append(sizes)
            place = self.by_offset.get((key, offsets))
            if place is None and self.by_position:
                place = self.by_position.get((key, position))
                if place is None and len(chunks) == 1:
                    place = self.by_position.get((key, None))
            tensor.places.append(place)
        return tensor

    def tensor_and_chunks(self, key: str, record: Any) -> tuple[TensorFields, list[Any]]:
        """Return a tensor without its chunks, and these, unchecked."""
        state = self.fields(record, TensorRecord, "the tensor", key)
        shape = self.numbers(state.get("size"), "size", key)
        tensor = self.properties(key, state.get("properties"), shape)
        chunks = state.get("chunks")
        if type(chunks) is not list:
            self.fail(f"chunks is {describe(chunks)}, not a list", key)
        # Each takes a byte or more, unless tensors share a list: then a few bytes ask for many.
        self.chunks_left -= len(chunks)
        if self.chunks_left < 0:
            raise LimitExceededError(
                f"key {key!r}, file {self.file!r}: lists far more chunks than the size of the "
                "file can explain"
            )
        return tensor, chunks

    def box(self, tensor: TensorFields, position: int, chunk: Any) -> tuple[_Offsets, _Offsets]:
        """Return offsets and sizes of a chunk."""
        key = tensor.key
        box = self.fields(chunk, ChunkRecord, f"chunk {position}", key)
        offsets = self.numbers(box.get("offsets"), f"offsets of chunk {position}", key)
        sizes = self.numbers(box.get("sizes"), f"sizes of chunk {position}", key)
        if not len(offsets) == len(sizes) == len(tensor.shape):
            self.fail(
                f"chunk {position} has offsets {offsets} and sizes {sizes}, "
                f"but the tensor has shape {tensor.shape}",
                key,
            )
        return offsets, sizes

    def properties(self, key: str, record: Any, shape: tuple[int, ...]) -> TensorFields:
        if type(record) is not PropertiesRecord:
            self.fail(f"properties is {_name(record)}, not TensorProperties", key)
        state = record.state
        if type(state) is not tuple or len(state) not in (5, 6):
            self.fail("TensorProperties has other fields than any known release's", key)
        # The sixth, strides, since 2.15: those of the local shard, which need not be those
        # of the stored record. The record itself tells.
        dtype, layout, requires_grad, memory_format, pin_memory = state[:5]
        if type(dtype) is not DType:
            self.fail(f"dtype is {describe(dtype)}, not a torch.dtype", key)
        if type(layout) is not Layout:
            self.fail(f"layout is {describe(layout)}, not a torch.layout", key)
        if layout.name != "torch.strided":
            raise NotSupportedError(
                f"key {key!r}, file {self.file!r}: layout {describe(layout.name)} is not supported"
            )
        if type(memory_format) is not MemoryFormat:
            self.fail(f"memory format is {describe(memory_format)}, not an encoding", key)
        return TensorFields(
            key,
            dtype,
            shape,
            self.flag(requires_grad, "requires_grad", key),
            self.flag(pin_memory, "pin_memory", key),
            memory_format.code,
        )

    def storage_data(self, value: Any) -> None:
        for index, record in self.storage_items(value):
            key, offset, position, place = self.entry(index, record)
            if offset is not None:
                self.by_offset[key, offset] = place
            else:
                self.by_position[key, position] = place

    def storage_items(self, value: Any) -> Iterable[tuple[Any, Any]]:
        """Return keys and values of ``storage_data``."""
        if value is None:
            return ()
        if type(value) is not dict:
            self.fail(f"storage_data is {describe(value)}, not a dict")
        return value.items()

    def entry(
        self, index: Any, record: Any
    ) -> tuple[str, tuple[int, ...] | None, int | None, Place]:
        """Return key, offset, position in the tensor's list, and place."""
        entry = self.fields(index, IndexRecord, "a key of storage_data", None)
        key = self.text(entry.get("fqn"), "fqn of a key of storage_data", None)
        place = self.place(key, record)
        offset = entry.get("offset")
        position = entry.get("index")
        if offset is not None:
            # The position is then no more than a hint.
            known = type(position) is int and 0 <= position <= _HIGHEST
            numbers = self.numbers(offset, "offset of its index", key)
            return key, numbers, position if known else None, place
        if position is not None:
            self.number(position, "index of its index", key)
        return key, None, position, place

    def place(self, key: str, record: Any) -> Place:
        state = self.fields(record, StorageRecord, "its storage entry", key)
        descriptors = state.get("transform_descriptors")
        if descriptors is None:
            descriptors = ()
        elif type(descriptors) not in (list, tuple):
            self.fail(f"transform_descriptors is {describe(descriptors)}, not a list", key)
        return (
            self.text(state.get("relative_path"), "relative_path of its storage entry", key),
            self.number(state.get("offset"), "offset of its storage entry", key),
            self.number(state.get("length"), "length of its storage entry", key),
            tuple([self.text(d, "a transform descriptor", key) for d in descriptors]),
        )

    def storage_meta(self, record: Any) -> dict[str, Any] | None:
        if record is None:
            return None
        if type(record) is not StorageMetaRecord:
            self.fail(f"storage_meta is {_name(record)}, not StorageMeta")
        state = record.state if record.state is not None else {}
        if type(state) is not dict:
            self.fail(f"storage_meta has {describe(state)} as its fields, not a dict")
        for name, value in state.items():
            self.text(name, "a field of storage_meta", None)
            if value is None or type(value) is str:
                continue
            if name == "checkpoint_id" and isinstance(value, PurePath):
                continue
            if name == "modules" and type(value) is list and all(type(v) is str for v in value):
                continue
            self.fail(f"{describe(name)} of storage_meta is {describe(value)}")
        return state


def _name(value: Any) -> str:
    if isinstance(value, Record):
        return type(value).torch_name
    return describe(value)


def check_metadata(record: MetadataRecord, *, file: str, size: int) -> MetadataFields:
    """Check every field of a ``Metadata`` from a pickle of `size` bytes.

    Raises
    ------
    FormatError
        If a field has another type than torch gives it; the error names key and file.
    LimitExceededError
        If tensors list more chunks than the pickle can hold, or have too many axes.
    """
    checker = Checker(file, size=size)
    state, entries = checker.entries(record)
    checker.storage_data(state.get("storage_data"))
    tensors: list[TensorFields] = []
    objects: dict[str, Place | None] = {}
    for key, entry in entries.items():
        if checker.is_object(key, entry):
            place = checker.by_position.get((key, None))
            objects[key] = place if place is not None else checker.by_position.get((key, 0))
        else:
            tensors.append(checker.tensor(key, entry))
    return checker.whole(state, entries, tensors, objects)
