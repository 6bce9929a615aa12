"""Whole files that ``torch.save`` wrote: a state dict in one file, in either of its formats.

The zip format (the default since torch 1.6) is one record with many storages. The older one is
five pickles (a magic number, a protocol number, facts on the machine, the object, the storages'
keys), then for every key its number of elements (8 bytes) and its bytes. Source: files of torch
2.6 to 2.15, of both formats.

Only the pickles are read. Tensors become chunks that lie in the file; everything else becomes
values. Tensors inside values (in a tuple, say) are read with them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeAlias, cast

import numpy as np

from shardpoint.dtypes import DType
from shardpoint.errors import FormatError, NotSupportedError, PlanError
from shardpoint.formats._legacy_save import is_legacy, open_legacy
from shardpoint.formats._pickle_guards import DEFAULT_LIMITS, measure
from shardpoint.formats._record_members import (
    MAX_MEMBERS,
    Members,
    RecordMember,
    TensorPayload,
    check_crc,
    find_payload,
)
from shardpoint.formats._store import Store, reader_of
from shardpoint.formats._tensor_pickles import StorageReference
from shardpoint.formats._zip_reading import Window
from shardpoint.formats.object_decoder import (
    NumpyFactory,
    ObjectFactory,
    TensorDescription,
    TensorLoader,
    decode_object,
)
from shardpoint.formats.torch_record import TAIL_BYTES
from shardpoint.index import (
    UNKNOWN,
    CheckpointIndex,
    ChunkEntry,
    Container,
    ObjectEntry,
    TensorEntry,
    build_index,
)
from shardpoint.tree import flatten

__all__ = ["read_torch_save"]

FindStorage: TypeAlias = Callable[[str], RecordMember]
Allowed: TypeAlias = Mapping[str, Callable[..., Any]]

MAX_PICKLE_BYTES = 1 << 30
MAX_EXPANDED_BYTES = 1 << 32
"""A tensor with more elements than its storage (an expanded one) is refused past this."""


@dataclass(frozen=True, slots=True, eq=False)
class _Tensor:
    """Stands for a tensor while the pickle is decoded: where it lies, not what it holds."""

    number: int
    description: TensorDescription
    requires_grad: bool


def read_torch_save(
    storage: Store,
    name: str,
    *,
    allowed: Allowed | None = None,
    factory: ObjectFactory | None = None,
) -> CheckpointIndex:
    """Return the index of a file that ``torch.save`` wrote.

    Keys are flattened as torch 2.4 and later flatten a state dict; what is no dict or list at
    the root has the key ``""``.

    Parameters
    ----------
    storage, name
        Where the file lies.
    allowed
        Classes beyond the closed list, by qualified name; see `object_decoder.decode_object`.
    factory
        Makes the tensors that lie inside of values, and the like; None is `NumpyFactory`.

    Raises
    ------
    FormatError
        If it is no such file, or a tensor lies outside its storage; `ForbiddenContentError`
        where it is made of classes that are not on the closed list (a whole module, say).
    CorruptionError
        If it is cut off, or the pickle's checksum is wrong.
    NotSupportedError
        If it is a TorchScript archive, big-endian, or has a dtype that is not known.
    LimitExceededError, UnsafePathError, StorageError
    """
    with storage.open(name) as file:
        window = Window(reader_of(file), 0, file.size, file=name, key=None)
        begin = window.read(0, min(4, file.size), "the file's start")
        if begin == b"PK\x03\x04":
            pickle, find_storage = _open_zip(window)
        elif is_legacy(begin):
            pickle, find_storage = open_legacy(window, allowed=allowed or {})
        else:
            window.fail(f"not a torch.save file: it begins with {begin!r}")
        state = _State(window, pickle, find_storage, allowed or {}, factory or NumpyFactory())
        return state.index(name)


class _Placeholders:
    """A factory whose parameters may be of tensors that are not loaded."""

    def __init__(self, factory: ObjectFactory) -> None:
        self._factory = factory

    def __getattr__(self, name: str) -> Any:
        return getattr(self._factory, name)

    def parameter(self, tensor: Any, requires_grad: bool) -> Any:
        if isinstance(tensor, _Tensor):
            return replace(tensor, requires_grad=requires_grad)
        return self._factory.parameter(tensor, requires_grad)


def _open_zip(window: Window) -> tuple[bytes, FindStorage]:
    window.fetch(window.length - TAIL_BYTES, TAIL_BYTES)
    members = Members(window, max_members=MAX_MEMBERS)
    if "constants.pkl" in members:
        window.fail("a TorchScript archive, not a state dict", kind=NotSupportedError)
    members.check_little_endian()
    pickle = members.content("data.pkl", limit=MAX_PICKLE_BYTES)
    known: dict[str, RecordMember] = {}

    def find_storage(key: str) -> RecordMember:
        if key not in known:
            known[key] = members.member(f"data/{key}")
        return known[key]

    return pickle, find_storage


class _State:
    """A file's pickle, decoded and flattened."""

    def __init__(
        self,
        window: Window,
        pickle: bytes,
        find_storage: FindStorage,
        allowed: Allowed,
        factory: ObjectFactory,
    ) -> None:
        self._window = window
        self._pickle = pickle
        self._find_storage = find_storage
        self._allowed = allowed
        self._factory = factory

    def index(self, name: str) -> CheckpointIndex:
        nested, count = self._decode(frozenset())
        flat, paths = self._flatten(nested)
        leaves = {value.number for value in flat.values() if isinstance(value, _Tensor)}
        # A value is what is no tensor itself; those that hold tensors get them in a second run.
        inside = set(range(count)) - leaves
        self._collect([v for v in flat.values() if not isinstance(v, _Tensor)], inside)
        values = flat
        if inside:
            nested, _ = self._decode(frozenset(inside))
            values, _ = self._flatten(nested)
        tensors = [
            self._entry(key, value, name)
            for key, value in flat.items()
            if isinstance(value, _Tensor)
        ]
        objects = [
            ObjectEntry(key, None, value=values[key])
            for key, value in flat.items()
            if not isinstance(value, _Tensor)
        ]
        return build_index(
            tensors,
            objects,
            key_order=list(flat),
            paths=paths,
            storage_meta=None,
            version=None,
            source="torch",
            metadata_files=[name],
        )

    def _decode(self, wanted: frozenset[int]) -> tuple[Any, int]:
        """Decode the pickle; tensors with these numbers are loaded. Also count the tensors."""
        count = 0

        factory = cast(ObjectFactory, _Placeholders(self._factory))
        loader = TensorLoader(self._load_storage, factory, self._window.source)

        def make_tensor(description: TensorDescription, storage: StorageReference) -> Any:
            nonlocal count
            count += 1
            if count - 1 in wanted:
                self._place(description)
                return loader.tensor(description, storage)
            return _Tensor(count - 1, description, description.requires_grad)

        value = decode_object(
            self._pickle,
            load_storage=self._load_storage,
            source=self._window.source,
            factory=factory,
            allowed=self._allowed,
            make_tensor=make_tensor,
        )
        return value, count

    def _flatten(self, nested: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        try:
            return flatten(nested, is_tensor=lambda v: isinstance(v, _Tensor | np.ndarray))
        except PlanError as error:
            raise FormatError(f"{self._window.source}: {error}") from error

    def _collect(self, values: list[Any], numbers: set[int]) -> None:
        """Add the numbers of the tensors inside values."""

        def note(value: Any) -> None:
            if isinstance(value, _Tensor):
                numbers.add(value.number)

        measure(values, source=self._window.source, limits=DEFAULT_LIMITS, on_leaf=note)

    def _load_storage(self, dtype: DType | None, key: str, location: str, numel: int) -> bytearray:
        storage = self._find_storage(key)
        data = self._window.read(storage.offset, storage.size, f"storage {key!r}")
        check_crc(self._window, storage, data)
        return bytearray(data)  # so that arrays of it can be changed

    def _place(self, description: TensorDescription) -> TensorPayload:
        storage = self._find_storage(description.storage_key)
        return find_payload(self._window, description, storage, most_expanded=MAX_EXPANDED_BYTES)

    def _entry(self, key: str, tensor: _Tensor, name: str) -> TensorEntry:
        payload = self._place(tensor.description)
        chunk = ChunkEntry(
            offsets=(0,) * len(payload.shape),
            sizes=payload.shape,
            file=name,
            record_offset=payload.payload_offset,
            record_length=payload.payload_length,
            container=Container.RAW,
            payload_offset=payload.payload_offset,
            strides=payload.strides,
            payload_length=payload.payload_length,
            checksum=UNKNOWN if payload.checksum is None else payload.checksum,
            flags=payload.flags,
        )
        return TensorEntry(
            key,
            payload.dtype,
            payload.shape,
            [chunk],
            requires_grad=tensor.requires_grad,
        )
