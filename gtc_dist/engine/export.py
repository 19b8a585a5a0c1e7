"""Embeddings of a run as Parquet files under the original ids: each rank writes its own rows."""

from dataclasses import asdict

import pyarrow as pa
import torch

from gtc_dist.data import storage
from gtc_dist.data.catalog import Catalog
from gtc_dist.engine.restore import Found, restore
from gtc_dist.errors import InputError
from gtc_dist.graph.csc import Graphs
from gtc_dist.model.collectives import World
from gtc_dist.model.table import RowTable

ROWS = 1 << 17  # rows of a file


def export_rank(world: World, graphs: Graphs | None, found: Found, out: str, dtype: str) -> dict:
    """Compute and write this rank's rows; returns what the manifest says of the files of all ranks. A collective."""
    run = restore(found, world, graphs)
    tables = dict(zip(("users", "items"), run.embed(), strict=True))
    for kind, table in tables.items():
        if world.max(int(not _fits(table, dtype))):
            raise InputError(f"embeddings of {kind} are not finite in {dtype}; export them as float32")
    files = {}
    for kind, table in tables.items():
        for first in range(table.start, table.stop, ROWS):
            name = f"{kind}/part-{first:012d}.parquet"
            files[name] = write_rows(run.catalog, kind, table, first, storage.join(out, name), dtype)
    merged = {}
    for rank_files in world.gather_json(files):
        merged |= rank_files
    sizes = {kind: table.rows for kind, table in tables.items()}
    return {**sizes, "dim": tables["items"].width, "streams": run.network.shape.streams, "files": merged}


def write_rows(catalog: Catalog, kind: str, table: RowTable, first: int, uri: str, dtype: str) -> dict:
    """Write up to ROWS of this rank's rows from `first` on, with their ids."""
    last = min(first + ROWS, table.stop)
    rows = table.weight[first - table.start : last - table.start].cpu().numpy().astype(dtype)
    column = pa.FixedSizeListArray.from_arrays(pa.array(rows.reshape(-1)), rows.shape[1])
    written = storage.write_table(uri, pa.table({"id": catalog.ids(kind, first, last), "embedding": column}))
    return {"rows": len(rows)} | asdict(written)


def _fits(table: RowTable, dtype: str) -> bool:
    """Whether this rank's embeddings are finite, and stay so in `dtype`."""
    most = table.weight.abs().max().item() if len(table.weight) else 0.0
    return most <= torch.finfo(getattr(torch, dtype)).max  # false for NaN
