"""Raw interactions of a few rows, and what `prepare` makes of them."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from gtc_dist.config_data import DataConfig
from gtc_dist.data.catalog import SPLITS
from gtc_dist.data.scratch import Scratch
from gtc_dist.prepare import catalog_interactions, interactions
from gtc_dist.prepare.catalog_interactions import SplitInteractions
from gtc_dist.prepare.clean import RawInteractions
from gtc_dist.raw import ids, interaction_file


def data_config(raw: Path, **sections) -> DataConfig:
    return DataConfig.model_validate({"raw": str(raw), "catalog": str(raw / "catalog"), **sections})


def raw_of(rows: list[tuple], time: bool = False, split_codes: list[int] | None = None) -> RawInteractions:
    """Raw interactions from (user, item[, time]) rows."""
    user_ids, user = ids.encode(pa.chunked_array([pa.array([r[0] for r in rows])]))
    item_ids, item = ids.encode(pa.chunked_array([pa.array([r[1] for r in rows])]))
    times = np.array([r[2] for r in rows]) if time else None
    codes = None if split_codes is None else np.array(split_codes, np.int8)
    return RawInteractions(user_ids, item_ids, user, item, time=times, split=codes)


def read(files: list[interaction_file.InteractionFile], memory: int = 1 << 30) -> RawInteractions:
    with Scratch(memory_bytes=memory) as scratch:  # mapped arrays stay readable after the folder is removed
        return interactions.read_interactions(files, scratch)


def build(
    raw: RawInteractions, data: DataConfig, more: pa.Array | None = None, memory: int = 1 << 30
) -> SplitInteractions:
    with Scratch(memory_bytes=memory) as scratch:
        return catalog_interactions.build_interactions(raw, data, scratch, more)


def triples(found: SplitInteractions) -> dict[str, list[tuple]]:
    """Each split as pairs of original ids, in its order."""
    users, items = found.users.to_pylist(), found.items.to_pylist()
    return {name: [(users[u], items[i]) for u, i in zip(*pair, strict=True)] for name, pair in found.splits.items()}


def write_given(folder: Path, train=((1, 1), (1, 2)), valid=((1, 3),), test=((1, 4),)) -> DataConfig:
    for name, rows in zip(SPLITS, (train, valid, test), strict=True):
        columns = {"user_id": [r[0] for r in rows], "item_id": [r[1] for r in rows]}
        pq.write_table(pa.table(columns), folder / f"{name}.parquet")
    return data_config(folder, split={"method": "given"})
