"""Pipeline stages: the ranks of each stage save and load their layers as a group of their own.

torchrun --nproc-per-node 4 examples/pipeline_stages.py FOLDER
"""

import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DeviceMesh, Shard, distribute_tensor

import shardpoint.dcp as dcp

WORLD_SIZE = 4
STAGES = ((0, 1), (2, 3))


def own_stage():
    """Return this rank's stage and its group; every rank takes part in making every group."""
    groups = [dist.new_group(list(ranks)) for ranks in STAGES]
    (stage,) = (number for number, ranks in enumerate(STAGES) if dist.get_rank() in ranks)
    return stage, groups[stage]


def layers(stage, group, fill):
    torch.manual_seed(stage)
    mesh = DeviceMesh.from_group(group, "cpu")
    block = nn.Linear(4, 6)
    weight = block.weight.detach() if fill else torch.zeros(6, 4)
    return {
        f"layers.{stage}.weight": distribute_tensor(weight, mesh, [Shard(0)]),
        f"layers.{stage}.bias": block.bias.detach() if fill else torch.zeros(6),
        f"layers.{stage}.microbatches": 8 + stage if fill else 0,
    }


def save(folder):
    stage, group = own_stage()
    state = layers(stage, group, fill=True)
    dcp.save(state, checkpoint_id=f"{folder}/stage-{stage}", process_group=group)
    dist.barrier()


def load(folder):
    stage, group = own_stage()
    state = layers(stage, group, fill=False)
    dcp.load(state, checkpoint_id=f"{folder}/stage-{stage}", process_group=group)
    weight = state[f"layers.{stage}.weight"]
    return {**state, f"layers.{stage}.weight": weight.full_tensor()}


if __name__ == "__main__":
    dist.init_process_group("gloo")
    save(sys.argv[1])
    print(load(sys.argv[1]))
    dist.destroy_process_group()
