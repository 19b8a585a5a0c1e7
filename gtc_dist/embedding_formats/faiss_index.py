"""FAISS index of an export's items, by inner product: items.faiss.

Up to FLAT_ITEMS items it is flat, which is exact; beyond them it has inverted lists (IVF, `inverted_lists.py`). A graph
(HNSW) is made on request: it found fewer of the best items in more time (docs/scaling.md). How far the last two search,
`nprobe` or `efSearch`, is stored in the index: the least that finds RECALL of the best RECALL_TOP items of a sample of
the users, compared with an exact search.

Integer ids are in the index. Where ids are texts, or negative, which FAISS takes for "none", it returns row numbers,
and items_ids.jsonl or items_ids.npy has the id of each row.

The index, with all items, is held in memory; everything else is read some rows at a time.
"""

from dataclasses import asdict
from typing import Any, Literal

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from gtc_dist.data import storage
from gtc_dist.embedding_formats.exported_rows import RowsDone, exported_rows
from gtc_dist.embedding_formats.inverted_lists import FIT_ITEMS, InvertedLists, list_count
from gtc_dist.embedding_formats.numpy_files import write_ids

INDEX = "items.faiss"
IndexKind = Literal["flat", "hnsw", "ivf"]
INDEX_KINDS = ("flat", "hnsw", "ivf")
FLAT_ITEMS = 50_000
RECALL_USERS, RECALL_TOP, RECALL = 256, 20, 0.95
FIT_USERS = 8192  # whose scores decide on the inverted lists
# of HNSW: neighbours of an item, candidates while it is built, and the most candidates of a search
LINKS, CONSTRUCTION, MOST_CANDIDATES = 32, 80, 4096


def write_index(
    out: str,
    parts: list[str],
    user_parts: list[str],
    rows: int,
    dim: int,
    kind: IndexKind | None = None,
    progress: RowsDone | None = None,
) -> tuple[dict[str, dict], dict[str, Any]]:
    """Write the index of the items of some Parquet files.

    Args:
        user_parts: files of the users, whose first rows are the sample.
        kind: None: by the number of items.

    Returns:
        the manifest's entries of the files, and a description: kind, metric, ids (`original`, or the file that has
        those of the rows), and for an approximate index its parameter and recall@20.
    """
    kind = kind or chosen_kind(rows)
    files = {} if has_integer_ids(out, parts) else write_ids(out, "items", parts, rows)
    users = sample_rows(out, user_parts, RECALL_USERS + FIT_USERS, dim)
    best, first = BestRows(users[:RECALL_USERS], RECALL_TOP), 0
    if kind == "ivf":
        sample = sample_rows(out, parts, FIT_ITEMS * list_count(rows), dim)
        others = users[RECALL_USERS:]  # so that the recall is of users who did not decide on the lists
        builder = InvertedLists(sample, others if len(others) >= RECALL_USERS else users, list_count(rows))
    else:
        builder = MappedIndex(kind, dim)
    for ids, vectors in exported_rows(out, parts, progress=progress):
        vectors, last = np.ascontiguousarray(vectors, np.float32), first + len(vectors)
        names = np.arange(first, last) if files else ids.to_numpy().astype(np.int64)
        builder.add(vectors, names)
        if kind != "flat":
            best.add(vectors, names)
        first = last
    index = builder.finish()
    description = {"kind": kind, "metric": "inner product", "ids": next(iter(files), "original")}
    if kind != "flat" and len(users) and rows:
        description |= tune_search(index, kind, best)
    with storage.create(storage.join(out, INDEX)) as file:
        faiss.write_index(index, faiss.PyCallbackIOWriter(file.write, storage.PART_BYTES))
    return files | {INDEX: {"rows": index.ntotal} | asdict(file.written)}, description


def chosen_kind(items: int) -> IndexKind:
    """The kind of index for a number of items."""
    return "flat" if items <= FLAT_ITEMS else "ivf"


class MappedIndex:
    """A flat index or a graph that is filled some rows at a time."""

    def __init__(self, kind: IndexKind, dim: int):
        self.inner = faiss.IndexFlatIP(dim)
        if kind == "hnsw":
            self.inner = faiss.IndexHNSWFlat(dim, LINKS, faiss.METRIC_INNER_PRODUCT)
            self.inner.hnsw.efConstruction = CONSTRUCTION
        self.index = faiss.IndexIDMap(self.inner)  # refers to the inner one

    def add(self, vectors: np.ndarray, ids: np.ndarray) -> None:
        """Add rows, float32 [n, dim], under their ids, int64 [n]."""
        self.index.add_with_ids(vectors, ids)

    def finish(self) -> Any:
        """The index."""
        return self.index


def tune_search(index: Any, kind: IndexKind, best: "BestRows") -> dict[str, Any]:
    """Set how far an approximate index searches: the least of doubling values with recall RECALL, or else the most.
    Returns the parameter, its value and the recall, for the description."""
    name, value, most = ("nprobe", 1, index.nlist) if kind == "ivf" else ("efSearch", 32, MOST_CANDIDATES)
    holder = index if kind == "ivf" else faiss.downcast_index(index.index).hnsw
    while True:
        setattr(holder, name, min(value, most))
        found = index.search(best.queries, best.ids.shape[1])[1]
        recall = float(np.mean([len(np.intersect1d(a, b)) / len(b) for a, b in zip(found, best.ids, strict=True)]))
        if recall >= RECALL or value >= most:
            return {name: min(value, most), f"recall@{RECALL_TOP}": recall, "recall_users": len(best.ids)}
        value *= 2


class BestRows:
    """The best rows for some queries by exact search, over batches of rows that are added one after the other.

    Args:
        queries: float32 [n, dim].
        top: how many rows are wanted.

    Attributes:
        ids: int64 [n, at most top], best first.
    """

    def __init__(self, queries: np.ndarray, top: int):
        self.queries, self.wanted = queries, top
        self.scores = np.empty((len(queries), 0), np.float32)
        self.ids = np.empty((len(queries), 0), np.int64)

    def add(self, vectors: np.ndarray, ids: np.ndarray) -> None:
        """The next rows, float32 [m, dim], and their ids, int64 [m]."""
        if not len(self.queries):
            return
        found, at = faiss.knn(self.queries, vectors, min(self.wanted, len(vectors)), faiss.METRIC_INNER_PRODUCT)
        scores, named = np.concatenate([self.scores, found], axis=1), np.concatenate([self.ids, ids[at]], axis=1)
        order = np.argsort(-scores, axis=1, kind="stable")[:, : self.wanted]
        self.scores, self.ids = np.take_along_axis(scores, order, 1), np.take_along_axis(named, order, 1)


def sample_rows(out: str, parts: list[str], rows: int, dim: int) -> np.ndarray:
    """The first rows of some files, float32 [at most rows, dim]; a random sample, as the order of a catalog is."""
    taken, count = [np.empty((0, dim), np.float32)], 0
    for _, vectors in exported_rows(out, parts):
        taken.append(vectors[: rows - count].astype(np.float32))
        count += len(taken[-1])
        if count >= rows:
            break
    return np.concatenate(taken)


def has_integer_ids(out: str, parts: list[str]) -> bool:
    """Whether all ids are integers that FAISS can hold."""
    for ids, _ in exported_rows(out, parts, ("id",)):
        if not pa.types.is_integer(ids.type) or pc.min(ids).as_py() < 0:
            return False
    return True
