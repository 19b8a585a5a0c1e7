"""What a run folder holds when a training is started in it: nothing, a run to go on with, or a finished one."""

from typing import Literal

from gtc_dist.checkpoint import checkpoint_files
from gtc_dist.config import Config
from gtc_dist.config_file import read_config
from gtc_dist.data import storage
from gtc_dist.errors import InputError
from gtc_dist.inference.trained_run import CONFIG_FILE

# what a run may be continued with another value of: it changes how long, where or how it is watched, not what is
# learnt, or it gets a run beyond a step whose loss was not finite
FREE = (
    "cluster.",
    "dataset",
    "prepare.",
    "graph.",
    "run.",
    "data.raw",
    "data.verify",
    "data.interactions.",
    "data.split.",
    "data.features",
    "data.items",
    "train.epochs",
    "train.not_finite",
    "train.clip_norm",
    "train.log_every",
    "train.prefetch",
    "train.checkpoint.",
    "eval.patience",
    "eval.item_block",
    "eval.user_block",
    "eval.chunk",
)
METRICS_FILE = "metrics.json"
LOCK_FILE = "lease.json"  # of the command that trains (gtc_dist/launch/run_lock.py)


def run_status(config: Config, run: str, fingerprint: str) -> Literal["new", "begun", "finished"]:
    """How far the run at `run` is.

    Args:
        fingerprint: of the catalog.

    Raises:
        InputError: the folder holds something else, or a run with another configuration or catalog.
    """
    found = storage.listing(run).keys() - {LOCK_FILE}
    if not found:
        return "new"
    if CONFIG_FILE not in found:
        raise InputError(f"the run folder {run} is not empty; choose another run.name, or remove it")
    path = storage.join(run, CONFIG_FILE)
    before = read_config(storage.read_bytes(path), path)
    other = differences(before, config)
    if other:
        shown = "; ".join(f"{key}: {there!r} there, {here!r} here" for key, (there, here) in list(other.items())[:5])
        raise InputError(
            f"{run} holds a run with another configuration ({shown}); choose another run.name, or remove it"
        )
    for name in (name for prefix in ("epoch-", "step-") for name in checkpoint_files.list_checkpoints(run, prefix)[0]):
        if (
            checkpoint_files.read_manifest(storage.join(run, checkpoint_files.FOLDER, name)).get("catalog")
            != fingerprint
        ):
            raise InputError(
                f"{config.data.catalog} was rebuilt after the run {run} was begun on it; choose another run.name"
            )
    as_long = (before.train.epochs, before.eval.patience) == (config.train.epochs, config.eval.patience)
    return "finished" if METRICS_FILE in found and as_long else "begun"


def differences(before: Config, now: Config) -> dict[str, tuple]:
    """Keys of which a run cannot be continued with another value, and both values."""
    one, other = (_flat(config.model_dump()) for config in (before, now))
    keys = [key for key in dict.fromkeys([*one, *other]) if not key.startswith(FREE)]
    return {key: (one.get(key), other.get(key)) for key in keys if one.get(key) != other.get(key)}


def _flat(tree: dict, prefix: str = "") -> dict:
    out = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            out |= _flat(value, f"{prefix}{key}.")
        else:
            out[f"{prefix}{key}"] = value
    return out
