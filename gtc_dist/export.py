"""Export a run's embeddings under the original ids.

    python -m gtc_dist.export --run RUN --out DIR [--format parquet numpy faiss jsonl] [--dtype float16]
        [--new-items FILE] [--workers N]

Writes DIR/users/part-*.parquet and DIR/items/part-*.parquet with the columns `id` (original type) and `embedding`
(fixed_size_list), DIR/README.md, which says what they are and how to load them, and DIR/manifest.json last: without it
the export is incomplete, and the same command starts it again. The score of a user and an item is the dot product of
their embeddings. RUN and DIR are local or in object storage. The same run and number of workers give the same bytes
every time.

--new-items FILE adds items that arrived after training, from their content alone: a Parquet file with the column `id`
and one column of raw vectors for each modality, named as in data.features, null where an item has none. They are
written to items/part-new-*.parquet.

--format, one or several of

- parquet (default), as above;
- numpy: users.npy and items.npy, with the ids of their rows in users_ids.npy and items_ids.npy (integers) or .jsonl;
- faiss: items.faiss, an index by inner product with your ids in it where they are integers: flat or, for many items,
  IVF (or HNSW: --index), with its recall in manifest.json and README.md;
- jsonl: users.jsonl and items.jsonl, which pgvector, Qdrant and Milvus import. README.md has the lines for each.

With --workers N, N ranks on the cluster write their own rows as Parquet; this process makes the other formats from
them, some rows at a time. faiss holds all items in the memory of this process.
"""

import argparse
import functools

from gtc_dist.checkpoint.existing_run import find_run
from gtc_dist.data import storage
from gtc_dist.data.output_folder import OutputFolder
from gtc_dist.embedding_formats.faiss_index import INDEX_KINDS
from gtc_dist.embedding_formats.write_formats import EXPORT_FORMATS, OWN_FILES, write_formats
from gtc_dist.errors import run_command
from gtc_dist.inference.embedding_files import export_rank
from gtc_dist.inference.model_card import CARD, model_card
from gtc_dist.launch.job_paths import refuse_relative_paths
from gtc_dist.launch.offline_job import parse_run_command, run_on_ranks_or_here

EXPORT_MANIFEST = "manifest.json"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="URI of a new or empty folder, or of an incomplete export")
    parser.add_argument("--dtype", choices=("float32", "float16"), default="float32")
    parser.add_argument("--format", nargs="+", choices=EXPORT_FORMATS, default=["parquet"], help="default: parquet")
    parser.add_argument("--faiss", action="store_true", help="add faiss to --format")
    parser.add_argument("--index", choices=INDEX_KINDS, help="kind of items.faiss (default: by the number of items)")
    parser.add_argument("--new-items", metavar="FILE", help="URI of a Parquet file with items that arrived since")
    args = parse_run_command(parser, argv)
    if args.new_items and args.workers:
        parser.error("--new-items works in this process alone, without --workers")
    chosen = {*args.format, *(["faiss"] if args.faiss else [])}
    if args.index and "faiss" not in chosen:
        parser.error("--index goes with --format faiss")

    refuse_relative_paths(
        {"--run": args.run, "--out": args.out, "--new-items": args.new_items, "--catalog": args.catalog}
    )
    out = storage.absolute(args.out)
    run_ref = find_run(args.run, args.catalog)
    folder = empty_folder(out, args.out)
    export = run_on_ranks_or_here(
        args, run_ref, functools.partial(export_rank, out=out, dtype=args.dtype, new_items=args.new_items)
    )
    export = {"dtype": args.dtype, "metric": "dot product"} | write_formats(out, export, chosen, args.dtype, args.index)
    storage.write_bytes(storage.join(out, CARD), model_card(run_ref, export).encode())
    manifest = {
        "run": run_ref.uri,
        "checkpoint": run_ref.checkpoint,
        "epoch": run_ref.epoch,
        "catalog": run_ref.config.data.catalog,
        **export,
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
        own_files=rf"(users|items)/part-(new-)?\d{{12}}\.parquet|{OWN_FILES}|README\.md",
        manifest=EXPORT_MANIFEST,
        marker=None,
    )
    folder.start_empty(named)
    return folder


if __name__ == "__main__":
    run_command(main)
