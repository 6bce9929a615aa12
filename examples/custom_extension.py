"""A stream transform of your own: every entry XORed with a key stream. And zstd, which is there.

(For real encryption there is ``AesGcm``; this one is to show the interface. torch 2.13 cannot read
back what it writes through two extensions at once; shardpoint can.)

    torchrun --nproc-per-node 2 examples/custom_extension.py FOLDER
"""

import io
import sys

import torch
import torch.distributed as dist
from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

import shardpoint.dcp as dcp
from shardpoint.dcp.extension import ExtensionRegistry, StreamTransformExtension, ZStandard

WORLD_SIZE = 2
KEY = bytes(range(7, 7 + 64))


class XorStream(io.RawIOBase):
    """Changes what is written to, or read from, another stream."""

    def __init__(self, stream):
        self.stream = stream
        self.position = 0

    def _changed(self, data):
        start = self.position % len(KEY)
        self.position += len(data)
        pad = (KEY * (len(data) // len(KEY) + 2))[start : start + len(data)]
        return bytes(a ^ b for a, b in zip(data, pad, strict=True))

    def readable(self):
        return True

    def writable(self):
        return True

    def write(self, data):
        data = bytes(data)
        self.stream.write(self._changed(data))
        return len(data)

    def readinto(self, buffer):
        data = self._changed(self.stream.read(len(buffer)))
        buffer[: len(data)] = data
        return len(data)

    def flush(self):
        if not self.closed:
            self.stream.flush()


class Xor(StreamTransformExtension):
    @staticmethod
    def registry_name():
        return "stream.xor@example.org"

    @staticmethod
    def from_descriptor(version):
        if version != "1":
            raise ValueError(f"version {version} of {Xor.registry_name()} is not known")
        return Xor()

    def get_descriptor(self):
        return f"{self.registry_name()}/1"

    def transform_to(self, output):
        return XorStream(output)

    def transform_from(self, input):
        return XorStream(input)


def state(axis, fill):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    whole = torch.arange(3000.0).reshape(50, 60) if fill else torch.zeros(50, 60)
    return {
        "weight": distribute_tensor(whole, mesh, [Shard(axis)]),
        "settings": {"steps": 5 if fill else 0},
    }


EXTENSIONS = {"xor": Xor, "zstd": ZStandard}


def save(folder):
    for name, kind in EXTENSIONS.items():
        writer = dcp.FileSystemWriter(f"{folder}/{name}", _extensions=[kind()])
        dcp.save(state(axis=0, fill=True), storage_writer=writer)


def load(folder):
    registry = ExtensionRegistry()
    registry.register(Xor)
    loaded = {}
    for name in EXTENSIONS:
        target = state(axis=1, fill=False)
        reader = dcp.FileSystemReader(f"{folder}/{name}", _extension_registry=registry)
        dcp.load(target, storage_reader=reader)
        loaded[name] = {**target, "weight": target["weight"].full_tensor()}
    return loaded


if __name__ == "__main__":
    dist.init_process_group("gloo")
    save(sys.argv[1])
    print(load(sys.argv[1]))
    dist.destroy_process_group()
