"""One batch computed again, with the weights of the newest checkpoint before it: what is not finite, and how large
everything is."""

import io

import numpy as np

from gtc_dist.config_file import read_config
from gtc_dist.data import storage
from gtc_dist.data.catalog import Catalog
from gtc_dist.engine.build import load_graphs
from gtc_dist.engine.health import FIELDS, not_finite
from gtc_dist.engine.loader import Draws
from gtc_dist.engine.loop import Trainer
from gtc_dist.engine.restore import CONFIG
from gtc_dist.errors import InputError
from gtc_dist.model.collectives import World


def replay(uri: str) -> dict:
    """Loss parts, norms of the gradients and what is not finite, of the batch in a file that a run left.

    Raises:
        InputError: no such file, or no run around it.
    """
    run, _, _ = uri.rpartition("/")
    draws = read_draws(uri)
    path = storage.join(run or ".", CONFIG)
    if not storage.exists(path):
        raise InputError(f"{uri} is in no run folder (there is no {path}); replay it from where it was written")
    config = read_config(storage.read_bytes(path), path)
    catalog = Catalog(config.data.catalog, verify="size")
    trainer = Trainer(config, catalog, run, *catalog.interactions("train"), load_graphs(config, catalog), World())
    found = trainer.state.resume()
    batch = trainer.loader.assemble(draws)
    parts = trainer.gradients(batch)
    norms = {f"{table.name} table": table.pending[0][1] for table in trainer.tables.all() if table.pending}
    norms |= {name: p.grad for name, p in trainer.network.named_parameters() if p.grad is not None}
    return {
        "pairs": len(draws.users),
        "weights": f"after {found.steps} steps" if found else "as they start",
        "loss": {name: float(value) for name, value in parts.items()},
        "not_finite": not_finite(parts, trainer.network, trainer.tables.all()),
        "gradient_norms": {name: float(gradient.norm()) for name, gradient in norms.items()},
    }


def read_draws(uri: str) -> Draws:
    """What `health.batch_file` wrote."""
    if not storage.exists(uri):
        raise InputError(f"{uri} does not exist")
    try:
        with np.load(io.BytesIO(storage.read_bytes(uri)), allow_pickle=False) as file:
            arrays = {name: file[name] for name in ("users", "positives", "negatives", "seeds", *FIELDS)}
    except (ValueError, KeyError, OSError) as error:
        raise InputError(f"{uri} is not a batch that a run left behind: {error}") from error
    permutation, sampler = (int(seed) for seed in arrays.pop("seeds"))
    return Draws(**arrays, seed=permutation, sampler_seed=sampler, counts=[len(arrays["users"])])
