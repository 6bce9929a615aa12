"""Which part two boxes of one tensor share, one axis at a time."""

from __future__ import annotations

from shardpoint.dcp.metadata import ChunkStorageMetadata

__all__: list[str] = []


def _check_shard_metadata_pair_overlap(
    shard1: ChunkStorageMetadata, shard2: ChunkStorageMetadata
) -> bool:
    """Whether two boxes share an element."""
    spans = zip(shard1.offsets, shard1.sizes, shard2.offsets, shard2.sizes, strict=True)
    return all(a < b + m and b < a + n for a, n, b, m in spans)


def _shards_get_overlap_region_wrt_saved_tensor(
    saved_shard: ChunkStorageMetadata, current_shard: ChunkStorageMetadata
) -> list[tuple[int, int, int, int]]:
    """Return, for each axis, where the part that two boxes share lies in both.

    Returns
    -------
    For each axis its number, where the part begins in the saved box and in the current one,
    and its length.
    """
    result = []
    spans = zip(
        saved_shard.offsets,
        saved_shard.sizes,
        current_shard.offsets,
        current_shard.sizes,
        strict=True,
    )
    for axis, (saved, saved_size, current, current_size) in enumerate(spans):
        begin = max(saved, current)
        length = min(saved + saved_size, current + current_size) - begin
        result.append((axis, begin - saved, begin - current, length))
    return result
