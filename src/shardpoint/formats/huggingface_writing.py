"""Names, headers and the index of the safetensors files that Hugging Face's libraries load.

Facts (torch 2.8 to 2.15, ``HuggingFaceStorageWriter``): full files are called
``model-00001-of-00003.safetensors``, those of one rank ``shard-00001-model-00001-of-00003``
with the rank counted from 1. What the header says of the shards is in `sharding_metadata`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

__all__ = ["FULL_METADATA", "INDEX_NAME", "encode_index", "file_name", "sharding_metadata"]

INDEX_NAME = "model.safetensors.index.json"

FULL_METADATA = {"format": "pt"}
"""What the libraries want to see in the header of a full file."""

_SUFFIX = ".safetensors"


def file_name(number: int, count: int, shard: int | None = None) -> str:
    """Return a file's name; all numbers count from 1."""
    name = f"model-{number:05d}-of-{count:05d}{_SUFFIX}"
    return name if shard is None else f"shard-{shard:05d}-{name}"


def sharding_metadata(offsets: Mapping[str, Sequence[int]]) -> dict[str, str]:
    """Return a header's metadata that say where in each tensor the file's chunk begins."""
    content = {key: {"saved_offsets": list(place)} for key, place in offsets.items()}
    return {"DCP_SHARDING_INFO": json.dumps(content), "DCP_VERSION": "1.0", "format": "pt"}


def encode_index(weight_map: Mapping[str, str], total_size: int) -> bytes:
    """Return the index: which file each tensor is in, and the bytes of all."""
    content = {"metadata": {"total_size": total_size}, "weight_map": dict(weight_map)}
    return json.dumps(content, indent=2, ensure_ascii=False).encode()
