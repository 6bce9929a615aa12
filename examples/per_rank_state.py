"""State that every rank has for itself: where its data loader is, and its random generators.

torchrun --nproc-per-node 2 examples/per_rank_state.py FOLDER
"""

import random
import sys

import torch
import torch.distributed as dist

import shardpoint.dcp as dcp
from shardpoint.dcp.stateful import Stateful

WORLD_SIZE = 2


class Loader(Stateful):
    """Gives this rank's share of the samples, in an order that it shuffles anew every epoch."""

    def __init__(self, samples, rank, world_size):
        self.generator = torch.Generator().manual_seed(100 + rank)
        self.samples = range(rank, samples, world_size)
        self.epoch, self.position, self.order = -1, 0, []

    def __next__(self):
        if self.position == len(self.order):
            self.order = torch.randperm(len(self.samples), generator=self.generator).tolist()
            self.epoch, self.position = self.epoch + 1, 0
        self.position += 1
        return self.samples[self.order[self.position - 1]]

    def state_dict(self):
        return {
            "epoch": self.epoch,
            "position": self.position,
            "order": list(self.order),
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state_dict):
        self.epoch, self.position = state_dict["epoch"], state_dict["position"]
        self.order = list(state_dict["order"])
        self.generator.set_state(state_dict["generator"])


class RandomState(Stateful):
    """The generators of Python and torch."""

    def state_dict(self):
        version, numbers, gauss = random.getstate()
        return {
            "torch": torch.get_rng_state(),
            "python": {"version": version, "numbers": list(numbers), "gauss": gauss},
        }

    def load_state_dict(self, state_dict):
        python = state_dict["python"]
        torch.set_rng_state(state_dict["torch"])
        random.setstate((python["version"], tuple(python["numbers"]), python["gauss"]))


def own_state(loader):
    """Return the state under keys that only this rank has."""
    name = f"rank-{dist.get_rank()}"
    return {f"{name}/loader": loader, f"{name}/random": RandomState()}


def save(folder):
    torch.manual_seed(dist.get_rank())
    random.seed(dist.get_rank())
    loader = Loader(20, dist.get_rank(), dist.get_world_size())
    for _ in range(13):
        next(loader)
        torch.rand(2)
        random.random()
    dcp.save(own_state(loader), checkpoint_id=folder)


def load(folder):
    loader = Loader(20, dist.get_rank(), dist.get_world_size())
    dcp.load(own_state(loader), checkpoint_id=folder)
    return {
        "samples": [next(loader) for _ in range(15)],
        "torch": torch.rand(3),
        "python": [random.random() for _ in range(3)],
    }


if __name__ == "__main__":
    dist.init_process_group("gloo")
    save(sys.argv[1])
    print(load(sys.argv[1]))
    dist.destroy_process_group()
