"""Embeddings of a run as Parquet files under the original ids: each rank writes its own rows."""

from dataclasses import asdict

import pyarrow as pa
import torch

from gtc_dist.data import formats, storage
from gtc_dist.data.catalog import Catalog
from gtc_dist.distributed.collectives import Communicator
from gtc_dist.distributed.sharded_table import ShardedTable
from gtc_dist.errors import InputError
from gtc_dist.graph.csc import Graphs
from gtc_dist.inference.new_items import embed_new_items, read_new_items
from gtc_dist.inference.trained_run import RunRef, load_run

ROWS = 1 << 17  # rows of a file


def export_rank(
    comm: Communicator, graphs: Graphs | None, found: RunRef, out: str, dtype: str, new_items: str | None = None
) -> dict:
    """Compute and write this rank's rows; returns what the manifest says of the files of all ranks. A collective.

    Args:
        new_items: file of items that arrived after training (`arrivals.read_arrivals`); of a world of one.
    """
    run = load_run(found, comm, graphs)
    ids, content = read_new_items(run, new_items) if new_items else (None, None)
    tables = dict(zip(("users", "items"), run.embed(), strict=True))
    arrived = embed_new_items(run, tables["items"], content) if new_items else None
    for kind, rows in [(kind, table.weight) for kind, table in tables.items()] + [("new items", arrived)]:
        if comm.all_reduce_max(int(rows is not None and not _fits(rows, dtype))):
            raise InputError(f"embeddings of {kind} are not finite in {dtype}; export them as float32")
    files = {}
    for kind, table in tables.items():
        for first in range(table.start, table.stop, ROWS):
            name = f"{kind}/part-{first:012d}.parquet"
            files[name] = write_part(run.catalog, kind, table, first, storage.join(out, name), dtype)
    for first in range(0, 0 if ids is None else len(ids), ROWS):
        name = f"items/part-new-{first:012d}.parquet"
        own = slice(first, first + ROWS)
        files[name] = write_rows(ids[own], arrived[own], storage.join(out, name), dtype)
    merged = {}
    for rank_files in comm.all_gather_json(files):
        merged |= rank_files
    sizes = {kind: table.rows for kind, table in tables.items()}
    if ids is not None:
        sizes["new_items"] = len(ids)
    return {**sizes, "dim": tables["items"].width, "streams": run.network.shape.streams, "files": merged}


def write_part(catalog: Catalog, kind: str, table: ShardedTable, first: int, uri: str, dtype: str) -> dict:
    """Write up to ROWS of this rank's rows from `first` on, with their ids."""
    own = table.weight[first - table.start :][:ROWS]
    return write_rows(catalog.ids(kind, first, first + len(own)), own, uri, dtype)


def write_rows(ids: pa.Array, embeddings: torch.Tensor, uri: str, dtype: str) -> dict:
    """Write rows with their ids as one file."""
    rows = embeddings.cpu().numpy().astype(dtype)
    column = pa.FixedSizeListArray.from_arrays(pa.array(rows.reshape(-1)), rows.shape[1])
    written = formats.write_table(uri, pa.table({"id": ids, "embedding": column}))
    return {"rows": len(rows)} | asdict(written)


def _fits(rows: torch.Tensor, dtype: str) -> bool:
    """Whether embeddings are finite, and stay so in `dtype`."""
    most = rows.abs().max().item() if rows.numel() else 0.0
    return most <= torch.finfo(getattr(torch, dtype)).max  # false for NaN
