"""Export a run's embeddings under the original ids.

    python -m gtc_dist.export --run RUN --out DIR [--dtype float16] [--faiss] [--new-items FILE] [--workers N]

Writes DIR/users/part-*.parquet and DIR/items/part-*.parquet with the columns `id` (original type) and `embedding`
(fixed_size_list), DIR/README.md, which says what they are and how to load them, and DIR/manifest.json last: without it
the export is incomplete, and the same command starts it again. The score of a user and an item is the dot product of
their embeddings. RUN and DIR are local or in object storage. The same run and number of workers give the same bytes
every time.

--new-items FILE adds items that arrived after training, from their content alone: a Parquet file with the column `id`
and one column of raw vectors for each modality, named as in data.features, null where an item has none. They are
written to items/part-new-*.parquet.

With --workers N, N ranks on the cluster write their own rows. --faiss holds all items in the memory of this process.
"""

import argparse
import functools
from dataclasses import asdict

import numpy as np

from gtc_dist.checkpoint.existing_run import find_run
from gtc_dist.data import formats, storage
from gtc_dist.data.output_folder import OutputFolder
from gtc_dist.errors import run_command
from gtc_dist.inference.embedding_files import export_rank
from gtc_dist.inference.model_card import CARD, model_card
from gtc_dist.launch.job_paths import refuse_relative_paths
from gtc_dist.launch.offline_job import parse_run_command, run_on_ranks_or_here

EXPORT_MANIFEST = "manifest.json"
INDEX = "items.faiss"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="URI of a new or empty folder, or of an incomplete export")
    parser.add_argument("--dtype", choices=("float32", "float16"), default="float32")
    parser.add_argument("--faiss", action="store_true", help="also write items.faiss, an exact inner-product index")
    parser.add_argument("--new-items", metavar="FILE", help="URI of a Parquet file with items that arrived since")
    args = parse_run_command(parser, argv)
    if args.new_items and args.workers:
        parser.error("--new-items works in this process alone, without --workers")

    refuse_relative_paths(
        {"--run": args.run, "--out": args.out, "--new-items": args.new_items, "--catalog": args.catalog}
    )
    out = storage.absolute(args.out)
    run_ref = find_run(args.run, args.catalog)
    folder = empty_folder(out, args.out)
    export = run_on_ranks_or_here(
        args, run_ref, functools.partial(export_rank, out=out, dtype=args.dtype, new_items=args.new_items)
    )
    files = export["files"]
    if args.faiss:
        files[INDEX] = write_index([name for name in files if name.startswith("items/")], export["dim"], out)
    storage.write_bytes(storage.join(out, CARD), model_card(run_ref, export, args.dtype).encode())
    manifest = {
        "run": run_ref.uri,
        "checkpoint": run_ref.checkpoint,
        "epoch": run_ref.epoch,
        "catalog": run_ref.config.data.catalog,
        **export,
        "dtype": args.dtype,
        "metric": "dot product",
    }
    folder.finish(manifest)
    new = f" (and {export['new_items']:,} new ones)" if args.new_items else ""
    print(f"{export['users']:,} users and {export['items']:,} items{new} of width {export['dim']} are in {out}")


def empty_folder(out: str, named: str) -> OutputFolder:
    """The output folder, emptied of an incomplete export. Raises InputError where it holds anything else."""
    folder = OutputFolder(
        out,
        title="the output folder",
        kind="an export",
        own_files=r"(users|items)/part-(new-)?\d{12}\.parquet|items\.faiss|README\.md",
        manifest=EXPORT_MANIFEST,
        marker=None,
    )
    folder.start_empty(named)
    return folder


def write_index(names: list[str], dim: int, out: str) -> dict:
    """Write an exact FAISS inner-product index of the exported items; position = row, file after file."""
    import faiss

    index = faiss.IndexFlatIP(dim)
    for name in sorted(names):
        column = formats.read_table(storage.join(out, name), ["embedding"])["embedding"].combine_chunks()
        index.add(column.flatten().to_numpy(zero_copy_only=False).reshape(-1, dim).astype(np.float32))
    written = storage.write_bytes(storage.join(out, INDEX), faiss.serialize_index(index).data)
    return {"rows": index.ntotal} | asdict(written)


if __name__ == "__main__":
    run_command(main)
