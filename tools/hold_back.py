"""Yesterday's data: the files of a given split without a share of the users, of the items and of the interactions.

    python tools/hold_back.py --config configs/lastfm.yaml --out work/next_day/raw [--share 0.1] [--seed 0] [a.b=c ...]

Writes train.parquet, valid.parquet and test.parquet. Rows of the users and items that are held back are left out of all
three, and of the rest of train the share of the interactions, at random. Every row stays in its split, so that a run on
the result has seen nothing of valid and test of the whole data. Features stay where they are: `data.features` takes
absolute paths.
"""

import argparse

import numpy as np
import pyarrow as pa

from gtc_dist.config_file import parse_command_line
from gtc_dist.data import formats, storage
from gtc_dist.data.catalog import SPLITS
from gtc_dist.errors import InputError, run_command


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="folder for the three files")
    parser.add_argument("--share", type=float, default=0.1, help="of users, of items, of interactions (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    config, args = parse_command_line(parser, argv)
    data, rng = config.data, np.random.default_rng(args.seed)
    if data.split.method != "given":
        raise InputError(f"{args.config}: data.split.method is {data.split.method}; hold_back reads a given split")
    uris = {name: [storage.join(data.raw, file) for file in getattr(data.split, name)] for name in SPLITS}
    tables = {name: pa.concat_tables([formats.read_table(uri) for uri in files]) for name, files in uris.items()}
    held = {}
    for column in (data.interactions.user, data.interactions.item):
        ids = np.unique(np.concatenate([table[column].to_numpy() for table in tables.values()]))
        held[column] = rng.choice(ids, round(args.share * len(ids)), replace=False)
    for name, table in tables.items():
        kept = np.ones(len(table), bool)
        for column, ids in held.items():
            kept &= ~np.isin(table[column].to_numpy(), ids)
        if name == "train":
            kept &= rng.random(len(table)) >= args.share
        formats.write_table(storage.join(args.out, f"{name}.parquet"), table.filter(pa.array(kept)))
        print(f"{name}: {kept.sum():,} of {len(table):,} rows")


if __name__ == "__main__":
    run_command(main)
