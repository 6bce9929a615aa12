"""Places where checkpoints lie: bytes by name, and nothing of plans."""

from shardpoint.storage.base import (
    Buffer,
    Claim,
    Closing,
    MappableFile,
    ReadableFile,
    SharedStorage,
    SpanReadable,
    Storage,
    WritableFile,
)
from shardpoint.storage.local import LocalStorage
from shardpoint.storage.places import storage_at

__all__ = [
    "Buffer",
    "Claim",
    "Closing",
    "LocalStorage",
    "MappableFile",
    "ReadableFile",
    "SharedStorage",
    "SpanReadable",
    "Storage",
    "WritableFile",
    "storage_at",
]
