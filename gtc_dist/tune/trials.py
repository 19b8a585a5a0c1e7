"""Trials of a search over settings, as Ray Tune runs them.

Each is a run of one rank, which ASHA stops where others were better after as many epochs (Li et al. 2020, "A System for
Massively Parallel Hyperparameter Tuning"). A trial's run folder is an ordinary one.

The settings of the trials are drawn from the seed alone, in order, so the same command draws them again after an
interruption. A trial that had ended then reports what trial.json holds, which is written when it ends; one that had
begun resumes from its newest training state. Ray Tune's own state, which is pickled, is never read.
"""

import logging
import os
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")  # a trial's run folder has its own logs
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # a table at the start, whatever `verbose` says

import torch
import yaml
from ray import tune
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search import BasicVariantGenerator

from gtc_dist.checkpoint.run_folder import CONFIG_FILE, RAY_FOLDER
from gtc_dist.config import Config
from gtc_dist.data import storage
from gtc_dist.data.catalog import Catalog
from gtc_dist.distributed.collectives import Communicator
from gtc_dist.errors import find_shown
from gtc_dist.graph.csc import Graphs
from gtc_dist.launch.rank_memory import keep_memory
from gtc_dist.training.trainer import Trainer
from gtc_dist.tune.search_space import Parameter, SearchSpace, with_settings

VALUE, EPOCH = "best", "epoch"  # keys of a report: the best value so far of eval.metric on valid, and the epoch
TRAINED = "finished"  # key of the last report of a trial that trained to its end
TRIAL_FILE = "trial.json"  # in the run folder of a trial that ended


@dataclass
class Trial:
    """A trial and its outcome.

    reports: epoch and best value of eval.metric on valid so far, of each validation.
    status: finished, stopped (by ASHA) or failed.
    """

    name: str
    settings: dict[str, Any]
    reports: list[dict[str, float]] = field(default_factory=list)
    status: Literal["finished", "stopped", "failed"] = "failed"

    @property
    def value(self) -> float | None:
        """Best value of eval.metric on valid; None where the trial was never validated."""
        return self.reports[-1][VALUE] if self.reports else None


def search(config: Config, space: SearchSpace, graphs: Graphs, folder: str) -> list[Trial]:
    """Run the trials of a search, or those that are left of an interrupted one; returns all of them, best first.

    Args:
        graphs: of the catalog; the trials on a node share one copy.
        folder: URI of the search; each trial's run folder is in it.
    """
    cluster, ray_folder = config.cluster, storage.join(folder, RAY_FOLDER)
    storage.remove_tree(ray_folder)
    filesystem, path = storage.arrow_filesystem(folder)
    trainable = tune.with_parameters(run_trial, base=config, folder=folder, graphs=graphs)
    resources = {"cpu": cluster.cpus_per_worker or 1, "gpu": 1 if cluster.gpu else 0}
    records = Records(folder, space.trials, config.eval.metric)
    tuner = tune.Tuner(
        tune.with_resources(trainable, resources),
        param_space={key: domain(parameter) for key, parameter in space.parameters.items()},
        tune_config=tune.TuneConfig(
            metric=VALUE,
            mode="max",
            scheduler=ASHAScheduler(
                EPOCH, max_t=config.train.epochs + 1, grace_period=space.first_epochs, reduction_factor=space.factor
            ),
            search_alg=BasicVariantGenerator(random_state=config.train.seed),
            num_samples=space.trials,
            reuse_actors=False,  # a trial that was stopped may be in a step
            trial_dirname_creator=lambda trial: trial_name(trial.trial_id),
        ),
        run_config=tune.RunConfig(
            name=RAY_FOLDER, storage_path=path, storage_filesystem=filesystem, callbacks=[records], verbose=0
        ),
    )
    logging.getLogger("ray.tune.analysis.experiment_analysis").setLevel(logging.ERROR)  # misses files that are off
    tuner.fit()
    storage.remove_tree(ray_folder)
    found = list(records.trials.values())
    return sorted(found, key=lambda trial: (trial.value is None, -(trial.value or 0.0), trial.name))


def run_trial(settings: dict[str, Any], base: Config, folder: str, graphs: Graphs) -> None:
    """A trial, in a process of its own: train its settings on one rank, and report every validation."""
    logging.disable(logging.INFO)
    name = trial_name(tune.get_context().get_trial_id())
    run = storage.join(folder, name)
    if ended := read_trial(run):
        for report in ended.reports:
            tune.report(report)
        return
    config = with_settings(base, {**settings, "run.storage": folder, "run.name": name}, name)
    storage.write_bytes(storage.join(run, CONFIG_FILE), yaml.safe_dump(config.model_dump(), sort_keys=False).encode())
    torch.set_num_threads(config.cluster.threads or max(1, int(config.cluster.cpus_per_worker or 1)))
    keep_memory()
    device = torch.device("cuda", 0) if config.cluster.gpu else torch.device("cpu")
    catalog, comm = Catalog(config.data.catalog), Communicator(device=device)
    users, items = catalog.interactions("train")
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):  # trials side by side would mix their lines
        trainer = Trainer(config, catalog, run, users, items, used_graphs(graphs, config), comm, report=tune.report)
        trainer.fit()
    at = trainer.state.progress
    tune.report({EPOCH: at.epoch - 1, VALUE: at.best, TRAINED: True})


def used_graphs(graphs: Graphs, config: Config) -> Graphs:
    """Those of a catalog's graphs that a configuration uses."""
    item_item = graphs.item_item if config.model.item_hop else None
    user_user = graphs.user_user if config.model.user_hop else None
    return replace(graphs, item_item=item_item, user_user=user_user)


def domain(parameter: Parameter):
    """Ray Tune's form of a parameter."""
    match parameter.kind:
        case "choice":
            return tune.choice(parameter.values)
        case "uniform":
            return tune.uniform(*parameter.values)
        case "log_uniform":
            return tune.loguniform(*parameter.values)
        case "integer":
            return tune.randint(parameter.values[0], parameter.values[1] + 1)


def trial_name(trial_id: str) -> str:
    """Name of the run of a trial, by its number in the search, from Ray Tune's id such as 9c1f2_00003."""
    return f"trial-{trial_id.rpartition('_')[2]}"


def read_trial(run: str) -> Trial | None:
    """A trial that ended, from its run folder."""
    uri = storage.join(run, TRIAL_FILE)
    return Trial(**storage.read_json(uri)) if storage.exists(uri) else None


class Records(tune.Callback):
    """Keeps what the trials report, writes trial.json when one ends, and prints a line."""

    def __init__(self, folder: str, count: int, metric: str):
        self.folder, self.count, self.metric = folder, count, metric
        self.trials: dict[str, Trial] = {}
        self.ended = 0

    def on_trial_start(self, iteration: int, trials: list, trial, **info) -> None:
        name = trial_name(trial.trial_id)
        self.trials[name] = read_trial(storage.join(self.folder, name)) or Trial(name, dict(trial.config))

    def on_trial_result(self, iteration: int, trials: list, trial, result: dict, **info) -> None:
        found = self.trials[trial_name(trial.trial_id)]
        if found.status == "failed":  # not ended before
            found.reports.append({EPOCH: result[EPOCH], VALUE: result[VALUE]})
            if result.get(TRAINED):
                found.status = "finished"

    def on_trial_complete(self, iteration: int, trials: list, trial, **info) -> None:
        found = self.trials[trial_name(trial.trial_id)]
        if found.status == "failed":
            found.status = "stopped"
        storage.write_json(storage.join(self.folder, found.name, TRIAL_FILE), asdict(found))
        self._print(found, f"{self.metric} {found.value:.4f} after epoch {found.reports[-1][EPOCH]}")

    def on_trial_error(self, iteration: int, trials: list, trial, **info) -> None:
        error = trial.get_error()
        shortest = find_shown(error) or (str(error).strip().splitlines() or ["no message"])[-1]
        self._print(self.trials[trial_name(trial.trial_id)], str(shortest))

    def _print(self, found: Trial, text: str) -> None:
        self.ended += 1
        best = max((trial.value for trial in self.trials.values() if trial.value is not None), default=0.0)
        print(
            f"[{self.ended}/{self.count}] {found.name} {found.status}: {text}; best so far {best:.4f}; "
            f"{as_overrides(found.settings)}",
            flush=True,
        )


def as_overrides(settings: dict[str, Any]) -> str:
    """Settings as overrides of the command line."""
    texts = {key: f"{value:.4g}" if isinstance(value, float) else value for key, value in settings.items()}
    return " ".join(f"{key}={text}" for key, text in texts.items())
