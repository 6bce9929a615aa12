"""Export a sharded model in Hugging Face's format, and import it into another layout.

torchrun --nproc-per-node 2 examples/hugging_face.py FOLDER
"""

import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import fully_shard

import shardpoint.dcp as dcp

WORLD_SIZE = 2

# Which of the files model-0000N-of-00002.safetensors holds which tensor.
FILES = {"0.weight": 1, "0.bias": 1, "1.weight": 2, "1.bias": 2}


def model(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 3))


def save(folder):
    sharded = fully_shard(model(seed=1))
    writer = dcp.HuggingFaceStorageWriter(
        path=folder,
        fqn_to_index_mapping=FILES,
        save_distributed=True,
        enable_consolidation=True,
    )
    dcp.save(get_model_state_dict(sharded), storage_writer=writer)


def load(folder):
    sharded = fully_shard(model(seed=2))
    state = get_model_state_dict(sharded)
    dcp.load(state, storage_reader=dcp.HuggingFaceStorageReader(folder))
    set_model_state_dict(sharded, state)
    return {key: value.full_tensor() for key, value in get_model_state_dict(sharded).items()}


if __name__ == "__main__":
    dist.init_process_group("gloo")
    save(sys.argv[1])
    print(load(sys.argv[1]))
    dist.destroy_process_group()
