"""Checkpoints: sharded by row range, independent of the world's size, complete only with their manifest.

<run>/checkpoints/epoch-00012/
    <table>.<tensor>.<start>-<stop>.npy   rows [start, stop) of weight, exp_avg, exp_avg_sq; FILE_BYTES at most
    dense.pt                              dense modules and their optimizer (no pickle on load)
    manifest.json                         written last: epoch, metrics, table shapes, sizes and checksums
"""

import io
import re
from collections.abc import Iterator

import torch

from gtc_dist.data import storage
from gtc_dist.errors import InputError
from gtc_dist.model.collectives import World
from gtc_dist.model.table import RowTable

MANIFEST = "manifest.json"
FILE_BYTES = 128 << 20  # of rows in a file: what saving and loading hold beside the tables


def save(
    uri: str,
    epoch: int,
    dense: dict[str, dict],
    tables: list[RowTable],
    world: World,
    metrics: dict[str, float],
    catalog: str,
) -> None:
    """Write a checkpoint folder. A collective; the manifest appears when every rank's files are there.

    Args:
        dense: state dictionaries (tensors and plain numbers) by name, of rank 0.
        metrics: what the checkpoint scored.
        catalog: fingerprint of the catalog that it belongs to.
    """
    files = {}
    for table in tables:
        for part, tensor in table.state().items():
            for low, high in _parts(tensor):
                name = f"{table.name}.{part}.{table.start + low:012d}-{table.start + high:012d}.npy"
                written = storage.write_array(storage.join(uri, name), tensor[low:high].cpu().numpy())
                files[name] = {"bytes": written.bytes, "sha256": written.sha256}
    if world.rank == 0:
        buffer = io.BytesIO()
        torch.save(dense, buffer)
        written = storage.write_bytes(storage.join(uri, "dense.pt"), buffer.getbuffer())
        files["dense.pt"] = {"bytes": written.bytes, "sha256": written.sha256}
    merged = {}
    for rank_files in world.gather_json(files):
        merged |= rank_files
    if world.rank == 0:
        shapes = {t.name: {"rows": t.rows, "width": t.width, "steps": t.steps} for t in tables}
        manifest = {"epoch": epoch, "catalog": catalog, "metrics": metrics, "tables": shapes, "files": merged}
        storage.write_json(storage.join(uri, MANIFEST), manifest)
    world.barrier()


def read_manifest(uri: str) -> dict:
    """The manifest of a checkpoint. Raises InputError where there is none: the checkpoint is not whole."""
    path = storage.join(uri, MANIFEST)
    if not storage.exists(path):
        raise InputError(f"{uri} is not a whole checkpoint: it has no {MANIFEST}")
    return storage.read_json(path)


def load(uri: str, tables: list[RowTable], optimizer: bool = False) -> dict[str, dict]:
    """Fill this rank's rows of the tables and return the dense state dictionaries.

    Args:
        optimizer: also load the tables' optimizer state.

    Raises:
        InputError: a missing or changed file, or tables of other sizes (named).
    """
    manifest = read_manifest(uri)
    for table in tables:
        shape = manifest["tables"].get(table.name)
        if shape is None or (shape["rows"], shape["width"]) != (table.rows, table.width):
            raise InputError(
                f"{uri}: table {table.name!r} is {shape and (shape['rows'], shape['width'])} in the checkpoint, "
                f"{(table.rows, table.width)} in this model; is it another catalog or configuration?"
            )
        table.steps = shape["steps"]
        for part, tensor in table.state().items():
            if part == "weight" or optimizer:
                _load_rows(uri, f"{table.name}.{part}", tensor, table.start, table.stop, manifest["files"])
    data = storage.read_bytes(storage.join(uri, "dense.pt"))
    storage.check(storage.join(uri, "dense.pt"), data, manifest["files"]["dense.pt"]["sha256"])
    return torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")


def _parts(tensor: torch.Tensor) -> Iterator[tuple[int, int]]:
    """Row ranges of a table's tensor that make a file each; one empty range where it has no rows."""
    step = max(FILE_BYTES // (tensor.shape[1] * tensor.element_size()), 1)
    for low in range(0, max(len(tensor), 1), step):
        yield low, min(low + step, len(tensor))


def _load_rows(uri: str, prefix: str, out: torch.Tensor, start: int, stop: int, files: dict) -> None:
    filled = 0
    for name, entry in files.items():
        match = re.fullmatch(re.escape(prefix) + r"\.(\d+)-(\d+)\.npy", name)
        if match is None:
            continue
        first, last = int(match[1]), int(match[2])
        low, high = max(first, start), min(last, stop)
        if low < high:
            rows = storage.read_array(storage.join(uri, name), entry["sha256"])
            out[low - start : high - start] = torch.from_numpy(rows[low - first : high - first])
            filled += high - low
    if filled != stop - start:
        raise InputError(f"{uri}: rows [{start}, {stop}) of {prefix} are not complete in the checkpoint")
