"""An earlier run whose weights are to go on with another catalog: does it fit?

Everything is checked before Ray starts, from configurations, manifests, ids and interactions; no weight is read.
"""

import numpy as np

from gtc_dist.checkpoint.existing_run import RunRef, find_run
from gtc_dist.config import Config
from gtc_dist.data.catalog import SPLITS, Catalog
from gtc_dist.errors import InputError
from gtc_dist.warm_start.matched_rows import earlier_rows

# Keys of the model that must be the same: they decide which weights there are, their shapes and what they mean.
MODEL_KEYS = ("variant", "width", "members", "masked_members")
LOSS_KEYS = ("w_diff", "w_tc")  # 0 or not: whether the content filter and the critic exist


def find_earlier_run(uri: str, config: Config | None, catalog: Catalog, catalog_uri: str | None = None) -> RunRef:
    """The run at `uri`, whose weights fit the model of `config` on a catalog.

    Args:
        config: None: the run's own.
        catalog_uri: where the run's own catalog is now, as of `find_run`.

    Raises:
        InputError: no such run, its catalog is gone, another model (the keys are named), or no common user or item.
    """
    try:
        earlier = find_run(uri, catalog_uri)
    except InputError as error:
        if "was rebuilt" not in str(error):
            raise
        raise InputError(
            f"{error}; the ids of its rows are lost: keep the catalog of a run, and prepare grown data into another "
            "folder (data.catalog)"
        ) from None
    before = Catalog(earlier.config.data.catalog)
    if different := model_differences(earlier.config, before, config or earlier.config, catalog):
        shown = "; ".join(f"{key}: {old} there, {new} here" for key, (old, new) in different.items())
        raise InputError(f"the weights of {uri} do not fit this configuration ({shown})")
    for kind in ("users", "items"):
        if not any((rows >= 0).any() for _, rows in matched_blocks(before, catalog, kind)):
            raise InputError(
                f"no id of the {kind} of {catalog.uri} is in {before.uri}, the catalog of {uri}; give a run on "
                "earlier data of the same shop"
            )
    return earlier


def model_differences(before: Config, old: Catalog, now: Config, new: Catalog) -> dict[str, tuple]:
    """Keys by which the weights of one model do not fit the other, with both values."""
    pairs = {f"model.{key}": tuple(getattr(c.model, key) for c in (before, now)) for key in MODEL_KEYS}
    pairs |= {f"train.{key}": tuple(getattr(c.train, key) for c in (before, now)) for key in LOSS_KEYS}
    found = {
        key: values
        for key, values in pairs.items()
        if (bool(values[0]) != bool(values[1]) if key.startswith("train.") else values[0] != values[1])
    }
    if before.train.w_diff and now.train.w_diff and before.model.diffusion != now.model.diffusion:
        for key in type(now.model.diffusion).model_fields:
            values = tuple(getattr(c.model.diffusion, key) for c in (before, now))
            found |= {f"model.diffusion.{key}": values} if values[0] != values[1] else {}
    there, here = old.modalities(before.model.modalities), new.modalities(now.model.modalities)
    if list(there) != list(here):
        found["model.modalities"] = ", ".join(there), ", ".join(here)
    for name in there.keys() & here.keys():
        raw = tuple(catalog.manifest.modalities[name].raw_dim for catalog in (old, new))
        if raw[0] != raw[1]:
            found[f"data.features.{name}.path"] = tuple(f"vectors of width {width}" for width in raw)
        elif there[name] != here[name]:
            found[f"data.features.{name}.pca"] = there[name], here[name]
    return found


def matched_blocks(before: Catalog, catalog: Catalog, kind: str, block: int = 1 << 20):
    """(first index, `earlier_rows`) of a catalog's users or items, block by block."""
    for first in range(0, getattr(catalog, kind), block):
        yield first, earlier_rows(before, catalog, kind, first, min(first + block, getattr(catalog, kind)))


def trained_interactions(earlier: RunRef, catalog: Catalog) -> dict[str, int]:
    """How many valid and test interactions of a catalog were train interactions of an earlier run; splits without any
    are left out. Metrics of them would be of what the weights have seen."""
    before = Catalog(earlier.config.data.catalog)
    if before.manifest.fingerprint == catalog.manifest.fingerprint:
        return {}
    index = {kind: np.full(getattr(before, kind), -1, np.int64) for kind in ("users", "items")}
    for kind, of_earlier in index.items():
        for first, rows in matched_blocks(before, catalog, kind):
            of_earlier[rows[rows >= 0]] = first + np.flatnonzero(rows >= 0)
    splits = {name: np.sort(_pairs(*catalog.interactions(name), catalog)) for name in SPLITS if name != "train"}
    counts = dict.fromkeys(splits, 0)
    for users, items in (pair for name in earlier.config.train_splits for pair in before.interaction_files(name)):
        user, item = index["users"][users], index["items"][items]
        known = (user >= 0) & (item >= 0)
        pairs = _pairs(user[known], item[known], catalog)
        for name, wanted in splits.items():
            at = np.minimum(np.searchsorted(wanted, pairs), len(wanted) - 1)
            counts[name] += int(np.count_nonzero(wanted[at] == pairs))
    return {name: count for name, count in counts.items() if count}


def _pairs(users: np.ndarray, items: np.ndarray, catalog: Catalog) -> np.ndarray:
    """One number for each pair, int64 [n]."""
    return users.astype(np.int64) * catalog.items + items


def refuse_trained_interactions(earlier: RunRef, catalog: Catalog) -> None:
    """Raises InputError where an earlier run was trained on interactions that a catalog has in valid or test."""
    if counts := trained_interactions(earlier, catalog):
        shown = " and ".join(
            f"{n:,} of the {catalog.manifest.interactions[name]:,} {name} interactions" for name, n in counts.items()
        )
        raise InputError(
            f"{earlier.uri} was trained on {shown} of {catalog.uri}, so metrics would be of what the weights have "
            "seen; split so that train only grows: by time (data.split.method: leave_last_out or global_time), or by "
            "given files"
        )
