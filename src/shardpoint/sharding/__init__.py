"""Layouts as arithmetic: how a tensor is cut, which cut some boxes are, what is wrong with them."""

from shardpoint.sharding.chunking import chunk_length, chunk_spans, split_length
from shardpoint.sharding.layout import Layout, layout_of
from shardpoint.sharding.tiling import gaps, overlaps, tiling_problems

__all__ = [
    "Layout",
    "chunk_length",
    "chunk_spans",
    "gaps",
    "layout_of",
    "overlaps",
    "split_length",
    "tiling_problems",
]
