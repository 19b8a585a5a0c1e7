"""Files under a URI: the same behaviour on a local disk and on a real S3 server."""

import hashlib
import logging
import re

import numpy as np
import pyarrow as pa
import pytest

from gtc_dist.data import storage
from gtc_dist.errors import InputError


@pytest.fixture(params=["local", "s3"])
def folder(request, tmp_path) -> str:
    return str(tmp_path) if request.param == "local" else request.getfixturevalue("s3")


def test_what_is_written_is_read_back(folder):
    name = storage.join(folder, "a/b.bin")
    assert not storage.exists(name)
    written = storage.write_bytes(name, b"hello")
    assert storage.exists(name)
    assert written.bytes == 5
    assert storage.read_bytes(name) == b"hello"
    storage.check(name, b"hello", written.sha256)
    storage.write_json(storage.join(folder, "j.json"), {"ä": [1, None]})
    assert storage.read_json(storage.join(folder, "j.json")) == {"ä": [1, None]}
    array = np.arange(12, dtype=np.float16).reshape(3, 4)
    storage.write_array(storage.join(folder, "x.npy"), array)
    assert np.array_equal(storage.read_array(storage.join(folder, "x.npy")), array)
    table = pa.table({"id": ["a", "b"], "n": [1, 2]})
    storage.write_table(storage.join(folder, "t.parquet"), table)
    assert storage.read_table(storage.join(folder, "t.parquet")).equals(table)
    assert storage.read_table(storage.join(folder, "t.parquet"), ["n"]).column_names == ["n"]


def test_listing_glob_and_removal(folder):
    assert storage.listing(storage.join(folder, "x")) == {}
    for name in ("x/1.csv", "x/2.csv", "x/y/3.json"):
        storage.write_bytes(storage.join(folder, name), name.encode())
    assert storage.listing(storage.join(folder, "x")) == {"1.csv": 7, "2.csv": 7, "y/3.json": 10}
    found = storage.glob(storage.join(folder, "x/*.csv"))
    assert [storage.read_bytes(uri) for uri in found] == [b"x/1.csv", b"x/2.csv"]
    assert len(storage.glob(storage.join(folder, "x/1.csv"))) == 1
    storage.remove_tree(storage.join(folder, "x"))
    storage.remove_tree(storage.join(folder, "x"))
    assert storage.listing(storage.join(folder, "x")) == {}


def test_errors_name_the_uri(folder):
    with pytest.raises(InputError, match=r"none\.bin does not exist"):
        storage.read_bytes(storage.join(folder, "none.bin"))
    with pytest.raises(InputError, match=r"no file matches .*\*\.csv"):
        storage.glob(storage.join(folder, "*.csv"))
    storage.write_bytes(storage.join(folder, "bad"), b"{")
    with pytest.raises(InputError, match="bad is not valid JSON"):
        storage.read_json(storage.join(folder, "bad"))
    with pytest.raises(InputError, match="bad is not a readable Parquet"):
        storage.read_table(storage.join(folder, "bad"))
    with pytest.raises(InputError, match=r"bad is not a plain \.npy"):
        storage.read_array(storage.join(folder, "bad"))
    storage.write_bytes(storage.join(folder, "f/x.csv"), b"1")
    with pytest.raises(InputError, match="is a folder"):
        storage.glob(storage.join(folder, "f"))


PART = 5 << 20  # the smallest part that S3 takes


@pytest.mark.parametrize(
    "kind", ["rows", "fortran", "every second row", "one number", "none", "no column", "big endian"]
)
def test_arrays_of_any_layout_are_read_back(folder, kind, monkeypatch):
    """Through more than one part, and as numpy itself reads and writes them."""
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
    written = storage.write_array(uri, array)
    data = storage.read_bytes(uri)
    assert (written.bytes, written.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    found = storage.read_array(uri, written.sha256)
    assert found.dtype == array.dtype
    assert np.array_equal(found, np.atleast_1d(array))
    with pytest.raises(InputError, match="was changed"):
        storage.read_array(uri, "0" * 64)


def test_arrays_that_numpy_wrote_and_cut_ones(folder, tmp_path):
    array = np.asfortranarray(np.arange(20.0).reshape(4, 5))
    np.save(tmp_path / "f.npy", array)
    uri = storage.join(folder, "copy.npy")
    storage.copy_file(str(tmp_path / "f.npy"), uri)
    assert np.array_equal(storage.read_array(uri, hashlib.sha256(storage.read_bytes(uri)).hexdigest()), array)
    storage.write_bytes(uri, storage.read_bytes(uri)[:-1])
    with pytest.raises(InputError, match=r"copy\.npy is not a plain .npy array: it ends before"):
        storage.read_array(uri)


def test_a_write_that_fails_leaves_what_was_there(folder, monkeypatch):
    """Also when parts of it have been uploaded."""
    monkeypatch.setattr(storage, "PART_BYTES", PART)
    uri = storage.join(folder, "a/x.bin")
    for before in (None, b"before"):
        if before is not None:
            storage.write_bytes(uri, before)
        with pytest.raises(TypeError), storage.create(uri) as file:
            assert file.write(bytes(3 * PART)) == file.write("no bytes")
        assert list(storage.listing(folder)) == ([] if before is None else ["a/x.bin"])
        assert before is None or storage.read_bytes(uri) == before
    if uri.startswith("s3://"):
        fs, path = storage.filesystem(uri)
        assert not fs.list_multipart_uploads(path.split("/")[0])


def test_some_vectors_of_a_table(folder, caplog):
    rows, width = 3 * storage.VECTOR_ROW_GROUP + 100, 16
    vectors = np.random.default_rng(0).normal(size=(rows, width)).astype(np.float16)
    column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), width)
    uri = storage.join(folder, "v.parquet")
    written = storage.write_table(uri, pa.table({"item": np.arange(rows), "vector": column}))
    group = storage.VECTOR_ROW_GROUP
    for start, stop in [(0, rows), (5, 6), (group, 2 * group), (group - 1, 2 * group + 1), (rows - 1, rows)]:
        assert np.array_equal(storage.read_vectors(uri, "vector", start, stop), vectors[start:stop])
    with caplog.at_level(logging.DEBUG, "s3fs"):
        storage.read_vectors(uri, "vector", group + 3, group + 9)
    if uri.startswith("s3://"):  # as s3fs logs them
        ranges = [re.search(r"Fetch: .* (\d+)-(\d+)", record.message) for record in caplog.records]
        fetched = sum(int(found[2]) - int(found[1]) for found in ranges if found)
        wanted = group * width * 2
        assert wanted <= fetched < 1.5 * wanted < written.bytes / 2  # one group, its levels and the footer
    storage.write_bytes(uri, b"PAR1")
    with pytest.raises(InputError, match=r"v\.parquet is not a readable Parquet"):
        storage.read_vectors(uri, "vector", 0, 1)


def test_pickled_arrays_are_refused(folder, tmp_path):
    np.save(tmp_path / "p.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    storage.copy_file(str(tmp_path / "p.npy"), storage.join(folder, "copy.npy"))
    with pytest.raises(InputError, match="not a plain"):
        storage.read_array(storage.join(folder, "copy.npy"))


def test_changed_missing_and_cut_files_are_found(folder):
    expected = {n: storage.write_bytes(storage.join(folder, n), n.encode() * 9) for n in ("a", "b")}
    storage.check_files(folder, expected, checksum=True)
    storage.write_bytes(storage.join(folder, "b"), b"B" * 9)
    storage.check_files(folder, expected, checksum=False)
    with pytest.raises(InputError, match="b was changed"):
        storage.check_files(folder, expected, checksum=True)
    storage.write_bytes(storage.join(folder, "b"), b"B" * 8)
    with pytest.raises(InputError, match="b has 8 bytes, its manifest says 9"):
        storage.check_files(folder, expected, checksum=False)
    storage.remove_tree(storage.join(folder, "b"))
    with pytest.raises(InputError, match="b is missing"):
        storage.check_files(folder, expected, checksum=False)


def test_a_failed_local_write_leaves_nothing(tmp_path):
    (tmp_path / "taken").mkdir()
    with pytest.raises(OSError, match="could not write"):
        storage.write_bytes(str(tmp_path / "taken"), b"x")
    assert list(tmp_path.iterdir()) == [tmp_path / "taken"]


def test_unknown_protocol():
    with pytest.raises(InputError, match="nope"):
        storage.exists("nope://a/b")


def test_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert storage.absolute("a/b") == str(tmp_path / "a/b")
    assert storage.absolute("s3://b/c/") == "s3://b/c"
    assert storage.join("s3://b/c/", "d") == "s3://b/c/d"
    assert storage.join("a", "/d") == "/d"
    assert storage.join("a", "s3://d") == "s3://d"
