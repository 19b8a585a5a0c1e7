"""Command: a run and a split to metrics.

    python -m gtc_dist.evaluate --run RUN [--split valid|test]

Prints one JSON object: Recall, NDCG, Precision, HitRate and MRR at 5, 10, 20 and 50, overall and for cold items (no
train interaction), and the number of users. Runs in this process, without a cluster.
"""

import argparse
import json

import torch

from gtc_dist.engine import ranking
from gtc_dist.engine.restore import restore
from gtc_dist.errors import run_command


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Score a run's best checkpoint by full ranking.")
    parser.add_argument("--run", required=True, help="URI of the run folder: run.storage/run.name")
    parser.add_argument("--split", choices=("valid", "test"), default="test")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="torch threads")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)

    run = restore(args.run)
    truth = ranking.split_truth(run.catalog.interactions(args.split), run.catalog.users)
    blocks = (run.config.eval.item_block, run.config.eval.user_block)
    metrics = ranking.evaluate(*run.embed(), run.graphs, truth, *blocks)
    print(json.dumps({"split": args.split, **metrics}))


if __name__ == "__main__":
    run_command(main)
