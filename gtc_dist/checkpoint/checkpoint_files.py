"""Checkpoints: sharded by row range, independent of the world's size, complete only with their manifest.

<run>/checkpoints/epoch-00012/             weights that were ranked: the best so far
<run>/checkpoints/step-000000001234/       all that training goes on from, after so many steps
    <table>.<tensor>.<start>-<stop>.npy    rows [start, stop) of weight, exp_avg, ...; FILE_BYTES at most
    dense.pt                               dense modules and whatever else is no table (no pickle on load)
    manifest.json                          written last: a head of plain values, shapes, sizes and checksums
"""

import io
import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from gtc_dist.data import formats, storage
from gtc_dist.distributed.collectives import Communicator
from gtc_dist.distributed.sharded_table import ShardedTable
from gtc_dist.errors import InputError

MANIFEST = "manifest.json"
FOLDER = "checkpoints"
FILE_BYTES = 128 << 20  # of rows in a file: what saving and loading hold beside the tables


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
    return [Shard(f"{table.name}.weight", table.weight, table.start, table.rows) for table in tables]


def state_shards(tables: list[ShardedTable]) -> list[Shard]:
    """Weights and the optimizer's state."""
    parts = [(table, part, tensor) for table in tables for part, tensor in table.state().items()]
    return [Shard(f"{table.name}.{part}", tensor, table.start, table.rows) for table, part, tensor in parts]


def save(uri: str, head: dict, dense: dict, shards: list[Shard], comm: Communicator) -> None:
    """Write a checkpoint folder. A collective; the manifest appears when every rank's files are there.

    Args:
        head: what the manifest says of it, JSON.
        dense: tensors, plain values, lists and dictionaries of them, by name; rank 0's are kept.
        shards: the same names on every rank.
    """
    commit(uri, head, shards, write_files(uri, dense if comm.rank == 0 else None, shards), comm)


def write_files(uri: str, dense: dict | None, shards: list[Shard]) -> dict[str, dict]:
    """Write this rank's files; returns their sizes and checksums by name. Not a collective."""
    files = {}
    for shard in shards:
        for low, high in _parts(shard.tensor):
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
    """Make a checkpoint whole: its manifest, of the files of all ranks. A collective.

    Raises:
        OSError: on every rank alike, where it could not be written.
    """
    merged, error = {}, ""
    for rank_files in comm.all_gather_json(files):
        merged |= rank_files
    if comm.rank == 0:
        manifest = {**head, "tensors": {shard.name: shard.shape for shard in shards}, "files": merged}
        try:
            storage.write_json(storage.join(uri, MANIFEST), manifest)
        except Exception as problem:
            error = str(problem) or type(problem).__name__
    errors = [text for text in comm.all_gather_json(error) if text]
    if errors:
        raise OSError(errors[0])


def read_manifest(uri: str) -> dict:
    """The manifest of a checkpoint. Raises InputError where there is none: the checkpoint is not whole."""
    path = storage.join(uri, MANIFEST)
    if not storage.exists(path):
        raise InputError(f"{uri} is not a whole checkpoint: it has no {MANIFEST}")
    manifest = storage.read_json(path)
    if not isinstance(manifest, dict) or not {"tensors", "files"} <= manifest.keys():
        raise InputError(f"{path} is no manifest of this version of gtc-dist; train again")
    return manifest


def load(uri: str, shards: list[Shard]) -> dict:
    """Fill this rank's rows of the shards and return what was saved as `dense`.

    Raises:
        InputError: a missing or changed file, or tables of other sizes (named).
    """
    manifest = read_manifest(uri)
    for shard in shards:
        found = manifest["tensors"].get(shard.name)
        if found != shard.shape:
            raise InputError(
                f"{uri}: {shard.name} is {found and tuple(found)} in the checkpoint, {tuple(shard.shape)} in this "
                "model; is it another catalog or configuration?"
            )
        _load_rows(uri, shard, manifest["files"])
    data = storage.read_bytes(storage.join(uri, "dense.pt"))
    storage.check(storage.join(uri, "dense.pt"), data, manifest["files"]["dense.pt"]["sha256"])
    return torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")


def list_checkpoints(run: str, prefix: str) -> tuple[list[str], list[str]]:
    """Checkpoints of a run whose name starts with `prefix` (`epoch-` or `step-`), oldest first: whole ones, and those
    without a manifest."""
    found = storage.listing(storage.join(run, FOLDER))
    folders = sorted({name.split("/")[0] for name in found if name.startswith(prefix) and "/" in name})
    whole = [name for name in folders if f"{name}/{MANIFEST}" in found]
    return whole, [name for name in folders if name not in whole]


def remove(run: str, name: str) -> None:
    """Remove a checkpoint; its manifest first, so that what is left of it when that is cut off is no checkpoint."""
    uri = storage.join(run, FOLDER, name)
    storage.remove_tree(storage.join(uri, MANIFEST))
    storage.remove_tree(uri)


def _parts(tensor: torch.Tensor) -> Iterator[tuple[int, int]]:
    """Row ranges of a table's tensor that make a file each; one empty range where it has no rows."""
    step = max(FILE_BYTES // (tensor.shape[1] * tensor.element_size()), 1)
    for low in range(0, max(len(tensor), 1), step):
        yield low, min(low + step, len(tensor))


def _load_rows(uri: str, shard: Shard, files: dict) -> None:
    start, stop, filled = shard.start, shard.start + len(shard.tensor), 0
    for name, entry in files.items():
        match = re.fullmatch(re.escape(shard.name) + r"\.(\d+)-(\d+)\.npy", name)
        if match is None:
            continue
        first, last = int(match[1]), int(match[2])
        low, high = max(first, start), min(last, stop)
        if low < high:
            rows = formats.read_array(storage.join(uri, name), entry["sha256"])
            shard.tensor[low - start : high - start] = torch.from_numpy(rows[low - first : high - first])
            filled += high - low
    if filled != stop - start:
        raise InputError(f"{uri}: rows [{start}, {stop}) of {shard.name} are not complete in the checkpoint")
