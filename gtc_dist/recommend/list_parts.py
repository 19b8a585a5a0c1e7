"""The folder of lists: a Parquet file for some users at a time, so that an interrupted command goes on behind the files
that it has finished."""

import hashlib
import json
from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from gtc_dist.checkpoint import checkpoint_files
from gtc_dist.checkpoint.existing_run import RunRef
from gtc_dist.data import formats, storage
from gtc_dist.data.catalog import Catalog
from gtc_dist.data.output_folder import OutputFolder
from gtc_dist.errors import InputError

LISTS_MANIFEST, LISTS_MARKER = "_manifest.json", "_lists.json"  # readers of Parquet folders leave out names with _
HASHED_TEXTS = 1 << 16  # hashed at once


def lists_folder(out: str, named: str, fingerprint: str) -> OutputFolder:
    """The output folder, marked. Finished parts of an interrupted command stay if it was asked for the same.

    Args:
        named: the folder as the user gave it, for messages.
        fingerprint: of `lists_fingerprint`.

    Raises:
        InputError: the folder holds anything else, or cannot be written to.
    """
    own, asked = r"part-\d{12}\.parquet", {"fingerprint": fingerprint}
    folder = OutputFolder(out, "the output folder", "lists", own, LISTS_MANIFEST, LISTS_MARKER, asked)
    if folder.state() == "incomplete":
        if not folder.goes_on():
            raise InputError(
                f"the output folder {named} holds lists of an interrupted command with another run or other options; "
                "repeat that command to go on with them, name another folder, or remove it"
            )
        print(f"{named}: going on with the lists that an interrupted command has written", flush=True)
    else:
        folder.start_empty(named)
        folder.mark()
    return folder


def lists_fingerprint(run_ref: RunRef, catalog: Catalog, **asked: Any) -> str:
    """SHA-256 of what the lists and their files depend on: the weights, the catalog, and what was asked for (values of
    JSON, arrays)."""
    weights = checkpoint_files.read_manifest(storage.join(run_ref.uri, run_ref.checkpoint))["files"]
    return _digest({"weights": weights, "catalog": catalog.manifest.fingerprint, **asked})


def _digest(value: Any) -> str:
    digest = hashlib.sha256()
    if isinstance(value, dict):
        digest.update(json.dumps({name: _digest(part) for name, part in value.items()}, sort_keys=True).encode())
    elif isinstance(value, np.ndarray):
        digest.update(f"{value.dtype} ".encode() + value.tobytes())
    elif isinstance(value, pa.Array):
        for start in range(0, len(value), HASHED_TEXTS):
            digest.update(json.dumps(value.slice(start, HASHED_TEXTS).to_pylist()).encode())
    else:
        digest.update(json.dumps(value).encode())
    return digest.hexdigest()


def part_name(first: int) -> str:
    """Name of a part.

    Args:
        first: the rank's first user, plus the rank's users in the parts before.
    """
    return f"part-{first:012d}.parquet"


def finished_part(uri: str) -> tuple[int, dict]:
    """Rows of a part that is there, and its entry in the manifest. Raises InputError if it is not readable."""
    data = storage.read_bytes(uri)
    with formats.parsing(uri, "a readable Parquet file"):
        rows = pq.read_metadata(pa.BufferReader(data)).num_rows
    return rows, asdict(storage.WrittenFile(len(data), hashlib.sha256(data).hexdigest()))
