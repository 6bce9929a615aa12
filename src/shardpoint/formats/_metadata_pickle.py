"""The names that a torch ``.metadata`` pickle may hold, and what they become here.

Sources: ``.metadata`` files that torch 2.3 to 2.15 wrote; before torch 2.2, tensor properties
were those of ``torch.distributed._shard``.
"""

from __future__ import annotations

from pathlib import PurePath, PurePosixPath, PureWindowsPath
from typing import Any

from shardpoint.dtypes import BY_NAME
from shardpoint.errors import ForbiddenContentError, FormatError, NotSupportedError
from shardpoint.formats._metadata_records import (
    SIZE,
    BytesRecord,
    ChunkRecord,
    Function,
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
from shardpoint.formats._pickle_guards import Limits, WorkBudget, describe
from shardpoint.formats.pickle_machine import Runs, run_pickle

__all__ = ["load_metadata_pickle"]


_GET_LAYOUT = Function("torch.serialization._get_layout")
_MEMORY_FORMAT = Function("_MEM_FORMAT_ENCODING")
_POSIX_PATH = Function("pathlib.PosixPath")
_WINDOWS_PATH = Function("pathlib.WindowsPath")

_CHECKPOINT = "torch.distributed.checkpoint.metadata"
_SHARDED_TENSOR = "torch.distributed._shard.sharded_tensor.metadata"
_GLOBALS: dict[tuple[str, str], Any] = {
    **{
        (_CHECKPOINT, record.torch_name): record
        for record in (
            MetadataRecord,
            TensorRecord,
            PropertiesRecord,
            ChunkRecord,
            BytesRecord,
            IndexRecord,
            StorageMetaRecord,
        )
    },
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): StorageRecord,
    (_SHARDED_TENSOR, "TensorProperties"): PropertiesRecord,
    (_CHECKPOINT, "_MEM_FORMAT_ENCODING"): _MEMORY_FORMAT,
    (_SHARDED_TENSOR, "MEM_FORMAT_ENCODING"): _MEMORY_FORMAT,
    ("torch", "Size"): SIZE,
    ("torch.serialization", "_get_layout"): _GET_LAYOUT,
    **{
        (module, f"{kind}Path"): function
        for module in ("pathlib", "pathlib._local")  # the latter since Python 3.13
        for kind, function in (
            ("Posix", _POSIX_PATH),
            ("PurePosix", _POSIX_PATH),
            ("Windows", _WINDOWS_PATH),
            ("PureWindows", _WINDOWS_PATH),
        )
    },
}


class _MetadataResolver:
    """The closed list for ``.metadata``."""

    def __init__(self, source: str, budget: WorkBudget) -> None:
        self.source = source
        self.budget = budget

    def find_global(self, module: str, name: str) -> Any:
        found = _GLOBALS.get((module, name))
        if found is not None:
            return found
        if module == "torch" and name in BY_NAME:
            return BY_NAME[name]
        qualified = f"{module}.{name}"
        if module == "torch" and name.startswith(_DTYPE_PREFIXES):
            raise NotSupportedError(f"{self.source}: dtype {describe(qualified)} is not supported")
        raise ForbiddenContentError(
            f"{self.source}: names {describe(qualified)}, which has no place in a checkpoint's "
            "metadata; it is refused and has not been imported or run",
            qualified_name=qualified,
        )

    def reduce(self, function: Any, arguments: tuple[Any, ...]) -> Any:
        if function is SIZE:
            # The numbers themselves are checked where they are put into columns, all at once.
            if len(arguments) == 1 and type(arguments[0]) is tuple:
                return arguments[0]
            if not arguments:
                return ()
        elif function is _GET_LAYOUT:
            if len(arguments) == 1 and type(arguments[0]) is str:
                return Layout(arguments[0])
        elif function is _MEMORY_FORMAT:
            if len(arguments) == 1 and type(arguments[0]) is int and 0 <= arguments[0] <= 2:
                return MemoryFormat(arguments[0])
        elif function is _POSIX_PATH or function is _WINDOWS_PATH:
            return self._path(function, arguments)
        else:
            raise ForbiddenContentError(
                f"{self.source}: calls {describe(function)}, which is refused"
            )
        raise FormatError(
            f"{self.source}: {function.name} is called with "
            f"{', '.join(map(describe, arguments[:4])) or 'nothing'}"
        )

    def _path(self, function: Function, arguments: tuple[Any, ...]) -> PurePath:
        if not all(type(part) is str for part in arguments):
            raise FormatError(f"{self.source}: a path has parts that are no str")
        self.budget.spend(sum(map(len, arguments)))
        kind = PurePosixPath if function is _POSIX_PATH else PureWindowsPath
        return kind(*arguments)

    def new_object(self, cls: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        if not (type(cls) is type and issubclass(cls, Record)):
            raise ForbiddenContentError(f"{self.source}: an instance of {describe(cls)} is refused")
        if arguments or keywords:
            raise FormatError(f"{self.source}: {cls.torch_name} is made with arguments")
        return cls()

    def build(self, instance: Any, state: Any) -> Any:
        if not isinstance(instance, Record):
            raise FormatError(f"{self.source}: {describe(instance)} is given a state")
        instance.state = state
        return instance

    def persistent_load(self, identifier: Any) -> Any:
        raise ForbiddenContentError(f"{self.source}: a persistent id is refused in metadata")


_DTYPE_PREFIXES = ("bits", "float", "int", "qint", "quint", "uint")
# The values are taken apart to a fixed depth, so nothing is measured.
_LIMITS = Limits(max_depth=None)


def load_metadata_pickle(data: bytes, *, source: str, runs: Runs | None = None) -> MetadataRecord:
    """Interpret a ``.metadata`` pickle.

    Parameters
    ----------
    data
        The pickle.
    source
        Where it comes from; errors begin with it.
    runs
        What takes chunks and their places by the thousands, if anything does.

    Raises
    ------
    ForbiddenContentError
        If it names anything but torch's metadata classes.
    FormatError
        If it is no pickle, or no ``Metadata``.
    """
    budget = WorkBudget(len(data), source=source, limits=_LIMITS)
    resolver = _MetadataResolver(source, budget)
    value, position = run_pickle(data, resolver, source=source, limits=_LIMITS, runs=runs)
    if type(value) is not MetadataRecord:
        found = value.torch_name if isinstance(value, Record) else describe(value)
        raise FormatError(f"{source}: holds {found}, not a Metadata")
    if position != len(data):
        raise FormatError(f"{source}: {len(data) - position} bytes follow the metadata")
    return value
