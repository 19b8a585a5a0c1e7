"""Print the top recommendations for a user from exported embeddings.

    python tools/recommend.py --embeddings DIR --user ID [--top 10]

Ranks all items by dot product. Items that the user already has are not excluded, since an export does not hold them.
"""

import argparse

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from gtc_dist.data import formats, storage
from gtc_dist.errors import InputError, run_command


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--embeddings", required=True, help="URI of a folder that gtc_dist.export wrote")
    parser.add_argument("--user", required=True, help="original id")
    parser.add_argument("--top", type=int, default=10)
    args = parser.parse_args(argv)

    manifest = storage.join(args.embeddings, "manifest.json")
    export = storage.read_json(manifest) if storage.exists(manifest) else {}
    if export.get("metric") != "dot product":
        raise InputError(f"{args.embeddings} holds no export of python -m gtc_dist.export")
    files = sorted(export["files"])
    vector = user_vector(args.embeddings, [f for f in files if f.startswith("users/")], args.user)
    best: list[tuple[float, object]] = []
    for name in (f for f in files if f.startswith("items/")):
        ids, vectors = read_embeddings(args.embeddings, name)
        scores = vectors @ vector
        top = np.argsort(-scores, kind="stable")[: args.top]
        best += [(float(scores[row]), ids[int(row)].as_py()) for row in top]
    for score, item in sorted(best, key=lambda pair: -pair[0])[: args.top]:
        print(f"{score:10.4f}  {item}")


def read_embeddings(folder: str, name: str) -> tuple[pa.ChunkedArray, np.ndarray]:
    """Ids and float32 vectors [n, W] of one file."""
    table = formats.read_table(storage.join(folder, name))
    flat = table["embedding"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
    return table["id"], flat.reshape(table.num_rows, -1).astype(np.float32)


def user_vector(folder: str, files: list[str], user: str) -> np.ndarray:
    """Vector [W] of a user. Raises InputError for an unknown one."""
    for name in files:
        ids, vectors = read_embeddings(folder, name)
        row = pc.index(ids.cast(pa.string()), user).as_py()
        if row >= 0:
            return vectors[row]
    raise InputError(f"no user {user!r} in {folder}")


if __name__ == "__main__":
    run_command(main)
