"""New items: embeddings of items that arrive after training, from their content alone.

They are predicted like the cold-start items of the catalog (`hybrid/cold_start.py`): by the regression on content, and
as the mean of their nearest warm items. Unlike a catalog item, a new item gets its k nearest warm items, so it always
has neighbours. Similarity is that of the item-item graph, with the modality weights of `data.features` in the run's
config.yaml (1 for modalities that it does not list). Their content profiles are their own.
"""

import posixpath
from collections.abc import Iterable
from dataclasses import dataclass

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from gtc_dist.checkpoint.run_folder import CONFIG_FILE
from gtc_dist.data import formats, storage
from gtc_dist.data.catalog import Catalog
from gtc_dist.data.feature_transform import FeatureTransform
from gtc_dist.data.output_folder import refuse_unfinished
from gtc_dist.distributed.sharded_table import ShardedTable
from gtc_dist.errors import InputError
from gtc_dist.graph.csc import similarity_weights
from gtc_dist.graph.item_knn_graph import ITEM_NEIGHBOURS
from gtc_dist.hybrid.cold_start import CONTENT_WEIGHT, NEIGHBOURS, REGRESSION, adjusted_rows
from gtc_dist.hybrid.content_space import ContentSpace, weighted_unit_rows
from gtc_dist.inference.trained_run import TrainedRun

WARM_BLOCK = 1 << 16  # warm items compared at once


@dataclass
class NewItems:
    """Items that the catalog lacks."""

    ids: pa.Array  # in the catalog's type
    features: dict[str, np.ndarray]  # modality -> float16 [n, width], transformed like the catalog's


def read_new_items(catalog: Catalog, modalities: Iterable[str], sources: list[str]) -> NewItems:
    """Read and check items that arrived after training.

    Args:
        modalities: names of those that the run uses.
        sources: URI of a Parquet file with the column `id` and one column of raw vectors for each modality, null where
            an item has none; or MODALITY=PLACE for each modality, where PLACE is a folder that `gtc features` wrote, or
            a file or glob of Parquet files with the columns `item_id` (or `id`) and `vector`. An item's features are
            zeros where it has no vector, as those of the catalog's items are.

    Raises:
        InputError: not a Parquet file, a column that is missing or of another type or width, a modality that is not
            given or unknown, an item without any vector, a value that is not finite, an id that is given twice or that
            the catalog has. Rows are counted from 1.
    """
    names = list(modalities)
    by_modality = dict(source.split("=", 1) for source in sources if source.partition("=")[0] in names)
    if len(by_modality) == len(sources):
        table, given = _join_modalities(catalog, names, by_modality), ", ".join(sources)
    else:
        table, given = _one_table(names, sources), sources[0]
        _check_new_ids(catalog, table, given)
    ids = catalog.cast_ids("items", table["id"].combine_chunks())
    features = {name: _new_features(catalog, given, table, name) for name in names}
    empty = np.all([table[name].is_null().to_numpy() for name in names], axis=0)
    if empty.any():
        row = int(empty.argmax())
        raise InputError(
            f"{given}: item {ids[row].as_py()!r} in row {row + 1} has no vector of any modality; leave it out"
        )
    return NewItems(ids, features)


def place_of(source: str) -> str:
    """The path or URI in FILE or MODALITY=PLACE; folders may have a `=` in their names, modalities no slash."""
    name, _, place = source.partition("=")
    return place if place and "/" not in name else source


def _one_table(modalities: list[str], sources: list[str]) -> pa.Table:
    """The table that has all modalities. Raises InputError."""
    joined = ", ".join(modalities)
    needed = (
        f"--new-items needs a Parquet file with `id` and one column of vectors per modality ({joined}), or "
        f"{' '.join(f'{name}=FOLDER' for name in modalities)}"
    )
    if len(sources) > 1:
        raise InputError(f"{needed}; not {' '.join(sources)}")
    uri = sources[0]
    try:
        table = formats.read_table(uri)
    except InputError as error:
        raise InputError(f"{needed}; {error}") from error
    missing = [name for name in ("id", *modalities) if name not in table.column_names]
    if missing:
        found = ", ".join(table.column_names)
        raise InputError(f"{needed}; {uri} has no column {missing[0]!r}; columns found: {found}")
    return table


def _join_modalities(catalog: Catalog, modalities: list[str], places: dict[str, str]) -> pa.Table:
    """A table of all items of the places: `id` and a column for each modality, null where a place lacks the item."""
    missing = [name for name in modalities if name not in places]
    if missing:
        raise InputError(f"--new-items gives no {missing[0]}; the run needs {', '.join(modalities)}")
    tables = {name: _vectors_of(places[name]) for name in modalities}
    for name, table in tables.items():
        _check_new_ids(catalog, table, places[name])
    of_items = {name: catalog.cast_ids("items", table["id"].combine_chunks()) for name, table in tables.items()}
    ids = pc.unique(pa.concat_arrays(list(of_items.values())))
    columns = {
        name: table["vector"].combine_chunks().take(pc.index_in(ids, value_set=of_items[name]))
        for name, table in tables.items()
    }
    return pa.table({"id": ids, **columns})


def _vectors_of(place: str) -> pa.Table:
    """The columns `id` and `vector` of a folder's, a glob's or one Parquet file."""
    pattern = storage.join(place, "*.parquet") if storage.listing(place) else place
    uris, tables = storage.glob(pattern), []
    refuse_unfinished(posixpath.dirname(uri) for uri in uris)
    for uri in uris:
        table = formats.read_table(uri)
        column = next((name for name in ("item_id", "id") if name in table.column_names), None)
        if column is None or "vector" not in table.column_names:
            found = ", ".join(table.column_names)
            raise InputError(f"{uri} needs the columns `item_id` and `vector`, not {found}")
        tables.append(table.select([column, "vector"]).rename_columns(["id", "vector"]))
    try:
        return pa.concat_tables(tables)
    except pa.ArrowInvalid as error:
        raise InputError(f"the files of {place} have columns of different types: {error}") from None


def _check_new_ids(catalog: Catalog, table: pa.Table, uri: str) -> None:
    """Raises InputError for ids of another type, null, given twice, or that the catalog has."""
    try:
        index = catalog.index_of("items", table["id"], allow_unknown=True)
    except InputError as error:
        raise InputError(f"{uri}: column 'id': {error}") from None
    ids = table["id"]
    if ids.null_count:
        raise InputError(f"{uri}: column 'id' has {ids.null_count} nulls")
    if len(ids.unique()) < len(ids):
        raise InputError(f"{uri}: column 'id' has an id twice")
    known = np.flatnonzero(index >= 0)
    if len(known):
        raise InputError(f"{uri}: the catalog has item {ids[int(known[0])].as_py()!r} already; leave it out")


def _new_features(catalog: Catalog, uri: str, table: pa.Table, name: str) -> np.ndarray:
    column = table[name].combine_chunks()
    width = catalog.manifest.modalities[name].raw_dim
    kinds = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    if not any(kind(column.type) for kind in kinds):
        raise InputError(f"{uri}: column {name!r} is {column.type}; it must hold vectors (lists of numbers)")
    present = column.is_valid().to_numpy(zero_copy_only=False)
    rows, column = np.flatnonzero(present), column.drop_null()
    lengths = set(pc.list_value_length(column).to_pylist())
    if lengths - {width}:
        found = sorted(lengths - {width}, key=str)[0]
        raise InputError(f"{uri}: column {name!r} has a vector of length {found}, the catalog's have {width}")
    raw = column.flatten().to_numpy(zero_copy_only=False).astype(np.float64).reshape(-1, width)
    if not np.isfinite(raw).all():
        row = int(rows[np.flatnonzero(~np.isfinite(raw).all(axis=1))[0]])
        raise InputError(f"{uri}: column {name!r}, row {row + 1}: the vector has a value that is not finite")
    transform = FeatureTransform.load(catalog.uri, name)
    features = np.zeros((len(present), catalog.manifest.modalities[name].dim), np.float16)
    features[rows] = transform.apply(raw)
    return features


@torch.no_grad()
def embed_new_items(run: TrainedRun, items: ShardedTable, new_features: dict[str, np.ndarray]) -> torch.Tensor:
    """Embeddings of new items, float32 [n, width of `items`].

    Args:
        items: final embeddings of the catalog's items, all of them in this process.
        new_features: modality -> float16 [n, d], transformed like the catalog's.
    """
    cold_start = run.scorer.cold_start
    features = {name: torch.from_numpy(rows) for name, rows in new_features.items()}
    rows = torch.zeros(len(next(iter(features.values()))), items.width)
    if weight := cold_start.weights[REGRESSION]:
        rows += weight * cold_start.regression.predict_new(cold_start.regression.fit(items), features)
    if weight := cold_start.weights[NEIGHBOURS]:
        warm = np.flatnonzero(run.graphs.item_degree > 0)
        neighbour, similarity = nearest_warm_items(run, warm, features)
        share = torch.from_numpy(similarity_weights(similarity))
        rows += weight * torch.einsum("nk,nkd->nd", share, items.weight[torch.from_numpy(warm[neighbour])])
    special = run.scorer.special_columns(items.width)
    for name, columns in special.profiles.items():
        space = ContentSpace.fit({name: run.features[name]}, run.config.model.hybrid.content_profile)
        profiles = space.apply({name: features[name]}, missing_as_zero=False)  # like those of the catalog's items
        rows[:, columns] = profiles * cold_start.weights[CONTENT_WEIGHT]
    return adjusted_rows(rows, cold_start.weights, special.constant)


def nearest_warm_items(
    run: TrainedRun, warm: np.ndarray, features: dict[str, torch.Tensor]
) -> tuple[np.ndarray, np.ndarray]:
    """The nearest items of `warm` (indexes) to each new item, best first: position in `warm` int64 [n, k], similarity
    [n, k].

    Args:
        features: modality -> [n, d] of the new items.

    Raises:
        InputError: the weights of these modalities are all 0.
    """
    k = min(ITEM_NEIGHBOURS, len(warm))
    configured = run.config.data.features
    weights = {name: configured[name].weight if name in configured else 1.0 for name in features}
    if not sum(weights.values()):
        raise InputError(
            f"data.features in {storage.join(run.uri, CONFIG_FILE)} gives {', '.join(weights)} weight 0, so new items "
            "have no nearest items; train with a positive weight"
        )
    queries = weighted_unit_rows(features, weights).numpy()
    similarity, position = np.empty((len(queries), 0), np.float32), np.empty((len(queries), 0), np.int64)
    for first in range(0, len(warm), WARM_BLOCK):
        block = torch.from_numpy(warm[first : first + WARM_BLOCK])
        keys = weighted_unit_rows({name: run.features[name].weight[block] for name in features}, weights).numpy()
        found, at = faiss.knn(queries, keys, min(k, len(block)), faiss.METRIC_INNER_PRODUCT)
        similarity, position = (
            np.concatenate([similarity, found], axis=1),
            np.concatenate([position, at + first], axis=1),
        )
        order = np.argsort(-similarity, axis=1, kind="stable")[:, :k]
        similarity, position = np.take_along_axis(similarity, order, 1), np.take_along_axis(position, order, 1)
    return position, similarity
