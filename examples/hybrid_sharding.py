"""HSDP: a model sharded within a node and replicated between nodes; each part is written once.

torchrun --nproc-per-node 4 examples/hybrid_sharding.py FOLDER
"""

import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import init_device_mesh

import shardpoint.dcp as dcp

WORLD_SIZE = 4


def model(replicas, shards, seed):
    torch.manual_seed(seed)
    layers = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))
    mesh = init_device_mesh("cpu", (replicas, shards), mesh_dim_names=("replicate", "shard"))
    return fully_shard(layers, mesh=mesh)


def save(folder):
    dcp.save({"model": get_model_state_dict(model(2, 2, seed=1))}, checkpoint_id=folder)


def load(folder):
    target = model(1, 4, seed=2)  # no replicas now, four shards
    state = {"model": get_model_state_dict(target)}
    dcp.load(state, checkpoint_id=folder)
    set_model_state_dict(target, state["model"])
    return {key: value.full_tensor() for key, value in get_model_state_dict(target).items()}


if __name__ == "__main__":
    dist.init_process_group("gloo")
    save(sys.argv[1])
    print(load(sys.argv[1]))
    dist.destroy_process_group()
