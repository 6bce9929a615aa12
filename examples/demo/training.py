"""The training job: FSDP2, AdamW, and a checkpoint that any number of ranks can read.

Started by `job.Job`. Rank 0 reports what happens on standard output, one JSON object a line.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, TextIO

import torch
import torch.distributed as dist
from batches import Batches
from digests import digest
from model import ByteTransformer
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.multiprocessing.spawn import start_processes
from torch.nn import functional

import shardpoint.dcp as dcp
from shardpoint.dcp.state_dict import get_state_dict, set_state_dict

_LENGTH = 64
_BATCH_SIZE = 8
_SHAPE = {"width": 96, "heads": 4, "layers": 3, "inner_width": 250, "length": _LENGTH}


class Trainer:
    """A model, its optimizer, its learning rate schedule and its data, on this rank."""

    def __init__(self, text: bytes, *, total_steps: int, seed: int) -> None:
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        torch.manual_seed(seed)
        # In double precision the order in which ranks add up gradients, which depends on
        # their number, does not drown out what the demo wants to see.
        self.model = ByteTransformer(**_SHAPE).double()
        self.parameters = sum(parameter.numel() for parameter in self.model.parameters())
        mesh = init_device_mesh("cpu", (self.world_size,))
        for block in self.model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(self.model, mesh=mesh)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=3e-3, weight_decay=0.1)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, total_steps)
        self.data = Batches(text, length=_LENGTH, batch_size=_BATCH_SIZE, seed=seed)
        self.step = 0

    def train_one_step(self) -> float:
        """Learn from the next batch; return its mean loss over all ranks."""
        share = self.data.share(self.rank, self.world_size)
        scores = self.model(share[:, :-1])
        loss = functional.cross_entropy(scores.flatten(0, 1), share[:, 1:].flatten())
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.schedule.step()
        self.step += 1
        mean = loss.detach()
        dist.all_reduce(mean)
        return mean.item() / self.world_size

    def state(self) -> dict[str, Any]:
        """Return all that a checkpoint needs; tensors are this rank's shards."""
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {
            "model": model,
            "optimizer": optimizer,
            "schedule": self.schedule,
            "data": self.data,
            "step": self.step,
        }

    def save(self, folder: str) -> float:
        """Write a checkpoint; all ranks call this. Return the seconds of writing it."""
        state = self.state()
        dist.barrier()  # the time is that of saving, not of waiting for slower ranks
        started = time.perf_counter()
        dcp.save(state, checkpoint_id=folder)
        return time.perf_counter() - started

    def load(self, folder: str) -> dcp.LoadReport:
        """Go on from a checkpoint, whatever number of ranks wrote it; all ranks call this."""
        state = self.state()
        dist.barrier()
        report = dcp.load(state, checkpoint_id=folder)
        set_state_dict(
            self.model,
            self.optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
        )
        self.step = state["step"]
        return report

    def digests(self) -> dict[str, str]:
        """Fingerprint every tensor of model and optimizer, put together from all ranks."""
        return {key: digest(_whole(tensor).numpy()) for key, tensor in _tensors(self.state())}


def _tensors(state: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in state["model"].items():
        yield f"model.{name}", tensor
    for parameter, values in state["optimizer"]["state"].items():
        for name, tensor in values.items():
            yield f"optimizer.state.{parameter}.{name}", tensor


def _whole(tensor: Tensor) -> Tensor:
    whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return whole.detach()


class Reporter:
    """Tells the demo what happens; silent on all ranks but 0."""

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream

    def tell(self, event: str, **details: Any) -> None:
        """Write one line, at once: this process may be killed at any moment."""
        if self._stream is not None:
            print(json.dumps({"event": event, **details}), file=self._stream, flush=True)


def _train(arguments: argparse.Namespace, reporter: Reporter) -> None:
    # A resumed job begins with other random weights and another order of the data: what it
    # goes on with can only have come from the checkpoint.
    trainer = Trainer(
        arguments.text.read_bytes(),
        total_steps=arguments.steps,
        seed=1 if arguments.resume_from is None else 1_000 + dist.get_world_size(),
    )
    reporter.tell("ready", parameters=trainer.parameters, batches=trainer.data.batches_per_epoch)
    if arguments.resume_from is not None:
        report = trainer.load(arguments.resume_from)
        bytes_read = torch.tensor(report.bytes_read)
        dist.all_reduce(bytes_read)
        reporter.tell(
            "loaded",
            step=trainer.step,
            seconds=report.seconds,
            bytes_read=bytes_read.item(),
            digests=trainer.digests(),
        )
    while trainer.step < arguments.until:
        loss = trainer.train_one_step()
        reporter.tell("step", step=trainer.step, loss=loss)
        if trainer.step == arguments.save_at:
            digests = trainer.digests()
            seconds = trainer.save(arguments.save_to)
            reporter.tell("saved", seconds=seconds, digests=digests)


def _run_rank(rank: int, arguments: argparse.Namespace) -> None:
    # Libraries print to standard output as they please: events get a stream of their own.
    events = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=arguments.rendezvous.as_uri(),
        rank=rank,
        world_size=arguments.processes,
        timeout=timedelta(seconds=60),
    )
    _train(arguments, Reporter(events if rank == 0 else None))
    dist.destroy_process_group()


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rendezvous", type=Path, required=True, help="file the ranks meet in")
    parser.add_argument("--processes", type=int, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--steps", type=int, required=True, help="length of the schedule")
    parser.add_argument("--until", type=int, required=True, help="last step of this job")
    parser.add_argument("--save-at", type=int)
    parser.add_argument("--save-to")
    parser.add_argument("--resume-from")
    return parser.parse_args()


def main() -> None:
    """Start all ranks and wait for them; the first failure ends the others."""
    arguments = _parse()
    start_processes(  # type: ignore[no-untyped-call]
        _run_rank,
        (arguments,),
        nprocs=arguments.processes,
        # Importing torch is most of the work of a short job: where that is safe, it is done
        # once before the processes part.
        start_method="fork" if sys.platform == "linux" else "spawn",
    )


if __name__ == "__main__":
    main()
