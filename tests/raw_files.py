"""Raw interaction and feature files for the tests of prepare, and a slow k-core."""

import gzip
import io
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from gtc_dist.config import Config
from gtc_dist.config_data import ModalityConfig
from gtc_dist.data import formats
from gtc_dist.data.catalog import SPLITS, Catalog
from gtc_dist.prepare import feature_files

FORMATS = ["parquet", "csv", "tsv", "inter", "jsonl"]
USERS, ITEMS = 60, 40  # of `write_raw`
ROWS, WIDTH = 40, 6  # of `feature_matrix`


def rows_table(rows: int = 60, seed: int = 0, text_ids: bool = False) -> pa.Table:
    rng = np.random.default_rng(seed)
    pairs = rng.permutation(400)[:rows]
    users = [f"u{p // 20}" if text_ids else p // 20 for p in pairs.tolist()]
    return pa.table(
        {
            "item_id": (pairs % 20).tolist(),
            "user_id": users,
            "time": rng.integers(0, 50, rows),
            "rating": rng.integers(1, 6, rows) / 2,
            "title": ['some, "quoted" text'] * rows,
        }
    )


def write_table_file(path: Path, table: pa.Table, suffixes: bool = False) -> str:
    """Write a table in the format of its file extension (.gz compresses it)."""
    name = path.name.removesuffix(".gz")
    names = [
        f"{n}:{t}" for n, t in zip(table.column_names, ["token"] * 2 + ["float"] * 2 + ["token_seq"], strict=False)
    ]
    columns = names if suffixes else table.column_names
    if name.endswith(".parquet"):
        sink = io.BytesIO()
        pq.write_table(table, sink)
        data = sink.getvalue()
    elif name.endswith(".jsonl"):
        data = "".join(json.dumps(row) + "\n" for row in table.to_pylist()).encode()
    else:
        sep = "," if name.endswith(".csv") else "\t"

        def cell(value) -> str:
            text = str(value)
            return '"' + text.replace('"', '""') + '"' if sep in text or '"' in text else text

        lines = [sep.join(columns), *(sep.join(map(cell, row.values())) for row in table.to_pylist())]
        data = ("\n".join(lines) + "\n").encode()
    path.write_bytes(gzip.compress(data) if path.name.endswith(".gz") else data)
    return str(path)


def write_raw(folder: str, seed: int = 0) -> None:
    """A small dataset: string users, int32 items, three splits; visual by row, textual by id with items left out."""
    rng = np.random.default_rng(seed)
    users, items = np.divmod(np.arange(USERS * ITEMS), ITEMS)
    chosen = rng.permutation(USERS * ITEMS)[:600]
    for split, rows in zip(SPLITS, np.split(chosen, [420, 500]), strict=True):
        columns = {"user_id": [f"u{u}" for u in users[rows]], "item_id": pa.array(items[rows], pa.int32())}
        formats.write_table(f"{folder}/{split}.parquet", pa.table(columns))
    formats.write_array(f"{folder}/visual.npy", rng.normal(2, 3, (ITEMS, 8)).astype(np.float32))
    with_text = rng.permutation(ITEMS)[:-3]
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(rng.normal(size=37 * 5).astype(np.float32)), 5)
    formats.write_table(f"{folder}/textual.parquet", pa.table({"item_id": with_text, "vector": vectors}))


def catalog_config(raw: str, catalog: str, user_hop: bool = True, **data) -> Config:
    features = {"visual": {"path": "visual.npy", "pca": 4}, "textual": {"path": "textual.parquet", "weight": 2.0}}
    tree = {"raw": str(raw), "catalog": str(catalog), "split": {"method": "given"}, "features": features, **data}
    return Config.model_validate(
        {
            "data": tree,
            "run": {"storage": "runs", "name": "x"},
            "model": {"user_hop": user_hop},
        }
    )


def catalog_contents(catalog: Catalog) -> dict:
    """The contents of a catalog: ids, interactions, graphs and features."""
    users, items = catalog.ids("users"), catalog.ids("items")
    held = {"users": users.to_pylist(), "items": items.to_pylist()}
    for split in SPLITS:
        held[split] = [part.tolist() for part in catalog.interactions(split)]
    for name in catalog.manifest.graphs:
        graph = catalog.graph(name)
        held[name] = [part.tolist() for part in (graph.indptr, graph.indices, graph.weight)]
    for name in catalog.modalities():
        held[name] = catalog.features(name).tolist()
    return held


def feature_matrix(seed: int = 0, rows: int = ROWS, width: int = WIDTH) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(rows, width)) @ rng.normal(size=(width, width)) + 3).astype(np.float32)


def inspect_visual(folder: Path | str, path: str = "v.npy", **settings) -> feature_files.FeatureSource:
    return feature_files.inspect_features("visual", ModalityConfig(path=path, **settings), str(folder))


def write_feature_parquet(path: Path, ids, rows: list, type: pa.DataType) -> None:
    pq.write_table(pa.table({"item_id": ids, "vector": pa.array(rows, type)}), path, row_group_size=7)


def slow_core(edges: set[tuple], k: int) -> set[tuple]:
    while True:
        users, items = Counter(u for u, _ in edges), Counter(i for _, i in edges)
        kept = {(u, i) for u, i in edges if users[u] >= k and items[i] >= k}
        if kept == edges:
            return kept
        edges = kept
