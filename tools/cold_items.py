"""What a run makes of cold items, beside what content alone makes of them, and what more of them would cost.

    python tools/cold_items.py --run RUN [--split valid] [--users N] [--threads N]

Prints Recall@20 on cold items (no train interaction) and on warm ones, in one ranking of all items, and how many of the
20 are cold:

    random     every order alike
    content    the mean cosine of an item's content to that of the user's items, centred, for each modality and all
    nearest    the run's embeddings, but of a cold item the mean of those of its nearest warm ones by content
    as chosen  the run's embeddings; and with the rows of cold items longer or shorter by steps of a tenth (than what
               content tells of them, where none was chosen to be listed). How long they are was chosen on the valid
               split, by what eval.cold_loss lets them cost warm items.
"""

import argparse
from dataclasses import replace

import numpy as np
import torch

from gtc_dist.data.catalog import CSC
from gtc_dist.errors import InputError, run_command
from gtc_dist.evaluation import ranking
from gtc_dist.hybrid.cold_start import NORM_SCALE
from gtc_dist.hybrid.content_profile import ContentMap
from gtc_dist.hybrid.coordinate_search import Embeddings
from gtc_dist.inference.layerwise import ShardedSpMM
from gtc_dist.inference.trained_run import TrainedRun, find_run, load_run

TOP = 20
STEPS = range(-2, 7)  # of a tenth


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True, help="URI of the run folder: run.storage/run.name")
    parser.add_argument("--split", choices=("valid", "test"), default="test")
    parser.add_argument("--users", type=int, help="rank about so many users (default: all)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args(argv)

    torch.set_num_threads(args.threads)
    run = load_run(find_run(args.run))
    cold = run.final.cold
    if cold is None or not run.features:
        raise InputError(f"{args.run} was trained without content, so there is nothing to know cold items by")
    if not cold.cold.any():
        raise InputError(f"{run.config.data.catalog} has no cold item")
    truth = ranking.load_ground_truth(run.catalog, args.split)
    print("| scores | Recall@20, cold items | Recall@20, warm items | cold items among 20 |")
    print("| --- | --- | --- | --- |")
    share = TOP / run.catalog.items
    print(f"| random | {share:.4f} | {share:.4f} | {share * cold.cold.sum():.2f} |")
    names = list(run.features)
    for chosen in [[name] for name in names] + ([names] if len(names) > 1 else []):
        show(f"content, {' and '.join(chosen)}", run, content_scores(run, chosen), truth, args.users)
    chosen, blended = cold.weights[NORM_SCALE], run.blended()
    if cold.neighbours is not None:
        users, items = blended
        show("nearest", run, (users, cold.neighbours.filled(items)), truth, args.users)
    lifts = {"without cold items in the lists": 0.0, "**as chosen**": chosen}
    for step in STEPS:
        if step or not chosen:
            lifts[f"cold items' rows {1.1**step:.2f} as long"] = (chosen or 1.0) * 1.1**step
    for name, lift in lifts.items():
        cold.weights[NORM_SCALE] = lift
        show(name, run, run.final.filled(blended), truth, args.users)


def show(name: str, run: TrainedRun, pair: Embeddings, truth: CSC, users: int | None) -> None:
    """One line of the table."""
    options = replace(run.ranking_options(users), seed=0)
    mine = ranking.ranked_users(pair[0], run.graphs, truth, options)
    top, _ = ranking.top_k_items(*pair, run.graphs, mine, max(ranking.K_VALUES), options)
    is_cold = run.graphs.item_degree == 0
    cells = []
    for counted in (is_cold, ~is_cold):
        recall = ranking.metrics_of_lists_on_items(top, mine, truth, counted)[f"recall@{TOP}"]
        cells.append(f"{recall.mean():.4f} ({len(recall):,} users)" if len(recall) else "-")
    listed = top[:, :TOP]
    cells.append(f"{(is_cold[np.maximum(listed, 0)] & (listed >= 0)).sum(1).mean():.2f}")
    print(f"| {name} | {' | '.join(cells)} |", flush=True)


def content_scores(run: TrainedRun, names: list[str]) -> Embeddings:
    """Embeddings whose dot product is the mean cosine of an item's content to that of the user's items."""
    users, items, graphs = run.tables.user, run.tables.item, run.graphs
    units = [ContentMap.of(table, table.width).apply(table.weight) for table in (run.features[n] for n in names)]
    items = items.holding(torch.cat(units, dim=1))
    own = ShardedSpMM(graphs.nodes.indptr, graphs.nodes.indices, None, 0, users, items, 1 << 14, base=graphs.users)
    return users.holding(torch.cat([rows for _, _, rows in own.sums(items)])), items


if __name__ == "__main__":
    run_command(main)
