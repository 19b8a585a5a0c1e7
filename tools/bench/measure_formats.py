"""One format of an export made from its Parquet files, for generated rows: items in groups, whose norms differ."""

import os
import tempfile
import time

import numpy as np
import pyarrow as pa
import torch
from watching import peak_mib

from gtc_dist.data import storage
from gtc_dist.distributed.collectives import Communicator
from gtc_dist.embedding_formats.write_formats import write_formats
from gtc_dist.inference.embedding_files import FILE_ROWS, write_embeddings

USERS, GROUPS, DIRECTIONS = 1000, 200, 48  # users enter the recall of an index only


def measure_formats(case: dict, comm: Communicator) -> dict:
    """Seconds and memory; the Parquet files, which `gtc export` always writes first, are not counted."""
    with tempfile.TemporaryDirectory(prefix="gtc-benchmark-") as out:
        files = {}
        generator = torch.Generator().manual_seed(0)
        centres = torch.randn(GROUPS, DIRECTIONS, generator=generator)
        directions = torch.randn(DIRECTIONS, case["width"], generator=generator) / case["width"] ** 0.5
        for kind, count in (("users", USERS), ("items", case["rows"])):
            for first in range(0, count, FILE_ROWS):
                rows = group_rows(min(FILE_ROWS, count - first), centres, directions, generator)
                name = f"{kind}/part-{first:012d}.parquet"
                ids = pa.array(np.arange(first, first + len(rows)))
                files[name] = write_embeddings(ids, rows, storage.join(out, name), "float32")
        del rows
        before, start, busy = peak_mib(), time.perf_counter(), os.times()
        made = write_formats(out, {"dim": case["width"], "files": files}, {case["format"]}, "float32")
        seconds, after = time.perf_counter() - start, os.times()
    return {
        "seconds": seconds,
        "cpu_seconds": after.user + after.system - busy.user - busy.system,
        "bytes": sum(entry["bytes"] for entry in made["files"].values()),
        "peak_mib_before": before,
        "peak_mib": peak_mib(),
        **{f"index/{name}": value for name, value in made.get("index", {}).items()},
    }


def group_rows(count: int, centres: torch.Tensor, directions: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Rows float32 [count, width] around the centres of groups, with noise in all columns."""
    group = torch.randint(len(centres), (count,), generator=generator)
    own = centres[group] + torch.randn(count, centres.shape[1], generator=generator)
    norm = torch.exp(0.4 * torch.randn(count, 1, generator=generator))
    noise = torch.randn(count, directions.shape[1], generator=generator) * 0.5 / directions.shape[1] ** 0.5
    return norm * (own @ directions + noise)
