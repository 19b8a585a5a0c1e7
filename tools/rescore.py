"""Score user-item pairs with a run's personal content filter, to re-rank candidates.

    python tools/rescore.py --run RUN --candidates FILE --out FILE

RUN was trained with model.diffusion.condition=user. The candidates are a Parquet file, local or in object storage, with
the columns `user` and `item` (original ids), any number of pairs in any order. The output has the same rows in the same
order, with two more float32 columns: `dot` (the dot product of the exported embeddings) and `personal` (the personal
content score: the item's content, filtered for the user, compared with the user's preference). `evaluate --rerank N`
finds the best weight for adding them, both z-scored over a user's candidates.
"""

import argparse
import posixpath

import numpy as np
import pyarrow as pa

from gtc_dist.checkpoint.existing_run import find_run
from gtc_dist.data import formats, storage
from gtc_dist.errors import InputError, run_command
from gtc_dist.inference.trained_run import TrainedRun, load_run
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
    user_rows, item_rows = (embeddings.weight.numpy() for embeddings in run.final_embeddings())
    dot = np.einsum("nd,nd->n", user_rows[users], item_rows[items])
    for name, values in (("dot", dot), ("personal", personal)):
        table = table.append_column(name, pa.array(values.astype(np.float32)))
    formats.write_table(args.out, table)
    print(f"{len(users):,} pairs are in {args.out}")


def pair_indexes(run: TrainedRun, table: pa.Table, uri: str) -> tuple[np.ndarray, np.ndarray]:
    """Catalog indexes int64 [n] of the users and items of a table's pairs.

    Raises:
        InputError: a column that is missing or of another type, a null, or an id that the catalog lacks.
    """
    return _column_indexes(run, table, "user", uri), _column_indexes(run, table, "item", uri)


def _column_indexes(run: TrainedRun, table: pa.Table, column: str, uri: str) -> np.ndarray:
    if column not in table.column_names:
        raise InputError(f"{uri} has no column {column!r}; columns found: {', '.join(table.column_names)}")
    try:
        return run.catalog.index_of(COLUMNS[column], table[column])
    except InputError as error:
        raise InputError(f"{uri}: column {column!r}: {error}") from None


if __name__ == "__main__":
    run_command(main)
