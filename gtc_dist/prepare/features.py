"""Raw features to standardised float16 features of the catalog's items.

`gather_features` reads the chunks in Ray tasks and puts each row at its item's index in scratch, so memory does not
grow with the catalog. `fit_feature_transform` makes one pass over the scratch in index order, so the result does not
depend on the order in which tasks finish. `write_features` applies the transform block by block.

Without PCA, each dimension gets mean 0 and variance 1 over the items that have a vector. With PCA, centred vectors are
projected on the leading principal axes and divided by one common scale, such that the variances of the kept dimensions
average 1; their ratios, which carry information, are kept. Items without a vector are imputed with the mean: zeros.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from gtc_dist.data import ray_tasks
from gtc_dist.data.catalog import FEATURE_ROWS, CatalogWriter, ModalityEntry
from gtc_dist.data.feature_transform import FeatureTransform
from gtc_dist.data.scratch import Buckets, Scratch
from gtc_dist.errors import InputError
from gtc_dist.prepare import feature_files
from gtc_dist.prepare.feature_files import FeatureSource
from gtc_dist.progress import ProgressCallback, no_progress
from gtc_dist.raw import ids

BLOCK_BYTES = 32 << 20  # float64 values at once in the driver; fixed, so that sums do not depend on the memory


@dataclass(frozen=True)
class GatheredFeatures:
    """Raw vectors of one modality by item index.

    Attributes:
        vectors: [items, raw width], in `scratch` if given; zeros for an item without a vector.
        present: bool [items], whether the item has a vector.
        unknown: number of raw rows whose id is not an item.
    """

    vectors: np.ndarray
    present: np.ndarray
    unknown: int
    scratch: Scratch | None = None

    def blocks(self) -> Iterator[slice]:
        """Blocks of rows; they do not depend on the amount of memory."""
        rows = max(BLOCK_BYTES // (8 * self.vectors.shape[1]), 1)
        for first in range(0, len(self.present), rows):
            yield slice(first, min(first + rows, len(self.present)))
            if self.scratch is not None:
                self.scratch.release()


def item_ids(sources: dict[str, FeatureSource], type: pa.DataType) -> pa.Array:
    """Ids that have a vector in any modality, for data.items=all."""
    parts = [ids.cast(_ids_like(source, type), type, f"item ids of {source.uris[0]}") for source in sources.values()]
    return ids.sorted_unique(pa.chunked_array(parts, type))


def match_rows(source: FeatureSource, items: pa.Array) -> np.ndarray:
    """Catalog index of each raw row, int32; -1 if its id is not an item.

    Args:
        items: original ids in index order.

    Raises:
        InputError: a `.npy` with rows by number for items with text ids or with too few rows, or no match at all.
    """
    found = _ids_like(source, items.type)
    if source.ids is None:
        low, high = pc.min_max(items).values()
        extreme = low if low.as_py() < 0 else high
        if not 0 <= extreme.as_py() < source.rows:
            raise InputError(
                f"{source.uris[0]} has {source.rows} rows, one for each item id from 0, but the catalog has item "
                f"{extreme}; add the missing rows, or list each row's id (data.features.{source.name}.ids)"
            )
    index = ids.positions(found, items)
    if not (index >= 0).any():
        raise InputError(
            f"{', '.join(source.uris[:3])}: none of its ids (such as {found[0].as_py()!r}) is an item of the "
            f"catalog (such as {items[0].as_py()!r})"
        )
    return index


def gather_features(
    sources: dict[str, FeatureSource], items: pa.Array, scratch: Scratch, progress: ProgressCallback = no_progress
) -> dict[str, GatheredFeatures]:
    """Read all modalities in Ray tasks into scratch.

    Args:
        items: original ids in index order.
        progress: called with a line for every table.

    Raises:
        InputError: see `match_rows`; a vector that is not finite or of another width (file and item are named).
    """
    gatherers = {
        name: _Gatherer(source, match_rows(source, items), len(items), scratch) for name, source in sources.items()
    }
    chunks = [chunk for source in sources.values() for chunk in source.chunks]
    total, done = sum(source.rows for source in sources.values()), 0
    for position, table in ray_tasks.map_tables(feature_files.read_feature_chunk, chunks):
        name = chunks[position].modality
        if "bad_row" in table.column_names:
            row, problem = table["bad_row"][0].as_py(), table["problem"][0].as_py()
            uri, file_row = sources[name].locate(row)
            raise InputError(f"{uri}: the vector of item {sources[name].id_of(row)!r} (row {file_row}) {problem}")
        gatherers[name].add(table)
        done += table.num_rows
        progress(f"feature rows read: {done:,} of {total:,}")
    for name, source in sources.items():
        if not gatherers[name].present.any():
            raise InputError(f"{', '.join(source.uris[:3])}: no item of the catalog has a vector")
    return {name: gatherer.finish() for name, gatherer in gatherers.items()}


class _Gatherer:
    """Puts the vectors of one modality at their items' indexes.

    Rows arrive in file order, which is random with respect to indexes; written directly, they would touch every page of
    the array many times. So rows are first partitioned into ranges of items that fit memory, then ordered by range.

    Args:
        index: catalog index of each raw row, -1 for none.
    """

    def __init__(self, source: FeatureSource, index: np.ndarray, items: int, scratch: Scratch):
        self.index, self.scratch = index, scratch
        self.present = np.zeros(items, bool)
        row_bytes = source.width * np.dtype(source.dtype).itemsize
        self.rows = scratch.rows(4 * row_bytes + 8)  # per range; a range and its ordered copy use half of the memory
        sizes = [min(self.rows, items - first) for first in range(0, items, self.rows)]
        self.ranges = Buckets(scratch, np.array(sizes), [np.int32, (source.dtype, source.width)])
        self.pending = 0

    def add(self, table: pa.Table) -> None:
        index = self.index[table["row"].to_numpy()]
        known = index >= 0
        matrix = pc.list_flatten(table["vector"]).combine_chunks().to_numpy(zero_copy_only=False)
        matrix, index = matrix.reshape(len(index), -1)[known], index[known]
        self.ranges.add(index // self.rows, index, matrix)
        self.present[index] = True
        self.pending += matrix.nbytes
        if self.pending >= self.scratch.memory_bytes // 8:
            self.scratch.release()
            self.pending = 0

    def finish(self) -> GatheredFeatures:
        items, vectors = self.ranges.columns
        for number, first in enumerate(self.ranges.starts[:-1]):
            index, rows = self.ranges.bucket(number)
            rows = np.array(rows)
            vectors[first : self.ranges.starts[number + 1]] = 0
            vectors[index] = rows
            self.scratch.release()
        self.scratch.discard(items)
        return GatheredFeatures(vectors, self.present, int(np.sum(self.index < 0)), self.scratch)


def fit_feature_transform(gathered: GatheredFeatures, pca: int | None = None) -> tuple[FeatureTransform, float]:
    """Fit the transform on the items that have a vector, in float64 and one pass.

    Returns:
        The transform, and the share of the variance that it keeps (1 without PCA).

    Sums are shifted by the first vector: this avoids cancellation if the mean is large, and makes the variance of a
    constant dimension exactly zero.
    """
    width = gathered.vectors.shape[1]
    shift = gathered.vectors[np.argmax(gathered.present)].astype(np.float64)
    count, total = 0, np.zeros(width)
    squares = np.zeros((width, width) if pca else width)  # Gram matrix, or its diagonal
    for block in gathered.blocks():
        x = gathered.vectors[block][gathered.present[block]].astype(np.float64) - shift
        count += len(x)
        total += x.sum(axis=0)
        squares += x.T @ x if pca else np.einsum("nd,nd->d", x, x)
    mean = total / count
    if not pca:
        return FeatureTransform(shift + mean, np.sqrt(np.maximum(squares / count - mean**2, 0))), 1.0
    return _pca_transform(shift + mean, squares / count - np.outer(mean, mean), pca)


def write_features(
    writer: CatalogWriter,
    name: str,
    gathered: GatheredFeatures,
    transform: FeatureTransform,
    explained_variance: float,
    scratch: Scratch,
    progress: ProgressCallback = no_progress,
) -> tuple[ModalityEntry, np.ndarray]:
    """Transform and write the features of a modality.

    Returns:
        The manifest entry, and the features float16 [items, width] in scratch.
    """
    items = len(gathered.present)
    out = scratch.array((items, transform.width), np.float16)
    for block in gathered.blocks():
        present = gathered.present[block]
        out[block][present] = transform.apply(gathered.vectors[block][present])
        progress(f"features standardised: {name}, {block.stop:,} of {items:,}")
    for part, first in enumerate(range(0, items, FEATURE_ROWS)):
        writer.features(name, part, first, out[first : first + FEATURE_ROWS])
        scratch.release()
        progress(f"features written: {name}, {min(first + FEATURE_ROWS, items):,} of {items:,}")
    transform.save(writer, name)
    entry = ModalityEntry(
        dim=transform.width,
        raw_dim=gathered.vectors.shape[1],
        missing=int(np.sum(~gathered.present)),
        explained_variance=explained_variance,
    )
    return entry, out


def _pca_transform(mean: np.ndarray, covariance: np.ndarray, width: int) -> tuple[FeatureTransform, float]:
    """PCA to `width` dimensions, by decreasing variance; fixed signs: the largest entry of each axis is positive."""
    variance, axes = np.linalg.eigh(covariance)
    variance = np.maximum(variance[::-1], 0)
    components = axes.T[::-1][:width]
    peak = np.abs(components).argmax(axis=1)
    components = components * np.sign(components[np.arange(width), peak])[:, None]
    kept, total = variance[:width].sum(), variance.sum()
    scale = np.full(width, np.sqrt(kept / width))
    transform = FeatureTransform(mean, scale, np.ascontiguousarray(components))
    return transform, float(kept / total) if total else 1.0


def _ids_like(source: FeatureSource, type: pa.DataType) -> pa.Array:
    """The ids of a source as integers or strings, like those of the catalog.

    Raises:
        InputError: rows by number, where ids are strings.
    """
    found = source.all_ids()
    if source.ids is None and ids.is_text(type):
        raise InputError(
            f"{source.uris[0]} has rows by integer item id, but the item ids of the interactions or of another "
            f"modality are strings; list each row's id (data.features.{source.name}.ids)"
        )
    return found.cast(pa.large_string()) if ids.is_text(type) and not ids.is_text(found.type) else found


def has_text_ids(sources: dict[str, FeatureSource]) -> bool:
    """Whether a source's item ids are strings; then those of the whole catalog are."""
    return any(ids.is_text(source.all_ids().type) for source in sources.values())
