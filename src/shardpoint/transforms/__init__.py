"""What is done to records on their way into a file, and undone: compression, encryption.

A reader needs a `Transform` for every descriptor that the metadata names. `Transforms` knows
those of shardpoint; encrypted checkpoints need their key::

    from shardpoint.transforms import AesGcm

    checkpoint = shardpoint.open(path, transforms=[AesGcm(key)])
"""

from __future__ import annotations

from shardpoint.transforms._framed import Encoded, FramedStream, FrameMap, NumberedFrame
from shardpoint.transforms._records import (
    MemoryRecord,
    Origin,
    RecordBytes,
    RecordReader,
    StreamRecord,
    Tally,
    Transform,
    read_at,
)
from shardpoint.transforms._registry import TransformFinder, Transforms, decode, open_record
from shardpoint.transforms.aes_gcm import AesGcm, KeyProvider
from shardpoint.transforms.shuffle_zstd import ShuffleZstd
from shardpoint.transforms.zstd import Zstd

__all__ = [
    "AesGcm",
    "Encoded",
    "FrameMap",
    "FramedStream",
    "KeyProvider",
    "MemoryRecord",
    "NumberedFrame",
    "Origin",
    "RecordBytes",
    "RecordReader",
    "ShuffleZstd",
    "StreamRecord",
    "Tally",
    "Transform",
    "TransformFinder",
    "Transforms",
    "Zstd",
    "decode",
    "open_record",
    "read_at",
]
