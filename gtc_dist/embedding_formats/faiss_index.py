"""FAISS index of an export's items, by inner product: items.faiss.

Up to FLAT_ITEMS items it is flat, which is exact; up to HNSW_ITEMS a graph (HNSW), which is quick to search and slow
to build; beyond them inverted lists (IVF). How far the last two search, `efSearch` or `nprobe`, is stored in the index:
the least that finds RECALL of the best RECALL_TOP items of a sample of the users, compared with an exact search.

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
from gtc_dist.embedding_formats.numpy_files import write_ids

INDEX = "items.faiss"
IndexKind = Literal["flat", "hnsw", "ivf"]
INDEX_KINDS = ("flat", "hnsw", "ivf")
FLAT_ITEMS, HNSW_ITEMS = 50_000, 200_000
RECALL_USERS, RECALL_TOP, RECALL = 256, 20, 0.95
LINKS, CONSTRUCTION = 32, 80  # of HNSW: neighbours of an item, and candidates while it is built
TRAIN_ROWS = 64  # of IVF: items for each list, by which the lists are chosen


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
    queries = sample_rows(out, user_parts, RECALL_USERS, dim)
    index = empty_index(kind, dim, rows)
    if not index.is_trained:
        index.train(sample_rows(out, parts, TRAIN_ROWS * index.nlist, dim))
    filled = index if files else faiss.IndexIDMap(index)  # which has no copy of `index`
    best = BestRows(queries, RECALL_TOP)
    for ids, vectors in exported_rows(out, parts, progress=progress):
        vectors = np.ascontiguousarray(vectors, np.float32)
        if files:
            index.add(vectors)
        else:
            filled.add_with_ids(vectors, ids.to_numpy().astype(np.int64))
        if kind != "flat":
            best.add(vectors)
    description = {"kind": kind, "metric": "inner product", "ids": next(iter(files), "original")}
    if kind != "flat" and len(queries) and rows:
        description |= tune_search(index, kind, best)
    with storage.create(storage.join(out, INDEX)) as file:
        faiss.write_index(filled, faiss.PyCallbackIOWriter(file.write, storage.PART_BYTES))
    return files | {INDEX: {"rows": filled.ntotal} | asdict(file.written)}, description


def chosen_kind(items: int) -> IndexKind:
    """The kind of index for a number of items."""
    return "flat" if items <= FLAT_ITEMS else "hnsw" if items <= HNSW_ITEMS else "ivf"


def empty_index(kind: IndexKind, dim: int, rows: int) -> Any:
    """An index without items, for about `rows` of them."""
    if kind == "flat":
        return faiss.IndexFlatIP(dim)
    if kind == "hnsw":
        index = faiss.IndexHNSWFlat(dim, LINKS, faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction = CONSTRUCTION
        return index
    lists = max(min(round(4 * rows**0.5), rows // TRAIN_ROWS), 1)
    return faiss.IndexIVFFlat(faiss.IndexFlatIP(dim), dim, lists, faiss.METRIC_INNER_PRODUCT)


def tune_search(index: Any, kind: IndexKind, best: "BestRows") -> dict[str, Any]:
    """Set how far an approximate index searches: the least of doubling values with recall RECALL, or else all of them.
    Returns the parameter, its value and the recall, for the description."""
    parameter, value, most = (
        ("nprobe", max(index.nlist // 256, 1), index.nlist) if kind == "ivf" else ("efSearch", 32, 4096)
    )
    holder = index if kind == "ivf" else index.hnsw
    while True:
        setattr(holder, parameter, min(value, most))
        found = index.search(best.queries, best.top)[1]
        recall = float(np.mean([len(np.intersect1d(a, b)) / len(b) for a, b in zip(found, best.rows, strict=True)]))
        if recall >= RECALL or value >= most:
            return {
                parameter: getattr(holder, parameter),
                f"recall@{RECALL_TOP}": recall,
                "recall_users": len(best.rows),
            }
        value *= 2


class BestRows:
    """The best rows for some queries by exact search, over batches of rows that are added one after the other.

    Args:
        queries: float32 [n, dim].
        top: how many rows are wanted.
    """

    def __init__(self, queries: np.ndarray, top: int):
        self.queries, self.wanted, self.seen = queries, top, 0
        self.scores = np.empty((len(queries), 0), np.float32)
        self.rows = np.empty((len(queries), 0), np.int64)

    @property
    def top(self) -> int:
        return self.rows.shape[1]

    def add(self, vectors: np.ndarray) -> None:
        """The next rows, float32 [m, dim]."""
        if len(self.queries):
            found = faiss.knn(self.queries, vectors, min(self.wanted, len(vectors)), faiss.METRIC_INNER_PRODUCT)
            scores = np.concatenate([self.scores, found[0]], axis=1)
            rows = np.concatenate([self.rows, found[1] + self.seen], axis=1)
            order = np.argsort(-scores, axis=1, kind="stable")[:, : self.wanted]
            self.scores, self.rows = np.take_along_axis(scores, order, 1), np.take_along_axis(rows, order, 1)
        self.seen += len(vectors)


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
