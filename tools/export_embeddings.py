"""Export a run's embeddings under the original ids.

    python tools/export_embeddings.py --run RUN --out DIR [--dtype float16] [--faiss]

Writes DIR/users/part-*.parquet and DIR/items/part-*.parquet with the columns `id` (original type) and `embedding`
(fixed_size_list), and DIR/manifest.json last. The score of a user and an item is the dot product of their embeddings.
RUN and DIR are local or in object storage. The same run gives the same bytes every time.
"""

import argparse
from dataclasses import asdict

import numpy as np
import pyarrow as pa
import torch

from gtc_dist.data import storage
from gtc_dist.engine.restore import Run, restore
from gtc_dist.errors import InputError, run_command
from gtc_dist.model.table import RowTable

ROWS = 1 << 17  # rows of a file


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True, help="URI of the run folder: run.storage/run.name")
    parser.add_argument("--out", required=True, help="URI of a new or empty folder")
    parser.add_argument("--dtype", choices=("float32", "float16"), default="float32")
    parser.add_argument("--faiss", action="store_true", help="also write items.faiss, an exact inner-product index")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="torch threads")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)

    if storage.listing(args.out):
        raise InputError(f"the output folder {args.out} is not empty; choose another, or remove it")
    run = restore(args.run)
    print(f"run {args.run}, {run.checkpoint}: computing embeddings", flush=True)
    users, items = run.embed()
    export(run, users, items, args.out, args.dtype, args.faiss)
    print(f"{users.rows:,} users and {items.rows:,} items of width {users.width} are in {args.out}")


def export(run: Run, users: RowTable, items: RowTable, out: str, dtype: str, faiss_index: bool) -> None:
    """Write the Parquet files, the index if asked for, and the manifest last."""
    files: dict[str, dict] = {}
    converted = {}
    for kind, table in (("users", users), ("items", items)):
        with np.errstate(over="ignore"):  # found and said just below
            converted[kind] = table.weight.numpy().astype(dtype)
        if not np.isfinite(converted[kind]).all():
            raise InputError(f"embeddings of {kind} are not finite in {dtype}; export them as float32")
    for kind, vectors in converted.items():
        ids = run.catalog.ids(kind)
        for part, start in enumerate(range(0, len(ids), ROWS)):
            rows = vectors[start : start + ROWS]
            column = pa.FixedSizeListArray.from_arrays(pa.array(rows.reshape(-1)), rows.shape[1])
            name = f"{kind}/part-{part:05d}.parquet"
            written = storage.write_table(
                storage.join(out, name), pa.table({"id": ids.slice(start, ROWS), "embedding": column})
            )
            files[name] = {"rows": len(rows)} | asdict(written)
    if faiss_index:
        written = write_index(items.weight.numpy(), storage.join(out, "items.faiss"))
        files["items.faiss"] = {"rows": items.rows} | asdict(written)
    manifest = {
        "run": run.uri,
        "checkpoint": run.checkpoint,
        "epoch": run.epoch,
        "catalog": run.config.data.catalog,
        "users": users.rows,
        "items": items.rows,
        "dim": users.width,
        "dtype": dtype,
        "metric": "dot product",
        "streams": run.network.shape.streams,
        "files": files,
    }
    storage.write_json(storage.join(out, "manifest.json"), manifest)


def write_index(vectors: np.ndarray, uri: str) -> storage.Written:
    """An exact FAISS inner-product index; position = row of the exported items, file after file."""
    import faiss

    index = faiss.IndexFlatIP(vectors.shape[1])
    index.add(np.ascontiguousarray(vectors, dtype=np.float32))
    return storage.write_bytes(uri, faiss.serialize_index(index).tobytes())


if __name__ == "__main__":
    run_command(main)
