"""Memory and load of ranks."""

import math

import pytest
import torch
from ranks import run_ranks

from gtc_dist.distributed.collectives import Communicator
from gtc_dist.tracking.machine import MachineMonitor, over_ranks


def test_a_process_that_takes_memory_shows_it():
    monitor = MachineMonitor(torch.device("cpu"))
    before = over_ranks(monitor.readings(Communicator()))
    held = torch.ones(64 << 20)  # 256 MiB
    after = over_ranks(monitor.readings(Communicator()))
    assert set(before) == {"memory/host_gib"}  # no GPU
    assert after["memory/host_gib"] - before["memory/host_gib"] > 0.2
    assert len(held)


def gathered(comm: Communicator) -> torch.Tensor:
    return comm.all_reduce(MachineMonitor(comm.device).readings(comm))


def test_readings_of_all_ranks_come_together():
    one, other = run_ranks(gathered, 2)
    assert one.shape == (6,)
    torch.testing.assert_close(one, other, equal_nan=True)
    assert (one[[0, 3]] > 0).all()
    assert one[[1, 2, 4, 5]].isnan().all()


def test_the_largest_memory_and_the_mean_load_count():
    readings = torch.tensor([[1.0, 5.0, 0.5], [3.0, 4.0, math.nan]])
    expected = {"memory/host_gib": 3.0, "memory/gpu_gib": 5.0, "gpu_busy": 0.5}
    assert over_ranks(readings.view(-1)) == pytest.approx(expected)
