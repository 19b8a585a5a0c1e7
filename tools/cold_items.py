"""Compare a run's predictions for cold-start items with baselines, and show the cost of recommending more of them.

    python tools/cold_items.py --run RUN [--split valid] [--users N] [--threads N]

Ranks all items together and prints Recall@20 on cold items (no train interaction) and on warm ones, and the mean number
of cold items among the 20; and ranks cold items alone and prints Recall@20 on them:

    random     a random order
    content    mean cosine of an item's content with the content of the user's items, centred; per modality and for all
    nearest    the run's embeddings, with the mean embedding of the nearest warm items by content for cold items
    as tuned   the run's final embeddings; then the same with other offsets of the cold items' scores. The offset was
               tuned on the valid split: the largest one within the drop that eval.cold_loss allows for warm items.
               Without score fusion: factors instead of offsets.
"""

import argparse
from dataclasses import replace

import numpy as np
import torch

from gtc_dist.checkpoint.existing_run import find_run
from gtc_dist.data.catalog import CSC
from gtc_dist.distributed.sharded_spmm import ShardedSpMM
from gtc_dist.errors import InputError, run_command
from gtc_dist.evaluation import ranking
from gtc_dist.evaluation.metrics import K_VALUES, metrics_of_lists
from gtc_dist.hybrid.cold_start import NORM_SCALE, OFFSET, WITHOUT
from gtc_dist.hybrid.content_space import ContentSpace
from gtc_dist.hybrid.embeddings import Embeddings
from gtc_dist.inference.trained_run import TrainedRun, load_run

TOP = 20
STEPS = range(-4, 9)
OFFSET_STEP, FACTOR_STEP = 0.1, 1.1
USER_BLOCK = 1024


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True, help="URI of the run folder: run.storage/run.name")
    parser.add_argument("--split", choices=("valid", "test"), default="test")
    parser.add_argument("--users", type=int, help="rank about this many users (default: all)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args(argv)

    torch.set_num_threads(args.threads)
    run = load_run(find_run(args.run))
    cold_start = run.scorer.cold_start
    if cold_start is None or not run.features:
        raise InputError(f"{args.run} was trained without content, so cold items cannot be predicted")
    if not cold_start.cold.any():
        raise InputError(f"{run.config.data.catalog} has no cold item")
    truth = ranking.load_ground_truth(run.catalog, args.split)
    print("| scores | Recall@20, cold items | of cold items alone | Recall@20, warm items | cold items among 20 |")
    print("| --- | --- | --- | --- | --- |")
    share, n_cold = TOP / run.catalog.items, int(cold_start.cold.sum())
    print(f"| random | {share:.4f} | {min(TOP / n_cold, 1):.4f} | {share:.4f} | {share * n_cold:.2f} |")
    names = list(run.features)
    for chosen in [[name] for name in names] + ([names] if len(names) > 1 else []):
        print_row(f"content, {' and '.join(chosen)}", run, content_scores(run, chosen), truth, args.users)
    fused = run.fused_embeddings()
    if cold_start.neighbours is not None:
        users, items = fused
        print_row("nearest", run, Embeddings(users, cold_start.neighbours.impute(items)), truth, args.users)
    tuned = cold_start.weights[NORM_SCALE], cold_start.weights[OFFSET]
    factor, offset = tuned if tuned[0] else (1.0, 0.0)
    adjustments = {"without cold items": WITHOUT, "**as tuned**": tuned}
    by_offset = run.scorer.special_columns(fused.items.width).constant is not None
    for step in STEPS:
        if step == 0 and tuned[0]:
            continue  # as tuned
        if by_offset:
            adjustments[f"scores of cold items {OFFSET_STEP * step:+.1f}"] = factor, offset + OFFSET_STEP * step
        else:
            adjustments[f"scores of cold items x {FACTOR_STEP**step:.2f}"] = factor * FACTOR_STEP**step, 0.0
    for name, adjustment in adjustments.items():
        cold_start.weights[NORM_SCALE], cold_start.weights[OFFSET] = adjustment
        print_row(name, run, run.scorer.impute_cold(fused), truth, args.users)


def print_row(name: str, run: TrainedRun, embeddings: Embeddings, truth: CSC, users: int | None) -> None:
    options = replace(run.ranking_options(users), seed=0)
    rank_users = ranking.ranked_users(embeddings.users, run.graphs, truth, options)
    top, _ = ranking.top_k_items(*embeddings, run.graphs, rank_users, max(K_VALUES), options)
    is_cold = run.graphs.item_degree == 0
    cells = []
    for counted in (is_cold, ~is_cold):
        recall = metrics_of_lists(top, rank_users, truth, counted)[f"recall@{TOP}"]
        cells.append(f"{recall.mean():.4f} ({len(recall):,} users)" if len(recall) else "-")
    alone = metrics_of_lists(best_of(embeddings, is_cold, rank_users), rank_users, truth, is_cold)[f"recall@{TOP}"]
    rows = embeddings.items.weight[torch.from_numpy(is_cold)]
    scored = (rows != rows[:1]).any()  # not all alike, as without cold items
    cells.insert(1, f"{alone.mean():.4f}" if len(alone) and scored else "-")
    listed = top[:, :TOP]
    cells.append(f"{(is_cold[np.maximum(listed, 0)] & (listed >= 0)).sum(1).mean():.2f}")
    print(f"| {name} | {' | '.join(cells)} |", flush=True)


def best_of(embeddings: Embeddings, chosen: np.ndarray, users: np.ndarray) -> np.ndarray:
    """The best items of `chosen`, bool [items], for each of `users`: int64 [n, max(K_VALUES)], -1 where there are no
    more."""
    indexes = np.flatnonzero(chosen)
    items, count = embeddings.items.weight[torch.from_numpy(indexes)], min(max(K_VALUES), len(indexes))
    out = np.full((len(users), max(K_VALUES)), -1)
    for first in range(0, len(users), USER_BLOCK):
        block = torch.from_numpy(users[first : first + USER_BLOCK])
        best = (embeddings.users.weight[block] @ items.T).topk(count, dim=1).indices
        out[first : first + USER_BLOCK, :count] = indexes[best.numpy()]
    return out


def content_scores(run: TrainedRun, names: list[str]) -> Embeddings:
    """Embeddings whose dot product is the mean cosine of an item's content with that of the user's items."""
    users, items, graphs = run.tables.user, run.tables.item, run.graphs
    features = {name: run.features[name] for name in names}
    space = ContentSpace.fit(features, width=max(table.width for table in features.values()))
    content = {name: table.weight for name, table in features.items()}
    items = items.with_values(space.apply(content, missing_as_zero=False))  # as in the content profiles
    to_users = ShardedSpMM(graphs.nodes.indptr, graphs.nodes.indices, None, 0, users, items, 1 << 14, base=graphs.users)
    return Embeddings(users.with_values(torch.cat([rows for _, _, rows in to_users.sums(items)])), items)


if __name__ == "__main__":
    run_command(main)
