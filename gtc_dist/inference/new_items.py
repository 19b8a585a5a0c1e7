"""Items that arrive after training: embeddings from their content alone.

They get what cold items of the catalog get (`cold.py`): what the regression tells of their content, or the mean of the
rows of the nearest warm items, the modalities weighed as in the item-item graph; and in the content profiles their own.
"""

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from gtc_dist.data import formats
from gtc_dist.distributed.sharded_table import ShardedTable
from gtc_dist.errors import InputError
from gtc_dist.graph.item_knn_graph import similarity_weights
from gtc_dist.hybrid.cold_start import CONTENT_WEIGHT, NORM_SCALE, REGRESSION
from gtc_dist.hybrid.content_profile import ContentMap
from gtc_dist.inference.trained_run import TrainedRun
from gtc_dist.prepare.features import FeatureTransform

WARM_BLOCK = 1 << 16  # warm items compared at once


def read_new_items(run: TrainedRun, uri: str) -> tuple[pa.Array, dict[str, np.ndarray]]:
    """Ids, in the catalog's type, and each modality's features float16 [n, width] as the catalog has them.

    Args:
        uri: Parquet file with the column `id` and one column of raw vectors for each modality of the run.

    Raises:
        InputError: a column that is missing or of another type or width, a null, a value that is not finite, an id
            that is given twice or that the catalog has.
    """
    table, catalog = formats.read_table(uri), run.catalog
    wanted = ["id", *run.features]
    missing = [name for name in wanted if name not in table.column_names]
    if missing:
        raise InputError(f"{uri} has no column {missing[0]!r}; columns found: {', '.join(table.column_names)}")
    known = catalog.ids("items")
    try:
        ids = table["id"].combine_chunks().cast(known.type)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise InputError(f"{uri}: column 'id' is {table['id'].type}, the catalog's are {known.type}: {error}") from None
    if ids.null_count:
        raise InputError(f"{uri}: column 'id' has {ids.null_count} nulls")
    if len(ids.unique()) < len(ids):
        raise InputError(f"{uri}: column 'id' has an id twice")
    taken = pc.is_in(ids, value_set=known)
    if pc.any(taken).as_py():
        first = ids.filter(taken)[0].as_py()
        raise InputError(f"{uri}: the catalog has item {first!r} already; leave it out")
    return ids, {name: _vectors(run, uri, table, name) for name in run.features}


def _vectors(run: TrainedRun, uri: str, table: pa.Table, name: str) -> np.ndarray:
    column = table[name].combine_chunks()
    width = run.catalog.manifest.modalities[name].raw_dim
    kinds = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    if not any(kind(column.type) for kind in kinds):
        raise InputError(f"{uri}: column {name!r} is {column.type}; it must hold vectors (lists of numbers)")
    if column.null_count:
        row = column.is_null().index(True).as_py()
        raise InputError(f"{uri}: column {name!r} has no vector in row {row}")
    lengths = set(pc.list_value_length(column).to_pylist())
    if lengths - {width}:
        found = sorted(lengths - {width}, key=str)[0]
        raise InputError(f"{uri}: column {name!r} has a vector of length {found}, the catalog's have {width}")
    raw = column.flatten().to_numpy(zero_copy_only=False).astype(np.float64).reshape(-1, width)
    if not np.isfinite(raw).all():
        row = int(np.flatnonzero(~np.isfinite(raw).all(axis=1))[0])
        raise InputError(f"{uri}: column {name!r}, row {row}: the vector has a value that is not finite")
    return FeatureTransform.load(run.catalog.uri, name).apply(raw)


@torch.no_grad()
def embed_new_items(run: TrainedRun, items: ShardedTable, content: dict[str, np.ndarray]) -> torch.Tensor:
    """Embeddings of new items, float32 [n, width of `items`].

    Args:
        items: final embeddings of the catalog's items, all in this process.
        content: modality -> float16 [n, d], as the catalog holds them.
    """
    cold = run.final.cold
    features = {name: torch.from_numpy(rows) for name, rows in content.items()}
    if cold.weights[REGRESSION]:
        rows = cold.regression.new(cold.regression.fit(items), features)
    else:
        warm = np.flatnonzero(run.graphs.item_degree > 0)
        neighbour, similarity = nearest_warm_items(run, warm, content)
        share = torch.from_numpy(similarity_weights(similarity))
        rows = torch.einsum("nk,nkd->nd", share, items.weight[torch.from_numpy(warm[neighbour])])
    for name, columns in run.final.profiles(items.width).items():
        own = ContentMap.of(run.features[name], run.config.model.walk.profile)
        rows[:, columns] = own.apply(features[name]) * cold.weights[CONTENT_WEIGHT]
    return rows * cold.weights[NORM_SCALE]


def nearest_warm_items(
    run: TrainedRun, warm: np.ndarray, content: dict[str, np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """The nearest of the items `warm` to each new one, best first: place in `warm` int64 [n, k], similarity [n, k]."""
    k = min(run.config.graph.item_neighbours, len(warm))
    configured = run.config.data.features
    weights = {name: configured[name].weight if name in configured else 1.0 for name in content}
    new = _joint({name: torch.from_numpy(rows) for name, rows in content.items()}, weights)
    found, place = np.empty((len(new), 0), np.float32), np.empty((len(new), 0), np.int64)
    for first in range(0, len(warm), WARM_BLOCK):
        block = torch.from_numpy(warm[first : first + WARM_BLOCK])
        theirs = _joint({name: run.features[name].weight[block] for name in content}, weights)
        similarity, at = faiss.knn(new, theirs, min(k, len(block)), faiss.METRIC_INNER_PRODUCT)
        found, place = np.concatenate([found, similarity], axis=1), np.concatenate([place, at + first], axis=1)
        order = np.argsort(-found, axis=1, kind="stable")[:, :k]
        found, place = np.take_along_axis(found, order, 1), np.take_along_axis(place, order, 1)
    return place, found


def _joint(content: dict[str, torch.Tensor], weights: dict[str, float]) -> np.ndarray:
    """Rows whose inner products are the means of the modalities' cosines by weight, float32."""
    total = sum(weights.values())
    parts = [
        torch.nn.functional.normalize(rows.float(), dim=1) * (weights[name] / total) ** 0.5
        for name, rows in content.items()
    ]
    return torch.cat(parts, dim=1).numpy()
