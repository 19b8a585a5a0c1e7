"""A small catalog and the one of the day before, which lacks some of its users, items and interactions."""

from pathlib import Path

import numpy as np
from small import small_catalog, write_catalog

from gtc_dist.data.catalog import SPLITS, Catalog
from gtc_dist.data.feature_transform import FeatureTransform


def raw_vectors(catalog: Catalog) -> dict[str, np.ndarray]:
    """The vectors that a catalog's features come from, by item index."""
    found = {}
    for name in catalog.modalities():
        transform = FeatureTransform.load(catalog.uri, name)
        found[name] = catalog.features(name) * transform.scale + transform.mean
    return found


def day_before(
    today: Catalog, uri: str | Path, without_users=(), without_items=(), share=0.0, seed=1, scale: float = 1.0
) -> Catalog:
    """The catalog without some users and items, by their index, and without a share of the other train interactions.
    Indexes are permuted, and features standardised anew and divided by `scale`."""
    rng = np.random.default_rng(seed)
    kept = {"users": np.setdiff1d(np.arange(today.users), without_users)}
    kept["items"] = np.setdiff1d(np.arange(today.items), without_items)
    index, order = {}, {}
    for kind, old in kept.items():
        order[kind] = rng.permutation(old)
        index[kind] = np.full(getattr(today, kind), -1)
        index[kind][order[kind]] = np.arange(len(old))
    splits = {}
    for name in SPLITS:
        users, items = today.interactions(name)
        pairs = index["users"][users], index["items"][items]
        left = (pairs[0] >= 0) & (pairs[1] >= 0)
        if name == "train":
            left &= rng.random(len(left)) >= share
        splits[name] = tuple(column[left].astype(np.int32) for column in pairs)
    ids = {kind: today.ids(kind).take(order[kind]) for kind in order}
    vectors = {name: rows[order["items"]] for name, rows in raw_vectors(today).items()}
    return write_catalog(uri, splits, ids, vectors, "the day before", scale=scale)


def two_days(folder: Path, **options) -> tuple[Catalog, Catalog]:
    """Yesterday's catalog, without the last 10 of 60 users and 6 of 40 items, one of them cold today; and today's."""
    today = small_catalog(folder / "today")
    options = {"without_users": range(50, 60), "without_items": range(32, 38), "share": 0.1} | options
    return day_before(today, folder / "yesterday", **options), today
