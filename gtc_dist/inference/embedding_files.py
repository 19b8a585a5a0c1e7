"""Exported embeddings: Parquet files under the original ids, each rank writes its own rows."""

from dataclasses import asdict

import pyarrow as pa
import torch

from gtc_dist.checkpoint.existing_run import RunRef
from gtc_dist.data import formats, storage
from gtc_dist.data.catalog import Catalog
from gtc_dist.distributed.collectives import Communicator
from gtc_dist.distributed.sharded_table import ShardedTable
from gtc_dist.errors import InputError
from gtc_dist.graph.csc import Graphs
from gtc_dist.inference.new_items import NewItems, embed_new_items
from gtc_dist.inference.new_users import NewUsers, load_run_with_new_users, without_new_users
from gtc_dist.inference.trained_run import load_run

FILE_ROWS = 1 << 17


def export_rank(
    comm: Communicator,
    graphs: Graphs | None,
    run_ref: RunRef,
    out: str,
    dtype: str,
    new_items: NewItems | None = None,
    new_users: NewUsers | None = None,
) -> dict:
    """Compute and write this rank's rows. Collective: every rank must call it.

    Args:
        new_items: items that arrived after training; on a single rank only.
        new_users: users who are not in the catalog; on a single rank only.

    Returns:
        the manifest's entries on sizes and on the files of all ranks.
    """
    if new_users is None:
        run, new_user_rows = load_run(run_ref, comm, graphs), None
    else:
        run = load_run_with_new_users(run_ref, new_users, comm, graphs)
    final = run.final_embeddings()
    if new_users is not None:
        final, new_user_rows = without_new_users(run, final)
    tables = final._asdict()
    new_rows = embed_new_items(run, tables["items"], new_items.features) if new_items else None
    new = [("new items", new_rows), ("new users", new_user_rows)]
    for kind, rows in [(kind, table.weight) for kind, table in tables.items()] + new:
        if comm.all_reduce_max(int(rows is not None and not _fits(rows, dtype))):
            raise InputError(f"embeddings of {kind} are not finite in {dtype}; export them as float32")
    files = {}
    for kind, table in tables.items():
        for first in range(table.start, table.stop, FILE_ROWS):
            name = f"{kind}/part-{first:012d}.parquet"
            files[name] = write_catalog_rows(run.catalog, kind, table, first, storage.join(out, name), dtype)
    of_new = {"items": (new_items and new_items.ids, new_rows), "users": (new_users and new_users.ids, new_user_rows)}
    for kind, (names, embeddings) in of_new.items():
        for first in range(0, 0 if names is None else len(names), FILE_ROWS):
            name = f"{kind}/part-new-{first:012d}.parquet"
            rows = slice(first, first + FILE_ROWS)
            files[name] = write_embeddings(names[rows], embeddings[rows], storage.join(out, name), dtype)
    merged = {}
    for rank_files in comm.all_gather_json(files):
        merged |= rank_files
    sizes = {kind: table.rows for kind, table in tables.items()}
    if new_items is not None:
        sizes["new_items"] = len(new_items.ids)
    if new_users is not None:
        sizes["new_users"] = len(new_users)
    return {**sizes, "dim": tables["items"].width, "streams": run.network.view_names, "files": merged}


def write_catalog_rows(catalog: Catalog, kind: str, table: ShardedTable, first: int, uri: str, dtype: str) -> dict:
    """Write up to FILE_ROWS of this rank's rows from `first` on, with their ids."""
    rows = table.weight[first - table.start :][:FILE_ROWS]
    return write_embeddings(catalog.ids(kind, first, first + len(rows)), rows, uri, dtype)


def write_embeddings(ids: pa.Array, embeddings: torch.Tensor, uri: str, dtype: str) -> dict:
    """Write rows with their ids as one file."""
    rows = embeddings.cpu().numpy().astype(dtype)
    column = pa.FixedSizeListArray.from_arrays(pa.array(rows.reshape(-1)), rows.shape[1])
    written = formats.write_table(uri, pa.table({"id": ids, "embedding": column}))
    return {"rows": len(rows)} | asdict(written)


def _fits(rows: torch.Tensor, dtype: str) -> bool:
    """Whether embeddings are finite, and stay finite in `dtype`."""
    most = rows.abs().max().item() if rows.numel() else 0.0
    return most <= torch.finfo(getattr(torch, dtype)).max  # false for NaN
