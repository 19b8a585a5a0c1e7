"""Run a function on the ranks of a world: one process each, gloo, one thread."""

import os
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from gtc_dist.distributed.collectives import Communicator

# Ranks are forked from a process that has imported these once.
mp.get_context("forkserver").set_forkserver_preload(
    ["gtc_dist.training.trainer", "gtc_dist.graph.neighbor_sampler", "pytest"]
)


def run_ranks(function, size: int, *args) -> list:
    """What `function(world, *args)` returns on each rank: tensors, numbers, and lists or dictionaries of them."""
    if size == 1:
        return [function(Communicator(), *args)]
    with tempfile.TemporaryDirectory() as folder:
        try:
            mp.start_processes(_rank, (size, folder, function, args), nprocs=size, start_method="forkserver")
        finally:
            for said in sorted(Path(folder).glob("*.out")):
                print(said.read_text(), end="", flush=True)
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=True) for rank in range(size)]


def _rank(rank: int, size: int, folder: str, function, args) -> None:
    with open(Path(folder) / f"{rank}.out", "w") as out:  # a forked process does not have what pytest captures
        os.dup2(out.fileno(), 1), os.dup2(out.fileno(), 2)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
    comm = Communicator(rank, size).new_group()
    torch.save(function(comm, *args), Path(folder) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
