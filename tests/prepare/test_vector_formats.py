"""The same vectors in every format give the same source; ids are never changed; what each format treats as its own."""

import gzip
import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from broken import npy, npz, saved
from raw_files import feature_matrix, inspect_visual
from test_feature_files import read_rows

from gtc_dist.data import storage
from gtc_dist.data.scratch import Scratch
from gtc_dist.errors import InputError
from gtc_dist.prepare import features
from gtc_dist.prepare.vector_formats import feature_chunk
from gtc_dist.raw.interaction_file import TEXT_BLOCK_BYTES

X = np.round(feature_matrix(rows=20), 3)
IDS = {
    "text": [f"00{n}" for n in range(20)],
    "number": list(range(100, 120)),
    "mixed": ["7", "007", *"abcdefghijklmnopqr"],
}


def as_text(rows: list, separator: str = " ", brackets: str = "[]") -> list[str]:
    return [f"{brackets[:1]}{separator.join(map(str, row))}{brackets[1:]}" for row in rows]


def table(ids: list, vectors: list, separator: str = ",") -> bytes:
    """A CSV or TSV file with a quoted column of texts."""
    return (
        separator.join(["item_id", "vector"]).encode()
        + b"\n"
        + "".join(f'{i}{separator}"{v}"\n' for i, v in zip(ids, vectors, strict=True)).encode()
    )


def wide(ids: list, rows: list, separator: str = ",") -> bytes:
    """A CSV or TSV file with one column for each dimension, before and behind others."""
    names = ["price", *(f"v{n}" for n in range(len(rows[0]))), "item_id", "title"]
    lines = [[9, *row, item, "x"] for item, row in zip(ids, rows, strict=True)]
    return "".join(separator.join(map(str, line)) + "\n" for line in [names, *lines]).encode()


def json_lines(ids: list, vectors: list) -> bytes:
    lines = [{"title": "x", "item_id": i, "vector": v} for i, v in zip(ids, vectors, strict=True)]
    return "".join(json.dumps(line) + "\n" for line in lines).encode()


def wide_parquet(ids: list, rows: list) -> bytes:
    sink = io.BytesIO()
    columns = dict(zip((f"v{n}" for n in range(len(rows[0]))), zip(*rows, strict=True), strict=True))
    pq.write_table(pa.table({"item_id": ids, **{name: list(column) for name, column in columns.items()}}), sink)
    return sink.getvalue()


FILES = {  # name, settings -> bytes of ids and rows
    "spaces.csv": lambda ids, rows: table(ids, as_text(rows)),
    "commas.tsv": lambda ids, rows: table(ids, as_text(rows, ", ", ""), "\t"),
    "bars.csv.gz": lambda ids, rows: gzip.compress(table(ids, as_text(rows, "|", "()"))),
    "numpy.csv": lambda ids, rows: table(ids, [np.array2string(np.array(row), max_line_width=30) for row in rows]),
    "semicolons.csv": lambda ids, rows: table(ids, as_text(rows, ","), ";"),
    "wide.csv": lambda ids, rows: wide(ids, rows),
    "wide-colons.csv.gz": lambda ids, rows: gzip.compress(wide(ids, rows, "::")),
    "wide.tsv.gz": lambda ids, rows: gzip.compress(wide(ids, rows, "\t")),
    "wide.parquet": wide_parquet,
    "lists.jsonl": json_lines,
    "lists.ndjson.gz": lambda ids, rows: gzip.compress(json_lines(ids, rows)),
    "texts.jsonl": lambda ids, rows: json_lines(ids, as_text(rows, ",")),
    "arrays.npz": lambda ids, rows: npz(ids=np.array(ids), vectors=np.array(rows)),
    "columns.npz": lambda ids, rows: npz(ids=np.array(ids), vectors=np.asfortranarray(rows)),
    "both.pt": lambda ids, rows: saved({"ids": ids, "vectors": torch.tensor(rows)}),
    "dict.pt": lambda ids, rows: saved({i: torch.tensor(row) for i, row in zip(ids, rows, strict=True)}),
    "lists.pt": lambda ids, rows: saved(dict(zip(ids, rows, strict=True))),
}


@pytest.mark.parametrize("kind", IDS)
@pytest.mark.parametrize("name", FILES)
def test_every_format_gives_the_same_vectors_and_ids(tmp_path, monkeypatch, name, kind):
    monkeypatch.setattr(feature_chunk, "CHUNK_BYTES", 150)
    (tmp_path / name).write_bytes(FILES[name](IDS[kind], X.tolist()))
    source = inspect_visual(tmp_path, name, vector_column="v*" if "wide" in name else "vector")
    assert source.all_ids().to_pylist() == IDS[kind]
    assert (source.dtype, source.width) == ("float32", X.shape[1])
    assert np.array_equal(read_rows(source), X)


@pytest.mark.parametrize(
    "name", ["spaces.csv", "bars.csv.gz", "lists.jsonl", "lists.ndjson.gz", "arrays.npz", "dict.pt"]
)
def test_formats_in_object_storage(s3, name):
    storage.write_bytes(f"{s3}/{name}", FILES[name](IDS["text"], X.tolist()))
    source = inspect_visual(s3, name)
    assert source.all_ids().to_pylist() == IDS["text"]
    assert np.array_equal(read_rows(source), X)


@pytest.mark.parametrize("name", ["spaces.csv", "wide.csv", "lists.jsonl", "arrays.npz", "both.pt"])
def test_several_files_of_a_modality(tmp_path, name):
    for part, rows in enumerate((slice(0, 12), slice(12, 20))):
        (tmp_path / f"{part}-{name}").write_bytes(FILES[name](IDS["mixed"][rows], X[rows].tolist()))
    source = inspect_visual(tmp_path, f"*-{name}", vector_column="v*" if "wide" in name else "vector")
    assert source.all_ids().to_pylist() == IDS["mixed"]
    assert np.array_equal(read_rows(source), X)
    assert source.locate(13) == (str(tmp_path / f"1-{name}"), 2)


@pytest.mark.parametrize("name", ["spaces.csv", "lists.jsonl"])
def test_a_file_of_several_blocks(tmp_path, name):
    """Rows keep their numbers from block to block."""
    count = TEXT_BLOCK_BYTES // 100
    rows = np.random.default_rng(0).normal(size=(count, 6))
    (tmp_path / name).write_bytes(FILES[name](list(range(count)), rows.tolist()))
    assert (tmp_path / name).stat().st_size > TEXT_BLOCK_BYTES
    source = inspect_visual(tmp_path, name)
    assert np.array_equal(read_rows(source), rows.astype(np.float32))
    assert source.ids.to_pylist() == [str(n) if name.endswith("csv") else n for n in range(count)]


EMPTY = {
    "v.csv": (b'item_id,vector\na,\nb,"1 2"\nc," "\n', "vector"),
    "wide.csv": (b"item_id,v0,v1\na,,\nb,1,2\nc,,\n", "v*"),
    "v.jsonl": (b'{"item_id":"a","vector":null}\n{"item_id":"b","vector":[1,2]}\n{"item_id":"c"}\n', "vector"),
    "texts.jsonl": (b'{"item_id":"a","vector":""}\n{"item_id":"b","vector":"1 2"}\n{"item_id":"c"}\n', "vector"),
}


@pytest.mark.parametrize("name", EMPTY)
def test_rows_without_a_vector(tmp_path, name):
    data, column = EMPTY[name]
    (tmp_path / name).write_bytes(data)
    source = inspect_visual(tmp_path, name, vector_column=column)
    assert source.ids.to_pylist() == ["a", "b", "c"]
    np.testing.assert_array_equal(read_rows(source), [[np.nan] * 2, [1, 2], [np.nan] * 2])


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8", ">f4", "i4", "u1"])
def test_npz_of_any_number_type(tmp_path, dtype):
    x = np.abs(X).astype(dtype)
    (tmp_path / "v.npz").write_bytes(npz(ids=np.arange(20, dtype=">i8"), vectors=x))
    source = inspect_visual(tmp_path, "v.npz")
    assert source.dtype == ("float16" if dtype == "f2" else "float32")
    assert np.array_equal(read_rows(source), x.astype(source.dtype))


@pytest.mark.parametrize("type", [torch.float16, torch.bfloat16, torch.float64, torch.int32, torch.uint8], ids=str)
@pytest.mark.parametrize("new", [True, False])
def test_a_tensor_of_any_number_type_has_rows_by_number(tmp_path, monkeypatch, type, new):
    """Also of a file in torch's older format, which cannot be mapped, and of a tensor with gradients."""
    monkeypatch.setattr(feature_chunk, "CHUNK_BYTES", 100)
    x = torch.tensor(np.abs(X)).to(type)
    x.requires_grad_(x.is_floating_point())
    torch.save(x, tmp_path / "v.pt", _use_new_zipfile_serialization=new)
    source = inspect_visual(tmp_path, "v.pt")
    assert source.all_ids().to_pylist() == list(range(20))
    assert source.dtype == ("float16" if type == torch.float16 else "float32")
    assert np.array_equal(read_rows(source), x.detach().float().numpy())
    assert source.ids is None


def test_a_pt_file_cannot_run_code(tmp_path):
    class Code:
        def __reduce__(self):
            return (open, (str(tmp_path / "written"), "w"))

    torch.save({"ids": [1], "vectors": Code()}, tmp_path / "v.pt")
    with pytest.raises(InputError, match=r"v.pt is not a .pt file that torch.load\(weights_only=True\) can read"):
        inspect_visual(tmp_path, "v.pt")
    assert not (tmp_path / "written").exists()


def test_torch_is_imported_for_pt_files_alone(tmp_path):
    """prepare's tasks start in less time without it."""
    import subprocess
    import sys

    (tmp_path / "v.csv").write_bytes(FILES["spaces.csv"](IDS["text"], X.tolist()))
    code = (
        "import sys; from gtc_dist.config_data import ModalityConfig; from gtc_dist.prepare import feature_files; "
        f"s = feature_files.inspect_features('v', ModalityConfig(path='v.csv'), {str(tmp_path)!r}); "
        "list(feature_files.read_feature_chunk(s.chunks[0])); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize("name", ["spaces.csv", "wide.csv", "lists.jsonl", "arrays.npz", "dict.pt"])
def test_vectors_go_to_their_items_by_ray(tmp_path, ray_local, scratch, name):
    (tmp_path / name).write_bytes(FILES[name](IDS["mixed"], X.tolist()))
    items = pa.array(["c", "007", "unknown", "7"])
    source = inspect_visual(tmp_path, name, vector_column="v*" if "wide" in name else "vector")
    found = features.gather_features({"visual": source}, items, scratch)["visual"]
    assert found.present.tolist() == [True, True, False, True]
    assert np.array_equal(found.vectors[found.present], X[[4, 1, 0]])


@pytest.fixture
def scratch():
    with Scratch() as made:
        yield made


def test_files_that_do_not_go_together(tmp_path):
    (tmp_path / "a.csv").write_bytes(wide(["a"], [[1, 2]]))
    (tmp_path / "b.csv").write_bytes(wide(["b"], [[1, 2, 3]]))
    with pytest.raises(InputError, match=r"b.csv has the vectors in other columns than .*a.csv"):
        inspect_visual(tmp_path, "*.csv", vector_column="v*")
    for name in ("a.pt", "b.pt"):
        (tmp_path / name).write_bytes(saved(torch.ones(2, 2)))
    with pytest.raises(InputError, match=r"names 2 .pt files without ids \(.*a.pt, ...\); one is expected"):
        inspect_visual(tmp_path, "*.pt")
    (tmp_path / "a.npy.gz").write_bytes(gzip.compress(npy(X)))
    with pytest.raises(InputError, match=r"a.npy.gz is gzipped, which only text may be; unpack it"):
        inspect_visual(tmp_path, "a.npy.gz")
