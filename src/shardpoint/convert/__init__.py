"""Checkpoints from one format to another, without torch and without holding them in memory.

At most the largest tensor is in memory at a time (the largest chunk, where chunks are written
one by one); everything that is read is compared with its checksum where it has one.
"""

from shardpoint.convert.checkpoint import to_checkpoint
from shardpoint.convert.safetensors import to_safetensors
from shardpoint.convert.torch_save import to_torch_save

__all__ = ["to_checkpoint", "to_safetensors", "to_torch_save"]
