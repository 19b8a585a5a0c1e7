"""Raw features -> standardised float16 features of the catalog's items.

The chain: `vectors.inspect` (before Ray) -> `gather_features` (Ray tasks read and check chunks; the driver puts each row at its
item's index in scratch, so memory does not grow with the catalog) -> `train_on_ray` (one pass over the scratch, in index order,
so that the result does not depend on which task ended first) -> `write_features` (`FeatureTransform.apply`, block by block).

Without PCA each dimension gets mean 0 and variance 1 over the items that have a vector. With PCA the centred vectors
are turned to the leading principal axes and divided by one common scale, chosen so that the variances of the kept
dimensions average 1: their relative sizes, which carry the information, stay. Items without a vector count as the mean,
which is zero in either case.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from gtc_dist.data import formats, ray_tasks, storage
from gtc_dist.data.catalog import FEATURE_ROWS, CatalogWriter, ModalityEntry
from gtc_dist.data.scratch import Buckets, Scratch
from gtc_dist.errors import InputError
from gtc_dist.prepare import feature_files, ids
from gtc_dist.prepare.feature_files import Source
from gtc_dist.progress import ProgressCallback, no_progress

FLOAT16_MAX = 65504.0
BLOCK_BYTES = 32 << 20  # of float64 at once in the driver; fixed, so that sums are the same whatever the memory


@dataclass(frozen=True)
class FeatureTransform:
    """What raw vectors of a modality go through: (x - mean), times components if there are any, over std.

    mean float64 [raw width]; std float64 [width], 0 where there is no variance; components float64 [width, raw width]
    or None.
    """

    mean: np.ndarray
    std: np.ndarray
    components: np.ndarray | None = None
    explained_variance: float = 1.0

    @property
    def width(self) -> int:
        return len(self.std)

    def apply(self, raw: np.ndarray) -> np.ndarray:
        """Raw vectors [n, raw width] -> float16 [n, width]; beyond float16's range the nearest end of it."""
        x = raw.astype(np.float64) - self.mean
        if self.components is not None:
            x = x @ self.components.T
        x *= np.divide(1.0, self.std, out=np.zeros_like(self.std), where=self.std > 0)
        return np.clip(x, -FLOAT16_MAX, FLOAT16_MAX).astype(np.float16)

    def save(self, writer: CatalogWriter, modality: str) -> None:
        writer.array(f"features/{modality}/mean.npy", self.mean)
        writer.array(f"features/{modality}/std.npy", self.std)
        if self.components is not None:
            writer.array(f"features/{modality}/components.npy", self.components)

    @classmethod
    def load(cls, catalog_uri: str, modality: str) -> "FeatureTransform":
        """The transform that a catalog's features went through, for new raw vectors."""
        folder = storage.join(catalog_uri, "features", modality)
        parts = [storage.join(folder, f"{part}.npy") for part in ("mean", "std", "components")]
        arrays = [formats.read_array(uri) for uri in parts[:2]]
        return cls(*arrays, formats.read_array(parts[2]) if storage.exists(parts[2]) else None)


@dataclass(frozen=True)
class Gathered:
    """One modality's raw vectors by item index.

    vectors: [items, raw width], in `scratch` if there is one; present: bool [items]; unknown: raw rows of ids that are
    no item.
    """

    vectors: np.ndarray
    present: np.ndarray
    unknown: int
    scratch: Scratch | None = None

    def blocks(self) -> Iterator[slice]:
        """Blocks of rows, the same for any amount of memory."""
        rows = max(BLOCK_BYTES // (8 * self.vectors.shape[1]), 1)
        for first in range(0, len(self.present), rows):
            yield slice(first, min(first + rows, len(self.present)))
            if self.scratch is not None:
                self.scratch.release()


def item_ids(sources: dict[str, Source], like: pa.DataType) -> pa.Array:
    """All ids that have a vector in some modality, for data.items=all. Raises InputError for ids of another type."""
    parts = [ids.cast(_ids_like(source, like), like, f"item ids of {source.uris[0]}") for source in sources.values()]
    return ids.sorted_unique(pa.chunked_array(parts, like))


def match_rows(source: Source, items: pa.Array) -> np.ndarray:
    """Catalog index of each raw row (int32, -1: no item of the catalog).

    Raises:
        InputError: ids of another type than the interactions', a `.npy` with fewer rows than items, or no match at all.
    """
    found = _ids_like(source, items.type)
    if source.ids is None:
        low, high = pc.min_max(items).values()
        worst = low if low.as_py() < 0 else high
        if not 0 <= worst.as_py() < source.rows:
            raise InputError(
                f"{source.uris[0]} has {source.rows} rows, one for each item id from 0, but the interactions have item "
                f"{worst}; add the missing rows, or list each row's id (data.features.{source.name}.ids)"
            )
    index = ids.positions(found, items)
    if not (index >= 0).any():
        raise InputError(
            f"{', '.join(source.uris[:3])}: none of its ids (such as {found[0].as_py()!r}) is an item of the "
            f"interactions (such as {items[0].as_py()!r})"
        )
    return index


def gather_features(
    sources: dict[str, Source], items: pa.Array, scratch: Scratch, tell: ProgressCallback = no_progress
) -> dict[str, Gathered]:
    """Read all modalities with Ray Data into scratch.

    Args:
        tell: takes a line about how far it is, often.

    Raises:
        InputError: as `match_rows`, or a row that is not finite or of another width (file and item named).
    """
    places = {name: _Places(source, match_rows(source, items), len(items), scratch) for name, source in sources.items()}
    chunks = [chunk for source in sources.values() for chunk in source.chunks]
    total, done = sum(source.rows for source in sources.values()), 0
    for position, table in ray_tasks.map_tables(feature_files.read_feature_chunk, chunks):
        name = chunks[position].source
        if "bad_row" in table.column_names:
            row, problem = table["bad_row"][0].as_py(), table["problem"][0].as_py()
            uri, place = sources[name].locate(row)
            raise InputError(f"{uri}: the vector of item {sources[name].id_of(row)!r} (row {place}) {problem}")
        places[name].add(table)
        done += table.num_rows
        tell(f"feature rows read: {done:,} of {total:,}")
    for name, source in sources.items():
        if not places[name].present.any():
            raise InputError(f"{', '.join(source.uris[:3])}: no item of the interactions has a vector")
    return {name: place.finish() for name, place in places.items()}


class _Places:
    """Vectors on their way to their items' places.

    Rows come in the order of the files, which is random as items go; put there one by one, they would touch every page
    of the array again and again. So they are first dealt to ranges of items that fit memory, then ordered in each.

    Args:
        index: catalog index of each raw row, -1 for none.
    """

    def __init__(self, source: Source, index: np.ndarray, items: int, scratch: Scratch):
        self.index, self.scratch = index, scratch
        self.present = np.zeros(items, bool)
        row_bytes = source.width * np.dtype(source.dtype).itemsize
        self.rows = scratch.rows(4 * row_bytes + 8)  # of a range: it and its copy, while it is ordered, take half
        sizes = [min(self.rows, items - first) for first in range(0, items, self.rows)]
        self.ranges = Buckets(scratch, np.array(sizes), [np.int32, (source.dtype, source.width)])
        self.pending = 0

    def add(self, table: pa.Table) -> None:
        where = self.index[table["row"].to_numpy()]
        known = where >= 0
        matrix = pc.list_flatten(table["vector"]).combine_chunks().to_numpy(zero_copy_only=False)
        matrix, where = matrix.reshape(len(where), -1)[known], where[known]
        self.ranges.add(where // self.rows, where, matrix)
        self.present[where] = True
        self.pending += matrix.nbytes
        if self.pending >= self.scratch.memory_bytes // 8:
            self.scratch.release()
            self.pending = 0

    def finish(self) -> Gathered:
        """The vectors at their places; zeros where there is none."""
        items, vectors = self.ranges.columns
        for number, first in enumerate(self.ranges.starts[:-1]):
            where, rows = self.ranges.bucket(number)
            rows = np.array(rows)
            vectors[first : self.ranges.starts[number + 1]] = 0
            vectors[where] = rows
            self.scratch.release()
        self.scratch.discard(items)
        return Gathered(vectors, self.present, int(np.sum(self.index < 0)), self.scratch)


def fit_feature_transform(gathered: Gathered, pca: int | None = None) -> FeatureTransform:
    """Statistics over the items that have a vector, in float64, from one pass.

    Sums are taken around the first vector: this keeps digits where the mean is large, and makes the variance of a
    constant dimension exactly zero.
    """
    width = gathered.vectors.shape[1]
    shift = gathered.vectors[np.argmax(gathered.present)].astype(np.float64)
    count, total = 0, np.zeros(width)
    squares = np.zeros((width, width) if pca else width)  # the Gram matrix, or its diagonal
    for block in gathered.blocks():
        x = gathered.vectors[block][gathered.present[block]].astype(np.float64) - shift
        count += len(x)
        total += x.sum(axis=0)
        squares += x.T @ x if pca else np.einsum("nd,nd->d", x, x)
    mean = total / count
    if not pca:
        return FeatureTransform(shift + mean, np.sqrt(np.maximum(squares / count - mean**2, 0)))
    return _principal(shift + mean, squares / count - np.outer(mean, mean), pca)


def write_features(
    writer: CatalogWriter,
    name: str,
    gathered: Gathered,
    transform: FeatureTransform,
    scratch: Scratch,
    tell: ProgressCallback = no_progress,
) -> tuple[ModalityEntry, np.ndarray]:
    """Write a modality's files; also returns its features, float16 [items, width], in scratch."""
    items = len(gathered.present)
    out = scratch.array((items, transform.width), np.float16)
    for block in gathered.blocks():
        present = gathered.present[block]
        out[block][present] = transform.apply(gathered.vectors[block][present])
        tell(f"features standardised: {name}, {block.stop:,} of {items:,}")
    for part, first in enumerate(range(0, items, FEATURE_ROWS)):
        writer.features(name, part, first, out[first : first + FEATURE_ROWS])
        scratch.release()
        tell(f"features written: {name}, {min(first + FEATURE_ROWS, items):,} of {items:,}")
    transform.save(writer, name)
    entry = ModalityEntry(
        dim=transform.width,
        raw_dim=gathered.vectors.shape[1],
        missing=int(np.sum(~gathered.present)),
        explained_variance=transform.explained_variance,
    )
    return entry, out


def _principal(mean: np.ndarray, covariance: np.ndarray, width: int) -> FeatureTransform:
    """Leading axes of a covariance, by falling variance; each with its largest part positive, so signs are fixed."""
    variance, axes = np.linalg.eigh(covariance)
    variance = np.maximum(variance[::-1], 0)
    components = axes.T[::-1][:width]
    peak = np.abs(components).argmax(axis=1)
    components = components * np.sign(components[np.arange(width), peak])[:, None]
    kept, everything = variance[:width].sum(), variance.sum()
    scale = np.full(width, np.sqrt(kept / width))
    return FeatureTransform(
        mean, scale, np.ascontiguousarray(components), float(kept / everything) if everything else 1.0
    )


def _ids_like(source: Source, like: pa.DataType) -> pa.Array:
    """The source's ids as integers or strings, whichever the interactions have; ids of a text file may be either."""
    found = source.all_ids()
    if source.untyped and not ids.is_text(like):
        found = ids.from_text(found)
    if ids.is_text(found.type) == ids.is_text(like):
        return found
    if source.ids is None:
        raise InputError(
            f"{source.uris[0]} has rows by integer item id, but the interactions' item ids are strings; list each "
            f"row's id (data.features.{source.name}.ids)"
        )
    raise InputError(
        f"the item ids of {source.ids_uri or source.uris[0]} are {found.type}, but those of the interactions {like}; "
        "write them with one type"
    )
