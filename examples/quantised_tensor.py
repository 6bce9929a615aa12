"""A tensor subclass that takes part by itself: block-quantised weights with their scales.

A row is cut into blocks; of each block a float32 scale and one signed byte a value are kept, the
scale right before its bytes. So one tensor of bytes holds everything, and any rank can take any
rows of it.

    torchrun --nproc-per-node 2 examples/quantised_tensor.py FOLDER
"""

import sys

import torch
import torch.distributed as dist

import shardpoint.dcp as dcp
from shardpoint.dcp.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from shardpoint.dcp.planner import TensorWriteData, WriteItem, WriteItemType

WORLD_SIZE = 2
BLOCK = 32
SCALE_BYTES = 4


class BlockQuantised(torch.Tensor):
    """Some rows of a quantised matrix: ``packed`` is uint8 [rows, blocks, 4 + BLOCK].

    To PyTorch it has the size and dtype of what is stored of all rows, which is what saving and
    loading compare.
    """

    @staticmethod
    def __new__(cls, packed, first_row, all_rows):
        shape = (all_rows, *packed.shape[1:])
        return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=torch.uint8)

    def __init__(self, packed, first_row, all_rows):
        self.packed = packed
        self.first_row = first_row
        self.all_rows = all_rows

    @classmethod
    def quantise(cls, values, first_row, all_rows):
        blocks = values.reshape(values.size(0), -1, BLOCK)
        scales = blocks.abs().amax(dim=2, keepdim=True).clamp(min=1e-12) / 127
        numbers = (blocks / scales).round().to(torch.int8)
        packed = torch.cat([scales.view(torch.uint8), numbers.view(torch.uint8)], dim=2)
        return cls(packed, first_row, all_rows)

    @classmethod
    def empty(cls, rows, columns, first_row, all_rows):
        packed = torch.zeros(rows, columns // BLOCK, SCALE_BYTES + BLOCK, dtype=torch.uint8)
        return cls(packed, first_row, all_rows)

    def dequantise(self):
        scales = self.packed[:, :, :SCALE_BYTES].contiguous().view(torch.float32)
        numbers = self.packed[:, :, SCALE_BYTES:].view(torch.int8)
        return (scales * numbers).flatten(1)

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            (own,) = args
            return cls(own.packed, own.first_row, own.all_rows)
        raise NotImplementedError(f"{function}: dequantise first")

    # what makes it checkpointable

    def __create_write_items__(self, fqn, object):
        chunk = self._chunk()
        properties = TensorProperties(dtype=torch.uint8)
        return [
            WriteItem(
                index=MetadataIndex(fqn, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk=chunk, properties=properties, size=self.size()),
            )
        ]

    def __create_chunk_list__(self):
        return [self._chunk()]

    def __get_tensor_shard__(self, index):
        return self.packed

    def _chunk(self):
        offsets = torch.Size((self.first_row, 0, 0))
        return ChunkStorageMetadata(offsets=offsets, sizes=self.packed.shape)


def rows_of(rank, cut):
    return (0, cut) if rank == 0 else (cut, 10)


def save(folder):
    begin, end = rows_of(dist.get_rank(), cut=6)
    values = torch.linspace(-2, 3, 10 * 64).reshape(10, 64)[begin:end]
    weight = BlockQuantised.quantise(values, first_row=begin, all_rows=10)
    dcp.save({"weight": weight}, checkpoint_id=folder)


def load(folder):
    begin, end = rows_of(dist.get_rank(), cut=3)  # other rows than when it was saved
    weight = BlockQuantised.empty(end - begin, 64, first_row=begin, all_rows=10)
    dcp.load({"weight": weight}, checkpoint_id=folder)
    return {"rows": (begin, end), "packed": weight.packed, "values": weight.dequantise()}


if __name__ == "__main__":
    dist.init_process_group("gloo")
    save(sys.argv[1])
    print(load(sys.argv[1]))
    dist.destroy_process_group()
