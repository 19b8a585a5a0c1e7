"""Export a run's embeddings under the original ids.

    python -m gtc_dist.export --run RUN --out DIR [--format parquet numpy faiss jsonl] [--dtype float16]
        [--new-items FILE] [--new-users FILE] [--workers N]

Writes DIR/users/part-*.parquet and DIR/items/part-*.parquet with the columns `id` (original type) and `embedding`
(fixed_size_list), DIR/README.md, which says what they are and how to load them, and DIR/manifest.json last: without it
the export is incomplete, and the same command starts it again. The score of a user and an item is the dot product of
their embeddings. RUN and DIR are local or in object storage. The same run and number of workers give the same bytes
every time.

--new-items FILE adds items that arrived after training, from their content alone: a Parquet file with the column `id`
and one column of raw vectors for each modality, named as in data.features, null where an item has none. Or, for each
modality, MODALITY=FOLDER with what `gtc features --like` wrote: --new-items text=new/text visual=new/visual. They are
written to items/part-new-*.parquet.

--new-users FILE adds users who are not in the catalog, from their interactions: a file in the format of the catalog's
own interactions (data.interactions); or, for users who have none yet, a file with a column of users alone, who get the
mean of the others. They are written to users/part-new-*.parquet; nothing changes for the other users and the items.

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
import sys

from gtc_dist.checkpoint.existing_run import RunRef, find_run
from gtc_dist.data import storage
from gtc_dist.data.catalog import Catalog
from gtc_dist.data.output_folder import OutputFolder
from gtc_dist.embedding_formats.faiss_index import INDEX_KINDS
from gtc_dist.embedding_formats.write_formats import EXPORT_FORMATS, OWN_FILES, write_formats
from gtc_dist.errors import run_command
from gtc_dist.inference.embedding_files import export_rank
from gtc_dist.inference.model_card import CARD, model_card
from gtc_dist.inference.new_items import NewItems, place_of, read_new_items
from gtc_dist.inference.new_users import NewUsers
from gtc_dist.launch.job_paths import refuse_relative_paths
from gtc_dist.launch.offline_job import parse_run_command, run_on_ranks_or_here
from gtc_dist.prepare.new_users import read_new_users

EXPORT_MANIFEST = "manifest.json"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="URI of a new or empty folder, or of an incomplete export")
    parser.add_argument("--dtype", choices=("float32", "float16"), default="float32")
    parser.add_argument("--format", nargs="+", choices=EXPORT_FORMATS, default=["parquet"], help="default: parquet")
    parser.add_argument("--faiss", action="store_true", help="add faiss to --format")
    parser.add_argument("--index", choices=INDEX_KINDS, help="kind of items.faiss (default: by the number of items)")
    parser.add_argument(
        "--new-items",
        nargs="+",
        metavar="FILE",
        help="items that arrived since: URI of a Parquet file, or MODALITY=FOLDER for each modality",
    )
    parser.add_argument("--new-users", metavar="FILE", help="URI of a file with users who are not in the catalog")
    args = parse_run_command(parser, argv)
    if (args.new_items or args.new_users) and args.workers:
        parser.error("--new-items and --new-users work in this process alone, without --workers")
    chosen = {*args.format, *(["faiss"] if args.faiss else [])}
    if args.index and "faiss" not in chosen:
        parser.error("--index goes with --format faiss")

    paths = {f"--{name.replace('_', '-')}": getattr(args, name) for name in ("run", "out", "new_users", "catalog")}
    paths |= {f"--new-items ({n})": place_of(source) for n, source in enumerate(args.new_items or [], 1)}
    refuse_relative_paths(paths)
    out = storage.absolute(args.out)
    run_ref = find_run(args.run, args.catalog)
    new = {
        "new_items": args.new_items and open_new_items(run_ref, args.new_items),
        "new_users": args.new_users and open_new_users(run_ref, args.new_users),
    }
    folder = empty_folder(out, args.out)
    export = run_on_ranks_or_here(args, run_ref, functools.partial(export_rank, out=out, dtype=args.dtype, **new))
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
    counts = [
        f"{export[kind]:,} {kind}" + (f" (and {export[f'new_{kind}']:,} new ones)" if f"new_{kind}" in export else "")
        for kind in ("users", "items")
    ]
    print(f"{counts[0]} and {counts[1]} of width {export['dim']} are in {out}")


def open_new_items(run_ref: RunRef, sources: list[str]) -> NewItems:
    """The items of a file, or of a folder for each modality. Raises InputError."""
    catalog = Catalog(run_ref.config.data.catalog)
    return read_new_items(catalog, catalog.modalities(run_ref.config.model.modalities), sources)


def open_new_users(run_ref: RunRef, uri: str) -> NewUsers:
    """The users of a file, and a line on what is not used of it. Raises InputError."""
    new = read_new_users(run_ref.config.data, Catalog(run_ref.config.data.catalog), uri)
    none = int((new.indptr[1:] == new.indptr[:-1]).sum())
    unused = f"; {new.unknown:,} rows of items that the catalog lacks are not used" if new.unknown else ""
    mean = f", {none:,} of them without an interaction: they get the mean user" if none else ""
    print(f"{uri}: {len(new):,} users with {len(new.items):,} interactions{mean}{unused}", file=sys.stderr, flush=True)
    return new


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
