"""Extensions of any origin, torch's included, as the engine uses them."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Sequence
from typing import IO, Any, Protocol, TypeAlias, cast, runtime_checkable

from shardpoint.dcp.extension import ExtensionRegistry, ZStandard
from shardpoint.errors import (
    PlanError,
    ShardpointError,
)
from shardpoint.transforms import (
    AesGcm,
    FrameMap,
    MemoryRecord,
    Origin,
    RecordBytes,
    ShuffleZstd,
    Tally,
    Transform,
    Zstd,
    read_at,
)

__all__ = [
    "Registry",
    "RegistryFinder",
    "StreamExtension",
    "check_extensions",
    "descriptors_of",
    "encode",
]

Blocks: TypeAlias = Iterable["bytes | bytearray | memoryview"]

_STEP = 4 << 20
_TORCHS_ZSTANDARD = ("torch.distributed.checkpoint._extension", "ZStandard")


@runtime_checkable
class StreamExtension(Protocol):
    """What a `StreamTransformExtension` of ours or of torch's can do."""

    def get_descriptor(self) -> str: ...

    def transform_to(self, output: IO[bytes]) -> IO[bytes]: ...

    def transform_from(self, input: IO[bytes]) -> IO[bytes]: ...


class Registry(Protocol):
    """What an `ExtensionRegistry` of ours or of torch's can do."""

    def from_descriptor_list(self, descriptors: Sequence[str]) -> Sequence[Any]: ...


def check_extensions(extensions: Iterable[Any]) -> tuple[StreamExtension, ...]:
    """Return extensions to write with.

    Raises
    ------
    PlanError
        If one has not the methods of a `StreamTransformExtension`, or no text as descriptor.
    """
    checked = tuple(extensions)
    for extension in checked:
        if isinstance(extension, type) or not isinstance(extension, StreamExtension):
            raise PlanError(
                f"an extension to write with must be a StreamTransformExtension object, not "
                f"{extension!r}"
            )
        descriptor = extension.get_descriptor()
        if not isinstance(descriptor, str) or not descriptor.partition("/")[0]:
            raise PlanError(f"{extension!r}: its descriptor is {descriptor!r}, not a name")
    return checked


def descriptors_of(extensions: Sequence[StreamExtension]) -> tuple[str, ...]:
    """Return the descriptors as the metadata lists them: in the order of being applied."""
    return tuple(extension.get_descriptor() for extension in reversed(extensions))


def encode(
    extensions: Sequence[StreamExtension],
    frame_map: FrameMap,
    blocks: Blocks,
    element_size: int | None,
) -> Blocks:
    """Return an entry's bytes as they go into the file.

    Parameters
    ----------
    extensions
        Of which the last one is applied first.
    frame_map
        Encodes frames, perhaps several at once.
    blocks
        The entry; one block is used only until the next is taken.
    element_size
        Bytes of the elements that most of the entry consists of, or None.
    """
    for extension in reversed(extensions):
        transform = getattr(extension, "transform", None)
        if isinstance(transform, AesGcm | ShuffleZstd):
            blocks = transform.stream(element_size).encode(blocks, frame_map=frame_map)
        else:
            blocks = _through(extension, blocks)
        element_size = None  # what comes out of an extension has no elements
    return blocks


def _through(extension: StreamExtension, blocks: Blocks) -> Iterator[bytes]:
    """Yield what an extension's stream makes of an entry."""
    output = _Collected()
    stream = extension.transform_to(cast("IO[bytes]", output))
    for block in blocks:
        stream.write(block)
        yield from output.take()
    stream.close()
    yield from output.take()


class _Collected(io.RawIOBase):
    """Takes what is written to it, until it is fetched; closing it changes nothing."""

    def __init__(self) -> None:
        self._pieces: list[bytes] = []
        self._position = 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        piece = bytes(data)
        self._pieces.append(piece)
        self._position += len(piece)
        return len(piece)

    def tell(self) -> int:
        return self._position

    def close(self) -> None:
        """Stay open: what was written is fetched after the stream around this has closed."""

    def take(self) -> list[bytes]:
        pieces, self._pieces = self._pieces, []
        return pieces


class RegistryFinder:
    """Finds transforms in a registry of extensions; a `TransformFinder` of the core.

    Parameters
    ----------
    registry
        Ours or torch's; None is ours with nothing added.
    """

    def __init__(self, registry: Registry | None) -> None:
        self._registry: Registry = ExtensionRegistry() if registry is None else registry
        self._found: dict[str, Transform] = {}

    def find(self, descriptor: str, origin: Origin) -> Transform:
        """See `TransformFinder`."""
        found = self._found.get(descriptor)
        if found is None:
            found = self._found[descriptor] = self._look_up(descriptor, origin)
        return found

    def _look_up(self, descriptor: str, origin: Origin) -> Transform:
        try:
            (extension,) = self._registry.from_descriptor_list([descriptor])
        except ShardpointError as error:
            raise origin.not_supported(f"{descriptor!r} cannot be undone: {error}") from error
        except ValueError as error:  # what torch's own raise
            raise origin.not_supported(
                f"{descriptor!r} cannot be undone: {error}; register an extension of that name "
                f"in the ExtensionRegistry that FileSystemReader is given"
            ) from error
        transform = getattr(extension, "transform", None)
        if isinstance(transform, AesGcm | ShuffleZstd):
            return transform
        kind = type(extension)
        if kind is ZStandard or (kind.__module__, kind.__qualname__) == _TORCHS_ZSTANDARD:
            return Zstd()  # bounded, where the package's stream is not
        if hasattr(extension, "transform_from"):
            return _StreamTransform(extension, descriptor)
        return _Unchanged(descriptor)


class _StreamTransform:
    """A user's extension: all of a record at once, through its stream."""

    def __init__(self, extension: StreamExtension, descriptor: str) -> None:
        self.name = descriptor.partition("/")[0]
        self._extension = extension

    def undo(
        self, stored: RecordBytes, version: str, *, most: int, origin: Origin, tally: Tally | None
    ) -> RecordBytes:
        """See `Transform`; an exception of the extension is an error that names the entry."""
        data = bytearray()
        try:
            # In one go: so the stored bytes are compared with their checksum, if there is one.
            source = io.BytesIO(read_at(stored, 0, stored.size))
            stream = self._extension.transform_from(cast("IO[bytes]", source))
            while piece := stream.read(min(_STEP, most + 1 - len(data))):
                data += piece
                if len(data) > most:
                    raise origin.too_large(f"{self.name} gives more than the {most} bytes it may")
        except ShardpointError:
            raise
        except Exception as error:
            raise origin.corrupt(
                f"{self.name} cannot undo it: {type(error).__name__}: {error}"
            ) from error
        if tally is not None:
            tally.add(len(data))
        return MemoryRecord(data)


class _Unchanged:
    """An extension that changes no bytes: one that is none of streams."""

    def __init__(self, descriptor: str) -> None:
        self.name = descriptor.partition("/")[0]

    def undo(
        self, stored: RecordBytes, version: str, *, most: int, origin: Origin, tally: Tally | None
    ) -> RecordBytes:
        """See `Transform`."""
        return stored
