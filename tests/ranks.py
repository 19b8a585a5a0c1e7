"""Run a function on ranks: one process each, gloo, one thread."""

import os
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from gtc_dist.distributed.collectives import Communicator

# Ranks are forked from a process that has imported these once. torch imports torch._dynamo with the first optimizer or
# DDP, which takes longer than most tests.
PRELOAD = ["gtc_dist.training.trainer", "gtc_dist.graph.neighbor_sampler", "gtc_dist.evaluate", "torch._dynamo"]
PRELOAD += ["torch.utils.tensorboard", "tensorboard.backend.event_processing.event_accumulator"]
PRELOAD += ["hypothesis", "pytest", "s3fs"]
mp.get_context("forkserver").set_forkserver_preload(PRELOAD)


def run_ranks(function, size: int, *args) -> list:
    """Results of `function(comm, *args)` on each rank: tensors, numbers, and lists or dictionaries of them."""
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
    with open(Path(folder) / f"{rank}.out", "w") as out:  # pytest does not capture the output of a forked process
        os.dup2(out.fileno(), 1), os.dup2(out.fileno(), 2)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
    comm = Communicator(rank, size).new_group()
    torch.save(function(comm, *args), Path(folder) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
