"""Lists of recommended items from a trained run:

    python -m gtc_dist.recommend --run RUN --user ID [--user ID ...]      on the terminal
    python -m gtc_dist.recommend --run RUN --out lists [--users FILE]     Parquet, for all users or those of a file
    python -m gtc_dist.recommend --run RUN --new-users FILE [--out lists] for users who are not in the catalog
    python -m gtc_dist.recommend --run RUN --item ID                      similar items

What a user already has, in train, valid or test, is left out (--include-seen: not). Users without a train interaction
get the list of the mean user. FILE holds ids: one in each line (.txt), or in a column of a CSV, TSV, JSON lines or
Parquet file that is named user_id or item_id. --titles adds names from a table. Parquet has the columns user_id, rank
(from 1), item_id, score and, with --titles, title; rows of a user follow each other. --where category=boots lists only
items that have this text in a column of that table; of one column given twice, one of the texts.

--new-users FILE is as of `gtc export`: a file like the interactions of the catalog, or with a column of users alone.

--explain adds what each part of the model contributes to a score (popularity, network, masked_diffusion, graph_filter,
content_MODALITY: together the score; in Parquet the columns score_PART), and the user's own train items that are most
similar to the listed one, with the cosine (nearest_own). Lists are exact: every item is scored for every user.

Rerun the same command to go on with lists that were interrupted: files of users that are finished stay.

Similar items are those with the largest cosine, without the columns that hold an item's popularity. The dot product, by
which users' lists are ranked, also rewards items that many people take.
"""

import argparse
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict

import numpy as np
import pyarrow as pa
import torch
from torch.nn.functional import normalize

from gtc_dist.checkpoint.existing_run import RunRef, find_run
from gtc_dist.data import formats, storage
from gtc_dist.data.catalog import CSC, Catalog
from gtc_dist.distributed.collectives import Communicator
from gtc_dist.distributed.sharded_table import ShardedTable
from gtc_dist.errors import InputError
from gtc_dist.evaluation.beyond_accuracy import mean_user
from gtc_dist.evaluation.ranking import top_k_items
from gtc_dist.export import open_new_users
from gtc_dist.features.item_content import read_ids
from gtc_dist.graph.csc import Graphs, by_destination
from gtc_dist.hybrid.embeddings import Embeddings
from gtc_dist.inference.new_users import CatalogWithUsers, NewUsers, load_run_with_new_users
from gtc_dist.inference.trained_run import TrainedRun, load_run
from gtc_dist.launch.job_paths import refuse_relative_paths
from gtc_dist.launch.offline_job import parse_run_command, run_on_ranks_or_here
from gtc_dist.progress import TimeLeft
from gtc_dist.recommend.explain import explain_lists, named_parts
from gtc_dist.recommend.item_choice import (
    allowed_items,
    item_attributes,
    item_titles,
    where_conditions,
)
from gtc_dist.recommend.list_parts import finished_part, lists_fingerprint, lists_folder, part_name
from gtc_dist.recommend.list_table import list_table, show

CHUNK_USERS = 1 << 15  # of a rank, whose lists are held at once


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--user", action="append", metavar="ID", help="print this user's list; may be repeated")
    parser.add_argument("--item", metavar="ID", help="print the items most similar to this one")
    parser.add_argument("--users", metavar="FILE", help="users to make lists for (default: all)")
    parser.add_argument("--new-users", metavar="FILE", help="users who are not in the catalog, with their interactions")
    parser.add_argument("--out", metavar="FOLDER", help="new or empty folder for the lists")
    parser.add_argument("--top", type=int, default=20, help="items of a list (default: %(default)s)")
    parser.add_argument("--include-seen", action="store_true", help="list what a user already has, too")
    parser.add_argument("--candidates", metavar="FILE", help="list only these items")
    parser.add_argument("--exclude", metavar="FILE", help="never list these items")
    parser.add_argument("--titles", metavar="FILE", help="table with names of the items")
    parser.add_argument("--where", action="append", metavar="COLUMN=TEXT", help="list only items with this text there")
    parser.add_argument("--title", default="title", metavar="COLUMN", help="its column with the name (%(default)s)")
    parser.add_argument("--explain", action="store_true", help="parts of each score, and nearest items of the user's")
    parser.add_argument("--id", metavar="COLUMN", help="its column with the id (default: as in the interactions)")
    args = parse_run_command(parser, argv)
    check_arguments(parser, args)

    run_ref = find_run(args.run, args.catalog)
    new = open_new_users(run_ref, args.new_users) if args.new_users else None
    catalog, id_column = Catalog(run_ref.config.data.catalog), args.id or run_ref.config.data.interactions.item
    if new is not None:
        catalog = CatalogWithUsers(catalog, new.ids)
    named = [(args.user, "users"), (args.item and [args.item], "items")]
    users, item = (None if ids is None else index_of_texts(catalog, kind, ids) for ids, kind in named)
    if args.users:
        users = np.unique(catalog.index_of("users", read_ids(args.users, "user_id")))
        if not len(users):
            raise InputError(f"--users {args.users} has no user")
    elif new is not None and users is None:
        users = np.arange(catalog.users - len(new), catalog.users)
    wanted = where_conditions(args.where or [])
    attributes = item_attributes(catalog, args.titles, id_column, wanted) if wanted else None
    options = {
        "top": args.top,
        "allowed": allowed_items(catalog, args.candidates, args.exclude, attributes),
        "titles": None if args.titles is None else item_titles(catalog, args.titles, id_column, args.title),
    }
    if item is not None:
        work = functools.partial(similar_items, item=int(item[0]), **options)
        show(run_on_ranks_or_here(args, run_ref, work)["lists"], "item")
        return
    out = None if args.out is None else storage.absolute(args.out)
    options |= {"users": users, "include_seen": args.include_seen, "explain": args.explain}
    if out is not None:
        asked = options | {"new_users": None if new is None else vars(new)}
        asked |= {"ranks": max(args.workers, 1), "chunk": CHUNK_USERS}  # they divide the users among the files
        folder = lists_folder(out, args.out, lists_fingerprint(run_ref, catalog, **asked))
    work = functools.partial(recommend_rank, out=out, new_users=new, **options)
    result = run_on_ranks_or_here(args, run_ref, work)
    if out is None:
        show(result["lists"], "user")
        return
    folder.finish({"run": run_ref.uri, "checkpoint": run_ref.checkpoint, "top": args.top, **result})
    print(f"lists of {result['users']:,} users, {result['rows']:,} rows, are in {out}")


def check_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """End with a usage message where options do not fit together."""
    chosen = [name for name in ("user", "item", "out") if getattr(args, name)]
    if len(chosen) != 1 and not (args.new_users and not chosen):
        parser.error("give one of --user, --item and --out")
    if args.new_users and (args.item or args.users or args.workers):
        parser.error("--new-users goes without --item, --users and --workers")
    if args.users and not args.out:
        parser.error("--users goes with --out")
    if args.workers and not args.out:
        parser.error("--workers goes with --out")
    if args.explain and args.item:
        parser.error("--explain goes with --user and --out")
    if args.where and not args.titles:
        parser.error("--where needs --titles, the table with the column")
    if args.top < 1:
        parser.error("--top must be positive")
    paths = ("run", "catalog", "out", "users", "new_users", "candidates", "exclude", "titles")
    refuse_relative_paths({f"--{name.replace('_', '-')}": getattr(args, name) for name in paths})


def index_of_texts(catalog: Catalog, kind: str, ids: list[str]) -> np.ndarray:
    """Indexes of ids from the command line, as they are written in the catalog."""
    return catalog.index_of(kind, pa.array(ids, pa.string()))


def recommend_rank(
    comm: Communicator,
    graphs: Graphs | None,
    run_ref: RunRef,
    users: np.ndarray | None,
    top: int,
    include_seen: bool,
    allowed: np.ndarray | None,
    titles: pa.Array | None,
    out: str | None,
    explain: bool = False,
    new_users: NewUsers | None = None,
) -> dict:
    """Lists of this rank's users, written to `out`, or, without it, returned. Collective: every rank must call it.

    Args:
        users: indexes in the order of the lists; None: all.
        allowed, titles: by item index.
        new_users: users behind those of the catalog; on a single rank only.
    """
    run = load_run_with_new_users(run_ref, new_users, comm, graphs) if new_users else load_run(run_ref, comm, graphs)
    embeddings = with_mean_user(run, run.final_embeddings())
    return write_lists(run, embeddings, out, users, top, include_seen, allowed, titles, explain)


def write_lists(run: TrainedRun, embeddings: Embeddings, out: str | None, *choice) -> dict:
    """`recommend_rank` of a run that is loaded; parts that are in `out` already stay. Collective: every rank must call
    it.

    Args:
        embeddings: final ones (`with_mean_user`).
        choice: arguments of `lists_of` after them.
    """
    comm, first = embeddings.users.comm, embeddings.users.start
    found = set() if out is None else storage.listing(out).keys()
    files, lists, rows, listed, chunks = {}, [], 0, 0, users_in_chunks(embeddings, choice[0])
    names = [part_name(first + number * CHUNK_USERS) for number in range(len(chunks))]
    is_written = [name in found for name in names]
    for number in np.flatnonzero(is_written).tolist():
        count, files[names[number]] = finished_part(storage.join(out, names[number]))
        rows, listed = rows + count, listed + len(chunks[number])
    for number, table in lists_of(run, embeddings, *choice, without=is_written):
        rows, listed = rows + table.num_rows, listed + len(chunks[number])
        if out is None:
            lists += table.to_pylist()
        else:
            files[names[number]] = asdict(formats.write_table(storage.join(out, names[number]), table))
    gathered = comm.all_gather_json({"files": files, "rows": rows, "users": listed})
    merged = {name: entry for part in gathered for name, entry in part["files"].items()}
    totals = {name: sum(part[name] for part in gathered) for name in ("users", "rows")}
    return {**totals, "files": merged, "lists": lists} if out is None else {**totals, "files": merged}


def lists_of(
    run: TrainedRun,
    embeddings: Embeddings,
    users: np.ndarray | None,
    top: int,
    include_seen: bool = False,
    allowed: np.ndarray | None = None,
    titles: pa.Array | None = None,
    explain: bool = False,
    without: Sequence[bool] = (),
) -> Iterator[tuple[int, pa.Table]]:
    """Lists of this rank's users, chunk by chunk: the number of the chunk, and a table as of `list_table`. Collective:
    every rank must take all.

    Args:
        embeddings: final ones (`with_mean_user`); others as of `recommend_rank`.
        without: which chunks of `users_in_chunks` are left out; empty: none.
    """
    comm, first, last = embeddings.users.comm, embeddings.users.start, embeddings.users.stop
    known = None if include_seen else later_interactions(run.catalog, first, last)
    options, width = run.ranking_options(None), embeddings.items.width
    chunks = dict(enumerate(users_in_chunks(embeddings, users)))
    chunks = {number: chunk for number, chunk in chunks.items() if not (without and without[number])}
    mine, before = sum(map(len, chunks.values())), 0
    report = users_done(mine, sum(comm.all_gather_int(mine)), comm.rank == 0)
    none = [(-1, np.empty(0, np.int64))] * (comm.all_reduce_max(len(chunks)) - len(chunks))
    for number, chunk in [*chunks.items(), *none]:  # every rank takes part as often as the one with the most chunks
        done = functools.partial(report, before, len(chunk))
        items, scores = top_k_items(
            *embeddings, run.graphs, chunk, top, options, allowed, known, mask_train=not include_seen, done=done
        )
        reasons = None
        if explain:
            parts, popularity = named_parts(run, width), run.scorer.special_columns(width).popularity
            reasons = explain_lists(embeddings, run.graphs, parts, popularity, chunk, items)
        before += len(chunk)
        if len(chunk):
            yield number, list_table(run.catalog, "user_id", chunk, items, scores, titles, reasons)


def users_in_chunks(embeddings: Embeddings, users: np.ndarray | None) -> list[np.ndarray]:
    """Local. This rank's users among some (None: all), CHUNK_USERS at a time."""
    first, last = embeddings.users.start, embeddings.users.stop
    mine = np.arange(first, last) if users is None else users[(users >= first) & (users < last)]
    return [mine[start : start + CHUNK_USERS] for start in range(0, len(mine), CHUNK_USERS)]


def users_done(mine: int, users: int, is_shown: bool) -> Callable[[int, int, float], None]:
    """Progress of lists, judged by this rank's users: a function of how many of these had their lists before, how many
    are being ranked, and the share of it that is done."""
    shown = TimeLeft(f"lists of {users:,} users")

    def report(before: int, now: int, share: float) -> None:
        if is_shown and mine:
            shown((before + now * share) / mine)

    return report


def with_mean_user(run: TrainedRun, embeddings: Embeddings) -> Embeddings:
    """Embeddings in which users without a train interaction have the mean of the others."""
    users, items = embeddings
    new = torch.from_numpy(run.graphs.user_degree[users.start : users.stop] == 0).to(users.weight.device)
    mean = mean_user(users, run.graphs, run.config.eval.block_rows)
    return Embeddings(users.with_values(torch.where(new[:, None], mean.to(users.weight.dtype), users.weight)), items)


def later_interactions(catalog: Catalog, first: int, last: int) -> CSC:
    """Items of valid and test of the users [first, last), by user index less `first`."""
    users, items = [np.empty(0, np.int32)], [np.empty(0, np.int32)]
    for split in ("valid", "test"):
        for user, item in catalog.interaction_files(split):
            inside = (user >= first) & (user < last)
            users.append(user[inside] - np.int32(first))
            items.append(item[inside])
    pairs = np.unique(np.concatenate(users).astype(np.int64) * catalog.items + np.concatenate(items))
    return by_destination(
        (pairs // catalog.items).astype(np.int32), (pairs % catalog.items).astype(np.int32), last - first
    )


def similar_items(
    comm: Communicator,
    graphs: Graphs | None,
    run_ref: RunRef,
    item: int,
    top: int,
    allowed: np.ndarray | None,
    titles: pa.Array | None,
) -> dict:
    """Work of this process: `nearest_items` of a run."""
    run = load_run(run_ref, comm, graphs)
    return {"lists": nearest_items(run, run.final_embeddings().items, item, top, allowed, titles).to_pylist()}


def nearest_items(
    run: TrainedRun,
    items: ShardedTable,
    item: int,
    top: int,
    allowed: np.ndarray | None = None,
    titles: pa.Array | None = None,
) -> pa.Table:
    """The items with the largest cosine with an item, without the columns of popularity, as a table of `list_table`.

    Args:
        items: final embeddings, all in this process.
    """
    first = run.scorer.special_columns(items.width).popularity
    own = normalize(items.weight[item, first:].double(), dim=0)
    blocks = items.weight[:, first:].split(run.config.eval.block_rows)
    scores = torch.cat([normalize(rows.double(), dim=1) @ own for rows in blocks])
    scores[item] = -torch.inf
    if allowed is not None:
        scores[torch.from_numpy(~allowed)] = -torch.inf
    best = scores.topk(min(top, len(scores) - 1))
    listed = np.where(torch.isinf(best.values).numpy(), -1, best.indices.numpy())[None]
    return list_table(run.catalog, "to", np.array([item]), listed, best.values.numpy()[None], titles)
