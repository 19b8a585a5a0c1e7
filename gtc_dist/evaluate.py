"""Command: a run and a split to metrics.

    python -m gtc_dist.evaluate --run RUN [--split valid|test] [--users N] [--workers N]

Prints one JSON object: Recall, NDCG, Precision, HitRate and MRR at 5, 10, 20 and 50, overall and for cold items (no
train interaction), and the number of users. Runs in this process, without a cluster, or with --workers on so many ranks
of the cluster, each with its share of everything that grows with the catalog.
"""

import argparse
import functools
import json

from gtc_dist.engine.restore import Found, find, restore
from gtc_dist.errors import run_command
from gtc_dist.finished import parse_run_command, run_on
from gtc_dist.graph.csc import Graphs
from gtc_dist.model.collectives import World


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Score a run's best checkpoint by full ranking.")
    parser.add_argument("--split", choices=("valid", "test"), default="test")
    parser.add_argument("--users", type=int, help="rank about so many users, 0 for all (default: the run's eval.users)")
    args = parse_run_command(parser, argv)

    found = find(args.run)
    users = found.config.eval.users if args.users is None else args.users or None
    metrics = run_on(args, found, functools.partial(score, split=args.split, users=users))
    print(json.dumps({"split": args.split, **metrics}))


def score(world: World, graphs: Graphs | None, found: Found, split: str, users: int | None) -> dict:
    """What each rank does."""
    return restore(found, world, graphs).evaluate(split, users)


if __name__ == "__main__":
    run_command(main)
