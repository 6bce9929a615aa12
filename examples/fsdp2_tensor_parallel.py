"""FSDP2 over tensor parallelism: saved from a mesh of 2 x 2, loaded into FSDP2 over all four.

torchrun --nproc-per-node 4 examples/fsdp2_tensor_parallel.py FOLDER
"""

import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, init_device_mesh
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

import shardpoint.dcp as dcp

WORLD_SIZE = 4


class FeedForward(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(6, 16)
        self.down = nn.Linear(16, 6)

    def forward(self, hidden):
        return hidden + self.down(torch.relu(self.up(hidden)))


def model_and_optimizer(tensor_parallel, seed):
    torch.manual_seed(seed)
    model = FeedForward()
    if tensor_parallel:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
        plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
        parallelize_module(model, mesh["tensor"], plan)
        fully_shard(model, mesh=mesh["data"])
    else:
        fully_shard(model, mesh=init_device_mesh("cpu", (4,)))
    return model, torch.optim.AdamW(model.parameters(), lr=0.01, foreach=False)


def train_step(model, optimizer):
    torch.manual_seed(3)
    model(torch.randn(5, 6)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def save(folder):
    model, optimizer = model_and_optimizer(tensor_parallel=True, seed=1)
    train_step(model, optimizer)
    model_state, optimizer_state = get_state_dict(model, optimizer)
    dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=folder)


def load(folder):
    model, optimizer = model_and_optimizer(tensor_parallel=False, seed=2)
    model_state, optimizer_state = get_state_dict(model, optimizer)
    state = {"model": model_state, "optimizer": optimizer_state}
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(
        model,
        optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
    )
    train_step(model, optimizer)  # goes on from where the other layout was
    return whole({"model": get_state_dict(model, optimizer)[0], "optimizer": state["optimizer"]})


def whole(value):
    if isinstance(value, dict):
        return {key: whole(item) for key, item in value.items()}
    if isinstance(value, list):
        return [whole(item) for item in value]
    return value.full_tensor() if isinstance(value, DTensor) else value


if __name__ == "__main__":
    dist.init_process_group("gloo")
    save(sys.argv[1])
    print(load(sys.argv[1]))
    dist.destroy_process_group()
