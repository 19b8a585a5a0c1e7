"""Run a generator of Arrow tables over many specs with Ray Data and gather what it yields in the driver.

Each table travels as Arrow IPC bytes in one row, so tables of one run may differ in schema (integer ids in one file,
strings in the next) and Ray Data never has to unify them. An error of `KINDS` in a task comes back as a row too: the
driver raises it as itself, without a remote traceback.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pyarrow as pa
import ray.data
from ray.train import DataConfig

from gtc_dist.data import formats
from gtc_dist.errors import InputError, Unreachable

PART_BYTES = 8 << 20  # of a table on its way: Ray holds a few for each task, and its object store may be small
KINDS = {error.__name__: error for error in (InputError, Unreachable)}  # that come back as themselves
_SCHEMA = pa.schema([("spec", pa.int64()), ("error", pa.string()), ("kind", pa.string()), ("table", pa.large_binary())])


def map_tables(
    function: Callable[[Any], Iterator[pa.Table]], specs: Sequence[Any], first_error: bool = False
) -> Iterator[tuple[int, pa.Table]]:
    """Yield (position of the spec, table) for every table of `function(spec)`, in no particular order.

    Args:
        function: importable generator function; runs in Ray tasks, so many specs are read at once.
        specs: picklable descriptions of the work, such as one for each file.
        first_error: end the run with the first `InputError` that comes, whichever it is.

    Raises:
        InputError, Unreachable: the one of the first spec (by position) in which `function` raised one, after all
            others are done; with `first_error` at once.
    """
    if not specs:
        return
    rows = ray.data.from_items([{"spec": i} for i in range(len(specs))], override_num_blocks=len(specs))
    chunks = rows.map_batches(
        functools.partial(_run, function=function, specs=list(specs)), batch_size=1, batch_format="pyarrow"
    )
    chunks.context.target_max_block_size = PART_BYTES  # else rows are joined to 128 MB before they travel
    errors: dict[int, Exception] = {}
    for block in chunks.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=1):
        for spec, error, kind, data in zip(*(block[name] for name in _SCHEMA.names), strict=True):
            if error.is_valid:
                errors[spec.as_py()] = KINDS[kind.as_py()](error.as_py())
                if first_error:
                    raise errors[spec.as_py()]
            elif not errors:
                yield spec.as_py(), pa.ipc.open_stream(data.as_py()).read_all()  # as_py: leaves the object store
    if errors:
        raise errors[min(errors)]


def read_rows(files: pa.Table) -> pa.Table:
    """The interactions in the files of column `uri`, in a Ray Data task. Not `ray.data.read_parquet`, whose listing of
    the files asks for a whole CPU beside the ranks; and here, since a task imports the module that its function is in,
    and torch would take it longer than the work."""
    return pa.concat_tables(formats.read_table(uri, ["user", "item"]) for uri in files["uri"].to_pylist())


def _run(batch: pa.Table, function: Callable[[Any], Iterator[pa.Table]], specs: list) -> Iterator[pa.Table]:
    for spec in batch["spec"].to_pylist():
        try:
            for table in function(specs[spec]):
                for part in _parts(table):
                    sink = pa.BufferOutputStream()
                    with pa.ipc.new_stream(sink, table.schema) as stream:
                        stream.write_table(part)
                    yield _row(spec, None, sink.getvalue().to_pybytes())
        except tuple(KINDS.values()) as error:
            yield _row(spec, error, None)


def _parts(table: pa.Table) -> Iterator[pa.Table]:
    """The table in parts of some `PART_BYTES`, at least one."""
    rows = max(table.num_rows * PART_BYTES // max(table.nbytes, 1), 1)
    for start in range(0, max(table.num_rows, 1), rows):
        yield table.slice(start, rows)


def _row(spec: int, error: Exception | None, table: bytes | None) -> pa.Table:
    kind = next((name for name, one in KINDS.items() if isinstance(error, one)), None)
    return pa.table([[spec], [None if error is None else str(error)], [kind], [table]], schema=_SCHEMA)


class EveryRow(DataConfig):
    """Deals the train rows to the ranks without the default's equal shares, which drop what does not divide. Here for
    the same reason: an actor of Ray Train's has it."""

    def configure(self, datasets, world_size, worker_handles, worker_node_ids, **kwargs):
        return [{"train": part} for part in datasets["train"].streaming_split(world_size, equal=False)]
