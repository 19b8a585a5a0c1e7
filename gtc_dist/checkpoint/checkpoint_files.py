"""Checkpoint format: sharded by row range, readable by any number of ranks, complete only with its manifest.

<run>/checkpoints/epoch-00012/             best checkpoint: the weights of the best validation so far
<run>/checkpoints/step-000000001234/       training state after that many steps: weights, optimizer, progress
    <table>.<tensor>.<start>-<stop>.npy    rows [start, stop) of weight, exp_avg, ...; FILE_BYTES at most
    dense.pt                               dense modules and everything that is no table (loaded without pickle)
    manifest.json                          written last: a head of plain values, shapes, sizes and checksums

torch.distributed.checkpoint is not used: its metadata is a pickle, and it has no checksums.
"""

import io
import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from gtc_dist.checkpoint.run_folder import CHECKPOINT_FOLDER, CHECKPOINT_MANIFEST
from gtc_dist.data import formats, storage
from gtc_dist.distributed.collectives import Communicator
from gtc_dist.distributed.sharded_table import ShardedTable
from gtc_dist.errors import InputError

FILE_BYTES = 128 << 20  # most bytes of rows per file: the extra memory of saving and loading


@dataclass
class Shard:
    """This rank's rows [start, start + len(tensor)) of a tensor of `rows` rows, named `table.tensor`."""

    name: str
    tensor: torch.Tensor
    start: int
    rows: int

    @property
    def shape(self) -> list[int]:
        return [self.rows, self.tensor.shape[1]]


def weight_shards(tables: list[ShardedTable]) -> list[Shard]:
    """Shards of the weights alone."""
    return [Shard(f"{table.name}.weight", table.weight, table.start, table.rows) for table in tables]


def state_shards(tables: list[ShardedTable]) -> list[Shard]:
    """Shards of the weights and of the optimizer state."""
    parts = [(table, part, tensor) for table in tables for part, tensor in table.state().items()]
    return [Shard(f"{table.name}.{part}", tensor, table.start, table.rows) for table, part, tensor in parts]


def save(uri: str, head: dict, dense: dict, shards: list[Shard], comm: Communicator) -> None:
    """Write a complete checkpoint: every rank its files, then rank 0 the manifest.

    Collective: every rank must call it.

    Args:
        head: JSON entries of the manifest.
        dense: tensors and plain values, nested in lists and dictionaries, by name; rank 0's are written.
        shards: this rank's rows; the same names on every rank.
    """
    commit(uri, head, shards, write_files(uri, dense if comm.rank == 0 else None, shards), comm)


def write_files(uri: str, dense: dict | None, shards: list[Shard]) -> dict[str, dict]:
    """Write this rank's files; returns their sizes and checksums by name."""
    files = {}
    for shard in shards:
        for low, high in _file_ranges(shard.tensor):
            name = f"{shard.name}.{shard.start + low:012d}-{shard.start + high:012d}.npy"
            written = formats.write_array(storage.join(uri, name), shard.tensor[low:high].cpu().numpy())
            files[name] = {"bytes": written.bytes, "sha256": written.sha256}
    if dense is not None:
        buffer = io.BytesIO()
        torch.save(dense, buffer)
        written = storage.write_bytes(storage.join(uri, "dense.pt"), buffer.getbuffer())
        files["dense.pt"] = {"bytes": written.bytes, "sha256": written.sha256}
    return files


def commit(uri: str, head: dict, shards: list[Shard], files: dict[str, dict], comm: Communicator) -> None:
    """Complete a checkpoint: rank 0 writes the manifest with the files of all ranks.

    Collective: every rank must call it.

    Raises:
        OSError: on every rank, if the manifest could not be written.
    """
    merged, error = {}, ""
    for rank_files in comm.all_gather_json(files):
        merged |= rank_files
    if comm.rank == 0:
        manifest = {**head, "tensors": {shard.name: shard.shape for shard in shards}, "files": merged}
        try:
            storage.write_json(storage.join(uri, CHECKPOINT_MANIFEST), manifest)
        except Exception as problem:
            error = str(problem) or type(problem).__name__
    errors = [text for text in comm.all_gather_json(error) if text]
    if errors:
        raise OSError(errors[0])


def read_manifest(uri: str) -> dict:
    """Manifest of a checkpoint. Raises InputError if there is none: the checkpoint is incomplete."""
    path = storage.join(uri, CHECKPOINT_MANIFEST)
    if not storage.exists(path):
        raise InputError(f"{uri} is not a complete checkpoint: it has no {CHECKPOINT_MANIFEST}")
    manifest = storage.read_json(path)
    if not isinstance(manifest, dict) or not {"tensors", "files"} <= manifest.keys():
        raise InputError(f"{path} is not a checkpoint manifest of this version of gtc-dist; train again")
    return manifest


def load(uri: str, shards: list[Shard]) -> dict:
    """Load this rank's rows into the shards, in place; returns the saved `dense`.

    Raises:
        InputError: a missing or changed file, or a tensor that is missing or of another size; the message names it.
    """
    manifest = read_manifest(uri)
    for shard in shards:
        found = manifest["tensors"].get(shard.name)
        if found is None:
            raise InputError(f"{uri} has no {shard.name}; it was saved with another configuration")
        if found != shard.shape:
            raise InputError(
                f"{uri}: {shard.name} is {tuple(found)} in the checkpoint, {tuple(shard.shape)} in this model; it was "
                "saved with another catalog or configuration"
            )
        _load_rows(uri, shard, manifest["files"])
    data = storage.read_bytes(storage.join(uri, "dense.pt"))
    storage.check_sha256(storage.join(uri, "dense.pt"), data, manifest["files"]["dense.pt"]["sha256"])
    return torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")


def list_checkpoints(run: str, prefix: str) -> tuple[list[str], list[str]]:
    """Names of a run's complete and incomplete checkpoints, oldest first.

    Args:
        prefix: EPOCH_PREFIX or STEP_PREFIX.
    """
    found = storage.listing(storage.join(run, CHECKPOINT_FOLDER))
    folders = sorted({name.split("/")[0] for name in found if name.startswith(prefix) and "/" in name})
    complete = [name for name in folders if f"{name}/{CHECKPOINT_MANIFEST}" in found]
    return complete, [name for name in folders if name not in complete]


def remove(run: str, name: str) -> None:
    """Remove a checkpoint, its manifest first, so that an interrupted removal leaves an incomplete checkpoint."""
    uri = storage.join(run, CHECKPOINT_FOLDER, name)
    storage.remove_tree(storage.join(uri, CHECKPOINT_MANIFEST))
    storage.remove_tree(uri)


def _file_ranges(tensor: torch.Tensor) -> Iterator[tuple[int, int]]:
    """Row range of each file of a tensor; one empty range for a tensor without rows."""
    step = max(FILE_BYTES // (tensor.shape[1] * tensor.element_size()), 1)
    for low in range(0, max(len(tensor), 1), step):
        yield low, min(low + step, len(tensor))


def _load_rows(uri: str, shard: Shard, files: dict) -> None:
    """Copy this rank's rows out of all files that overlap with them."""
    start, stop, loaded = shard.start, shard.start + len(shard.tensor), 0
    for name, entry in files.items():
        match = re.fullmatch(re.escape(shard.name) + r"\.(\d+)-(\d+)\.npy", name)
        if match is None:
            continue
        first, last = int(match[1]), int(match[2])
        low, high = max(first, start), min(last, stop)
        if low < high:
            rows = formats.read_array(storage.join(uri, name), entry["sha256"])
            shard.tensor[low - start : high - start] = torch.from_numpy(rows[low - first : high - first])
            loaded += high - low
    if loaded != stop - start:
        raise InputError(f"{uri}: rows [{start}, {stop}) of {shard.name} are missing from the checkpoint")
