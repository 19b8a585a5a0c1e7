"""File operations on a URI, local or in object storage, through fsspec.

A plain path or `file://` is local; `s3://` goes through s3fs, which takes credentials and endpoint from the environment
(`AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY`, `AWS_ENDPOINT_URL`, or the role of an instance). Any other protocol of
fsspec works once its package is installed.

Writes are atomic for readers: local files are renamed into place, objects appear when their upload ends. A failed write
leaves the previous file. Errors and retries: see storage_errors.py.
"""

import hashlib
import json
import os
import posixpath
import uuid
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import pyarrow.fs

from gtc_dist.data.storage_errors import FileOperation, is_local
from gtc_dist.errors import InputError

PROBE = ".writable"  # empty file that `check_writable` writes and removes
PART_BYTES = 32 << 20  # size of an upload part and of a streamed read or write


@dataclass(frozen=True)
class WrittenFile:
    """Size and SHA-256 of a file that was written."""

    bytes: int
    sha256: str


def filesystem(uri: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system of a URI and the path on it. Raises InputError for an unknown protocol."""
    if is_local(uri):
        fs = fsspec.filesystem("file")
        return fs, fs._strip_protocol(uri)  # url_to_fs would take a:: in a name for a file system around another
    try:
        return fsspec.core.url_to_fs(uri)
    except (ValueError, ImportError) as error:
        raise InputError(f"{uri}: {error}") from error


def arrow_filesystem(uri: str) -> tuple[pyarrow.fs.FileSystem, str]:
    """The file system of a URI as a pyarrow file system, and the path on it."""
    fs, path = filesystem(uri)
    if is_local(uri):
        return pyarrow.fs.LocalFileSystem(), path
    return pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(fs)), path


def absolute(uri: str) -> str:
    """A local path made absolute, for workers with another working directory; other URIs lose a trailing slash only."""
    return filesystem(uri)[1] if is_local(uri) else uri.rstrip("/")


def join(uri: str, *parts: str) -> str:
    """`uri/part/...`; a part that is a URI or an absolute path replaces everything before it."""
    for part in parts:
        uri = part if "://" in part or posixpath.isabs(part) else f"{uri.rstrip('/')}/{part}"
    return uri


def exists(uri: str) -> bool:
    """Whether a file or folder exists; never answered from a cache."""
    fs, path = filesystem(uri)
    with FileOperation(uri, "look up"):
        fs.invalidate_cache()
        return fs.exists(path)


def listing(uri: str) -> dict[str, int]:
    """Relative name -> size in bytes of all files below a folder; empty if the folder does not exist."""
    fs, path = filesystem(uri)
    with FileOperation(uri, "list"):
        fs.invalidate_cache()
        root = path.rstrip("/") + "/"
        return {
            name[len(root) :]: info["size"]
            for name, info in fs.find(path, detail=True).items()
            if name.startswith(root)
        }


def glob(uri: str) -> list[str]:
    """URIs of the files that match a URI with or without wildcards, sorted. Raises InputError if there are none."""
    fs, path = filesystem(uri)
    with FileOperation(uri, "list"):
        fs.invalidate_cache()
        found = [path] if fs.isfile(path) else []  # a file with a wildcard in its name stands for itself
        if not found and any(c in path for c in "*?["):
            found = sorted(p for p in fs.glob(path) if fs.isfile(p))
        if not found and fs.isdir(path):
            raise InputError(f"{uri} is a folder; name the files in it, such as {uri.rstrip('/')}/*.parquet")
    if not found:
        raise InputError(f"{uri} does not exist" if not any(c in path for c in "*?[") else f"no file matches {uri}")
    return found if is_local(uri) else [fs.unstrip_protocol(p) for p in found]


def open_input(uri: str, buffered: bool = True):
    """A readable, seekable binary file; compressed names are not unpacked.

    Args:
        buffered: read ahead from object storage; if false, each read fetches exactly the requested bytes.
    """
    fs, path = filesystem(uri)
    with FileOperation(uri, "open"):
        return fs.open(path, "rb", **({} if buffered or is_local(uri) else {"cache_type": "none"}))


def read_bytes(uri: str) -> bytes:
    fs, path = filesystem(uri)
    with FileOperation(uri, "read"):
        return fs.cat_file(path)


class _HashingFile:
    """A binary file for writing that counts and hashes the bytes written."""

    closed = False

    def __init__(self, file):
        self._file, self._digest, self.bytes = file, hashlib.sha256(), 0

    def write(self, data) -> int:
        data = memoryview(data).cast("B")
        self._digest.update(data)
        self.bytes += len(data)
        for start in range(0, len(data), PART_BYTES):  # an object store's file copies its input
            self._file.write(data[start : start + PART_BYTES])
        return len(data)

    def flush(self) -> None:
        pass

    @property
    def written(self) -> WrittenFile:
        return WrittenFile(self.bytes, self._digest.hexdigest())


@contextmanager
def create(uri: str) -> Iterator[_HashingFile]:
    """Context manager of a file for writing, which appears at `uri` when the context ends without an error."""
    fs, path = filesystem(uri)
    with FileOperation(uri, "write"):
        if is_local(uri):
            os.makedirs(os.path.dirname(path), exist_ok=True)
            partial = f"{path}.{uuid.uuid4().hex[:8]}.partial"
            try:
                with open(partial, "wb") as file:
                    yield _HashingFile(file)
                os.replace(partial, path)
            finally:
                if os.path.exists(partial):
                    os.remove(partial)
        else:
            file = fs.open(path, "wb", block_size=PART_BYTES)
            try:
                yield _HashingFile(file)
                file.close()
            except BaseException:
                file.discard()  # aborts the upload; closing would complete it
                file.closed = True
                raise


def write_bytes(uri: str, data: bytes | memoryview) -> WrittenFile:
    """Write a whole file."""
    with create(uri) as file:
        file.write(data)
    return file.written


def copy_file(local_path: str, uri: str) -> None:
    """Copy a local file to a URI (streamed; large files are uploaded in parts)."""
    fs, path = filesystem(uri)
    with FileOperation(uri, "write"):
        if is_local(uri):
            os.makedirs(os.path.dirname(path), exist_ok=True)
        fs.put_file(local_path, path)


def read_json(uri: str) -> Any:
    """Raises InputError for a missing file and for invalid JSON."""
    try:
        return json.loads(read_bytes(uri))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{uri} is not valid JSON: {error}") from error


def write_json(uri: str, value: Any) -> WrittenFile:
    return write_bytes(uri, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def check_sha256(uri: str, data: bytes, sha256: str | None) -> None:
    """Raise InputError if the bytes have another SHA-256; None: no check."""
    if sha256 is not None:
        check_digest(uri, hashlib.sha256(data).hexdigest(), sha256)


def check_digest(uri: str, found: str, expected: str) -> None:
    """Raise InputError if a computed SHA-256 differs from the expected one."""
    if found != expected:
        raise InputError(f"{uri} was changed after it was written (checksum differs from its manifest); rebuild it")


def check_files(root: str, expected: dict[str, WrittenFile], checksum: bool) -> None:
    """Compare the files below `root` with a manifest: existence, size and, with `checksum`, SHA-256."""
    found = listing(root)
    for name, written in expected.items():
        if name not in found:
            raise InputError(f"{join(root, name)} is missing, though the manifest lists it; rebuild with --force")
        if found[name] != written.bytes:
            raise InputError(
                f"{join(root, name)} has {found[name]} bytes, its manifest says {written.bytes}; rebuild with --force"
            )
    if checksum:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda item: _check_file(join(root, item[0]), item[1].sha256), expected.items()))


def remove_tree(uri: str) -> None:
    """Remove a file, or a folder with everything in it; does nothing if it does not exist."""
    fs, path = filesystem(uri)
    with FileOperation(uri, "remove"):
        fs.invalidate_cache()
        if fs.exists(path):
            fs.rm(path, recursive=True)


def check_writable(uri: str) -> None:
    """Write an empty file into the folder `uri` and remove it, together with the folders created for it.

    Raises:
        InputError: writing fails.
    """
    created = missing_parents(join(uri, PROBE))
    try:
        try:
            write_bytes(join(uri, PROBE), b"")
            with suppress(InputError, OSError):  # ignore: no permission to delete
                remove_tree(join(uri, PROBE))
        finally:
            for folder in created:
                with suppress(OSError):  # ignore: it does not exist, or has files of others by now
                    folder.rmdir()
    except OSError as error:
        raise InputError(f"{uri} cannot be written to: {error}") from error


def missing_parents(uri: str) -> list[Path]:
    """Folders above `uri` that do not exist yet, nearest first; empty for object stores, which have no folders."""
    return [folder for folder in Path(absolute(uri)).parents if not folder.exists()] if is_local(uri) else []


def file_signatures(uris: Iterable[str]) -> list[list]:
    """URI, size and modification time (or ETag) of each file: they change when a file changes."""
    rows = []
    for uri in uris:
        fs, path = filesystem(uri)
        with FileOperation(uri, "look up"):
            info = fs.info(path)
        rows.append([uri, info["size"], str(info.get("ETag") or info.get("mtime") or info.get("LastModified"))])
    return rows


def _check_file(uri: str, sha256: str) -> None:
    digest = hashlib.sha256()
    with open_input(uri) as file:
        while chunk := file.read(1 << 23):
            digest.update(chunk)
    check_digest(uri, digest.hexdigest(), sha256)
