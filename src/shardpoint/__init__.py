"""Checkpoints of large PyTorch models, opened without torch.

`open` reads what ``torch.distributed.checkpoint`` (2.3 and later), ``torch.save`` and
safetensors write. Training code uses ``shardpoint.dcp``, which needs torch and is never
imported from here.
"""

from shardpoint.checkpoint import Checkpoint, ChunkInfo, ObjectInfo, TensorInfo, open
from shardpoint.errors import (
    CheckpointExistsError,
    CheckpointKeyError,
    CheckpointNotFoundError,
    ConcurrentSaveError,
    CorruptionError,
    DamagedCheckpointError,
    ForbiddenContentError,
    FormatError,
    LimitExceededError,
    NarrowingWarning,
    NotSupportedError,
    PlanError,
    Problem,
    RankFailedError,
    RankLostError,
    ShardpointError,
    ShardpointWarning,
    StorageError,
    UnknownExtensionError,
    UnsafePathError,
)
from shardpoint.formats.allowing import allowing
from shardpoint.verify import VerifyReport

__version__ = "0.1.0"

__all__ = [
    "Checkpoint",
    "CheckpointExistsError",
    "CheckpointKeyError",
    "CheckpointNotFoundError",
    "ChunkInfo",
    "ConcurrentSaveError",
    "CorruptionError",
    "DamagedCheckpointError",
    "ForbiddenContentError",
    "FormatError",
    "LimitExceededError",
    "NarrowingWarning",
    "NotSupportedError",
    "ObjectInfo",
    "PlanError",
    "Problem",
    "RankFailedError",
    "RankLostError",
    "ShardpointError",
    "ShardpointWarning",
    "StorageError",
    "TensorInfo",
    "UnknownExtensionError",
    "UnsafePathError",
    "VerifyReport",
    "__version__",
    "allowing",
    "open",
]
