"""AsyncCheckpointWriter: storage failures, and changes of the state while it is written."""

import threading

import torch

from gtc_dist.checkpoint import checkpoint_files
from gtc_dist.checkpoint.async_writer import AsyncCheckpointWriter
from gtc_dist.checkpoint.run_folder import step_name
from gtc_dist.distributed.collectives import Communicator
from gtc_dist.distributed.sharded_table import ShardedTable
from gtc_dist.errors import Unreachable


def test_a_state_is_skipped_while_the_store_is_unreachable(tmp_path, monkeypatch, capfd):
    def unreachable(*args):
        raise Unreachable("cannot reach the object store")

    writer = AsyncCheckpointWriter(str(tmp_path), Communicator(), 0.0, 1)
    for step in (1, 2):
        writer.start(step, {"best_epoch": 0}, {}, [])
        assert writer.finalize(0) == ""
    for name in ("write_files", "remove", "list_checkpoints"):
        monkeypatch.setattr(checkpoint_files, name, unreachable)
    writer.start(3, {"best_epoch": 0}, {}, [])
    assert "is skipped: cannot reach the object store" in writer.finalize(0)
    writer.prune(0)
    printed = capfd.readouterr().out
    assert "step-000000000003 could not be removed" in printed
    assert "older checkpoints could not be listed" in printed
    assert list(writer.states) == [step_name(2)]


def test_the_saved_state_is_that_of_the_start(tmp_path):
    """Also when the tables change while the thread writes."""
    table = ShardedTable("t", 6, 2, Communicator(), init_std=1.0)
    writer = AsyncCheckpointWriter(str(tmp_path), Communicator(), 0.0, 2)
    dense = {"network": {"w": torch.ones(3)}, "betas": (0.9, 0.99)}
    changed, write = threading.Event(), checkpoint_files.write_files

    def late(*args):
        changed.wait()
        return write(*args)

    before = table.weight.clone()
    checkpoint_write, checkpoint_files.write_files = checkpoint_files.write_files, late
    try:
        writer.start(5, {"best_epoch": 0}, dense, checkpoint_files.state_shards([table]))
        table.weight += 1
        dense["network"]["w"] += 1
        changed.set()
        assert writer.finalize(0) == ""
    finally:
        checkpoint_files.write_files = checkpoint_write
    other = ShardedTable("t", 6, 2, Communicator())
    loaded = checkpoint_files.load(
        str(tmp_path / "checkpoints/step-000000000005"), checkpoint_files.state_shards([other])
    )
    assert torch.equal(other.weight, before)
    assert loaded == {"network": {"w": loaded["network"]["w"]}, "betas": [0.9, 0.99]}
    assert loaded["network"]["w"].tolist() == [1, 1, 1]
