"""How well yesterday's embeddings, refreshed ones and other runs rank a grown catalog.

    python tools/next_day.py --run YESTERDAY --refreshed DIR [--also RUN ...] [--split valid] [--threads N]

DIR is of `gtc refresh`, on the grown catalog; other runs are on it, too. Prints Recall@20 and NDCG@20 of all users,
Recall@20 of the users that YESTERDAY knew, of the others, and on the items that it did not know. Yesterday's embeddings
give users that they lack the mean user, and never list items that they lack; popularity is of the grown catalog.
"""

import argparse

import numpy as np
import torch

from gtc_dist.checkpoint.existing_run import find_run
from gtc_dist.errors import run_command
from gtc_dist.evaluation import ranking
from gtc_dist.hybrid.embeddings import Embeddings
from gtc_dist.inference.trained_run import TrainedRun, load_run
from gtc_dist.warm_start.matched_rows import earlier_rows


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True, help="URI of yesterday's run")
    parser.add_argument("--refreshed", required=True, help="URI of the folder of gtc refresh")
    parser.add_argument("--also", action="append", default=[], metavar="RUN", help="another run on the grown catalog")
    parser.add_argument("--split", choices=("valid", "test"), default="valid")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    before, today = (load_run(find_run(uri)) for uri in (args.run, args.refreshed))
    rows = {k: earlier_rows(before.catalog, today.catalog, k, 0, getattr(today.catalog, k)) for k in ("users", "items")}
    shown = {
        "popularity": ranking.popularity(today.graphs, today.tables.user.comm),
        "yesterday's": yesterday(before, today, rows),
        "refreshed": today.final_embeddings(),
    }
    shown |= {uri.rstrip("/").rpartition("/")[2]: load_run(find_run(uri)).final_embeddings() for uri in args.also}
    print("| embeddings | Recall@20 | NDCG@20 | known users | new users | new items |")
    print("| --- | --- | --- | --- | --- | --- |")
    truth = ranking.load_ground_truth(today.catalog, args.split)
    ranked = np.flatnonzero((truth.degree > 0) & (today.graphs.user_degree > 0))
    is_new, groups = rows["users"][ranked] < 0, {"all": None, "new items": rows["items"] < 0}
    for name, embeddings in shown.items():
        of = ranking.metrics_by_user(*embeddings, today.graphs, truth, today.ranking_options(None), groups)
        recall, ndcg = of["all"]["recall@20"], of["all"]["ndcg@20"]
        parts = (recall, ndcg, recall[~is_new], recall[is_new], of["new items"]["recall@20"])
        print(f"| {name} | " + " | ".join(f"{part.mean():.4f}" for part in parts) + " |")


def yesterday(before: TrainedRun, today: TrainedRun, rows: dict[str, np.ndarray]) -> Embeddings:
    """The earlier run's final embeddings in the order of the grown catalog, with one more column that keeps unknown
    items out of the lists."""
    found = []
    for kind, table in before.final_embeddings()._asdict().items():
        out = torch.zeros(len(rows[kind]), table.width + 1)
        known = torch.from_numpy(rows[kind] >= 0)
        out[known, :-1] = table.weight[torch.from_numpy(rows[kind][rows[kind] >= 0])].float()
        if kind == "users":
            out[~known, :-1] = table.weight[torch.from_numpy(before.graphs.user_degree > 0)].float().mean(0)
            out[:, -1] = 1
        else:
            out[~known, -1] = -1e4
        found.append((today.tables.user if kind == "users" else today.tables.item).with_values(out))
    return Embeddings(*found)


if __name__ == "__main__":
    run_command(main)
