"""Command: a catalog to a trained run, on one machine or a cluster.

    python -m gtc_dist.train --config configs/X.yaml [a.b=c ...]
    ray job submit --working-dir . -- python -m gtc_dist.train --config configs/X.yaml [a.b=c ...]

Joins the cluster of RAY_ADDRESS or of the job that it runs in, else starts a local one. The run folder
run.storage/run.name gets the resolved config.yaml, metrics.jsonl, metrics.json, checkpoints/ and tensorboard/.

    python -m gtc_dist.train --replay RUN/not-finite-....npz

The same command goes on with a run that was cut off, on any number of ranks. On SIGTERM it saves the state of training
and leaves with status 143.
"""

import argparse
import json
import sys
from contextlib import suppress

import yaml

from gtc_dist.checkpoint import checkpoint_files
from gtc_dist.checkpoint.run_folder import METRICS_FILE, run_status
from gtc_dist.config import Config
from gtc_dist.config_file import parse_command_line
from gtc_dist.data import storage
from gtc_dist.data.catalog import Catalog
from gtc_dist.errors import InputError, run_command
from gtc_dist.graph.csc import Graphs
from gtc_dist.inference.trained_run import CONFIG_FILE
from gtc_dist.launch.run_lock import hold_run_lock
from gtc_dist.model.build import load_graphs, network_shape

LEFT = 143  # exit status: 128 + SIGTERM


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Train GTC on a catalog.")
    parser.add_argument("--replay", metavar="FILE", help="compute a batch again that a run left behind")
    first = argparse.ArgumentParser(add_help=False)
    first.add_argument("--replay")
    replayed, _ = first.parse_known_args(argv)
    if replayed.replay:
        from gtc_dist.training.step_replay import replay_step

        print(json.dumps(replay_step(replayed.replay), indent=1))
        return 0
    config, _ = parse_command_line(parser, argv)
    config = with_absolute_uris(config)
    run = storage.join(config.run.storage, config.run.name)
    catalog = Catalog(config.data.catalog, verify=config.data.verify)
    check(config, catalog)
    if run_status(config, run, catalog.manifest.fingerprint) == "finished":
        result = storage.read_json(storage.join(run, METRICS_FILE))
        stopped = result["last_epoch"] < config.train.epochs  # early
        more = f"an eval.patience above {config.eval.patience}" if stopped else "more epochs"
        print(f"{run} is finished; choose another run.name to train again, or {more} to go on", file=sys.stderr)
        print(summary(run, result))
        return 0
    with hold_run_lock(run):
        result = train(config, catalog, run)
    if result is None:
        print(f"{run} was left as asked; the same command goes on with it", file=sys.stderr)
        return LEFT
    print(summary(run, result))
    return 0


def train(config: Config, catalog: Catalog, run: str) -> dict | None:
    """Begin or go on with a run; returns what metrics.json holds, or None where it was asked to leave before."""
    before = run_status(config, run, catalog.manifest.fingerprint)
    graphs = load_graphs(config, catalog)
    check_rows(catalog, graphs)
    rows = catalog.manifest.interactions["train"]
    going_on = f"; going on with {run}" if before == "begun" else ""
    print(
        f"{catalog.users:,} users, {catalog.items:,} items, {rows:,} interactions{going_on}; starting Ray",
        file=sys.stderr,
    )

    from gtc_dist.launch import (
        ray_cluster,
        ray_train,  # here, so that the errors above show at once
    )

    ray_cluster.connect(min(config.cluster.workers, ray_cluster.cores()) + 1, dashboard=True, shared_bytes=graphs.bytes)
    resources = ray_train.worker_resources(config.cluster)
    shared = ray_train.share_graphs(graphs)
    del graphs  # the ranks of a node share the one copy in Ray's object store
    storage.remove_tree(storage.join(run, METRICS_FILE))
    storage.write_bytes(storage.join(run, CONFIG_FILE), yaml.safe_dump(config.model_dump(), sort_keys=False).encode())
    try:
        return ray_train.train_on_ray(config, catalog, shared, run, resources)
    except BaseException:
        remove_if_nothing_was_saved(run)
        raise


def with_absolute_uris(config: Config) -> Config:
    """Local paths made absolute: workers and later commands run in other folders."""
    data = config.data.model_copy(
        update={"raw": storage.absolute(config.data.raw), "catalog": storage.absolute(config.data.catalog)}
    )
    run = config.run.model_copy(update={"storage": storage.absolute(config.run.storage)})
    return config.model_copy(update={"data": data, "run": run})


def check(config: Config, catalog: Catalog) -> None:
    """What the manifest tells before anything is read."""
    if not network_shape(config, catalog).modalities:
        raise InputError(f"the catalog {catalog.uri} has no modality; GTC needs at least one (data.features)")


def check_rows(catalog: Catalog, graphs: Graphs) -> None:
    """Every split can be ranked, and every user has an item to be ranked below its own."""
    for split in ("valid", "test"):
        if not any((graphs.user_degree[users] > 0).any() for users, _ in catalog.interaction_files(split)):
            raise InputError(
                f"the {split} split of the catalog {catalog.uri} has no user with a train interaction, so nothing can "
                "be scored on it; split in another way (data.split)"
            )
    degree = graphs.user_degree
    if degree.max() >= graphs.items:
        user = catalog.ids("users")[int(degree.argmax())].as_py()
        raise InputError(
            f"user {user!r} interacted with all {graphs.items} items in train: no negative is left to rank them against"
        )


def remove_if_nothing_was_saved(run: str) -> None:
    """A run that failed before its first checkpoint leaves no folder, which would only block the next try. Where the
    storage cannot be asked, everything stays."""
    with suppress(InputError, OSError):
        if not any(checkpoint_files.list_checkpoints(run, prefix)[0] for prefix in ("epoch-", "step-")):
            storage.remove_tree(run)


def summary(run: str, result: dict) -> str:
    """What metrics.json holds, for a person."""
    shown = ("recall@5", "recall@10", "recall@20", "ndcg@5", "ndcg@20")
    lines = [f"run {run}: best epoch {result['best_epoch']} of {result['last_epoch']}, {result['seconds']:.0f} s"]
    rows = {part: result[part]["overall"] for part in ("valid", "test")} | {"popularity": result["popularity"]}
    for name, values in rows.items():
        lines.append(f"{name:>10}  " + "  ".join(f"{metric} {values[metric]:.4f}" for metric in shown))
    if skipped := result.get("skipped_steps"):
        lines.append(f"warning: {skipped} step(s) left out, as their loss or gradient was not finite")
    return "\n".join(lines)


if __name__ == "__main__":
    run_command(main)
