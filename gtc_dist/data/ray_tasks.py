"""Ray tasks of this package: generators of Arrow tables run in parallel, and the reader of training.

`map_tables` sends each table as Arrow IPC bytes in one row. So the tables of one run may have different schemas
(integer ids in one file, strings in the next), and Ray Data never has to unify them. An error of `FORWARDED_ERRORS` in
a task is sent as a row, too: the driver raises it with its own type and without a remote traceback.

A Ray task imports the module of its function, so this module must not import torch: the import would take longer than
most tasks.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pyarrow as pa
import ray.data
from ray.train import DataConfig

from gtc_dist.data import formats
from gtc_dist.errors import InputError, Unreachable

ARROW_ROW_BYTES = 8 << 20  # of a table per row: Ray buffers several rows per task, and its object store may be small
FORWARDED_ERRORS = {error.__name__: error for error in (InputError, Unreachable)}
_SCHEMA = pa.schema([("spec", pa.int64()), ("error", pa.string()), ("kind", pa.string()), ("table", pa.large_binary())])


def map_tables(
    function: Callable[[Any], Iterator[pa.Table]], specs: Sequence[Any], first_error: bool = False
) -> Iterator[tuple[int, pa.Table]]:
    """Run `function` on every spec in Ray tasks; yield (position of the spec, table) in no particular order.

    Args:
        function: importable generator function.
        specs: picklable descriptions of the work, such as one per file.
        first_error: raise the first error that arrives at once.

    Raises:
        InputError, Unreachable: raised by `function`. Without `first_error`, all specs run to the end; then the error
            of the first failed spec (by position) is raised, so that the message does not depend on timing.
    """
    if not specs:
        return
    rows = ray.data.from_items([{"spec": i} for i in range(len(specs))], override_num_blocks=len(specs))
    chunks = rows.map_batches(
        functools.partial(_run_batch, function=function, specs=list(specs)), batch_size=1, batch_format="pyarrow"
    )
    chunks.context.target_max_block_size = ARROW_ROW_BYTES  # else rows are joined to 128 MB before they are sent
    errors: dict[int, Exception] = {}
    for block in chunks.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=1):
        for spec, error, kind, data in zip(*(block[name] for name in _SCHEMA.names), strict=True):
            if error.is_valid:
                errors[spec.as_py()] = FORWARDED_ERRORS[kind.as_py()](error.as_py())
                if first_error:
                    raise errors[spec.as_py()]
            elif not errors:
                yield spec.as_py(), pa.ipc.open_stream(data.as_py()).read_all()  # as_py copies out of the object store
    if errors:
        raise errors[min(errors)]


def map_blocks(work: Callable[[pa.Table], pa.Table], tables: list[pa.Table], gpu: bool) -> Iterator[dict[str, Any]]:
    """Run `work` on every table, each a row or a few, in a Ray task with a CPU or a GPU; yield the rows of the results
    in no particular order."""
    blocks, options = ray.data.from_arrow(tables), {"batch_size": None, "batch_format": "pyarrow"}
    if gpu:  # actors: Ray ends a task's process after one call if it has a GPU
        gpus = int(ray.cluster_resources()["GPU"])
        pool = ray.data.ActorPoolStrategy(min_size=1, max_size=max(1, min(gpus, len(tables))))
        done = blocks.map_batches(_Caller, fn_constructor_args=(work,), compute=pool, num_gpus=1, **options)
    else:
        done = blocks.map_batches(work, **options)
    yield from done.iter_rows()


class _Caller:
    """A function as an actor."""

    def __init__(self, work: Callable[[pa.Table], pa.Table]):
        self.work = work

    def __call__(self, table: pa.Table) -> pa.Table:
        return self.work(table)


def read_rows(files: pa.Table) -> pa.Table:
    """Ray Data task: read the interactions in the files of column `uri`.

    Used instead of `ray.data.read_parquet`, which needs a whole CPU besides the ranks to list the files.
    """
    return pa.concat_tables(formats.read_table(uri, ["user", "item"]) for uri in files["uri"].to_pylist())


def _run_batch(batch: pa.Table, function: Callable[[Any], Iterator[pa.Table]], specs: list) -> Iterator[pa.Table]:
    for spec in batch["spec"].to_pylist():
        try:
            for table in function(specs[spec]):
                for part in _parts(table):
                    sink = pa.BufferOutputStream()
                    with pa.ipc.new_stream(sink, table.schema) as stream:
                        stream.write_table(part)
                    yield _row(spec, None, sink.getvalue().to_pybytes())
        except tuple(FORWARDED_ERRORS.values()) as error:
            yield _row(spec, error, None)


def _parts(table: pa.Table) -> Iterator[pa.Table]:
    """Slices of a table of about `ARROW_ROW_BYTES`, at least one."""
    rows = max(table.num_rows * ARROW_ROW_BYTES // max(table.nbytes, 1), 1)
    for start in range(0, max(table.num_rows, 1), rows):
        yield table.slice(start, rows)


def _row(spec: int, error: Exception | None, table: bytes | None) -> pa.Table:
    kind = next((name for name, forwarded in FORWARDED_ERRORS.items() if isinstance(error, forwarded)), None)
    return pa.table([[spec], [None if error is None else str(error)], [kind], [table]], schema=_SCHEMA)


class EveryRow(DataConfig):
    """Splits the train interactions among the ranks without dropping rows.

    Ray's default makes equal shares and drops the remainder. Ray Data hands out blocks by demand, so the rows of a rank
    differ from run to run; therefore ranks re-partition them by hash, which makes a resume on the same number of ranks
    bit-exact (training/data_loader.py).
    """

    def configure(self, datasets, world_size, worker_handles, worker_node_ids, **kwargs):
        return [{"train": part} for part in datasets["train"].streaming_split(world_size, equal=False)]
