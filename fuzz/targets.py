"""What is fuzzed: every reader of bytes that come from somewhere else.

A target takes any bytes. It returns if they are fine and raises a `ShardpointError` if they are
not; anything else that comes out of it is a finding, and so is memory or time without bounds.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

from shardpoint.engine.opening import open_index
from shardpoint.formats.checksum import crc32
from shardpoint.formats.dcp_metadata import read_metadata
from shardpoint.formats.huggingface_journal import decode_journal
from shardpoint.formats.native_index import read_index, stamp_of
from shardpoint.formats.object_decoder import NumpyFactory, decode_object
from shardpoint.formats.safetensors import read_header
from shardpoint.formats.torch_record import read_object_pickle, tensor_payload_from_bytes
from shardpoint.transforms import AesGcm, ShuffleZstd, Transforms, decode

__all__ = ["CORPUS", "KEY", "MOST", "STAMP", "TARGETS", "descriptors_of"]

CORPUS = Path(__file__).parent / "corpus"

KEY = bytes(range(32))
"""With which the encrypted seeds were made."""

STAMP = stamp_of(b"what .metadata holds")
"""Of the metadata file that the seeds of `native_index` belong to."""

MOST = 1 << 20
"""The largest record that the frames may decode to."""

_DESCRIPTORS = (("stream.zstd/1",), (ShuffleZstd().descriptor,), (AesGcm(KEY).descriptor,))


def metadata(data: bytes) -> None:
    """torch's ``.metadata``."""
    read_metadata(data, file=".metadata")


def tensor_record(data: bytes) -> None:
    """The ``torch.save`` record of a tensor."""
    tensor_payload_from_bytes(data, file="f", key="k")


def native_index(data: bytes) -> None:
    """The native index, its checksum put right first: nothing else would get past it."""
    content = data[:-4]
    sealed = content + crc32(content).to_bytes(4, "little")
    read_index(memoryview(sealed), STAMP, file="f", metadata_file=".metadata")


def object_record(data: bytes) -> None:
    """The ``torch.save`` record of an object, decoded."""
    pickle, load_storage = read_object_pickle(data, file="f", key="k")
    decode_object(pickle, load_storage=load_storage, source="k", factory=NumpyFactory(), allowed={})


def object_pickle(data: bytes) -> None:
    """The pickle in such a record, without a zip around it to get past."""

    def load_storage(dtype: object, key: str, location: str, numel: int) -> memoryview:
        return memoryview(bytes(64))

    decode_object(data, load_storage=load_storage, source="k", factory=NumpyFactory(), allowed={})


def torch_save(data: bytes) -> None:
    """A whole file of ``torch.save``, as a zip or in the older form."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "file.pt"
        path.write_bytes(data)
        open_index(path)


def safetensors(data: bytes) -> None:
    """A safetensors file."""

    def read_at(offset: int, length: int) -> bytes:
        return data[offset : offset + length]

    read_header(read_at, len(data), file="f")


def journal(data: bytes) -> None:
    """The journal of a save of safetensors files."""
    decode_journal(data)


def frames(data: bytes) -> None:
    """What a transform has made of a record: the first byte says which transform."""
    decode(
        descriptors_of(data),
        data[1:],
        finder=Transforms([AesGcm(KEY)]),
        max_size=MOST,
        key="k",
        file="f",
    )


def descriptors_of(data: bytes) -> tuple[str, ...]:
    """Return the transforms that the input of `frames` asks for."""
    return _DESCRIPTORS[data[0] % len(_DESCRIPTORS)] if data else _DESCRIPTORS[0]


TARGETS: dict[str, Callable[[bytes], None]] = {
    target.__name__: target
    for target in (
        metadata,
        native_index,
        tensor_record,
        object_record,
        object_pickle,
        torch_save,
        safetensors,
        journal,
        frames,
    )
}
