"""Where torch's package has these two: programs import them from there."""

from shardpoint.dcp.hf_storage import (
    consolidate_safetensors_files,
    consolidate_safetensors_files_on_every_rank,
)

__all__ = ["consolidate_safetensors_files", "consolidate_safetensors_files_on_every_rank"]
