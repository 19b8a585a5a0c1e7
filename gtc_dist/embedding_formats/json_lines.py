"""JSON lines of an export, users.jsonl and items.jsonl: {"id": 17, "vector": [0.25, -1.5, ...]}, as vector databases
import them."""

from dataclasses import asdict

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from gtc_dist.data import storage
from gtc_dist.embedding_formats.exported_rows import RowsDone, exported_rows, json_ids

TEXT_VALUES = 1 << 22  # numbers that are written as text at once


def write_json_lines(out: str, kind: str, parts: list[str], rows: int, progress: RowsDone) -> dict[str, dict]:
    """Write the rows of some Parquet files; returns the manifest's entry."""
    name = f"{kind}.jsonl"
    with storage.create(storage.join(out, name)) as file:
        for ids, vectors in exported_rows(out, parts, progress=progress):
            step = max(TEXT_VALUES // max(vectors.shape[1], 1), 1)
            for first in range(0, len(ids), step):
                file.write(rows_as_json(ids[first : first + step], vectors[first : first + step]))
    return {name: {"rows": rows} | asdict(file.written)}


def rows_as_json(ids: pa.Array, vectors: np.ndarray) -> bytes:
    """A line for each row. Numbers have as many digits as a float32 needs."""
    texts = pc.cast(pa.array(np.ascontiguousarray(vectors, np.float32).reshape(-1)), pa.string())
    offsets = pa.array(np.arange(len(vectors) + 1, dtype=np.int32) * vectors.shape[1])
    joined = pc.binary_join(pa.ListArray.from_arrays(offsets, texts), ",").to_pylist()
    pairs = zip(json_ids(ids), joined, strict=True)
    return "".join(f'{{"id": {key}, "vector": [{row}]}}\n' for key, row in pairs).encode()
