"""AdamW with several groups of parameters, some parameters frozen, and a schedule.

torchrun --nproc-per-node 2 examples/optimizer_groups.py FOLDER
"""

import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import shardpoint.dcp as dcp
from shardpoint.dcp.stateful import Stateful

WORLD_SIZE = 2


class Training(Stateful):
    """A model, its optimizer and its schedule, which know how to be saved and loaded."""

    def __init__(self, seed):
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Embedding(10, 8), nn.Linear(8, 8), nn.Linear(8, 4))
        self.model[0].requires_grad_(False)  # frozen: in the model's state, not the optimizer's
        fully_shard(self.model)
        weights = [p for n, p in self.model.named_parameters() if p.ndim > 1 and p.requires_grad]
        biases = [p for n, p in self.model.named_parameters() if p.ndim == 1]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": weights, "lr": 0.02, "weight_decay": 0.1},
                {"params": biases, "lr": 0.05, "weight_decay": 0.0},
            ],
            foreach=False,
        )
        self.schedule = torch.optim.lr_scheduler.StepLR(self.optimizer, 2, gamma=0.5)

    def step(self):
        torch.manual_seed(5)
        self.model(torch.randint(0, 10, (6,))).square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.schedule.step()

    def state_dict(self):
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optimizer": optimizer, "schedule": self.schedule.state_dict()}

    def load_state_dict(self, state_dict):
        set_state_dict(
            self.model,
            self.optimizer,
            model_state_dict=state_dict["model"],
            optim_state_dict=state_dict["optimizer"],
        )
        self.schedule.load_state_dict(state_dict["schedule"])


def save(folder):
    training = Training(seed=1)
    for _ in range(3):
        training.step()
    dcp.save({"training": training}, checkpoint_id=folder)


def load(folder):
    training = Training(seed=2)
    dcp.load({"training": training}, checkpoint_id=folder)
    training.step()
    state = training.state_dict()
    return {
        "model": {
            key: value.full_tensor() if isinstance(value, DTensor) else value
            for key, value in state["model"].items()
        },
        "groups": [
            {key: value for key, value in group.items() if key in ("lr", "weight_decay", "params")}
            for group in state["optimizer"]["param_groups"]
        ],
        "rates": training.schedule.get_last_lr(),
    }


if __name__ == "__main__":
    dist.init_process_group("gloo")
    save(sys.argv[1])
    print(load(sys.argv[1]))
    dist.destroy_process_group()
