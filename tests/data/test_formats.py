"""Tables and arrays at a URI, on a local disk and on a real S3 server."""

import hashlib
import logging
import re

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gtc_dist.data import formats, storage
from gtc_dist.errors import InputError

PART = 5 << 20  # the smallest part that S3 accepts


def test_tables_and_arrays_are_read_back(folder):
    array = np.arange(12, dtype=np.float16).reshape(3, 4)
    formats.write_array(storage.join(folder, "x.npy"), array)
    assert np.array_equal(formats.read_array(storage.join(folder, "x.npy")), array)
    table = pa.table({"id": ["a", "b"], "n": [1, 2]})
    formats.write_table(storage.join(folder, "t.parquet"), table)
    assert formats.read_table(storage.join(folder, "t.parquet")).equals(table)
    assert formats.read_table(storage.join(folder, "t.parquet"), ["n"]).column_names == ["n"]


ENDS = st.sampled_from(["\n", "\r\n", "\r"])
LINE = st.text("ab 0\v\f\x1c\x1d\x1e\x85\u2028\u2029", max_size=4)


@settings(deadline=None)
@given(st.lists(st.tuples(LINE, ENDS)), st.sampled_from(["", "last"]), st.booleans())
def test_lines_end_as_in_an_editor_alone(tmp_path_factory, lines, last, mark):
    path = tmp_path_factory.mktemp("lines") / "ids.txt"
    lines = [(text or "x", end) for text, end in lines]  # an empty line between "\r" and "\n" is none
    text = "".join(text + end for text, end in lines) + last
    path.write_bytes(text.encode("utf-8-sig" if mark else "utf-8"))
    assert formats.read_lines(str(path)) == [text for text, _ in lines] + [last] * bool(last)


def test_other_files_are_refused(folder):
    storage.write_bytes(storage.join(folder, "bad"), b"{")
    with pytest.raises(InputError, match="bad is not a readable Parquet"):
        formats.read_table(storage.join(folder, "bad"))
    with pytest.raises(InputError, match=r"bad is not a plain \.npy"):
        formats.read_array(storage.join(folder, "bad"))


@pytest.mark.parametrize(
    "kind", ["rows", "fortran", "every second row", "one number", "none", "no column", "big endian"]
)
def test_arrays_of_any_layout_are_read_back(folder, kind, monkeypatch):
    """Written and read in more than one part."""
    monkeypatch.setattr(storage, "PART_BYTES", PART)
    array = np.random.default_rng(0).normal(size=(6000, 300)).astype(np.float32)
    array = {
        "rows": array,
        "fortran": np.asfortranarray(array),
        "every second row": array[::2],
        "one number": np.array(3, np.int64),
        "none": array[:0],
        "no column": array[:, :0],
        "big endian": array.astype(">f4"),
    }[kind]
    uri = storage.join(folder, "x.npy")
    written = formats.write_array(uri, array)
    data = storage.read_bytes(uri)
    assert (written.bytes, written.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    found = formats.read_array(uri, written.sha256)
    assert found.dtype == array.dtype
    assert np.array_equal(found, np.atleast_1d(array))
    with pytest.raises(InputError, match="was changed"):
        formats.read_array(uri, "0" * 64)


def test_arrays_written_by_numpy_and_truncated_ones(folder, tmp_path):
    array = np.asfortranarray(np.arange(20.0).reshape(4, 5))
    np.save(tmp_path / "f.npy", array)
    uri = storage.join(folder, "copy.npy")
    storage.copy_file(str(tmp_path / "f.npy"), uri)
    assert np.array_equal(formats.read_array(uri, hashlib.sha256(storage.read_bytes(uri)).hexdigest()), array)
    storage.write_bytes(uri, storage.read_bytes(uri)[:-1])
    with pytest.raises(InputError, match=r"copy\.npy is not a plain .npy array: it ends before"):
        formats.read_array(uri)


def test_some_vectors_of_a_table(folder, caplog):
    rows, width = 3 * formats.VECTOR_ROW_GROUP + 100, 16
    vectors = np.random.default_rng(0).normal(size=(rows, width)).astype(np.float16)
    column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), width)
    uri = storage.join(folder, "v.parquet")
    written = formats.write_table(uri, pa.table({"item": np.arange(rows), "vector": column}))
    group = formats.VECTOR_ROW_GROUP
    for start, stop in [(0, rows), (5, 6), (group, 2 * group), (group - 1, 2 * group + 1), (rows - 1, rows)]:
        assert np.array_equal(formats.read_vectors(uri, "vector", start, stop), vectors[start:stop])
    with caplog.at_level(logging.DEBUG, "s3fs"):
        formats.read_vectors(uri, "vector", group + 3, group + 9)
    if uri.startswith("s3://"):  # as s3fs logs them
        ranges = [re.search(r"Fetch: .* (\d+)-(\d+)", record.message) for record in caplog.records]
        fetched = sum(int(found[2]) - int(found[1]) for found in ranges if found)
        wanted = group * width * 2
        assert wanted <= fetched < 1.5 * wanted < written.bytes / 2  # one group, its levels and the footer
    storage.write_bytes(uri, b"PAR1")
    with pytest.raises(InputError, match=r"v\.parquet is not a readable Parquet"):
        formats.read_vectors(uri, "vector", 0, 1)


def test_pickled_arrays_are_refused(folder, tmp_path):
    np.save(tmp_path / "p.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    storage.copy_file(str(tmp_path / "p.npy"), storage.join(folder, "copy.npy"))
    with pytest.raises(InputError, match="not a plain"):
        formats.read_array(storage.join(folder, "copy.npy"))
