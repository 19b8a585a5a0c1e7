"""Files under a URI, local or in object storage, through fsspec.

A plain path or `file://` is local; `s3://` goes through s3fs, which takes credentials and the endpoint from the
environment (`AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY`, `AWS_ENDPOINT_URL`, or an instance's role). Any other
protocol that fsspec knows works once its package is installed.

Writes are atomic as readers see them: local files are renamed into place, objects appear when their upload ends. A
write that fails leaves nothing.

An object store that does not answer is tried again for about a minute, by botocore, with back-off and jitter
(`AWS_RETRY_MODE`, `AWS_MAX_ATTEMPTS`); after a while a line on the standard error says what is waited for.
"""

import hashlib
import json
import os
import posixpath
import sys
import threading
import uuid
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import pyarrow.fs

from gtc_dist.errors import InputError, Unreachable

os.environ.setdefault("AWS_RETRY_MODE", "standard")  # botocore's: connections, time limits, throttling, 5xx
os.environ.setdefault("AWS_MAX_ATTEMPTS", "12")  # 75 s on average

PATIENCE = 10.0  # seconds before a person is told that an object store is waited for
PROBE = ".writable"  # an empty file, there for a moment
PART_BYTES = 32 << 20  # of an upload, and of a file that is read or written piece by piece


@dataclass(frozen=True)
class Written:
    """What a write left behind: bytes and their SHA-256."""

    bytes: int
    sha256: str


def is_local(uri: str) -> bool:
    return "://" not in uri or uri.startswith(("file://", "local://"))


def filesystem(uri: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system that `uri` names and the path on it. Raises InputError for an unknown protocol."""
    try:
        return fsspec.core.url_to_fs(uri)
    except (ValueError, ImportError) as error:
        raise InputError(f"{uri}: {error}") from error


def arrow_filesystem(uri: str) -> tuple[pyarrow.fs.FileSystem, str]:
    """The same as a pyarrow file system, as Ray and Parquet datasets take it."""
    fs, path = filesystem(uri)
    if is_local(uri):
        return pyarrow.fs.LocalFileSystem(), path
    return pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(fs)), path


def absolute(uri: str) -> str:
    """A local path made absolute, so that workers with another working directory find it; other URIs unchanged."""
    return filesystem(uri)[1] if is_local(uri) else uri.rstrip("/")


def join(uri: str, *parts: str) -> str:
    """`uri/part/...`; a last part that is itself a URI or an absolute path stands alone."""
    for part in parts:
        uri = part if "://" in part or posixpath.isabs(part) else f"{uri.rstrip('/')}/{part}"
    return uri


def exists(uri: str) -> bool:
    fs, path = filesystem(uri)
    with _named(uri, "look up"):
        fs.invalidate_cache()
        return fs.exists(path)


def listing(uri: str) -> dict[str, int]:
    """Relative names of all files below a folder and their sizes in bytes; empty if there is none."""
    fs, path = filesystem(uri)
    with _named(uri, "list"):
        fs.invalidate_cache()
        root = path.rstrip("/") + "/"
        return {
            name[len(root) :]: info["size"]
            for name, info in fs.find(path, detail=True).items()
            if name.startswith(root)
        }


def glob(uri: str) -> list[str]:
    """URIs of the files that a URI with or without wildcards names, sorted. Raises InputError if there are none."""
    fs, path = filesystem(uri)
    with _named(uri, "list"):
        fs.invalidate_cache()
        found = sorted(p for p in fs.glob(path) if fs.isfile(p)) if any(c in path for c in "*?[") else []
        if not found and fs.isfile(path):
            found = [path]
        if not found and fs.isdir(path):
            raise InputError(f"{uri} is a folder; name the files in it, such as {uri.rstrip('/')}/*.parquet")
    if not found:
        raise InputError(f"{uri} does not exist" if not any(c in path for c in "*?[") else f"no file matches {uri}")
    return found if is_local(uri) else [fs.unstrip_protocol(p) for p in found]


def open_input(uri: str, buffered: bool = True):
    """A readable, seekable binary file; compressed names are not unpacked.

    Args:
        buffered: read ahead from object storage; without, each read fetches just what it asks for.
    """
    fs, path = filesystem(uri)
    with _named(uri, "open"):
        return fs.open(path, "rb", **({} if buffered or is_local(uri) else {"cache_type": "none"}))


def read_bytes(uri: str) -> bytes:
    fs, path = filesystem(uri)
    with _named(uri, "read"):
        return fs.cat_file(path)


class _Output:
    """A binary file for writing that counts and hashes what goes through it."""

    closed = False

    def __init__(self, file):
        self._file, self._digest, self.bytes = file, hashlib.sha256(), 0

    def write(self, data) -> int:
        data = memoryview(data).cast("B")
        self._digest.update(data)
        self.bytes += len(data)
        for start in range(0, len(data), PART_BYTES):  # what an object store's file is given, it copies
            self._file.write(data[start : start + PART_BYTES])
        return len(data)

    def flush(self) -> None:
        pass

    @property
    def written(self) -> Written:
        return Written(self.bytes, self._digest.hexdigest())


@contextmanager
def create(uri: str) -> Iterator[_Output]:
    """A file to write to: it appears at `uri` when the context ends, and not at all if that is by an error."""
    fs, path = filesystem(uri)
    with _named(uri, "write"):
        if is_local(uri):
            os.makedirs(os.path.dirname(path), exist_ok=True)
            partial = f"{path}.{uuid.uuid4().hex[:8]}.partial"
            try:
                with open(partial, "wb") as file:
                    yield _Output(file)
                os.replace(partial, path)
            finally:
                if os.path.exists(partial):
                    os.remove(partial)
        else:
            file = fs.open(path, "wb", block_size=PART_BYTES)
            try:
                yield _Output(file)
                file.close()
            except BaseException:
                file.discard()  # aborts the upload; closing would complete it
                file.closed = True
                raise


def write_bytes(uri: str, data: bytes | memoryview) -> Written:
    """Write one file whole."""
    with create(uri) as file:
        file.write(data)
    return file.written


def copy_file(local_path: str, uri: str) -> None:
    """Copy a local file to a URI (streamed; large files go up in parts)."""
    fs, path = filesystem(uri)
    with _named(uri, "write"):
        if is_local(uri):
            os.makedirs(os.path.dirname(path), exist_ok=True)
        fs.put_file(local_path, path)


def read_json(uri: str) -> Any:
    try:
        return json.loads(read_bytes(uri))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{uri} is not valid JSON: {error}") from error


def write_json(uri: str, value: Any) -> Written:
    return write_bytes(uri, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def check(uri: str, data: bytes, sha256: str | None) -> None:
    """Refuse bytes whose SHA-256 is not the expected one."""
    if sha256 is not None:
        check_digest(uri, hashlib.sha256(data).hexdigest(), sha256)


def check_digest(uri: str, found: str, expected: str) -> None:
    """The same of a SHA-256 that was found."""
    if found != expected:
        raise InputError(f"{uri} was changed after it was written (checksum differs from its manifest); rebuild it")


def check_files(root: str, expected: dict[str, Written], checksum: bool) -> None:
    """Compare the files below `root` with what a manifest says of them: existence, size and (if asked) SHA-256."""
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
            list(pool.map(lambda item: _check_one(join(root, item[0]), item[1].sha256), expected.items()))


def remove_tree(uri: str) -> None:
    """Remove a folder and all below it; nothing happens if it is not there."""
    fs, path = filesystem(uri)
    with _named(uri, "remove"):
        fs.invalidate_cache()
        if fs.exists(path):
            fs.rm(path, recursive=True)


def check_writable(uri: str) -> None:
    """Write an empty file into the folder `uri` and remove it, with the folders that were made for it.

    Raises:
        InputError: that fails.
    """
    made = missing_parents(join(uri, PROBE))
    try:
        try:
            write_bytes(join(uri, PROBE), b"")
            with suppress(InputError, OSError):  # who may write and not remove may still write
                remove_tree(join(uri, PROBE))
        finally:
            for folder in made:
                with suppress(OSError):  # one that is not there, or that something came into meanwhile
                    folder.rmdir()
    except OSError as error:
        raise InputError(f"{uri} cannot be written to: {error}") from error


def missing_parents(uri: str) -> list[Path]:
    """Folders above `uri` that are not there yet, the nearest first. An object store has no folders of their own."""
    return [folder for folder in Path(absolute(uri)).parents if not folder.exists()] if is_local(uri) else []


def signature(uris: Iterable[str]) -> list[list]:
    """What tells unchanged input files from changed ones: URI, size and modification time (or ETag) of each."""
    rows = []
    for uri in uris:
        fs, path = filesystem(uri)
        with _named(uri, "look up"):
            info = fs.info(path)
        rows.append([uri, info["size"], str(info.get("ETag") or info.get("mtime") or info.get("LastModified"))])
    return rows


def _check_one(uri: str, sha256: str) -> None:
    digest = hashlib.sha256()
    with open_input(uri) as file:
        while chunk := file.read(1 << 23):
            digest.update(chunk)
    check_digest(uri, digest.hexdigest(), sha256)


def is_away(error: BaseException | None) -> bool:
    """Whether an error says that an object store cannot be reached: a connection that does not come about or breaks."""
    kinds = {(kind.__module__, kind.__name__) for kind in type(error).__mro__}
    broken = isinstance(error, (ConnectionError, TimeoutError)) and not isinstance(error, Unreachable)
    return broken or not kinds.isdisjoint(
        ("botocore.exceptions", name) for name in ("ConnectionError", "HTTPClientError")
    )


class _named:
    """Turns the errors that a user can mend into an InputError that names the URI and the action, and a connection that
    does not come about into Unreachable."""

    def __init__(self, uri: str, action: str):
        self.uri, self.action = uri, action

    def __enter__(self):
        self.timer = None
        if not is_local(self.uri):
            self.timer = threading.Timer(PATIENCE, self._tell)
            self.timer.daemon = True
            self.timer.start()
        return self

    def _tell(self) -> None:
        print(f"still trying to {self.action} {self.uri}", file=sys.stderr, flush=True)

    def __exit__(self, kind, error, trace):
        if self.timer is not None:
            self.timer.cancel()
        if isinstance(error, FileNotFoundError):
            raise InputError(f"{self.uri} does not exist (tried to {self.action} it)") from error
        if isinstance(error, PermissionError):
            raise InputError(f"no permission to {self.action} {self.uri}: {error}") from error
        if not is_local(self.uri) and is_away(error):
            raise Unreachable(f"cannot reach the object store to {self.action} {self.uri}: {error}") from error
        if isinstance(error, OSError) and not isinstance(error, Unreachable):
            raise OSError(error.errno, f"could not {self.action} {self.uri}: {error}") from error
        if type(error).__name__ in ("NoCredentialsError", "PartialCredentialsError"):
            raise InputError(
                f"no credentials to {self.action} {self.uri}; set AWS_ACCESS_KEY_ID and friends"
            ) from error
        return False
