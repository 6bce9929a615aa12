"""What stands for torch's classes and functions in a ``.metadata`` pickle."""

from __future__ import annotations

from typing import Any

__all__ = [
    "SIZE",
    "BytesRecord",
    "ChunkRecord",
    "Function",
    "IndexRecord",
    "Layout",
    "MemoryFormat",
    "MetadataRecord",
    "PropertiesRecord",
    "Record",
    "StorageMetaRecord",
    "StorageRecord",
    "TensorRecord",
]


class Record:
    """An instance of a torch class: what BUILD gave it, unchecked."""

    __slots__ = ("state",)
    torch_name = ""

    def __init__(self) -> None:
        self.state: Any = None


class MetadataRecord(Record):
    """``Metadata``."""

    __slots__ = ()
    torch_name = "Metadata"


class TensorRecord(Record):
    """``TensorStorageMetadata``."""

    __slots__ = ()
    torch_name = "TensorStorageMetadata"


class PropertiesRecord(Record):
    """``TensorProperties``; its state is a tuple."""

    __slots__ = ()
    torch_name = "TensorProperties"


class ChunkRecord(Record):
    """``ChunkStorageMetadata``."""

    __slots__ = ()
    torch_name = "ChunkStorageMetadata"


class BytesRecord(Record):
    """``BytesStorageMetadata``."""

    __slots__ = ()
    torch_name = "BytesStorageMetadata"


class IndexRecord(Record):
    """``MetadataIndex``."""

    __slots__ = ()
    torch_name = "MetadataIndex"


class StorageMetaRecord(Record):
    """``StorageMeta``."""

    __slots__ = ()
    torch_name = "StorageMeta"


class StorageRecord(Record):
    """``_StorageInfo``."""

    __slots__ = ()
    torch_name = "_StorageInfo"


class Layout:
    """A ``torch.layout``."""

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name


class MemoryFormat:
    """A ``_MEM_FORMAT_ENCODING``."""

    __slots__ = ("code",)

    def __init__(self, code: int) -> None:
        self.code = code


class Function:
    """A name that REDUCE may call."""

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name


SIZE = Function("torch.Size")
