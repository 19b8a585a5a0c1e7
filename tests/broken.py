"""Broken inputs for prepare, and the error messages that they must give."""

import io
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from gtc_dist.data.catalog import SPLITS
from gtc_dist.errors import InputError
from gtc_dist.prepare import build_catalog

ROWS = 36
PAIRS = np.random.default_rng(0).permutation(48)[:ROWS]  # of 6 users and 8 items
COLUMNS = {
    "user_id": (PAIRS // 8).tolist(),
    "item_id": (PAIRS % 8).tolist(),
    "time": list(range(ROWS)),
    "rating": [1.0, 2.0, 3.0] * 12,
    "x_label": [0] * 24 + [1] * 6 + [2] * 6,
}


def parquet(names: list[str] | None = None, rows: int = ROWS, **columns) -> bytes:
    """The interactions as Parquet, with some columns replaced."""
    sink = io.BytesIO()
    table = pa.table({**COLUMNS, **columns})
    pq.write_table((table if names is None else table.rename_columns(names)).slice(0, rows), sink)
    return sink.getvalue()


def replaced(column: str, row: int, value) -> list:
    """A column with another value in one row, counted from 1."""
    values = list(COLUMNS[column])
    values[row - 1] = value
    return values


def text(sep: str = ",", **columns) -> bytes:
    table = {**COLUMNS, **columns}
    return "".join(
        sep.join(map(str, row)) + "\n" for row in [tuple(table), *zip(*table.values(), strict=True)]
    ).encode()


def npy(array) -> bytes:
    sink = io.BytesIO()
    np.save(sink, array, allow_pickle=True)
    return sink.getvalue()


def npz(**arrays) -> bytes:
    sink = io.BytesIO()
    np.savez(sink, **arrays)
    return sink.getvalue()


def saved(value) -> bytes:
    """A value in a `.pt` file."""
    sink = io.BytesIO()
    torch.save(value, sink)
    return sink.getvalue()


def vectors(item_ids, rows: list, type: pa.DataType | None = None, names=("item_id", "vector")) -> bytes:
    sink = io.BytesIO()
    columns = [pa.array(item_ids), pa.array(rows, type or pa.list_(pa.float32()))]
    pq.write_table(pa.table(columns, names=list(names)), sink)
    return sink.getvalue()


def patched(data: bytes, start: int, stop: int) -> bytes:
    return data[:start] + b"\xff" * len(data[start:stop]) + data[stop:]


VECTORS = np.random.default_rng(1).normal(size=(8, 3)).astype(np.float32)
GOOD, CSV, NPY = parquet(), text(), npy(VECTORS)
JSON = b'{"user_id": 1, "item_id": 2}\n'
EIGHT = vectors(range(8), VECTORS.tolist())
TIME, RATING, LABEL = "data.interactions.time=time", "data.interactions.rating=rating", "data.split.method=label"
BY_TIME = [TIME, "data.split.method=global_time"]
AS_PARQUET = "data.features.v.path=v.parquet"
GIVEN = ["data.split.method=given", *(f"data.split.{name}=[{name}.parquet]" for name in SPLITS)]
FOLDER = object()  # make a folder instead of a file
NO_NUL = "has NUL bytes, as UTF-16 or a broken file has; write it as UTF-8"


@dataclass
class Case:
    """Files below data.raw (a.* are interactions), overrides, and parts of the expected message, in which {raw} is the
    folder. Valid interactions or vectors are added if the case has none."""

    files: dict = field(default_factory=dict)
    says: list[str] = field(default_factory=list)
    overrides: list[str] = field(default_factory=list)

    def write(self, folder: Path) -> tuple[list[str], str]:
        """The command's arguments, and the folder of the raw files."""
        raw = folder / "raw"
        files = {"v.npy": NPY, **self.files}
        if not any(name.startswith(("a.", "train")) for name in files):
            files["a.parquet"] = GOOD
        for name, data in files.items():
            path = raw / name
            path.parent.mkdir(exist_ok=True)
            path.mkdir() if data is FOLDER else path.write_bytes(data)
        config = folder / "c.yaml"
        config.write_text(
            f"data: {{raw: {raw}, catalog: {folder}/catalog, interactions: {{files: ['a.*']}}, "
            "features: {v: {path: v.npy}}, split: {valid_share: 0.2, test_share: 0.2}}\n"
            f"run: {{storage: {folder}/runs, name: x}}\n"
        )
        return ["--config", str(config), *self.overrides], str(raw)


def refused(case: Case, folder: Path) -> str:
    """The command's error message; it leaves no catalog."""
    arguments, raw = case.write(folder)
    with pytest.raises(InputError) as caught:
        build_catalog.main(arguments)
    assert type(caught.value) is InputError
    assert not (folder / "catalog").exists()
    for part in case.says:
        assert part.replace("{raw}", raw) in str(caught.value)
    assert "\0" not in str(caught.value)
    return str(caught.value)


def one(name: str, data, *says: str, overrides=()) -> Case:
    """One broken file, which the message names."""
    return Case({name: data}, [f"{{raw}}/{name}", *says], list(overrides))


def listed(name: str, data: bytes, *says: str) -> Case:
    """A broken id file for v.npy."""
    return Case({name: data}, [f"{{raw}}/{name}", *says], [f"data.features.v.ids={name}"])


NO_PARQUET = "is not readable as parquet (repair it or write it again)"
NO_VECTORS = "is not a readable Parquet file (repair it or write it again)"
