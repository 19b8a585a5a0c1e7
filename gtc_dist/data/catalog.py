"""The catalog: what prepare writes and everything else reads.

    manifest.json                                    written last; a catalog without it does not exist
    users/part-*.parquet  items/part-*.parquet       index:int64, id:<original type>, sorted by index
    interactions/{train,valid,test}/part-*.parquet   user:int32, item:int32
    features/<modality>/part-*.parquet               item:int32, vector:fixed_size_list<float16>[d], sorted by item
    features/<modality>/{mean,std,components}.npy    the transform that raw features went through
    graph/<name>.{indptr,indices,weight}.npy         CSC: for destination c, sources indices[indptr[c]:indptr[c+1]]

Graphs, all from train interactions or content: `item_user` (destination user, sources its items), `user_item`
(destination item, sources its users), both weighted 1/sqrt(degree * degree); `item_item` (weights are similarities
normalised to sum to one) and `user_user` (softmax of co-interaction counts).

User and item indexes are a seeded random permutation of the sorted ids, so contiguous ranges are balanced.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from gtc_dist.data import formats, storage
from gtc_dist.errors import InputError

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
BUILDING = "building.json"  # stands in a folder while prepare writes into it
SPLITS = ("train", "valid", "test")
GRAPHS = ("item_user", "user_item", "item_item", "user_user")
FEATURE_ROWS = 1 << 16  # rows of a feature file
INTERACTION_ROWS = 1 << 20  # rows of an interaction file


class FileEntry(BaseModel):
    model_config = ConfigDict(extra="forbid")
    rows: int
    bytes: int
    sha256: str
    first: int | None = None  # first index in it, for files that are sorted by index


class ModalityEntry(BaseModel):
    model_config = ConfigDict(extra="forbid")
    dim: int  # width in the catalog
    raw_dim: int
    missing: int  # items without a vector, which got the mean
    explained_variance: float = 1.0  # share kept by PCA


class Manifest(BaseModel):
    """Counts, widths and files of a catalog."""

    model_config = ConfigDict(extra="forbid")
    schema_version: int = SCHEMA_VERSION
    fingerprint: str  # of the configuration and the raw files that it was made from
    users: int
    items: int
    interactions: dict[str, int]  # per split
    cold_items: int  # items without a train interaction
    modalities: dict[str, ModalityEntry]
    graphs: dict[str, int]  # name -> edges
    graph_quality: dict[str, float] = {}  # measures of the graphs that were built approximately, such as a recall
    dropped: dict[str, int]  # raw rows that did not make it, by reason
    files: dict[str, FileEntry]

    @field_validator("files", "modalities")
    @classmethod
    def _inside(cls, named: dict) -> dict:
        """Names are paths below the catalog, or parts of such."""
        for name in named:
            if "://" in name or "\\" in name or name.startswith("/") or ".." in name.split("/"):
                raise ValueError(f"the name {name!r} leads out of the catalog")
        return named


@dataclass(frozen=True)
class CSC:
    """A weighted graph by destination: sources of c are `indices[indptr[c]:indptr[c + 1]]`.

    indptr int64 [destinations + 1], indices int32 [E], weight float32 [E]; sources are sorted in each destination.
    """

    indptr: np.ndarray
    indices: np.ndarray
    weight: np.ndarray

    @property
    def degree(self) -> np.ndarray:
        return np.diff(self.indptr)


class CatalogWriter:
    """Writes a catalog file by file and its manifest last. Callers have checked that the folder may be written."""

    def __init__(self, uri: str):
        self.uri = uri
        self.files: dict[str, FileEntry] = {}
        storage.write_json(storage.join(uri, BUILDING), {"schema_version": SCHEMA_VERSION})

    def table(self, name: str, table: pa.Table, first: int | None = None) -> None:
        written = formats.write_table(storage.join(self.uri, name), table)
        self.files[name] = FileEntry(rows=table.num_rows, bytes=written.bytes, sha256=written.sha256, first=first)

    def array(self, name: str, array: np.ndarray) -> None:
        written = formats.write_array(storage.join(self.uri, name), array)
        self.files[name] = FileEntry(rows=len(array), bytes=written.bytes, sha256=written.sha256)

    def graph(self, name: str, graph: CSC) -> None:
        for part, array in (("indptr", graph.indptr), ("indices", graph.indices), ("weight", graph.weight)):
            self.array(f"graph/{name}.{part}.npy", array)

    def interactions(self, split: str, user: np.ndarray, item: np.ndarray) -> None:
        for part, start in enumerate(range(0, max(len(user), 1), INTERACTION_ROWS)):
            rows = slice(start, start + INTERACTION_ROWS)
            columns = {"user": user[rows].astype(np.int32), "item": item[rows].astype(np.int32)}
            self.table(f"interactions/{split}/part-{part:05d}.parquet", pa.table(columns))

    def ids(self, kind: str, ids: pa.Array) -> None:
        """The original ids of `users` or `items` in index order."""
        for part, start in enumerate(range(0, max(len(ids), 1), INTERACTION_ROWS)):
            rows = ids.slice(start, INTERACTION_ROWS)
            index = np.arange(start, start + len(rows), dtype=np.int64)
            self.table(f"{kind}/part-{part:05d}.parquet", pa.table({"index": index, "id": rows}), first=start)

    def features(self, modality: str, part: int, first: int, vectors: np.ndarray) -> None:
        """One file of a modality: rows `first` to `first + len(vectors)`; vectors float16 [n, d]."""
        column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), vectors.shape[1])
        item = np.arange(first, first + len(vectors), dtype=np.int32)
        self.table(
            f"features/{modality}/part-{part:05d}.parquet", pa.table({"item": item, "vector": column}), first=first
        )

    def finish(self, **fields) -> Manifest:
        manifest = Manifest(files=self.files, **fields)
        storage.write_json(storage.join(self.uri, MANIFEST), manifest.model_dump())
        fs, path = storage.filesystem(storage.join(self.uri, BUILDING))
        fs.rm_file(path)
        return manifest


class Catalog:
    """A whole catalog for reading.

    Args:
        uri: folder, local or in object storage.
        verify: `checksum` compares every file's SHA-256 with the manifest, `size` only names and sizes, `none` nothing
            (for ranks, after the driver has verified).

    Raises:
        InputError: no manifest, another schema version, or a file that does not match (named).
    """

    def __init__(self, uri: str, verify: str = "none"):
        self.uri = uri
        path = storage.join(uri, MANIFEST)
        if not storage.exists(path):
            half = storage.exists(storage.join(uri, BUILDING))
            state = "is half-written (prepare did not finish)" if half else "holds no catalog (no manifest.json)"
            raise InputError(f"{uri} {state}; run python -m gtc_dist.prepare first")
        try:
            self.manifest = Manifest.model_validate(storage.read_json(path))
        except ValidationError as error:
            raise InputError(f"{path} is not a catalog manifest: {error}") from None
        if self.manifest.schema_version != SCHEMA_VERSION:
            raise InputError(
                f"{path} has schema version {self.manifest.schema_version}, this program reads {SCHEMA_VERSION}; "
                "run prepare again with --force"
            )
        if verify != "none":
            storage.check_files(
                uri,
                {name: storage.Written(entry.bytes, entry.sha256) for name, entry in self.manifest.files.items()},
                checksum=verify == "checksum",
            )

    @property
    def users(self) -> int:
        return self.manifest.users

    @property
    def items(self) -> int:
        return self.manifest.items

    def modalities(self, wanted: list[str] | None = None) -> dict[str, int]:
        """Name -> width of the wanted modalities (None: all). Raises InputError for one that the catalog lacks."""
        have = self.manifest.modalities
        for name in wanted or []:
            if name not in have:
                raise InputError(
                    f"model.modalities names {name!r}, which the catalog {self.uri} lacks; "
                    f"it has: {', '.join(have) or 'none'}"
                )
        return {name: have[name].dim for name in (have if wanted is None else wanted)}

    def names(self, prefix: str) -> list[str]:
        """Files of the manifest below a folder, sorted."""
        return sorted(name for name in self.manifest.files if name.startswith(prefix))

    def interaction_uris(self, split: str) -> list[str]:
        return [storage.join(self.uri, name) for name in self.names(f"interactions/{split}/")]

    def interaction_files(self, split: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """A split's interactions file by file: user int32 [n], item int32 [n]."""
        for uri in self.interaction_uris(split):
            table = formats.read_table(uri)
            yield table["user"].to_numpy(), table["item"].to_numpy()

    def interactions(self, split: str) -> tuple[np.ndarray, np.ndarray]:
        """All interactions of a split: user int32 [E], item int32 [E], in file order."""
        users, items = zip(*self.interaction_files(split), strict=True)
        return np.concatenate(users), np.concatenate(items)

    def ids(self, kind: str, start: int = 0, stop: int | None = None) -> pa.Array:
        """Original ids of `users` or `items` [start, stop), in index order; reads only the files that hold them."""
        stop = getattr(self, kind) if stop is None else stop
        names = self.names(f"{kind}/")
        ranges = [(self.manifest.files[name].first, self.manifest.files[name].rows) for name in names]
        wanted = [n for n, (first, rows) in enumerate(ranges) if first < stop and first + rows > start]
        parts = []
        for n in wanted or [0]:
            column = formats.read_table(storage.join(self.uri, names[n]), ["id"])["id"]
            parts.append(column.slice(max(start - ranges[n][0], 0), max(stop - max(start, ranges[n][0]), 0)))
        return pa.chunked_array([chunk for part in parts for chunk in part.chunks], parts[0].type).combine_chunks()

    def features(self, modality: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Standardised features of items [start, stop) as float16 [n, d]; fetches the row groups that hold them."""
        stop = self.items if stop is None else stop
        dim = self.manifest.modalities[modality].dim
        out = np.empty((max(stop - start, 0), dim), np.float16)
        for name in self.names(f"features/{modality}/part-"):
            entry = self.manifest.files[name]
            first, last = max(entry.first, start), min(entry.first + entry.rows, stop)
            if first < last:
                uri = storage.join(self.uri, name)
                out[first - start : last - start] = formats.read_vectors(
                    uri, "vector", first - entry.first, last - entry.first
                )
        return out

    def graph(self, name: str) -> CSC:
        """One of `GRAPHS`."""
        arrays = [
            formats.read_array(storage.join(self.uri, f"graph/{name}.{part}.npy"))
            for part in ("indptr", "indices", "weight")
        ]
        return CSC(*arrays)
