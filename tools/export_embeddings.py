"""Export a run's embeddings under the original ids.

    python tools/export_embeddings.py --run RUN --out DIR [--dtype float16] [--faiss] [--workers N]

Writes DIR/users/part-*.parquet and DIR/items/part-*.parquet with the columns `id` (original type) and `embedding`
(fixed_size_list), and DIR/manifest.json last. The score of a user and an item is the dot product of their embeddings.
RUN and DIR are local or in object storage. The same run and number of workers give the same bytes every time.

With --workers each rank of the cluster writes its own rows. --faiss holds all items in the memory of this process.
"""

import argparse
import functools
from dataclasses import asdict

import numpy as np
import pyarrow as pa
import torch

from gtc_dist.data import storage
from gtc_dist.data.catalog import Catalog
from gtc_dist.engine.restore import Found, find, restore
from gtc_dist.errors import InputError, run_command
from gtc_dist.finished import parse_run_command, run_on
from gtc_dist.graph.csc import Graphs
from gtc_dist.model.collectives import World
from gtc_dist.model.table import RowTable

ROWS = 1 << 17  # rows of a file


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="URI of a new or empty folder")
    parser.add_argument("--dtype", choices=("float32", "float16"), default="float32")
    parser.add_argument("--faiss", action="store_true", help="also write items.faiss, an exact inner-product index")
    args = parse_run_command(parser, argv)

    out = storage.absolute(args.out)
    if storage.listing(out):
        raise InputError(f"the output folder {args.out} is not empty; choose another, or remove it")
    found = find(args.run)
    print(f"run {args.run}, {found.checkpoint}: computing embeddings", flush=True)
    export = run_on(args, found, functools.partial(export_rank, out=out, dtype=args.dtype))
    files = export["files"]
    if args.faiss:
        files["items.faiss"] = write_index([name for name in files if name.startswith("items/")], export["dim"], out)
    manifest = {
        "run": found.uri,
        "checkpoint": found.checkpoint,
        "epoch": found.epoch,
        "catalog": found.config.data.catalog,
        **export,
        "dtype": args.dtype,
        "metric": "dot product",
    }
    storage.write_json(storage.join(out, "manifest.json"), manifest)
    print(f"{export['users']:,} users and {export['items']:,} items of width {export['dim']} are in {args.out}")


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


def write_index(names: list[str], dim: int, out: str) -> dict:
    """An exact FAISS inner-product index of the exported items; position = row, file after file."""
    import faiss

    index = faiss.IndexFlatIP(dim)
    for name in sorted(names):
        column = storage.read_table(storage.join(out, name), ["embedding"])["embedding"].combine_chunks()
        index.add(column.flatten().to_numpy(zero_copy_only=False).reshape(-1, dim).astype(np.float32))
    written = storage.write_bytes(storage.join(out, "items.faiss"), faiss.serialize_index(index).data)
    return {"rows": index.ntotal} | asdict(written)


def _fits(table: RowTable, dtype: str) -> bool:
    """Whether this rank's embeddings are finite, and stay so in `dtype`."""
    most = table.weight.abs().max().item() if len(table.weight) else 0.0
    return most <= torch.finfo(getattr(torch, dtype)).max  # false for NaN


if __name__ == "__main__":
    run_command(main)
