"""The public names of `torch.distributed.checkpoint`, on shardpoint's engine.

``import shardpoint.dcp as dcp`` in place of ``import torch.distributed.checkpoint as dcp``:
the same calls, and the same files on disk, in both directions.
"""

import importlib
from typing import TYPE_CHECKING, Any

from shardpoint.dcp._fsspec_filesystem import FsspecReader, FsspecWriter
from shardpoint.dcp.api import CheckpointException
from shardpoint.dcp.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from shardpoint.dcp.filesystem import FileSystemReader, FileSystemWriter
from shardpoint.dcp.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from shardpoint.dcp.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    TensorStorageMetadata,
)
from shardpoint.dcp.optimizer import load_sharded_optimizer_state_dict
from shardpoint.dcp.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    WriteItem,
)
from shardpoint.dcp.quantized_hf_storage import QuantizedHuggingFaceStorageReader
from shardpoint.dcp.state_dict_loader import LoadReport, load, load_state_dict
from shardpoint.dcp.state_dict_saver import async_save, save, save_state_dict
from shardpoint.dcp.stateful import Stateful
from shardpoint.dcp.storage import StorageReader, StorageWriter

__all__ = [
    "BytesStorageMetadata",
    "CheckpointException",
    "ChunkStorageMetadata",
    "DefaultLoadPlanner",
    "DefaultSavePlanner",
    "FileSystemReader",
    "FileSystemWriter",
    "FsspecReader",
    "FsspecWriter",
    "HuggingFaceStorageReader",
    "HuggingFaceStorageWriter",
    "LoadPlan",
    "LoadPlanner",
    "LoadReport",
    "Metadata",
    "QuantizedHuggingFaceStorageReader",
    "ReadItem",
    "SavePlan",
    "SavePlanner",
    "Stateful",
    "StorageReader",
    "StorageWriter",
    "TensorStorageMetadata",
    "WriteItem",
    "async_save",
    "load",
    "load_sharded_optimizer_state_dict",
    "load_state_dict",
    "save",
    "save_state_dict",
]

# Modules that are attributes of torch's package once it is imported, or that much code comes to
# find there because something else has imported them.
_MODULES = frozenset(
    [
        *("checkpointable", "extension", "format_utils", "planner_helpers", "resharding"),
        *("sharding_spec", "state_dict"),
        *("_consolidate_hf_safetensors", "_extension", "_nested_dict", "_traverse"),
    ]
)

if not TYPE_CHECKING:  # which would take any name then

    def __getattr__(name: str) -> Any:
        if name in _MODULES:
            return importlib.import_module(f"{__name__}.{name}")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
