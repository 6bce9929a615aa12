"""Places where checkpoints lie: bytes by name, and nothing of plans."""

from shardpoint.storage.base import Buffer, ReadableFile, SharedStorage, Storage, WritableFile
from shardpoint.storage.local import LocalStorage
from shardpoint.storage.places import storage_at

__all__ = [
    "Buffer",
    "LocalStorage",
    "ReadableFile",
    "SharedStorage",
    "Storage",
    "WritableFile",
    "storage_at",
]
