"""Command: a run and a split to metrics.

    python -m gtc_dist.evaluate --run RUN [--split valid|test] [--users N] [--against OTHER] [--rerank N] [--workers N]

Prints one JSON object: Recall, NDCG, Precision, HitRate and MRR at 5, 10, 20 and 50, overall and for cold items (no
train interaction), and the number of users. Runs in this process, without a cluster, or with --workers on so many ranks
of the cluster, each with its share of everything that grows with the catalog.

--against OTHER, a run on the same catalog: adds for each metric the difference to it over the same users, with the 95 %
interval of a paired bootstrap (evaluation/bootstrap.py).

--rerank N, for a run with `condition: user`: adds the metrics after each user's first N items were ordered again with
their personal content scores (personal/personal_filter.py), whose weight is chosen on the valid split.
"""

import argparse
import functools
import json

from gtc_dist.data.catalog import Catalog
from gtc_dist.distributed.collectives import Communicator
from gtc_dist.errors import InputError, run_command
from gtc_dist.evaluation import bootstrap
from gtc_dist.graph.csc import Graphs
from gtc_dist.inference.trained_run import RunRef, find_run, load_run
from gtc_dist.launch.run_command import parse_run_command, run_on_ranks_or_here
from gtc_dist.personal.personal_filter import rerank


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Score a run's best checkpoint by full ranking.")
    parser.add_argument("--split", choices=("valid", "test"), default="test")
    parser.add_argument("--users", type=int, help="rank about so many users, 0 for all (default: the run's eval.users)")
    parser.add_argument("--against", metavar="OTHER", help="URI of another run on the same catalog, to compare with")
    parser.add_argument("--rerank", type=int, metavar="N", help="order each user's first N again by personal scores")
    args = parse_run_command(parser, argv)
    if args.rerank is not None and (args.rerank < 1 or args.against):
        parser.error("--rerank takes a positive number, and no --against")

    found = find_run(args.run)
    users = found.config.eval.users if args.users is None else args.users or None
    work = functools.partial(score, split=args.split, users=users, depth=args.rerank)
    if args.against:
        other = find_run(args.against)
        same_catalog(found, other)
        work = functools.partial(compare, other=other, split=args.split, users=users)
    print(json.dumps({"split": args.split, **run_on_ranks_or_here(args, found, work)}))


def same_catalog(found: RunRef, other: RunRef) -> None:
    """Raises InputError where two runs cannot be compared user by user."""
    prints = [Catalog(one.config.data.catalog, verify="size").manifest.fingerprint for one in (found, other)]
    if prints[0] != prints[1]:
        raise InputError(
            f"{found.uri} was trained on {found.config.data.catalog}, {other.uri} on another catalog, "
            f"{other.config.data.catalog}: their users are not the same; give two runs on one catalog"
        )


def score(
    comm: Communicator, graphs: Graphs | None, found: RunRef, split: str, users: int | None, depth: int | None
) -> dict:
    """What each rank does."""
    run = load_run(found, comm, graphs)
    reranked = {} if depth is None else {"rerank": rerank(run, split, depth, users)}
    return run.evaluate(split, users) | reranked


def compare(
    comm: Communicator, graphs: Graphs | None, found: RunRef, other: RunRef, split: str, users: int | None
) -> dict:
    """What each rank does with another run to compare with."""
    run = load_run(found, comm, graphs)
    metrics, ours = run.evaluate(split, users), run.by_user(split, users)
    # a run without a hop may have been given a catalog's graphs without the one that the other needs
    theirs = load_run(other, comm).by_user(split, users)
    return {**metrics, "against": {"run": other.uri, **bootstrap.paired(ours, theirs)}}


if __name__ == "__main__":
    run_command(main)
