"""What a checkpoint holds, in columns."""

from shardpoint.index._building import (
    ChunkEntry,
    ObjectEntry,
    TensorEntry,
    build_index,
    row_major_strides,
)
from shardpoint.index._columns import (
    BLOCK_BYTES,
    CONJUGATE,
    NEGATIVE,
    NO_FILE,
    UNKNOWN,
    BlockChecksums,
    CheckpointIndex,
    Chunks,
    Container,
    Objects,
    Payloads,
    Tensors,
)

__all__ = [
    "BLOCK_BYTES",
    "CONJUGATE",
    "NEGATIVE",
    "NO_FILE",
    "UNKNOWN",
    "BlockChecksums",
    "CheckpointIndex",
    "ChunkEntry",
    "Chunks",
    "Container",
    "ObjectEntry",
    "Objects",
    "Payloads",
    "TensorEntry",
    "Tensors",
    "build_index",
    "row_major_strides",
]
