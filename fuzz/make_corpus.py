"""Makes the seeds in ``corpus/`` out of the checkpoints in ``tests/fixtures``.

    python fuzz/make_corpus.py

Findings are added to the same folders by hand: an input that once gave a finding stays there.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator
from pathlib import Path

from targets import CORPUS, KEY, STAMP

import shardpoint
from shardpoint.formats.huggingface_journal import Journal, temporary_name
from shardpoint.formats.native_index import write_index
from shardpoint.formats.torch_record import read_object_pickle
from shardpoint.transforms import AesGcm, ShuffleZstd

FIXTURES = Path(__file__).parent.parent / "tests" / "fixtures"
_MOST_BYTES = 8 << 10


def main() -> int:
    for target, seeds in {
        "metadata": _metadata(),
        "native_index": _indexes(),
        "tensor_record": _records(objects=False),
        "object_record": _records(objects=True),
        "object_pickle": _pickles(),
        "torch_save": _files("torch_save_w1/ckpt/*.pt"),
        "safetensors": _files("hf_*/ckpt/**/*.safetensors"),
        "journal": _journals(),
        "frames": _frames(),
    }.items():
        folder = CORPUS / target
        folder.mkdir(parents=True, exist_ok=True)
        for seed in dict.fromkeys(seeds):
            (folder / f"seed-{hashlib.sha256(seed).hexdigest()[:12]}").write_bytes(seed)
    return 0


def _metadata() -> Iterator[bytes]:
    for release in ("2.3.1", "2.8.0", "2.13.0-py313", "2.15.0"):
        for path in sorted((FIXTURES / "public" / release).glob("*/ckpt/.metadata")):
            if path.stat().st_size <= _MOST_BYTES:
                yield path.read_bytes()
    for path in sorted((FIXTURES / "hostile").glob("meta_*/ckpt/.metadata")):
        if path.stat().st_size <= _MOST_BYTES:
            yield path.read_bytes()


def _indexes() -> Iterator[bytes]:
    """What a save would write of the fixtures' metadata."""
    for case in ("plain_w1", "optim_w1", "dtensor_2d_w4", "fsdp2_w2", "zstd_w2"):
        index = shardpoint.open(FIXTURES / "public" / "2.13.0" / case / "ckpt").index
        yield write_index(index, STAMP)


def _journals() -> Iterator[bytes]:
    """Of saves that count and that do not, with full files and with shards."""
    full = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    shards = tuple(f"sharded/shard-{rank:05d}-{full[0]}" for rank in range(1, 4))
    for names in (full, shards, (*shards, "model.safetensors.index.json")):
        temporaries = tuple(temporary_name(name, "0123456789abcdef") for name in names)
        yield Journal(True, temporaries, ("model.safetensors",), "a save").encode()
        yield Journal(False, names, (), "another").encode()


def _files(pattern: str) -> Iterator[bytes]:
    for release in ("2.8.0", "2.13.0"):
        for path in sorted((FIXTURES / "public" / release).glob(pattern)):
            data = path.read_bytes()
            if len(data) <= 8 * _MOST_BYTES:
                yield data


def _records(*, objects: bool) -> Iterator[bytes]:
    """Records of one checkpoint of each of two releases, a few of each size."""
    for release in ("2.6.0", "2.13.0"):
        place = FIXTURES / "public" / release / "plain_w1" / "ckpt"
        checkpoint = shardpoint.open(place)
        lengths: dict[int, int] = {}
        for key in checkpoint:
            info = checkpoint.info(key)
            chunk = info.chunks[0] if isinstance(info, shardpoint.TensorInfo) else info
            is_object = chunk is info
            seen = lengths.setdefault(chunk.record_length, 0)
            if is_object != objects or chunk.file is None or seen == 3:
                continue
            if chunk.record_length <= _MOST_BYTES:
                lengths[chunk.record_length] += 1
                data = (place / chunk.file).read_bytes()
                yield data[chunk.record_offset : chunk.record_offset + chunk.record_length]


def _pickles() -> Iterator[bytes]:
    for record in _records(objects=True):
        yield bytes(read_object_pickle(record, file="f", key="k")[0])


def _frames() -> Iterator[bytes]:
    place = FIXTURES / "public" / "2.13.0" / "zstd_w2" / "ckpt"
    checkpoint = shardpoint.open(place)
    for key in list(checkpoint)[:6]:
        info = checkpoint.info(key)
        chunk = info.chunks[0] if isinstance(info, shardpoint.TensorInfo) else info
        data = (place / chunk.file).read_bytes()
        yield b"\0" + data[chunk.record_offset : chunk.record_offset + chunk.record_length]
    for number, transform in enumerate(
        (ShuffleZstd(frame_size=4096), AesGcm(KEY, frame_size=4096))
    ):
        for length in (0, 5, 4096, 9000):
            stream = transform.stream(4)
            record = bytes(range(256)) * (length // 256) + b"x" * (length % 256)
            parts = [*stream.feed(record)]
            yield bytes([number + 1]) + b"".join(map(bytes, [*parts, *stream.finish()]))


if __name__ == "__main__":
    sys.exit(main())
