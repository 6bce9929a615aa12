"""A storage back end of your own: every rank keeps its items in an SQLite database.

torchrun --nproc-per-node 2 examples/custom_storage.py FOLDER
"""

import dataclasses
import io
import pickle
import sqlite3
import sys
from contextlib import closing
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh
from torch.futures import Future

import shardpoint.dcp as dcp
from shardpoint.dcp.planner import LoadItemType, WriteItemType
from shardpoint.dcp.storage import StorageReader, StorageWriter, WriteResult

WORLD_SIZE = 2


@dataclasses.dataclass(frozen=True)
class Row:
    """Where an item lies: a database and the number of a row in it."""

    database: str
    number: int


def finished(value):
    future = Future()
    future.set_result(value)
    return future


class SQLiteWriter(StorageWriter):
    def __init__(self, folder):
        super().__init__()
        self.folder = Path(folder)
        self.rank = 0

    def reset(self, checkpoint_id=None):
        self.folder = Path(checkpoint_id or self.folder)

    def set_up_storage_writer(self, is_coordinator, *args, **kwargs):
        self.rank = kwargs.get("rank") or 0

    def prepare_local_plan(self, plan):
        self.folder.mkdir(parents=True, exist_ok=True)
        return dataclasses.replace(plan, storage_data=f"items-{self.rank}.sqlite")

    def prepare_global_plan(self, plans):
        return plans

    def write_data(self, plan, planner):
        path = self.folder / plan.storage_data
        path.unlink(missing_ok=True)
        results = []
        with closing(sqlite3.connect(path)) as database, database:
            database.execute("create table items (number integer primary key, data blob)")
            for number, item in enumerate(plan.items):
                data = self._bytes_of(item, planner)
                database.execute("insert into items values (?, ?)", (number, data))
                place = Row(plan.storage_data, number)
                results.append(WriteResult(item.index, len(data), place))
        return finished(results)

    def _bytes_of(self, item, planner):
        value = planner.resolve_data(item)
        if item.type == WriteItemType.BYTE_IO:
            return value.getvalue()
        stream = io.BytesIO()
        torch.save(value.detach().cpu().clone(), stream)
        return stream.getvalue()

    def finish(self, metadata, results):
        metadata.storage_data = {
            result.index: result.storage_data for rank in results for result in rank
        }
        with open(self.folder / "index.pickle", "wb") as file:
            pickle.dump(metadata, file)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id):
        return "://" not in str(checkpoint_id)


class SQLiteReader(StorageReader):
    def __init__(self, folder):
        super().__init__()
        self.folder = Path(folder)
        self.places = {}

    def reset(self, checkpoint_id=None):
        self.folder = Path(checkpoint_id or self.folder)

    def read_metadata(self):
        with open(self.folder / "index.pickle", "rb") as file:
            return pickle.load(file)  # our own file: never do this with one from elsewhere

    def set_up_storage_reader(self, metadata, is_coordinator):
        self.places = metadata.storage_data

    def prepare_local_plan(self, plan):
        return plan

    def prepare_global_plan(self, plans):
        return plans

    def read_data(self, plan, planner):
        for item in plan.items:
            place = self.places[item.storage_index]
            with closing(sqlite3.connect(self.folder / place.database)) as database:
                query = "select data from items where number = ?"
                (data,) = database.execute(query, (place.number,)).fetchone()
            stream = io.BytesIO(data)
            if item.type == LoadItemType.BYTE_IO:
                planner.load_bytes(item, stream)
                continue
            stored = torch.load(stream, weights_only=True)
            for axis, (start, length) in enumerate(
                zip(item.storage_offsets, item.lengths, strict=True)
            ):
                stored = stored.narrow(axis, start, length)
            target = planner.resolve_tensor(item).detach()
            target.copy_(stored)
            planner.commit_tensor(item, target)
        return finished(None)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id):
        return "://" not in str(checkpoint_id)


def state(axis, fill):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    whole = torch.arange(24.0).reshape(4, 6) if fill else torch.zeros(4, 6)
    return {
        "weight": distribute_tensor(whole, mesh, [Shard(axis)]),
        "bias": torch.ones(3) if fill else torch.zeros(3),
        "settings": {"steps": 5 if fill else 0},
    }


def save(folder):
    dcp.save(state(axis=0, fill=True), storage_writer=SQLiteWriter(folder))


def load(folder):
    target = state(axis=1, fill=False)
    dcp.load(target, storage_reader=SQLiteReader(folder))
    return {**target, "weight": target["weight"].full_tensor()}


if __name__ == "__main__":
    dist.init_process_group("gloo")
    save(sys.argv[1])
    print(load(sys.argv[1]))
    dist.destroy_process_group()
