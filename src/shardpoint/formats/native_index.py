"""The native index: the columns of a checkpoint beside its ``.metadata``, with checksums.

One file in a safetensors container, whose name and content say which ``.metadata`` it belongs
to: the CRC-32 is in the name, and the size as well in the content. So an index never has to be
overwritten, the one of the checkpoint before stays in force until the commit, and where other
software has written another ``.metadata`` the index is simply not found.

Reading takes no Python object for any chunk: the columns are views of the file's bytes, which
may be mapped memory.
"""

from __future__ import annotations

import re

from shardpoint.formats._index_format import MetadataStamp, stamp_of
from shardpoint.formats._index_reading import read_index, read_save_id
from shardpoint.formats._index_writing import write_index

__all__ = [
    "MetadataStamp",
    "index_name",
    "is_index_name",
    "read_index",
    "read_save_id",
    "stamp_of",
    "with_save_id",
    "write_index",
]

_NAME = re.compile(r"\.shardpoint-[0-9a-f]{8}\.index")


def index_name(stamp: MetadataStamp) -> str:
    """Return the name of the index of a ``.metadata``.

    Examples
    --------
    >>> index_name(stamp_of(b"123456789"))
    '.shardpoint-cbf43926.index'
    """
    return f".shardpoint-{stamp.checksum:08x}.index"


def with_save_id(metadata: bytes, found: str, wanted: str) -> bytes:
    """Return a ``.metadata`` with another number of its save in the place of the one it has."""
    return metadata.replace(found.encode(), wanted.encode())


def is_index_name(name: str) -> bool:
    """Whether a file of that name is an index, of whichever ``.metadata``."""
    return _NAME.fullmatch(name) is not None
