"""Command: search over settings.

    python -m gtc_dist.tune --config mine.yaml --space configs/tune/default.yaml [a.b=c ...]

Trains as many settings as the space says, each on one rank, as many at a time as the cluster has room for, and stops
those early that are worse than others after as many epochs (ASHA). `eval.metric` on the valid split decides; the test
split does not enter. Joins the Ray cluster of RAY_ADDRESS, otherwise starts a local one.

The folder run.storage/run.name gets a run folder for each trial (TensorBoard on the folder shows them side by side),
tune.json with all results, and best.yaml, the configuration of the best trial. Rerun the same command to go on with an
interrupted search.
"""

import argparse
import json
import sys
from dataclasses import asdict

import yaml

from gtc_dist.checkpoint.run_folder import LOCK_FILE
from gtc_dist.config import Config
from gtc_dist.config_file import parse_command_line
from gtc_dist.data import storage
from gtc_dist.data.catalog import MANIFEST, Catalog
from gtc_dist.errors import InputError
from gtc_dist.graph.csc import Graphs
from gtc_dist.launch.run_lock import hold_run_lock
from gtc_dist.train import check_earlier_run, check_modalities, checked_graphs, open_for_training
from gtc_dist.tune.search_space import SearchSpace, read_space, with_settings

SEARCH_FILE = "search.json"  # what was asked for
RESULTS_FILE = "tune.json"
BEST_FILE = "best.yaml"
LISTED_TRIALS = 5  # trials in the table


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--space", required=True, help="YAML file of what varies, see configs/tune/")
    config, args = parse_command_line(parser, argv)
    space = read_space(args.space, config)
    check_search(config, space)
    config, catalog, folder = open_for_training(config)
    begun, results = was_begun(folder, config, space, catalog), storage.join(folder, RESULTS_FILE)
    if not begun or not storage.exists(results):
        graphs = graphs_of_trials(config, space, catalog, folder)
        with hold_run_lock(folder):
            storage.write_json(storage.join(folder, SEARCH_FILE), asked_for(config, space, catalog))
            run_search(config, space, graphs, folder, begun)
    print(table(storage.read_json(results), folder))
    return 0


def check_search(config: Config, space: SearchSpace) -> None:
    """Raises InputError for what a search cannot do."""
    if config.cluster.workers > 1 or config.cluster.min_workers:
        raise InputError("a trial trains on one rank, and trials run side by side: set cluster.workers=1")
    if config.train.final_fit:
        raise InputError("train.final_fit takes its settings from a run, so there is nothing to search; leave it out")
    if space.first_epochs > config.train.epochs:
        raise InputError(f"first_epochs is {space.first_epochs}, above train.epochs {config.train.epochs}")


def graphs_of_trials(config: Config, space: SearchSpace, catalog: Catalog, folder: str) -> Graphs:
    """All graphs that a trial may use. Raises InputError where the catalog, or the run of train.init_from, does not
    serve one."""
    trials = [config, *(with_settings(config, settings, "search space") for settings in space.extremes())]
    for trial in trials:
        check_modalities(trial, catalog)
        check_earlier_run(trial, catalog, folder)
    hops = {name: any(getattr(trial.model, name) for trial in trials) for name in ("item_hop", "user_hop")}
    together = with_settings(config, {f"model.{name}": used for name, used in hops.items()}, "search space")
    return checked_graphs(together, catalog)


def asked_for(config: Config, space: SearchSpace, catalog: Catalog) -> dict:
    """What identifies a search."""
    tree = config.model_dump(exclude={"cluster", "prepare"})
    return {"catalog": catalog.manifest.fingerprint, "space": space.model_dump(), "config": tree}


def was_begun(folder: str, config: Config, space: SearchSpace, catalog: Catalog) -> bool:
    """Whether this search was begun before. Raises InputError if the folder holds anything else."""
    uri = storage.join(folder, SEARCH_FILE)
    if not storage.exists(uri):
        if names := sorted(storage.listing(folder).keys() - {LOCK_FILE}):
            raise InputError(f"{folder} holds other files, such as {names[0]}; choose another run.name")
        return False
    if storage.read_json(uri) != json.loads(json.dumps(asked_for(config, space, catalog))):
        raise InputError(
            f"{folder} is a search with another configuration, space or catalog; choose another run.name, or repeat "
            "the command that began it"
        )
    return True


def run_search(config: Config, space: SearchSpace, graphs: Graphs, folder: str, begun: bool) -> None:
    """Run the trials, and write the configuration of the best one and all results.

    Raises:
        InputError: a trial failed. The others are done; the same command tries the failed ones again.
    """
    print(
        f"{'going on with' if begun else 'starting'} a search of {space.trials} trials; starting Ray", file=sys.stderr
    )
    from gtc_dist.launch import ray_cluster  # slow to import: the errors above show at once
    from gtc_dist.preflight import node_checks, room
    from gtc_dist.tune import trials

    ray_cluster.connect(dashboard=True, shared_bytes=graphs.bytes)
    room.room_for_ranks(config.cluster)
    catalog = storage.join(config.data.catalog, MANIFEST)
    node_checks.check_nodes({"run.storage": storage.join(folder, LOCK_FILE), "data.catalog": catalog})
    found = trials.search(config, space, graphs, folder)
    if failed := [trial.name for trial in found if trial.status == "failed"]:
        raise InputError(
            f"{len(failed)} of {space.trials} trials failed ({', '.join(failed)}), see above; the same command tries "
            "them again and keeps the others"
        )
    best = with_settings(config, {**found[0].settings, "run.name": f"{config.run.name}-best"}, "best trial")
    text = yaml.safe_dump(best.model_dump(), sort_keys=False)
    storage.write_bytes(storage.join(folder, BEST_FILE), text.encode())
    results = [
        asdict(trial) | {"value": trial.value, "overrides": trials.as_overrides(trial.settings)} for trial in found
    ]
    storage.write_json(storage.join(folder, RESULTS_FILE), {"metric": config.eval.metric, "trials": results})


def table(results: dict, folder: str) -> str:
    """The best trials of tune.json, and what to do next."""
    found = results["trials"]
    lines = [f"{results['metric']} on valid, {len(found)} trials:"]
    for trial in found[:LISTED_TRIALS]:
        lines.append(f"  {trial['value']:.4f}  {trial['name']}  {trial['status']:<8}  {trial['overrides']}")
    if found[0]["status"] == "finished":
        lines.append(f"the best is a finished run: {storage.join(folder, found[0]['name'])}")
    lines.append(f"its configuration, to train it again: {storage.join(folder, BEST_FILE)}")
    return "\n".join(lines)
