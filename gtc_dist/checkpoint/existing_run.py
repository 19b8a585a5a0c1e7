"""Look up an existing run: its status when training starts in its folder, and its best checkpoint for later commands.

Only small files are read; the weights are loaded by inference/trained_run.py.
"""

import posixpath
from dataclasses import dataclass, field
from typing import Literal

from gtc_dist.checkpoint import checkpoint_files
from gtc_dist.checkpoint.run_folder import (
    CHECKPOINT_FOLDER,
    CONFIG_FILE,
    EPOCH_PREFIX,
    LOCK_FILE,
    METRICS_FILE,
    REFRESH_FILES,
    STEP_PREFIX,
)
from gtc_dist.config import Config
from gtc_dist.config_file import read_run_config
from gtc_dist.config_upgrade import flatten_keys
from gtc_dist.data import storage
from gtc_dist.data.catalog import MANIFEST, Catalog
from gtc_dist.errors import InputError

# Configuration keys (prefixes) that may change when a run is resumed. They do not affect the learned weights, or, like
# train.clip_norm and train.not_finite, are needed to get past a step whose loss was not finite. The catalog's own keys
# (data.*) and a catalog that moved are covered by its fingerprint; prepare.* affects only memory and disk.
RESUMABLE_KEYS = (
    "cluster.",
    "prepare.",
    "run.",
    "data.raw",
    "data.catalog",
    "data.verify",
    "data.interactions.",
    "data.split.",
    "data.features",
    "data.items",
    "train.epochs",
    "model.sampler_device",
    "train.init_from",
    "train.not_finite",
    "train.clip_norm",
    "train.log_every",
    "train.checkpoint_minutes",
    "eval.patience",
    "eval.block_rows",
)


@dataclass(frozen=True)
class RunRef:
    """Reference to a run and its best checkpoint; both were checked against the catalog."""

    uri: str
    checkpoint: str  # relative to the run folder
    epoch: int
    config: Config
    trained_on: dict[str, int] = field(default_factory=dict)  # split -> interactions of it, beside train, in training


def run_status(config: Config, run: str, fingerprint: str) -> Literal["new", "begun", "finished"]:
    """Status of the run folder `run` for a training with `config`.

    Args:
        fingerprint: of the catalog.

    Raises:
        InputError: the folder holds foreign files, or a run with another configuration or catalog.
    """
    found = storage.listing(run).keys() - {LOCK_FILE}
    if not found:
        return "new"
    if found & set(REFRESH_FILES):
        raise InputError(
            f"{run} holds embeddings of gtc refresh; choose another run.name (train.init_from may be {run})"
        )
    if CONFIG_FILE not in found:
        raise InputError(f"the run folder {run} is not empty; choose another run.name, or remove it")
    path = storage.join(run, CONFIG_FILE)
    before = read_run_config(storage.read_bytes(path), path)
    changed = differences(before, config)
    if changed:
        shown = "; ".join(f"{key}: {old!r} there, {new!r} here" for key, (old, new) in list(changed.items())[:5])
        raise InputError(
            f"{run} holds a run with another configuration ({shown}); choose another run.name, or remove it"
        )
    for prefix in (EPOCH_PREFIX, STEP_PREFIX):
        for name in checkpoint_files.list_checkpoints(run, prefix)[0]:
            manifest = checkpoint_files.read_manifest(storage.join(run, CHECKPOINT_FOLDER, name))
            if manifest.get("catalog") != fingerprint:
                raise InputError(
                    f"{config.data.catalog} is not the catalog that the run {run} was started on, or was rebuilt "
                    "since; name its own in data.catalog, or choose another run.name"
                )
    same_length = (before.train.epochs, before.eval.patience) == (config.train.epochs, config.eval.patience)
    return "finished" if METRICS_FILE in found and same_length else "begun"


def differences(before: Config, now: Config) -> dict[str, tuple]:
    """Keys that differ and may not change on resume, with both values."""
    old, new = (flatten_keys(config.model_dump()) for config in (before, now))
    keys = [key for key in dict.fromkeys([*old, *new]) if not key.startswith(RESUMABLE_KEYS)]
    return {key: (old.get(key), new.get(key)) for key in keys if old.get(key) != new.get(key)}


def find_run(uri: str, catalog_uri: str | None = None, verify: str | None = None) -> RunRef:
    """Find a run and check that it matches its catalog.

    Args:
        catalog_uri: where the catalog is now; None: where it was, or, if nothing is there and the run has moved, in the
            same place relative to the run.
        verify: as of `Catalog`; None: data.verify of the run.

    Raises:
        InputError: no run at `uri`, no complete checkpoint in it, or a catalog that is missing or was rebuilt.
    """
    path = storage.join(uri, CONFIG_FILE)
    if not storage.exists(path):
        raise InputError(f"{uri} holds no run (no {CONFIG_FILE}); give run.storage/run.name of a training")
    config = with_catalog(read_run_config(storage.read_bytes(path), path), uri, catalog_uri)
    name = best_checkpoint(uri)
    manifest = checkpoint_files.read_manifest(storage.join(uri, name))
    catalog = Catalog(config.data.catalog, verify=verify or config.data.verify)
    if catalog.manifest.fingerprint != manifest["catalog"]:
        raise InputError(
            f"{config.data.catalog} is not the catalog that the run {uri} was trained on, or was rebuilt since; name "
            "its own with --catalog, or train again"
        )
    if config.train.final_fit is not None and not storage.exists(storage.join(uri, METRICS_FILE)):
        raise InputError(f"{uri} is a final fit that has not ended; train it to its end first")
    more = {split: catalog.manifest.interactions[split] for split in config.train_splits if split != "train"}
    more |= manifest.get("trained_on", {})
    return RunRef(storage.absolute(uri), name, manifest["epoch"], config, more)  # ranks work in other folders


def with_catalog(config: Config, run: str, catalog_uri: str | None = None) -> Config:
    """A run's configuration with the catalog's present place; arguments as in `find_run`.

    Raises:
        InputError: the catalog is neither where it was nor beside a run that has moved.
    """
    recorded = config.data.catalog
    if catalog_uri is None and not _has_catalog(recorded):
        catalog_uri = _beside(run, config)
        if catalog_uri is None or not _has_catalog(catalog_uri):
            raise InputError(
                f"the catalog {recorded} of run {run} does not exist; if it has moved, name its place with --catalog"
            )
    if catalog_uri is None:
        return config
    data = config.data.model_copy(update={"catalog": storage.absolute(catalog_uri)})
    return config.model_copy(update={"data": data})


def _has_catalog(uri: str) -> bool:
    """Whether a catalog is there; False also for a place that this machine may not read."""
    try:
        return storage.exists(storage.join(uri, MANIFEST))
    except (InputError, OSError):
        return False


def _beside(run: str, config: Config) -> str | None:
    """Where the catalog is if it has kept its place relative to the run; None: that would be in another bucket."""
    from_run = posixpath.relpath(_path(config.data.catalog), _path(storage.join(config.run.storage, config.run.name)))
    scheme, separator, path = storage.absolute(run).rpartition("://")
    found = posixpath.normpath(posixpath.join(path, from_run))
    if separator and found.partition("/")[0] != path.partition("/")[0]:
        return None
    return f"{scheme}{separator}{found}"


def _path(uri: str) -> str:
    """A URI without its scheme."""
    return storage.absolute(uri).rpartition("://")[2]


def best_checkpoint(run: str) -> str:
    """Best checkpoint of a run, relative to it: the one in metrics.json, or during training the last complete one."""
    if storage.exists(storage.join(run, METRICS_FILE)):
        return storage.read_json(storage.join(run, METRICS_FILE))["checkpoint"]
    complete, _ = checkpoint_files.list_checkpoints(run, EPOCH_PREFIX)
    if not complete:
        raise InputError(f"{run} has no complete checkpoint yet")
    return f"{CHECKPOINT_FOLDER}/{complete[-1]}"
