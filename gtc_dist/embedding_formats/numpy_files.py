"""NumPy files of an export: users.npy and items.npy, and the ids of their rows.

Integer ids are in users_ids.npy and items_ids.npy. Text ids are JSON lines, users_ids.jsonl and items_ids.jsonl, a text
a line: arrays of texts would need either pickle or the length of the longest id for every one.
"""

from dataclasses import asdict

import numpy as np
import pyarrow as pa

from gtc_dist.data import storage
from gtc_dist.embedding_formats.exported_rows import RowsDone, exported_rows, json_ids


def write_numpy(
    out: str, kind: str, parts: list[str], rows: int, dim: int, dtype: str, progress: RowsDone
) -> dict[str, dict]:
    """Write the rows of some Parquet files, [rows, dim] of `dtype`, and their ids; returns the manifest's entries."""
    name = f"{kind}.npy"
    with storage.create(storage.join(out, name)) as file:
        write_header(file, (rows, dim), np.dtype(dtype))
        for _, vectors in exported_rows(out, parts, progress=progress):
            file.write(np.ascontiguousarray(vectors).reshape(-1).view(np.uint8).data)
    return {name: {"rows": rows} | asdict(file.written)} | write_ids(out, kind, parts, rows)


def write_ids(out: str, kind: str, parts: list[str], rows: int) -> dict[str, dict]:
    """Write the ids of some Parquet files in the order of their rows; returns the manifest's entry."""
    is_text = ids_are_texts(out, parts)
    name = f"{kind}_ids.jsonl" if is_text else f"{kind}_ids.npy"
    with storage.create(storage.join(out, name)) as file:
        if not is_text:
            write_header(file, (rows,), np.dtype(np.int64))
        for ids, _ in exported_rows(out, parts, ("id",)):
            if is_text:
                file.write("".join(f"{text}\n" for text in json_ids(ids)).encode())
            else:
                file.write(ids.to_numpy().astype(np.int64).view(np.uint8).data)
    return {name: {"rows": rows} | asdict(file.written)}


def write_header(file, shape: tuple[int, ...], dtype: np.dtype) -> None:
    """Header of a `.npy` file, whose rows follow."""
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)


def ids_are_texts(out: str, parts: list[str]) -> bool:
    """Whether the ids of some Parquet files are texts, not integers."""
    first = next((ids for ids, _ in exported_rows(out, parts, ("id",))), pa.array([], pa.int64()))
    return not pa.types.is_integer(first.type)
