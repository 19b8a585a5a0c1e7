"""Evaluate a trained run's best checkpoint on the valid or test split, by full ranking.

    python -m gtc_dist.evaluate --run RUN [--split valid|test] [--users N] [--against OTHER] [--rerank N] [--workers N]

For each user of the split, all items that the user has no train interaction with are ranked. Prints one JSON object:
Recall, NDCG, Precision, HitRate and MRR at 5, 10, 20 and 50, overall and for cold items (without a train interaction),
and the number of users. Runs in this process, without a cluster, or with --workers N on N ranks of the cluster, each
of which loads only its share of everything that grows with the catalog.

--against OTHER, a run on the same catalog: adds the difference of each metric to that run over the same users, with the
95 % confidence interval of a paired bootstrap (evaluation/bootstrap.py).

--rerank N, for a run with model.diffusion.condition=user: adds the metrics after the first N items of each user were
re-ranked with personal content scores (personal/personal_filter.py), whose weight is tuned on the valid split.
"""

import argparse
import functools
import json

from gtc_dist.checkpoint.existing_run import RunRef, find_run
from gtc_dist.data.catalog import Catalog
from gtc_dist.distributed.collectives import Communicator
from gtc_dist.errors import InputError, run_command
from gtc_dist.evaluation.bootstrap import paired_bootstrap
from gtc_dist.graph.csc import Graphs
from gtc_dist.inference.trained_run import load_run
from gtc_dist.launch.offline_job import parse_run_command, run_on_ranks_or_here
from gtc_dist.personal.personal_filter import rerank


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--split", choices=("valid", "test"), default="test")
    parser.add_argument(
        "--users", type=int, help="rank about this many users; 0: all (default: eval.users of the run's configuration)"
    )
    parser.add_argument("--against", metavar="OTHER", help="URI of another run on the same catalog to compare with")
    parser.add_argument("--rerank", type=int, metavar="N", help="re-rank the first N items with personal scores")
    args = parse_run_command(parser, argv)
    if args.rerank is not None and (args.rerank < 1 or args.against):
        parser.error("--rerank takes a positive number, and cannot be combined with --against")

    run_ref = find_run(args.run)
    users = run_ref.config.eval.users if args.users is None else args.users or None
    work = functools.partial(evaluate_run, split=args.split, users=users, candidates=args.rerank)
    if args.against:
        other = find_run(args.against)
        check_same_catalog(run_ref, other)
        work = functools.partial(compare_runs, other=other, split=args.split, users=users)
    print(json.dumps({"split": args.split, **run_on_ranks_or_here(args, run_ref, work)}))


def check_same_catalog(run_ref: RunRef, other: RunRef) -> None:
    """Raises InputError for two runs on different catalogs, which cannot be compared user by user."""
    prints = [Catalog(run.config.data.catalog, verify="size").manifest.fingerprint for run in (run_ref, other)]
    if prints[0] != prints[1]:
        raise InputError(
            f"{run_ref.uri} was trained on {run_ref.config.data.catalog}, {other.uri} on another catalog, "
            f"{other.config.data.catalog}, so their users differ; give two runs on one catalog"
        )


def evaluate_run(
    comm: Communicator, graphs: Graphs | None, run_ref: RunRef, split: str, users: int | None, candidates: int | None
) -> dict:
    """Work of each rank."""
    run = load_run(run_ref, comm, graphs)
    reranked = {} if candidates is None else {"rerank": rerank(run, split, candidates, users)}
    return run.evaluate(split, users) | reranked


def compare_runs(
    comm: Communicator, graphs: Graphs | None, run_ref: RunRef, other: RunRef, split: str, users: int | None
) -> dict:
    """Work of each rank with --against."""
    run = load_run(run_ref, comm, graphs)
    metrics, ours = run.evaluate(split, users), run.metrics_by_user(split, users)
    # the shared graphs are those that the first run's network uses, so the other run reads its own
    theirs = load_run(other, comm).metrics_by_user(split, users)
    return {**metrics, "against": {"run": other.uri, **paired_bootstrap(ours, theirs)}}


if __name__ == "__main__":
    run_command(main)
