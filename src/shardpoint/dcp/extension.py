"""Extensions: what is done to the bytes of every entry on their way into a file.

The names are those of ``torch.distributed.checkpoint._extension``; torch's own extensions and
registries, and subclasses of torch's classes, are taken wherever these are. Beyond torch's
there are `AesGcm` and `ShuffleZstd`, of which parts can be read without decoding all::

    writer = dcp.FileSystemWriter(path, _extensions=[AesGcm(key), ShuffleZstd()])
    dcp.save(state_dict, storage_writer=writer)  # compressed, then encrypted

    registry = ExtensionRegistry()
    registry.register(AesGcm(key))
    dcp.load(state_dict, storage_reader=dcp.FileSystemReader(path, _extension_registry=registry))

As with torch, the extension that is named last is the one that a record goes through first.
"""

from __future__ import annotations

import abc
import importlib
import importlib.util
import io
from collections.abc import Sequence
from typing import IO, Any, cast

from shardpoint.errors import NotSupportedError, UnknownExtensionError
from shardpoint.transforms import (
    AesGcm as AesGcmTransform,
)
from shardpoint.transforms import (
    FramedStream,
    KeyProvider,
    Origin,
    RecordReader,
    StreamRecord,
)
from shardpoint.transforms import (
    ShuffleZstd as ShuffleZstdTransform,
)

__all__ = [
    "AesGcm",
    "Extension",
    "ExtensionRegistry",
    "ShuffleZstd",
    "StreamTransformExtension",
    "ZStandard",
]

_UNLIMITED = 1 << 62  # bytes; a stream of torch's API has no limit to be held to


class Extension(abc.ABC):
    """What changes how entries are laid out in files, and is named in the metadata for readers."""

    @staticmethod
    @abc.abstractmethod
    def registry_name() -> str:
        """Return the name by which a registry knows the class: ``name[@local-domain]``."""

    @staticmethod
    @abc.abstractmethod
    def from_descriptor(version: str) -> Extension:
        """Return an extension that reads what one of that version wrote.

        Parameters
        ----------
        version
            What follows the slash in the descriptor; ``""`` where nothing does.
        """

    @abc.abstractmethod
    def get_descriptor(self) -> str:
        """Return what the metadata names: ``name[@local-domain][/version]``."""


class StreamTransformExtension(Extension):
    """What changes the bytes of each entry, one entry at a time."""

    @abc.abstractmethod
    def transform_to(self, output: IO[bytes]) -> IO[bytes]:
        """Return a stream to write an entry to, which writes it, changed, to `output`.

        The returned stream is closed when the entry has been written. It must then have
        written all, and must close `output`, which does not close any file.
        """

    @abc.abstractmethod
    def transform_from(self, input: IO[bytes]) -> IO[bytes]:
        """Return a stream to read an entry from, which reads what was written from `input`."""


class ZStandard(StreamTransformExtension):
    """zstd of each entry, as torch writes it since 2.7.

    Raises
    ------
    NotSupportedError
        If the package `zstandard` is not installed.
    """

    def __init__(self) -> None:
        if not self.is_available():
            raise NotSupportedError(f"{self.registry_name()}: install shardpoint[zstd] to use it")

    @staticmethod
    def is_available() -> bool:
        """Whether the package `zstandard` is installed."""
        return importlib.util.find_spec("zstandard") is not None

    @staticmethod
    def registry_name() -> str:
        return "stream.zstd"

    @staticmethod
    def from_descriptor(version: str) -> ZStandard:
        if version.partition(".")[0] != "1":
            raise UnknownExtensionError(f"unknown version {version!r} of stream.zstd; known: '1'")
        return ZStandard()

    def get_descriptor(self) -> str:
        return f"{self.registry_name()}/1"

    def transform_to(self, output: IO[bytes]) -> IO[bytes]:
        zstandard = importlib.import_module("zstandard")
        return cast("IO[bytes]", zstandard.ZstdCompressor().stream_writer(output))

    def transform_from(self, input: IO[bytes]) -> IO[bytes]:
        zstandard = importlib.import_module("zstandard")
        return cast("IO[bytes]", zstandard.ZstdDecompressor().stream_reader(input))


class _FramedExtension(StreamTransformExtension):
    """An extension around one of the core's transforms, which `transform` is."""

    transform: AesGcmTransform | ShuffleZstdTransform

    def get_descriptor(self) -> str:
        return self.transform.descriptor

    def transform_to(self, output: IO[bytes]) -> IO[bytes]:
        return cast("IO[bytes]", _FramingWriter(self.transform.stream(None), output))

    def transform_from(self, input: IO[bytes]) -> IO[bytes]:
        name, _, version = self.get_descriptor().partition("/")
        record = self.transform.undo(
            StreamRecord(input),
            version,
            most=_UNLIMITED,
            origin=Origin("", name),
            tally=None,
        )
        return cast("IO[bytes]", io.BufferedReader(RecordReader(record)))


class ShuffleZstd(_FramedExtension):
    """Compression for floating-point tensors; parts of what it writes are read on their own.

    See `shardpoint.transforms.ShuffleZstd`.

    Parameters
    ----------
    level
        zstd's, 1 to 22.
    frame_size
        Bytes that are compressed at once, 4 KiB to 1 MiB.
    """

    def __init__(self, *, level: int = 1, frame_size: int = 64 << 10) -> None:
        self.transform = ShuffleZstdTransform(level=level, frame_size=frame_size)

    @staticmethod
    def registry_name() -> str:
        return ShuffleZstdTransform.name

    @staticmethod
    def from_descriptor(version: str) -> ShuffleZstd:
        _check_version(ShuffleZstdTransform.descriptor, version)
        return ShuffleZstd()


class AesGcm(_FramedExtension):
    """Encryption that detects tampering; parts of what it writes are read on their own.

    See `shardpoint.transforms.AesGcm`, also for what it does and does not protect against.

    A reader's registry needs the key: register an object, not the class,
    ``registry.register(AesGcm(key))``; torch's own registry takes it, too.

    Parameters
    ----------
    key
        16, 24 or 32 secret random bytes, or a function that gives them for a key id.
    key_id
        Names the key, in every record, in plain text.
    context
        Bytes that readers must give too.
    frame_size
        Bytes that are encrypted at once, 4 KiB to 1 MiB.
    """

    def __init__(
        self,
        key: KeyProvider,
        *,
        key_id: str = "",
        context: bytes = b"",
        frame_size: int = 64 << 10,
    ) -> None:
        self.transform = AesGcmTransform(key, key_id=key_id, context=context, frame_size=frame_size)
        # Of an object that is registered in the class's place, so that it keeps its key.
        vars(self)["from_descriptor"] = self._with_key

    @staticmethod
    def registry_name() -> str:
        return AesGcmTransform.name

    @staticmethod
    def from_descriptor(version: str) -> AesGcm:
        raise NotSupportedError(
            f"{AesGcmTransform.name} needs a key: register an object, "
            f"registry.register(AesGcm(key)), in the ExtensionRegistry that FileSystemReader "
            f"is given"
        )

    def _with_key(self, version: str) -> AesGcm:
        _check_version(AesGcmTransform.descriptor, version)
        return self


class ExtensionRegistry:
    """The extensions that a reader knows.

    Attributes
    ----------
    extensions
        By registry name. A registry begins with those of this module.
    """

    def __init__(self) -> None:
        self.extensions: dict[str, type[Extension] | Extension] = {
            known.registry_name(): known for known in (ZStandard, ShuffleZstd, AesGcm)
        }

    def register(self, cls: type[Extension] | Extension) -> None:
        """Add an extension, perhaps in place of one of the same name.

        Parameters
        ----------
        cls
            The class; or an object where its ``from_descriptor`` needs what the object has.
        """
        self.extensions[cls.registry_name()] = cls

    def from_descriptor_list(self, descriptors: Sequence[str]) -> Sequence[Extension]:
        """Return an extension for each descriptor, in the same order.

        Raises
        ------
        UnknownExtensionError
            If a descriptor names none that is registered.
        Exception
            Whatever an extension's ``from_descriptor`` raises.
        """
        found = []
        for descriptor in descriptors:
            name, _, version = descriptor.partition("/")
            if name not in self.extensions:
                raise UnknownExtensionError(
                    f"unknown extension {name!r}; known: "
                    f"{', '.join(map(repr, self.extensions))}; register its class with "
                    f"ExtensionRegistry.register, and give FileSystemReader that registry"
                )
            found.append(self.extensions[name].from_descriptor(version))
        return found


def _check_version(descriptor: str, version: str) -> None:
    name, _, known = descriptor.partition("/")
    if version != known:
        raise UnknownExtensionError(f"unknown version {version!r} of {name}; known: {known!r}")


class _FramingWriter(io.RawIOBase):
    """A stream that writes frames of what is written to it."""

    def __init__(self, stream: FramedStream, output: IO[bytes]) -> None:
        self._stream = stream
        self._output = output

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        for piece in self._stream.feed(view):
            self._output.write(piece)
        return len(view)

    def close(self) -> None:
        if self.closed:
            return
        for piece in self._stream.finish():
            self._output.write(piece)
        self._output.close()
        super().close()
