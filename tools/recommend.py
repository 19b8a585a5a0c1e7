"""Recommend items to a user from exported embeddings, to look at a result.

    python tools/recommend.py --embeddings DIR --user ID [--top 10]

Ranks every item by dot product; items that the user already has are not left out, since an export does not hold them.
"""

import argparse

import numpy as np
import pyarrow as pa

from gtc_dist.data import formats, storage
from gtc_dist.errors import InputError, run_command


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--embeddings", required=True, help="URI of a folder that export_embeddings.py wrote")
    parser.add_argument("--user", required=True, help="original id")
    parser.add_argument("--top", type=int, default=10)
    args = parser.parse_args(argv)

    manifest = storage.join(args.embeddings, "manifest.json")
    export = storage.read_json(manifest) if storage.exists(manifest) else {}
    if export.get("metric") != "dot product":
        raise InputError(f"{args.embeddings} holds no export of tools/export_embeddings.py")
    files = sorted(export["files"])
    vector = user_vector(args.embeddings, [f for f in files if f.startswith("users/")], args.user)
    found: list[tuple[float, object]] = []
    for name in (f for f in files if f.startswith("items/")):
        ids, vectors = read(args.embeddings, name)
        scores = vectors @ vector
        best = np.argsort(-scores, kind="stable")[: args.top]
        found += [(float(scores[b]), ids[int(b)].as_py()) for b in best]
    for score, item in sorted(found, key=lambda pair: -pair[0])[: args.top]:
        print(f"{score:10.4f}  {item}")


def read(folder: str, name: str) -> tuple[pa.ChunkedArray, np.ndarray]:
    """Ids and float32 vectors [n, W] of one file."""
    table = formats.read_table(storage.join(folder, name))
    flat = table["embedding"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
    return table["id"], flat.reshape(table.num_rows, -1).astype(np.float32)


def user_vector(folder: str, files: list[str], user: str) -> np.ndarray:
    for name in files:
        ids, vectors = read(folder, name)
        at = np.flatnonzero(np.asarray([str(i) for i in ids.to_pylist()]) == user)
        if len(at):
            return vectors[at[0]]
    raise InputError(f"no user {user!r} in {folder}")


if __name__ == "__main__":
    run_command(main)
