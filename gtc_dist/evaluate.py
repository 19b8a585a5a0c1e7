"""Evaluate a trained run's best checkpoint on the valid or test split, by full ranking.

    python -m gtc_dist.evaluate --run RUN [--split valid|test] [--users N] [--head-items K] [--against OTHER]
        [--workers N]

For each user of the split, all items that the user has no train interaction with are ranked. Prints a table of the most
important metrics: on a terminal alone; otherwise on standard error, and standard output gets all metrics as one line of
JSON: Recall, NDCG, Precision, HitRate and MRR at 5, 10, 20 and 50, overall and for cold items (without a train
interaction), and the number of users. The same without the most frequent items of valid ("head_free"), by popularity
("strata"), for one list that is the same for everyone ("mean_list"), and how the lists spread over the items
(evaluation/ranking.py). Runs in this process, without a cluster, or with --workers N on N ranks of the cluster, each of
which loads only its share of everything that grows with the catalog.

--against OTHER, a run on the same catalog: adds the difference of each metric to that run over the same users, with its
standard error and the 95 % confidence interval of a paired bootstrap (evaluation/bootstrap.py): "against" for overall,
"against_head_free" for head_free.
"""

import argparse
import functools
import json
import sys

from gtc_dist.checkpoint.existing_run import RunRef, find_run
from gtc_dist.data.catalog import Catalog
from gtc_dist.distributed.collectives import Communicator
from gtc_dist.errors import InputError, run_command
from gtc_dist.evaluation.bootstrap import paired_bootstrap
from gtc_dist.evaluation.item_groups import HEAD_ITEMS, STRATA
from gtc_dist.graph.csc import Graphs
from gtc_dist.inference.trained_run import load_run
from gtc_dist.launch.job_paths import refuse_relative_paths
from gtc_dist.launch.offline_job import parse_run_command, run_on_ranks_or_here


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--split", choices=("valid", "test"), default="test")
    parser.add_argument(
        "--users", type=int, help="rank about this many users; 0: all (default: eval.users of the run's configuration)"
    )
    parser.add_argument(
        "--head-items",
        type=int,
        default=HEAD_ITEMS,
        metavar="K",
        help="head_free metrics do not count the K most frequent items of valid (default: %(default)s)",
    )
    parser.add_argument("--against", metavar="OTHER", help="URI of another run on the same catalog to compare with")
    args = parse_run_command(parser, argv)
    if args.head_items < 0:
        parser.error("--head-items must not be negative")

    refuse_relative_paths({"--run": args.run, "--against": args.against, "--catalog": args.catalog})
    run_ref = find_run(args.run, args.catalog)
    check_not_trained_on(run_ref, args.split)
    users = run_ref.config.eval.users if args.users is None else args.users or None
    options = {"split": args.split, "users": users, "head_items": args.head_items}
    work = functools.partial(evaluate_run, **options)
    if args.against:
        other = find_run(args.against, args.catalog)
        check_same_catalog(run_ref, other)
        check_not_trained_on(other, args.split)
        if run_ref.trained_on.keys() != other.trained_on.keys():
            raise InputError(f"one of {run_ref.uri} and {other.uri} was trained on more splits; they do not compare")
        work = functools.partial(compare_runs, other=other, **options)
    result = run_on_ranks_or_here(args, run_ref, work)
    more = {"trained_on": ["train", *run_ref.trained_on]} if run_ref.trained_on else {}
    is_terminal = sys.stdout.isatty()
    if not is_terminal:
        print(json.dumps({"split": args.split, **more, **result}), flush=True)
    for line in metric_table(args.split, result) + difference_lines(result):
        print(line, file=sys.stdout if is_terminal else sys.stderr)


def check_not_trained_on(run_ref: RunRef, split: str) -> None:
    """Raises InputError for a split that the run was trained on; says on standard error if it was trained on another
    one beside train."""
    uri, counts = run_ref.uri, run_ref.trained_on
    if count := counts.get(split):
        raise InputError(
            f"{uri} was trained on {count:,} interactions of {split}, so metrics would be of what the run has seen"
        )
    if counts:
        print(
            f"warning: {uri} was trained on interactions of {' and '.join(counts)} beside train; do not compare its "
            "metrics with those of runs that were trained on train alone",
            file=sys.stderr,
        )


def check_same_catalog(run_ref: RunRef, other: RunRef) -> None:
    """Raises InputError for two runs on different catalogs, which cannot be compared user by user."""
    prints = [Catalog(run.config.data.catalog, verify="size").manifest.fingerprint for run in (run_ref, other)]
    if prints[0] != prints[1]:
        raise InputError(
            f"{run_ref.uri} was trained on {run_ref.config.data.catalog}, {other.uri} on another catalog, "
            f"{other.config.data.catalog}, so their users differ; give two runs on one catalog"
        )


def evaluate_run(
    comm: Communicator,
    graphs: Graphs | None,
    run_ref: RunRef,
    split: str,
    users: int | None,
    head_items: int,
) -> dict:
    """Work of each rank."""
    return load_run(run_ref, comm, graphs).evaluate(split, users, head_items)


def compare_runs(
    comm: Communicator,
    graphs: Graphs | None,
    run_ref: RunRef,
    other: RunRef,
    split: str,
    users: int | None,
    head_items: int,
) -> dict:
    """Work of each rank with --against."""
    run = load_run(run_ref, comm, graphs)
    metrics, ours = run.evaluate(split, users, head_items), run.metrics_by_user(split, users, head_items)
    # the shared graphs are those that the first run's network uses, so the other run reads its own
    theirs = load_run(other, comm).metrics_by_user(split, users, head_items)
    difference = {group: paired_bootstrap(ours[group], theirs[group]) for group in ours}
    against = {"run": other.uri, **difference["overall"]}
    return {**metrics, "against": against, "against_head_free": difference["head_free"]}


def metric_table(split: str, result: dict) -> list[str]:
    """Lines for the terminal: metrics by group of items, and of one list that is the same for everyone."""
    shown = ("recall@10", "recall@20", "ndcg@10", "ndcg@20")
    strata = {f"{name} items": (result["strata"][name]["users"], result["strata"][name]) for name in STRATA}
    rows = {
        "overall": (result["users"], result["overall"]),
        "head-free": (result["head_free_users"], result["head_free"]),
        **strata,
        "cold items": (result["cold_users"], result["cold"]),
        "mean list": (result["users"], result["mean_list"]),
    }
    lines = [f"{split:<12}{'users':>11}" + "".join(f"{name:>11}" for name in shown)]
    for name, (users, values) in rows.items():
        cells = (f"{values[metric]:.4f}" if users else "-" for metric in shown)
        lines.append(f"{name:<12}{users:>11,}" + "".join(f"{cell:>11}" for cell in cells))
    return [*lines, "  ".join(f"{name} {result[name]:.4f}" for name in ("coverage@20", "head_share@20"))]


def difference_lines(result: dict) -> list[str]:
    """Lines for the terminal on the differences of --against; none without it."""
    lines = []
    for part, label in (("against", "overall"), ("against_head_free", "head-free")):
        cells = [
            f"{name} {row['difference']:+.4f} ± {row['standard_error']:.4f} [{row['low']:+.4f}, {row['high']:+.4f}]"
            for name in ("recall@20", "ndcg@20")
            if (row := result.get(part, {}).get(name))
        ]
        lines += [f"difference, {label}: " + "  ".join(cells)] if cells else []
    return lines


if __name__ == "__main__":
    run_command(main)
