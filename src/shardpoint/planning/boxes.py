"""Boxes for other layers: which of them overlap, and how one is named."""

from shardpoint.planning._geometry import box_text
from shardpoint.planning._join import Boxes, overlapping_pairs

__all__ = ["Boxes", "box_text", "overlapping_pairs"]
