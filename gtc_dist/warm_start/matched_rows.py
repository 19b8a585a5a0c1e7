"""Users and items of a catalog that an earlier catalog has too, by their original ids (indexes are random in both)."""

import numpy as np

from gtc_dist.data import formats, storage
from gtc_dist.data.catalog import Catalog
from gtc_dist.raw import ids as id_columns

ID_BLOCK = 1 << 20  # ids of the earlier catalog that are held at once


def earlier_rows(earlier: Catalog, catalog: Catalog, kind: str, start: int, stop: int) -> np.ndarray:
    """Index in the earlier catalog of the `users` or `items` [start, stop) of a catalog, int64; -1 where it lacks them.

    Integers and texts compare as they are written: `7` is the same item in a catalog whose ids became text since.
    """
    mine = catalog.ids(kind, start, stop)
    found, total = np.full(len(mine), -1, np.int64), getattr(earlier, kind)
    for first in range(0, total, ID_BLOCK):
        wanted, block = id_columns.comparable(mine, earlier.ids(kind, first, min(first + ID_BLOCK, total)))
        at = id_columns.positions(wanted, block)
        found[at >= 0] = at[at >= 0] + first
    return found


def has_interactions(catalog: Catalog, kind: str) -> np.ndarray:
    """Whether each of the `users` or `items` has a train interaction, bool [n]."""
    graph = {"users": "item_user", "items": "user_item"}[kind]
    return np.diff(formats.read_array(storage.join(catalog.uri, f"graph/{graph}.indptr.npy"))) > 0
