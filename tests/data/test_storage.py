"""Files at a URI: the same behaviour on a local disk and on a real S3 server."""

import os
import subprocess
import sys

import pyarrow as pa
import pytest
from botocore import exceptions

from gtc_dist.data import formats, storage
from gtc_dist.data.storage_errors import FileOperation
from gtc_dist.errors import InputError, Unreachable
from gtc_dist.launch.ray_train import FATAL


def test_files_are_read_back(folder):
    name = storage.join(folder, "a/b.bin")
    assert not storage.exists(name)
    written = storage.write_bytes(name, b"hello")
    assert storage.exists(name)
    assert written.bytes == 5
    assert storage.read_bytes(name) == b"hello"
    storage.check_sha256(name, b"hello", written.sha256)
    storage.write_json(storage.join(folder, "j.json"), {"ä": [1, None]})
    assert storage.read_json(storage.join(folder, "j.json")) == {"ä": [1, None]}


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


def test_an_existing_name_is_no_pattern(folder):
    for name in ("a*.csv", "ab.csv", "[1]/?.csv"):
        storage.write_bytes(storage.join(folder, name), name.encode())
    for name in ("a*.csv", "[1]/?.csv"):
        assert [storage.read_bytes(uri) for uri in storage.glob(storage.join(folder, name))] == [name.encode()]


def test_a_local_name_with_two_colons_is_one_name(tmp_path):
    storage.write_bytes(str(tmp_path / "a::b" / "c"), b"x")
    assert (tmp_path / "a::b" / "c").read_bytes() == b"x"
    assert storage.listing(str(tmp_path)) == {"a::b/c": 1}


def test_errors_name_the_uri(folder):
    with pytest.raises(InputError, match=r"none\.bin does not exist"):
        storage.read_bytes(storage.join(folder, "none.bin"))
    with pytest.raises(InputError, match=r"no file matches .*\*\.csv"):
        storage.glob(storage.join(folder, "*.csv"))
    storage.write_bytes(storage.join(folder, "bad"), b"{")
    with pytest.raises(InputError, match="bad is not valid JSON"):
        storage.read_json(storage.join(folder, "bad"))
    storage.write_bytes(storage.join(folder, "f/x.csv"), b"1")
    with pytest.raises(InputError, match="is a folder"):
        storage.glob(storage.join(folder, "f"))


PART = 5 << 20  # the smallest part that S3 accepts


def test_a_failed_write_leaves_the_previous_file(folder, monkeypatch):
    """Also after parts have been uploaded."""
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


def test_changed_missing_and_truncated_files_are_found(folder):
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


def test_checking_that_a_folder_is_writable_leaves_nothing(folder):
    storage.write_bytes(storage.join(folder, "x/1.csv"), b"1")
    for below in ("x", "y/z"):
        storage.check_writable(storage.join(folder, below))
    assert list(storage.listing(folder)) == ["x/1.csv"]


def test_a_folder_that_is_not_writable(tmp_path):
    (tmp_path / "file").write_text("mine")
    for uri in (f"{tmp_path}/file/below", "/proc/none/below"):
        with pytest.raises(InputError, match=f"{uri}.*(cannot be written to|does not exist)"):
            storage.check_writable(uri)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_an_unreachable_object_store_gives_a_one_line_error():
    script = "from gtc_dist.data import storage; from gtc_dist.errors import run_command\n"
    script += "run_command(lambda: storage.read_bytes('s3://bucket/x'))"
    keys = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_REGION": "us-east-1"}
    unreachable = keys | {"AWS_ENDPOINT_URL": "http://127.0.0.1:9", "AWS_MAX_ATTEMPTS": "1"}  # nothing listens there
    done = subprocess.run([sys.executable, "-c", script], env=os.environ | unreachable, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: cannot reach the object store to read s3://bucket/x")
    assert done.stderr.count("\n") == 1
    assert issubclass(Unreachable, OSError)  # so it is not bad input: training is retried
    assert "Unreachable" not in FATAL


def test_broken_connections_differ_from_broken_files():
    connections = [
        exceptions.EndpointConnectionError(endpoint_url="u"),
        exceptions.ConnectTimeoutError(endpoint_url="u"),
        exceptions.ReadTimeoutError(endpoint_url="u"),
        exceptions.ResponseStreamingError(error="e"),
        exceptions.HTTPClientError(error="e"),
        ConnectionResetError(104, "reset"),
    ]
    for error in connections:
        for context in (FileOperation("s3://b/x", "read"), formats.parsing("s3://b/x", "a table")):
            with pytest.raises(Unreachable, match=r"cannot reach the object store to read s3://b/x"), context:
                raise error
    for error, kind in ((pa.ArrowInvalid("odd"), InputError), (OSError(28, "full"), OSError), (RuntimeError(), None)):
        with pytest.raises(kind or RuntimeError) as raised, formats.parsing("s3://b/x", "a table"):
            raise error
        assert not isinstance(raised.value, Unreachable)


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
