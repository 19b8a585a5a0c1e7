"""Command: train a model on a catalog, on one machine or a cluster.

    python -m gtc_dist.train --config configs/X.yaml [a.b=c ...]
    ray job submit --working-dir . -- python -m gtc_dist.train --config configs/X.yaml [a.b=c ...]

Joins the Ray cluster of RAY_ADDRESS or of its own Ray job; otherwise starts a local one. The run folder
run.storage/run.name gets the resolved config.yaml, metrics.jsonl, metrics.json, checkpoints/ and tensorboard/.

Rerun the same command to resume an interrupted run, on any number of ranks. On SIGTERM the training state is saved and
the command exits with status 143, on Ctrl-C with 130.

    python -m gtc_dist.train --replay RUN/not-finite-....npz

recomputes a step whose loss or gradient was not finite, from the file that the run wrote.
"""

import argparse
import json
import sys
from contextlib import suppress

import numpy as np
import yaml

from gtc_dist.checkpoint import checkpoint_files
from gtc_dist.checkpoint.existing_run import run_status
from gtc_dist.checkpoint.run_folder import CONFIG_FILE, EPOCH_PREFIX, LOCK_FILE, METRICS_FILE, STEP_PREFIX
from gtc_dist.config import Config
from gtc_dist.config_file import load_config
from gtc_dist.config_reference import help_text
from gtc_dist.data import storage
from gtc_dist.data.catalog import MANIFEST, Catalog
from gtc_dist.distributed.collectives import Communicator
from gtc_dist.errors import InputError, run_command
from gtc_dist.evaluation.item_groups import HEAD_ITEMS, positive_groups, tuning_positives, valid_head
from gtc_dist.evaluation.metrics import personalisation_lines
from gtc_dist.evaluation.ranking import load_ground_truth
from gtc_dist.final_fit.selection import with_selection
from gtc_dist.graph.csc import Graphs, load_graphs
from gtc_dist.launch.job_paths import refuse_relative_paths
from gtc_dist.launch.run_lock import hold_run_lock
from gtc_dist.tracking.loggers import check_loggers
from gtc_dist.warm_start.earlier_run import find_earlier_run, refuse_trained_interactions

OTHER_RUNS = ("init_from", "final_fit")  # keys of train that name a run
STOPPED = 143  # exit status: 128 + SIGTERM


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    refuse_relative_paths({"--replay": args.replay})
    if args.replay:
        from gtc_dist.training.step_replay import replay_step

        print(json.dumps(replay_step(args.replay), indent=1))
        return 0
    config = load_config(args.config, args.overrides)
    if args.dry_run:
        return describe_without_training(config)
    result = train_or_resume(config)
    run = storage.absolute(storage.join(config.run.storage, config.run.name))
    if result is None:
        print(f"{run}: stopped on SIGTERM, state saved; rerun the same command to resume", file=sys.stderr)
        return STOPPED
    print(summary(run, result))
    return 0


def train_or_resume(config: Config) -> dict | None:
    """Train a run to its end, or go on with it; returns the content of metrics.json, that of a finished run as it is,
    or None if SIGTERM stopped the training early.

    Raises:
        InputError: bad input, before any work.
    """
    config, catalog, run = open_for_training(config)
    if run_status(config, run, catalog.manifest.fingerprint) == "finished":
        result = storage.read_json(storage.join(run, METRICS_FILE))
        stopped_early = result["last_epoch"] < config.train.epochs
        more = f"an eval.patience above {config.eval.patience}" if stopped_early else "more epochs"
        print(f"{run} is finished; choose another run.name to train again, or {more} to continue it", file=sys.stderr)
        return result
    with hold_run_lock(run):
        return start_or_resume(config, catalog, run)


def describe_without_training(config: Config) -> int:
    """Print what the training would take."""
    from gtc_dist.launch import dry_run  # slow to import

    config, catalog, run = open_for_training(config)
    if run_status(config, run, catalog.manifest.fingerprint) == "finished":
        print(f"{run} is finished; there is nothing to train")
    else:
        print(dry_run.describe_training(config, catalog, checked_graphs(config, catalog)))
    return 0


def open_for_training(config: Config) -> tuple[Config, Catalog, str]:
    """The configuration with absolute paths, its catalog, and the run folder. Raises InputError."""
    paths = {"data.catalog": config.data.catalog, "run.storage": config.run.storage}
    refuse_relative_paths(paths | {f"train.{key}": getattr(config.train, key) for key in OTHER_RUNS})
    check_loggers(config.run.loggers)
    config = with_absolute_uris(config)
    catalog = Catalog(config.data.catalog, verify=config.data.verify)
    check_modalities(config, catalog)
    if config.train.final_fit is not None:
        config = with_selection(config, catalog)
    run = storage.join(config.run.storage, config.run.name)
    check_earlier_run(config, catalog, run)
    return config, catalog, run


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line: a configuration with overrides, or --replay alone."""
    parser = argparse.ArgumentParser(
        description="Train GTC on a catalog. Rerun the same command to resume an interrupted run.",
        epilog=help_text("train"),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", help="YAML file, see configs/; required unless --replay is given")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="override of a configuration key")
    parser.add_argument("--dry-run", action="store_true", help="check all, print sizes and time, write nothing")
    parser.add_argument(
        "--replay",
        metavar="FILE",
        help="recompute a step whose loss or gradient was not finite, from the RUN/not-finite-*.npz of a run",
    )
    args = parser.parse_intermixed_args(argv)
    if args.replay and (args.config or args.overrides or args.dry_run):
        parser.error("--replay reads the configuration of the run folder; give it alone")
    if not args.replay and not args.config:
        parser.error("the following arguments are required: --config")
    return args


def start_or_resume(config: Config, catalog: Catalog, run: str) -> dict | None:
    """Start or resume a run; returns the content of metrics.json, or None if SIGTERM stopped it early."""
    # Checked again under the run lock: another command may have started or finished the run since the first check.
    status = run_status(config, run, catalog.manifest.fingerprint)
    graphs = checked_graphs(config, catalog)
    rows = sum(catalog.manifest.interactions[split] for split in config.train_splits)
    resuming = f"; resuming {run}" if status == "begun" else ""
    steps = config.train.epoch_steps or -(-rows // config.train.batch_size)
    print(
        f"{catalog.users:,} users, {catalog.items:,} items, {rows:,} interactions: {steps:,} steps of "
        f"{config.train.batch_size:,} an epoch{resuming}; starting Ray",
        file=sys.stderr,
    )

    from gtc_dist.launch import ray_cluster, ray_train  # slow to import: the errors above show at once
    from gtc_dist.preflight import node_checks, room

    ray_cluster.connect(min(config.cluster.workers, ray_cluster.cores()) + 1, dashboard=True, shared_bytes=graphs.bytes)
    resources = room.room_for_ranks(config.cluster)
    node_checks.check_nodes(
        {"run.storage": storage.join(run, LOCK_FILE), "data.catalog": storage.join(catalog.uri, MANIFEST)}
    )
    print("Ray started; starting the ranks", file=sys.stderr)
    shared = ray_train.share_graphs(graphs)
    del graphs  # the ranks of a node share the one copy in Ray's object store
    storage.remove_tree(storage.join(run, METRICS_FILE))
    storage.write_bytes(storage.join(run, CONFIG_FILE), yaml.safe_dump(config.model_dump(), sort_keys=False).encode())
    try:
        return ray_train.train_on_ray(config, catalog, shared, run, resources)
    except BaseException:
        remove_if_nothing_was_saved(run)
        raise


def checked_graphs(config: Config, catalog: Catalog) -> Graphs:
    """The graphs, after the checks that need them. Raises InputError."""
    graphs = load_graphs(config, catalog)
    check_rows(catalog, graphs)
    check_metric(config, catalog, graphs)
    return graphs


def with_absolute_uris(config: Config) -> Config:
    """Make local paths absolute: workers and later commands run in other folders."""
    data = config.data.model_copy(
        update={"raw": storage.absolute(config.data.raw), "catalog": storage.absolute(config.data.catalog)}
    )
    run = config.run.model_copy(update={"storage": storage.absolute(config.run.storage)})
    config = config.model_copy(update={"data": data, "run": run})
    others = {key: uri and storage.absolute(uri) for key in OTHER_RUNS for uri in [getattr(config.train, key)]}
    return config.model_copy(update={"train": config.train.model_copy(update=others)})


def check_modalities(config: Config, catalog: Catalog) -> None:
    """Check, from the manifest alone, that the catalog has a modality that the network can use."""
    if not catalog.modalities(config.model.modalities):
        raise InputError(f"the catalog {catalog.uri} has no modality; GTC needs at least one (data.features)")


def check_earlier_run(config: Config, catalog: Catalog, run: str) -> None:
    """Check the run that `train.init_from` names, unless `run` goes on from its own state. Raises InputError."""
    if config.train.init_from and not checkpoint_files.list_checkpoints(run, STEP_PREFIX)[0]:
        refuse_trained_interactions(find_earlier_run(config.train.init_from, config, catalog), catalog)


def check_rows(catalog: Catalog, graphs: Graphs) -> None:
    """Check that every split can be ranked, and that every user has a negative item."""
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
            f"user {user!r} interacted with all {graphs.items} items in train, which leaves no negative item to rank "
            "them against"
        )


def check_metric(config: Config, catalog: Catalog, graphs: Graphs) -> None:
    """Check that the valid split has a positive that `eval.metric` counts: without one, no epoch would be better than
    the first."""
    if "/" not in config.eval.metric:
        return
    valid = load_ground_truth(catalog, "valid")
    head = valid_head(valid, catalog.items, HEAD_ITEMS, Communicator())
    _, positives = tuning_positives(config.eval.metric, positive_groups(graphs, head))
    ranked = np.repeat(graphs.user_degree > 0, valid.degree)
    if positives is not None and not positives[valid.indices[ranked]].any():
        raise InputError(
            f"eval.metric is {config.eval.metric}, but the valid split of the catalog {catalog.uri} has no interaction "
            "that it counts, of a user with a train interaction; choose another metric"
        )


def remove_if_nothing_was_saved(run: str) -> None:
    """Remove the folder of a run that failed before its first checkpoint; it would only block the next try. If the
    storage cannot be listed, everything is kept."""
    with suppress(InputError, OSError):
        if not any(checkpoint_files.list_checkpoints(run, prefix)[0] for prefix in (EPOCH_PREFIX, STEP_PREFIX)):
            storage.remove_tree(run)


def summary(run: str, result: dict) -> str:
    """Content of metrics.json as a table for the terminal; the lines after popularity are about test, too."""
    shown = ("recall@5", "recall@10", "recall@20", "ndcg@5", "ndcg@20")
    lines = [f"run {run}: best epoch {result['best_epoch']} of {result['last_epoch']}, {result['seconds']:.0f} s"]
    if "final_fit" in result:
        lines.append(
            f"trained on train and valid, to be deployed; the metrics are those of {result['final_fit']['selection']}"
        )
    rows = {part: result[part]["overall"] for part in ("valid", "test")} | {"popularity": result["popularity"]}
    for name, values in rows.items():
        lines.append(f"{name:>10}  " + "  ".join(f"{metric} {values[metric]:.4f}" for metric in shown))
    lines += personalisation_lines(result["test"])
    if skipped := result.get("skipped_steps"):
        lines.append(f"warning: {skipped} step(s) skipped, because their loss or gradient was not finite")
    return "\n".join(lines)


if __name__ == "__main__":
    run_command(main)
