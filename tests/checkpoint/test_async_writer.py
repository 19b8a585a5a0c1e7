"""AsyncCheckpointWriter: storage failures, and changes of the state while it is written."""

import threading

import pytest
import torch

from gtc_dist.checkpoint import checkpoint_files
from gtc_dist.checkpoint.async_writer import BUSY, DONE, FAILED, AsyncCheckpointWriter
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
        assert writer.finalize() == ""
    for name in ("write_files", "remove", "list_checkpoints"):
        monkeypatch.setattr(checkpoint_files, name, unreachable)
    writer.start(3, {"best_epoch": 0}, {}, [])
    assert "is skipped: cannot reach the object store" in writer.finalize()
    writer.prune(0)
    printed = capfd.readouterr().out
    assert "step-000000000003 could not be removed" in printed
    assert "older checkpoints could not be listed" in printed
    assert list(writer.states) == [step_name(2)]


def best_names(folder) -> tuple[list[str], list[str]]:
    return checkpoint_files.list_checkpoints(str(folder), "epoch-")


def test_best_weights_are_written_while_training_continues(tmp_path, monkeypatch):
    """The earlier ones stay until the new ones are complete, and a state waits for those that it refers to."""
    gate, write = threading.Event(), checkpoint_files.write_files
    writer = AsyncCheckpointWriter(str(tmp_path), Communicator(), 0.0, 1)
    writer.start_best(1, {"metrics": {}}, {}, [])
    assert writer.finalize() == ""
    monkeypatch.setattr(checkpoint_files, "write_files", lambda *args: (gate.wait(), write(*args))[1])
    writer.start_best(2, {"metrics": {}}, {}, [])
    writer.start(7, {"best_epoch": 2}, {}, [])
    writer.prune(1)
    assert writer.outcome == BUSY
    assert not writer.due()
    assert best_names(tmp_path)[0] == ["epoch-00001"]
    gate.set()
    for pending in (writer.pending_best, writer.pending):
        pending.thread.join()
    assert writer.outcome == DONE
    assert best_names(tmp_path) == (["epoch-00001"], ["epoch-00002"])
    assert writer.finalize() == ""
    assert best_names(tmp_path) == (["epoch-00002"], [])
    assert list(writer.states) == [step_name(7)]
    assert checkpoint_files.read_manifest(str(tmp_path / "checkpoints/epoch-00002"))["epoch"] == 2


def test_best_weights_that_cannot_be_written_end_the_run_and_leave_the_earlier_ones(tmp_path, monkeypatch):
    def full(*args):
        raise OSError("no space left")

    writer = AsyncCheckpointWriter(str(tmp_path), Communicator(), 0.0, 1)
    writer.start_best(1, {"metrics": {}}, {}, [])
    writer.finalize_best()
    monkeypatch.setattr(checkpoint_files, "write_files", full)
    writer.start_best(2, {"metrics": {}}, {}, [])
    writer.pending_best.thread.join()
    assert writer.outcome == FAILED
    with pytest.raises(OSError, match=r"best epoch could not be written \(epoch-00002\): no space left"):
        writer.finalize()
    assert best_names(tmp_path) == (["epoch-00001"], [])


def test_an_error_without_words_is_one(tmp_path, monkeypatch):
    def fail(*args):
        raise MemoryError

    writer = AsyncCheckpointWriter(str(tmp_path), Communicator(), 0.0, 1)
    monkeypatch.setattr(checkpoint_files, "write_files", fail)
    writer.start(3, {"best_epoch": 0}, {}, [])
    assert "is skipped: MemoryError" in writer.finalize()
    assert writer.states == {}


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
        assert writer.finalize() == ""
    finally:
        checkpoint_files.write_files = checkpoint_write
    other = ShardedTable("t", 6, 2, Communicator())
    loaded = checkpoint_files.load(
        str(tmp_path / "checkpoints/step-000000000005"), checkpoint_files.state_shards([other])
    )
    assert torch.equal(other.weight, before)
    assert loaded == {"network": {"w": loaded["network"]["w"]}, "betas": [0.9, 0.99]}
    assert loaded["network"]["w"].tolist() == [1, 1, 1]
