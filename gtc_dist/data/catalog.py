"""The catalog: prepare writes it, all other commands read it.

    manifest.json                                    written last; without it the catalog is incomplete
    users/part-*.parquet  items/part-*.parquet       index:int64, id:<original type>, sorted by index
    interactions/{train,valid,test}/part-*.parquet   user:int32, item:int32; where interactions weigh differently, train
                                                     and valid have final_weight:float32, too
    features/<modality>/part-*.parquet               item:int32, vector:fixed_size_list<float16>[d], sorted by item
    features/<modality>/{mean,std,components}.npy    transform from raw features, see feature_transform.py
    graph/<name>.{indptr,indices,weight}.npy         CSC: for destination c, sources indices[indptr[c]:indptr[c+1]]
    graph/{item_user,user_item}.degree.npy           sums of weights, only where interactions weigh differently
    interactions/rejected.parquet                    rows left out by `on_bad_rows: skip`: file, place, row, problem; at
                                                     most 10,000 of a file

Graphs from train interactions: `item_user` (destination user, sources its items) and `user_item` (destination item,
sources its users), both weighted 1/sqrt(degree * degree), and optionally `user_user` (softmax of co-interaction
counts). Graph from content: `item_item` (similarities, normalised to a sum of one).

An interaction may have a weight w: the product of 2^(-age / half-life) with `data.recency_half_life` and of what the
keys weight, event_weights and repeats of `data.interactions` say. Degrees are then sums of weights, the user-item edges
have the weights w/sqrt(degree * degree), and a common item of two users counts the product of their two weights.
`final_weight` is w if train and valid are trained on together (`train.final_fit`).

User and item indexes are a seeded random permutation of the sorted ids, so contiguous ranges are balanced.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from gtc_dist.data import formats, storage
from gtc_dist.data.output_folder import OutputFolder
from gtc_dist.errors import InputError

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
BUILDING = "building.json"  # exists while prepare writes the catalog
SPLITS = ("train", "valid", "test")
GRAPHS = ("item_user", "user_item", "item_item", "user_user")
FEATURE_ROWS = 1 << 16  # rows of a feature file
INTERACTION_ROWS = 1 << 20  # rows of an interaction file


class FileEntry(BaseModel):
    model_config = ConfigDict(extra="forbid")
    rows: int
    bytes: int
    sha256: str
    first: int | None = None  # first index in the file, for files sorted by index


class ModalityEntry(BaseModel):
    model_config = ConfigDict(extra="forbid")
    dim: int  # width in the catalog
    raw_dim: int
    missing: int  # items without a vector; they have the mean
    explained_variance: float = 1.0  # share of the variance kept by PCA


class Manifest(BaseModel):
    """Counts, widths and files of a catalog."""

    model_config = ConfigDict(extra="forbid")
    schema_version: int = SCHEMA_VERSION
    fingerprint: str  # hash of `inputs`
    inputs: dict[str, Any] = {}  # settings, and signatures of the raw files; empty in catalogs before 0.7.0
    users: int
    items: int
    interactions: dict[str, int]  # per split
    cold_items: int  # items without a train interaction
    modalities: dict[str, ModalityEntry]
    graphs: dict[str, int]  # name -> edges
    graph_quality: dict[str, float] = {}  # measures of approximate graphs, such as a recall
    dropped: dict[str, int]  # raw rows that were dropped, by reason
    files: dict[str, FileEntry]

    @field_validator("files", "modalities")
    @classmethod
    def _inside(cls, named: dict) -> dict:
        """Names are paths below the catalog, or parts of such paths."""
        for name in named:
            if "://" in name or "\\" in name or name.startswith("/") or ".." in name.split("/"):
                raise ValueError(f"the name {name!r} is a path outside the catalog")
        return named


@dataclass(frozen=True)
class CSC:
    """A weighted graph in compressed sparse columns: sources of destination c are `indices[indptr[c]:indptr[c + 1]]`.

    indptr int64 [destinations + 1], indices int32 [E], weight float32 [E]; the sources of a destination are sorted.
    weighted_degree: float64 [destinations], sums of the weights of each destination's interactions; None: every
        interaction weighs one, and always in graphs other than the user-item graph.
    """

    indptr: np.ndarray
    indices: np.ndarray
    weight: np.ndarray
    weighted_degree: np.ndarray | None = None

    @property
    def degree(self) -> np.ndarray:
        """In-degree of each destination, int64 [destinations]."""
        return np.diff(self.indptr)


def catalog_folder(uri: str) -> OutputFolder:
    return OutputFolder(
        uri,
        title="data.catalog",
        kind="a catalog",
        own_files="(users|items|interactions|features|graph)/.*",
        manifest=MANIFEST,
        marker=BUILDING,
        marker_content={"schema_version": SCHEMA_VERSION},
    )


class CatalogWriter:
    """Writes the files of a catalog and its manifest last. Callers check the output folder before."""

    def __init__(self, uri: str):
        self.uri = uri
        self.files: dict[str, FileEntry] = {}
        self.folder = catalog_folder(uri)
        self.folder.mark()

    def table(self, name: str, table: pa.Table, first: int | None = None) -> None:
        written = formats.write_table(storage.join(self.uri, name), table)
        self.files[name] = FileEntry(rows=table.num_rows, bytes=written.bytes, sha256=written.sha256, first=first)

    def array(self, name: str, array: np.ndarray) -> None:
        written = formats.write_array(storage.join(self.uri, name), array)
        self.files[name] = FileEntry(rows=len(array), bytes=written.bytes, sha256=written.sha256)

    def graph(self, name: str, graph: CSC) -> None:
        for part, array in (("indptr", graph.indptr), ("indices", graph.indices), ("weight", graph.weight)):
            self.array(f"graph/{name}.{part}.npy", array)
        if graph.weighted_degree is not None:
            self.array(f"graph/{name}.degree.npy", graph.weighted_degree)

    def interactions(
        self, split: str, user: np.ndarray, item: np.ndarray, final_weight: np.ndarray | None = None
    ) -> None:
        """Write a split; `final_weight`: float32 [E], None: all weigh one."""
        for part, start in enumerate(range(0, max(len(user), 1), INTERACTION_ROWS)):
            rows = slice(start, start + INTERACTION_ROWS)
            columns = {"user": user[rows].astype(np.int32), "item": item[rows].astype(np.int32)}
            columns |= {} if final_weight is None else {"final_weight": final_weight[rows]}
            self.table(f"interactions/{split}/part-{part:05d}.parquet", pa.table(columns))

    def ids(self, kind: str, ids: pa.Array) -> None:
        """Write the original ids of `users` or `items`, in index order."""
        for part, start in enumerate(range(0, max(len(ids), 1), INTERACTION_ROWS)):
            rows = ids.slice(start, INTERACTION_ROWS)
            index = np.arange(start, start + len(rows), dtype=np.int64)
            self.table(f"{kind}/part-{part:05d}.parquet", pa.table({"index": index, "id": rows}), first=start)

    def features(self, modality: str, part: int, first: int, vectors: np.ndarray) -> None:
        """Write one file of a modality: items [first, first + n), vectors float16 [n, d]."""
        column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), vectors.shape[1])
        item = np.arange(first, first + len(vectors), dtype=np.int32)
        self.table(
            f"features/{modality}/part-{part:05d}.parquet", pa.table({"item": item, "vector": column}), first=first
        )

    def finish(self, **fields) -> Manifest:
        """Write the manifest; `fields` are those of `Manifest` besides the files."""
        manifest = Manifest(files=self.files, **fields)
        self.folder.finish(manifest.model_dump())
        return manifest


class Catalog:
    """A complete catalog for reading.

    Args:
        uri: folder, local or in object storage.
        verify: `checksum` compares names, sizes and SHA-256 of all files with the manifest; `size` only names and
            sizes; `none` nothing (for ranks, after the driver has verified).

    Raises:
        InputError: no manifest, another schema version, or a file that does not match the manifest.
    """

    def __init__(self, uri: str, verify: str = "none"):
        self.uri = uri
        path = storage.join(uri, MANIFEST)
        if not storage.exists(path):
            incomplete = storage.exists(storage.join(uri, BUILDING))
            state = "is incomplete (prepare did not finish)" if incomplete else "holds no catalog (no manifest.json)"
            raise InputError(f"{uri} {state}; run python -m gtc_dist.prepare first")
        try:
            self.manifest = Manifest.model_validate(storage.read_json(path))
        except ValidationError as error:
            raise InputError(f"{path} is not a catalog manifest: {error}") from None
        if self.manifest.schema_version != SCHEMA_VERSION:
            raise InputError(
                f"{path} has schema version {self.manifest.schema_version}, this version reads {SCHEMA_VERSION}; "
                "run prepare again with --force"
            )
        if verify != "none":
            storage.check_files(
                uri,
                {name: storage.WrittenFile(entry.bytes, entry.sha256) for name, entry in self.manifest.files.items()},
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
        available = self.manifest.modalities
        for name in wanted or []:
            if name not in available:
                raise InputError(
                    f"model.modalities names {name!r}, which the catalog {self.uri} lacks; "
                    f"it has: {', '.join(available) or 'none'}"
                )
        return {name: available[name].dim for name in (available if wanted is None else wanted)}

    def names(self, prefix: str) -> list[str]:
        """Files of the manifest below a folder, sorted."""
        return sorted(name for name in self.manifest.files if name.startswith(prefix))

    def interaction_uris(self, *splits: str) -> list[str]:
        """URIs of the files of some splits' interactions."""
        return [storage.join(self.uri, name) for split in splits for name in self.names(f"interactions/{split}/")]

    def interaction_files(self, split: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Read a split's interactions file by file: user int32 [n], item int32 [n]."""
        for uri in self.interaction_uris(split):
            table = formats.read_table(uri)
            yield table["user"].to_numpy(), table["item"].to_numpy()

    def interactions(self, *splits: str) -> tuple[np.ndarray, np.ndarray]:
        """Read all interactions of some splits: user int32 [E], item int32 [E], in file order."""
        users, items = zip(*(pair for split in splits for pair in self.interaction_files(split)), strict=True)
        return np.concatenate(users), np.concatenate(items)

    def final_weights(self, *splits: str) -> np.ndarray:
        """Read the weights of interactions of train and valid where both are trained on: float32 [E], in file order.

        Raises:
            InputError: a catalog of 0.8.0 or earlier, which lacks them.
        """
        tables = [formats.read_table(uri) for uri in self.interaction_uris(*splits)]
        if not all("final_weight" in table.column_names for table in tables):
            raise InputError(
                f"train.final_fit needs the weights of valid, and the catalog {self.uri} was built by an earlier "
                "version, without them; run python -m gtc_dist.prepare --force with this configuration"
            )
        return np.concatenate([table["final_weight"].to_numpy() for table in tables])

    def ids(self, kind: str, start: int = 0, stop: int | None = None) -> pa.Array:
        """Read the original ids of `users` or `items` [start, stop), in index order; reads only the files needed."""
        stop = getattr(self, kind) if stop is None else stop
        names = self.names(f"{kind}/")
        ranges = [(self.manifest.files[name].first, self.manifest.files[name].rows) for name in names]
        wanted = [n for n, (first, rows) in enumerate(ranges) if first < stop and first + rows > start]
        parts = []
        for n in wanted or [0]:
            column = formats.read_table(storage.join(self.uri, names[n]), ["id"])["id"]
            parts.append(column.slice(max(start - ranges[n][0], 0), max(stop - max(start, ranges[n][0]), 0)))
        return pa.chunked_array([chunk for part in parts for chunk in part.chunks], parts[0].type).combine_chunks()

    def index_of(self, kind: str, ids: pa.Array | pa.ChunkedArray, allow_unknown: bool = False) -> np.ndarray:
        """Indexes int64 [n] of original ids of `users` or `items`; ids may have another type if they cast without loss.

        Args:
            allow_unknown: give ids that the catalog lacks the index -1 instead of raising.

        Raises:
            InputError: ids that cannot be cast to the catalog's type, or that the catalog lacks (the first are named,
                rows are counted from 1).
        """
        known = self.ids(kind)
        wanted = self.cast_ids(kind, ids)
        found = pc.fill_null(pc.index_in(wanted, value_set=known), -1)
        index = np.asarray(found).astype(np.int64)
        unknown = np.flatnonzero(index < 0)
        if len(unknown) and not allow_unknown:
            first = ", ".join(repr(wanted[row].as_py()) for row in unknown[:3].tolist())
            row = int(unknown[0]) + 1
            raise InputError(
                f"{len(unknown)} of {len(index)} ids are no {kind} of {self.uri}, such as {first} (row {row})"
            )
        return index

    def cast_ids(self, kind: str, ids: pa.Array | pa.ChunkedArray) -> pa.Array | pa.ChunkedArray:
        """Original ids of `users` or `items` in the catalog's type.

        Raises:
            InputError: an id has no such value. Texts match integers only as these are written: `007` is not 7.
        """
        if pa.types.is_dictionary(ids.type):
            ids = ids.cast(ids.type.value_type)
        type = self.ids(kind, 0, 0).type
        problem = f"the {kind} of {self.uri} have {type} ids, not {ids.type}"
        try:
            wanted = ids.cast(type)
            changed = pc.not_equal(wanted.cast(ids.type), ids)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            raise InputError(f"{problem}: {error}") from None
        row = pc.index(changed, pa.scalar(True)).as_py()
        if row >= 0:
            raise InputError(f"{problem}: {ids[row].as_py()!r} (row {row + 1}) would become {wanted[row].as_py()!r}")
        return wanted

    def features(self, modality: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Read the features of items [start, stop), float16 [n, d]; fetches only the row groups with these."""
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
        """Read one of `GRAPHS`."""
        names = [f"graph/{name}.{part}.npy" for part in ("indptr", "indices", "weight", "degree")]
        if names[-1] not in self.manifest.files:
            names.pop()
        return CSC(*(formats.read_array(storage.join(self.uri, name)) for name in names))
