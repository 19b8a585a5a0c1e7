"""Checkpoints are complete or refused, and can be read by any number of ranks."""

import pytest
import torch
from ranks import run_ranks

from gtc_dist.checkpoint import checkpoint_files
from gtc_dist.data import storage
from gtc_dist.distributed.collectives import Communicator
from gtc_dist.distributed.sharded_table import ShardedTable, plan_lookup
from gtc_dist.errors import InputError


def tables_of(comm: Communicator, seed: int) -> list[ShardedTable]:
    return [ShardedTable("user", 23, 5, comm, init_std=1.0, seed=seed), ShardedTable("item", 11, 3, comm, init_std=1.0)]


def train_and_save(comm: Communicator, uri: str) -> dict:
    tables = tables_of(comm, 1)
    for table in tables:
        ids = torch.arange(0, table.rows, 2)
        table.lookup(plan_lookup(ids, table.rows, comm)).square().sum().backward()
        table.adam_step(0.1)
    dense = {"network": {"w": torch.arange(3.0)}, "steps": [t.steps for t in tables]}
    checkpoint_files.save(uri, {"epoch": 4}, dense, checkpoint_files.state_shards(tables), comm)
    assert checkpoint_files.read_manifest(uri)["epoch"] == 4
    return {t.name: [t.weight, t.exp_avg, t.exp_avg_sq] for t in tables}


def read_back(comm: Communicator, uri: str) -> dict:
    tables = tables_of(comm, 2)
    dense = checkpoint_files.load(uri, checkpoint_files.state_shards(tables))
    assert dense["steps"] == [1, 1]
    assert torch.equal(dense["network"]["w"], torch.arange(3.0))
    return {t.name: [t.weight, t.exp_avg, t.exp_avg_sq] for t in tables}


@pytest.mark.parametrize(("writers", "readers"), [(1, 1), (1, 2), (2, 1), (2, 3)])
def test_any_number_of_ranks_reads_a_checkpoint(tmp_path, writers, readers):
    uri = str(tmp_path / "c")
    written, read = run_ranks(train_and_save, writers, uri), run_ranks(read_back, readers, uri)
    for name in ("user", "item"):
        for part in range(3):
            got = torch.cat([r[name][part] for r in read])
            assert torch.equal(got, torch.cat([w[name][part] for w in written]))


def test_in_object_storage(s3):
    written = train_and_save(Communicator(), s3)
    assert torch.equal(read_back(Communicator(), s3)["user"][0], written["user"][0])


def test_a_checkpoint_without_manifest_is_incomplete(tmp_path):
    train_and_save(Communicator(), str(tmp_path))
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(InputError, match="not a complete checkpoint"):
        checkpoint_files.load(str(tmp_path), checkpoint_files.state_shards(tables_of(Communicator(), 1)))


@pytest.mark.parametrize("name", ["dense.pt", "user.weight.000000000000-000000000023.npy"])
def test_a_changed_file_is_refused_by_name(tmp_path, name):
    train_and_save(Communicator(), str(tmp_path))
    data = bytearray((tmp_path / name).read_bytes())
    data[-1] ^= 1
    (tmp_path / name).write_bytes(data)
    with pytest.raises(InputError, match=name):
        checkpoint_files.load(str(tmp_path), checkpoint_files.state_shards(tables_of(Communicator(), 1)))


def test_tables_of_another_size_are_refused(tmp_path):
    train_and_save(Communicator(), str(tmp_path))
    with pytest.raises(InputError, match=r"user.weight is \(23, 5\) in the checkpoint, \(24, 5\)"):
        checkpoint_files.load(
            str(tmp_path), checkpoint_files.weight_shards([ShardedTable("user", 24, 5, Communicator())])
        )


def test_missing_tensors_are_named(tmp_path):
    train_and_save(Communicator(), str(tmp_path))
    with pytest.raises(InputError, match=rf"{tmp_path.name} has no item\.average; it was saved with another"):
        checkpoint_files.load(str(tmp_path), [checkpoint_files.Shard("item.average", torch.zeros(3, 2), 0, 3)])


def test_tables_of_another_width_are_refused(tmp_path):
    train_and_save(Communicator(), str(tmp_path))
    with pytest.raises(InputError, match=r"user\.weight is \(23, 5\) in the checkpoint, \(23, 6\) in this model"):
        checkpoint_files.load(
            str(tmp_path), checkpoint_files.state_shards([ShardedTable("user", 23, 6, Communicator())])
        )


def test_missing_rows_are_found(tmp_path):
    run_ranks(train_and_save, 2, str(tmp_path))
    manifest = storage.read_json(str(tmp_path / "manifest.json"))
    manifest["files"].pop("user.weight.000000000011-000000000023.npy")
    storage.write_json(str(tmp_path / "manifest.json"), manifest)
    with pytest.raises(InputError, match=r"rows \[0, 23\) of user\.weight are missing"):
        checkpoint_files.load(str(tmp_path), checkpoint_files.state_shards(tables_of(Communicator(), 1)))


def test_pickles_are_not_loaded(tmp_path):
    train_and_save(Communicator(), str(tmp_path))
    torch.save({"network": Trap()}, tmp_path / "dense.pt")
    manifest = storage.read_json(str(tmp_path / "manifest.json"))
    manifest["files"]["dense.pt"]["sha256"] = storage.write_bytes(
        str(tmp_path / "dense.pt"), (tmp_path / "dense.pt").read_bytes()
    ).sha256
    storage.write_json(str(tmp_path / "manifest.json"), manifest)
    with pytest.raises(Exception, match=r"(?i)weights.only|unsupported"):
        checkpoint_files.load(str(tmp_path), checkpoint_files.state_shards(tables_of(Communicator(), 1)))


class Trap:
    def __reduce__(self):
        return (print, ("loaded a pickle",))
