"""Places where checkpoints lie: bytes by name, and nothing of plans."""

from shardpoint.storage.base import Buffer, ReadableFile, Storage, WritableFile
from shardpoint.storage.local import LocalStorage

__all__ = ["Buffer", "LocalStorage", "ReadableFile", "Storage", "WritableFile"]
