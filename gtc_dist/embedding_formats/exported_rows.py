"""The rows of an export, read from its Parquet files some at a time."""

import json
from collections.abc import Callable, Iterator

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from gtc_dist.data import formats, storage

KINDS_OF_ROWS = ("users", "items")
BATCH_ROWS = formats.VECTOR_ROW_GROUP
RowsDone = Callable[[int], None]
Batches = Iterator[tuple[pa.Array, np.ndarray]]


def part_names(files: dict[str, dict], kind: str) -> list[str]:
    """The Parquet files of users or items in the order of the rows of every other format: by name."""
    return sorted(name for name in files if name.startswith(f"{kind}/") and name.endswith(".parquet"))


def exported_rows(
    out: str,
    names: list[str],
    columns: tuple[str, ...] = ("id", "embedding"),
    progress: RowsDone | None = None,
) -> Batches:
    """Ids and embeddings [n, width] of some files, about BATCH_ROWS rows at a time; without `embedding` among the
    columns the latter are empty. `progress` is called before each with the number of rows so far."""
    rows = 0
    for name in names:
        uri = storage.join(out, name)
        with storage.open_input(uri) as stream, formats.parsing(uri, "a readable Parquet file"):
            for batch in pq.ParquetFile(stream).iter_batches(BATCH_ROWS, columns=list(columns)):
                if progress is not None:
                    progress(rows)
                rows += len(batch)
                if "embedding" not in columns:
                    yield batch["id"], np.empty((len(batch), 0), np.float32)
                    continue
                values = batch["embedding"].flatten().to_numpy(zero_copy_only=False)
                yield batch["id"], values.reshape(len(batch), -1)


def json_ids(ids: pa.Array) -> list[str]:
    """The ids as JSON values."""
    return [json.dumps(value, ensure_ascii=False) for value in ids.to_pylist()]
