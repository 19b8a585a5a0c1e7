"""Score pairs of a user and an item by a run's filter: a second look at candidates that dot products found.

    python tools/rescore.py --run RUN --candidates FILE --out FILE

RUN was trained with model.diffusion.condition=user. FILE is Parquet, local or in object storage, with the columns
`user` and `item`, original ids, any number of pairs in any order. What is written has the same rows in the same order,
with the columns `dot` (the dot product of the exported embeddings) and `personal` (the item's content, filtered for the
user, against what the user prefers), both float32. `evaluate --rerank N` says at which weight they are best added, each
in standard deviations over a user's candidates.
"""

import argparse
import posixpath

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from gtc_dist.data import formats, storage
from gtc_dist.errors import InputError, run_command
from gtc_dist.inference.trained_run import TrainedRun, find_run, load_run
from gtc_dist.personal.personal_filter import PersonalFilter

COLUMNS = {"user": "users", "item": "items"}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True, help="URI of the run folder: run.storage/run.name")
    parser.add_argument("--candidates", required=True, help="URI of a Parquet file with the columns user and item")
    parser.add_argument("--out", required=True, help="URI of the Parquet file to write")
    args = parser.parse_args(argv)

    if storage.exists(args.out):
        raise InputError(f"{args.out} exists; choose another name, or remove it")
    table = formats.read_table(args.candidates)
    if present := [name for name in ("dot", "personal") if name in table.column_names]:
        raise InputError(f"{args.candidates} has a column {present[0]!r} already; leave it out")
    storage.check_writable(posixpath.dirname(storage.absolute(args.out)))
    run = load_run(find_run(args.run))
    users, items = pair_indexes(run, table, args.candidates)
    personal = PersonalFilter(run).scores(users, items[:, None])[:, 0]
    of_users, of_items = (embedding.weight.numpy() for embedding in run.embed())
    dot = np.einsum("nd,nd->n", of_users[users], of_items[items])
    for name, values in (("dot", dot), ("personal", personal)):
        table = table.append_column(name, pa.array(values.astype(np.float32)))
    formats.write_table(args.out, table)
    print(f"{len(users):,} pairs are in {args.out}")


def pair_indexes(run: TrainedRun, table: pa.Table, uri: str) -> tuple[np.ndarray, np.ndarray]:
    """Catalog indexes int64 [n] of the users and items of a table's pairs.

    Raises:
        InputError: a column that is missing or of another type, a null, or an id that the catalog does not have.
    """
    return _indexes(run, table, "user", uri), _indexes(run, table, "item", uri)


def _indexes(run: TrainedRun, table: pa.Table, column: str, uri: str) -> np.ndarray:
    if column not in table.column_names:
        raise InputError(f"{uri} has no column {column!r}; columns found: {', '.join(table.column_names)}")
    known = run.catalog.ids(COLUMNS[column])
    try:
        ids = table[column].combine_chunks().cast(known.type)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        found = table[column].type
        raise InputError(f"{uri}: column {column!r} is {found}, the catalog's ids are {known.type}: {error}") from None
    at = pc.index_in(ids, value_set=known)
    if at.null_count:
        first = at.is_null().index(True).as_py()
        raise InputError(f"{uri}: row {first} has the {column} {ids[first].as_py()!r}, which the run does not know")
    return at.to_numpy().astype(np.int64)


if __name__ == "__main__":
    run_command(main)
