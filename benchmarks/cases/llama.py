"""A Llama-shaped model with AdamW, sharded by FSDP2 over 4 ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from contenders import given, load, save
from measuring import Measurement, evict, measure
from states import check_equal, tensor_bytes
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from cases import Case, Job

__all__ = ["CASES"]

_LAYERS = 8
_BYTES_PER_PARAMETER = 12  # float32 weights and two moments


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        inner = 8 * width // 3 // 8 * 8
        for name in ("q_proj", "o_proj"):
            self.add_module(name, nn.Linear(width, width, bias=False))
        for name in ("k_proj", "v_proj"):
            self.add_module(name, nn.Linear(width, width // 4, bias=False))
        for name in ("gate_proj", "up_proj"):
            self.add_module(name, nn.Linear(width, inner, bias=False))
        self.down_proj = nn.Linear(inner, width, bias=False)
        self.input_layernorm = nn.RMSNorm(width)
        self.post_attention_layernorm = nn.RMSNorm(width)


class _Llama(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(8 * width, width)
        self.layers = nn.ModuleList(_Block(width) for _ in range(_LAYERS))
        self.norm = nn.RMSNorm(width)
        self.lm_head = nn.Linear(width, 8 * width, bias=False)


def _width(llama_mb: int) -> int:
    """Return the width with which model and optimizer come nearest to the size."""
    per_square = 16 + _LAYERS * (2 + 0.5 + 8)
    return max(64, int(((llama_mb << 20) / _BYTES_PER_PARAMETER / per_square) ** 0.5) // 64 * 64)


def _state(job: Job, seed: int) -> dict[str, Any]:
    torch.manual_seed(seed)
    model = _Llama(_width(job.settings.llama_mb))
    for layer in model.layers:
        fully_shard(layer)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, foreach=False)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 1.0 + seed)
    optimizer.step()
    model_state, optimizer_state = get_state_dict(model, optimizer)
    return {"model": model_state, "optimizer": optimizer_state}


def _locals(state: dict[str, Any]) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, item in value.items():
                walk(f"{prefix}.{key}", item)
        elif isinstance(value, torch.Tensor):
            found[prefix] = value.to_local() if isinstance(value, DTensor) else value

    walk("", state)
    return found


def _run(job: Job) -> dict[str, Measurement]:
    store = f"file://{job.folder / 'store'}"
    dist.init_process_group("gloo", init_method=store, rank=job.rank, world_size=job.world_size)
    state, target = _state(job, 0), _state(job, 1)
    saved, into = _locals(state), _locals(target)
    saving: Any = given("raw", saved) if job.contender == "raw" else state
    loading: Any = given("raw", into) if job.contender == "raw" else target
    needed = tensor_bytes(saved)
    _save_and_load(job, saving, loading, job.folder / "warm-up", needed)
    results = _save_and_load(job, saving, loading, job.folder / "checkpoint", needed)
    check_equal(_locals(target) if job.contender != "raw" else into, saved)
    dist.barrier()
    dist.destroy_process_group()
    return results


def _save_and_load(
    job: Job, saving: Any, loading: Any, place: Path, needed: int
) -> dict[str, Measurement]:
    results = {
        "save": measure(
            lambda: save(job.contender, saving, place, sync=False, rank=job.rank),
            before=dist.barrier,
        )
    }
    dist.barrier()  # those that are done first must not take the processors from the others
    results["load"] = measure(
        lambda: load(job.contender, loading, place, rank=job.rank),
        needed_bytes=needed,
        before=lambda: _evict_together(job, place),
    )
    dist.barrier()
    return results


def _evict_together(job: Job, place: Any) -> None:
    if job.settings.cold and job.rank == 0:
        evict(place)
    dist.barrier()


CASES = [
    Case(
        "llama",
        "Llama-shaped with AdamW, FSDP2 over 4 ranks, no sync",
        ("torch", "torch_checkpointing", "shardpoint", "raw"),
        _run,
        world_size=4,
    )
]
