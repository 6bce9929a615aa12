"""Planners of your own: other keys, another dtype, a part of the state, a model that has grown.

torchrun --nproc-per-node 1 examples/custom_planner.py FOLDER
"""

import dataclasses
import sys

import torch
import torch.distributed as dist
from torch import nn

import shardpoint.dcp as dcp
from shardpoint.dcp.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from shardpoint.dcp.metadata import MetadataIndex

WORLD_SIZE = 1


def renamed(items, names):
    """Return write items under other keys."""
    return [
        dataclasses.replace(item, index=dataclasses.replace(item.index, fqn=names(item.index.fqn)))
        for item in items
    ]


class PrefixSavePlanner(DefaultSavePlanner):
    """Saves every value under ``<prefix>.<key>``."""

    def __init__(self, prefix):
        super().__init__()
        self.prefix = prefix

    def create_local_plan(self):
        plan = super().create_local_plan()
        paths = {
            f"{self.prefix}.{key}": (self.prefix, *path) for key, path in self.mappings.items()
        }
        items = renamed(plan.items, lambda key: f"{self.prefix}.{key}")
        return dataclasses.replace(plan, items=items, planner_data=paths)

    def lookup_object(self, index):
        own = index.fqn.removeprefix(f"{self.prefix}.")
        return super().lookup_object(MetadataIndex(own, index.offset, index.index))


class CastingSavePlanner(DefaultSavePlanner):
    """Saves floating-point tensors in another dtype; the model keeps its own."""

    def __init__(self, dtype):
        super().__init__()
        self.dtype = dtype

    def create_local_plan(self):
        plan = super().create_local_plan()
        return dataclasses.replace(plan, items=[self._cast(item) for item in plan.items])

    def _cast(self, item):
        data = item.tensor_data
        if data is None or not data.properties.dtype.is_floating_point:
            return item
        properties = dataclasses.replace(data.properties, dtype=self.dtype)
        return dataclasses.replace(
            item, tensor_data=dataclasses.replace(data, properties=properties)
        )

    def transform_object(self, write_item, object):
        if isinstance(object, torch.Tensor) and object.is_floating_point():
            object = object.to(self.dtype)
        return super().transform_object(write_item, object)


class FilteringSavePlanner(DefaultSavePlanner):
    """Saves only the values whose key has a word in it, such as the adapters of a model."""

    def __init__(self, word):
        super().__init__()
        self.word = word

    def create_local_plan(self):
        plan = super().create_local_plan()
        kept = [item for item in plan.items if self.word in item.index.fqn]
        paths = {key: path for key, path in self.mappings.items() if self.word in key}
        return dataclasses.replace(plan, items=kept, planner_data=paths)


class RenamingLoadPlanner(DefaultLoadPlanner):
    """Loads into a model whose keys were other ones when the checkpoint was saved.

    Parameters
    ----------
    names
        Key in the model to key in the checkpoint, for those that differ.
    """

    def __init__(self, names):
        super().__init__()
        self.names = names

    def set_up_planner(self, state_dict, metadata=None, is_coordinator=False):
        super().set_up_planner(state_dict, metadata, is_coordinator)
        self.state_dict = {self.names.get(key, key): v for key, v in self.state_dict.items()}
        self.mappings = {self.names.get(key, key): path for key, path in self.mappings.items()}


def model():
    torch.manual_seed(7)
    layers = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 4))
    layers.register_parameter("adapter", nn.Parameter(torch.randn(4, 2)))
    layers.register_buffer("steps", torch.tensor(12))
    return layers


def save(folder):
    state = {"model": model().state_dict(), "note": {"lr": 0.25}}
    dcp.save(state, checkpoint_id=f"{folder}/prefixed", planner=PrefixSavePlanner("teacher"))
    dcp.save(state, checkpoint_id=f"{folder}/half", planner=CastingSavePlanner(torch.bfloat16))
    dcp.save(state, checkpoint_id=f"{folder}/adapters", planner=FilteringSavePlanner("adapter"))


def zeroed():
    return {key: torch.zeros_like(value) for key, value in model().state_dict().items()}


def load(folder):
    prefixed = {"teacher": {"model": zeroed(), "note": {"lr": 0.0}}}
    dcp.load(prefixed, checkpoint_id=f"{folder}/prefixed")

    half = {"model": zeroed()}  # float32 again: every saved value fits
    dcp.load(half, checkpoint_id=f"{folder}/half")

    adapters = {"model": {"adapter": torch.zeros(4, 2)}}
    dcp.load(adapters, checkpoint_id=f"{folder}/adapters")

    grown = {"model": {**zeroed(), "gate": torch.full((3,), 0.5)}}  # "gate" is new
    planner = DefaultLoadPlanner(allow_partial_load=True)
    dcp.load(grown, checkpoint_id=f"{folder}/half", planner=planner)

    moved = {"network": {"adapter": torch.zeros(4, 2)}}
    planner = RenamingLoadPlanner({"network.adapter": "model.adapter"})
    dcp.load(moved, checkpoint_id=f"{folder}/adapters", planner=planner)
    return {
        "prefixed": prefixed,
        "half": half,
        "adapters": adapters,
        "grown": grown,
        "moved": moved,
    }


if __name__ == "__main__":
    dist.init_process_group("gloo")
    save(sys.argv[1])
    print(load(sys.argv[1]))
    dist.destroy_process_group()
