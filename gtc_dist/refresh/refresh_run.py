"""Today's embeddings from yesterday's run, without training:

    python -m gtc_dist.refresh --run RUN --catalog NEW --out DIR [--workers N]

NEW is a catalog that prepare made of the grown data, with the configuration of the run, in another folder than the
run's own catalog (which is needed, too: --run-catalog names its place if it has moved). The weights of RUN stay as they
are. Interactions that came since enter the graph, and with it the embeddings of their users and items. A user that RUN
did not train is folded in: its row is the mean over its items of the rows of their users. A new item with interactions
gets the mean row of similar items; an item without one is predicted from its content, as in the run.

DIR gets what `gtc export` writes (users/, items/, README.md, manifest.json), and beside it a run on NEW (config.yaml,
checkpoints/): `gtc recommend --run DIR`, `gtc export --run DIR` with its options, and `train.init_from: DIR` take it.
README.md says how many users and items come from where. RUN, NEW and DIR are local or in object storage.
"""

import argparse
import functools
import posixpath

import yaml

from gtc_dist.checkpoint import checkpoint_files
from gtc_dist.checkpoint.existing_run import RunRef
from gtc_dist.checkpoint.run_folder import CHECKPOINT_FOLDER, CONFIG_FILE, REFRESH_FILES, epoch_name
from gtc_dist.config import Config, RunConfig
from gtc_dist.data import storage
from gtc_dist.data.catalog import Catalog
from gtc_dist.data.output_folder import OutputFolder
from gtc_dist.distributed.collectives import Communicator
from gtc_dist.embedding_formats.loading_text import loading_text
from gtc_dist.embedding_formats.write_formats import write_formats
from gtc_dist.errors import InputError
from gtc_dist.graph.csc import Graphs, load_graphs
from gtc_dist.inference.embedding_files import export_rank
from gtc_dist.inference.model_card import CARD
from gtc_dist.launch.job_paths import refuse_relative_paths
from gtc_dist.launch.offline_job import parse_run_command, run_on_ranks_or_here
from gtc_dist.model.build import build_network
from gtc_dist.warm_start.carry_over import carry_over, describe_counts
from gtc_dist.warm_start.earlier_run import find_earlier_run, trained_interactions

FINISHED, REFRESHING = REFRESH_FILES
REFRESHED_FILES = r"(users|items)/part-\d{12}\.parquet|README\.md|config\.yaml|checkpoints/.*|ray-[0-9a-f]{8}/.*"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="URI of a new or empty folder, or of an incomplete refresh")
    parser.add_argument("--run-catalog", metavar="URI", help="the catalog of the run, if it has moved")
    parser.add_argument("--dtype", choices=("float32", "float16"), default="float32")
    args = parse_run_command(parser, argv, catalog="the catalog of the grown data (required)")
    if not args.catalog:
        parser.error("the following arguments are required: --catalog")
    paths = {"--run": args.run, "--catalog": args.catalog, "--out": args.out, "--run-catalog": args.run_catalog}
    refuse_relative_paths(paths)
    out, catalog = storage.absolute(args.out), Catalog(storage.absolute(args.catalog), verify="size")
    earlier = find_earlier_run(args.run, None, catalog, args.run_catalog)
    today = run_on_catalog(earlier, catalog.uri, out)
    seen = trained_interactions(earlier, catalog)
    folder = refresh_folder(out, args.out)
    work = functools.partial(refresh_rank, earlier=earlier, trained_on=seen, dtype=args.dtype)
    result = write_formats(out, run_on_ranks_or_here(args, today, work), {"parquet"}, args.dtype)
    storage.write_bytes(storage.join(out, CARD), refresh_card(earlier, today, result, args.dtype).encode())
    manifest = {"run": earlier.uri, "checkpoint": earlier.checkpoint, "epoch": earlier.epoch, "catalog": catalog.uri}
    folder.finish({**manifest, **result, "dtype": args.dtype, "metric": "dot product"})
    for kind, counts in result["rows_from"].items():
        print(f"{kind}: {describe_counts(counts)}")
    print(f"{result['users']:,} users and {result['items']:,} items of width {result['dim']} are in {out}")


def run_on_catalog(earlier: RunRef, catalog: str, out: str) -> RunRef:
    """The run that refresh makes of an earlier one, on another catalog. Raises InputError for a name that no run may
    have."""
    place, name = posixpath.split(out)
    try:
        run = RunConfig(storage=place, name=name)
    except ValueError:
        raise InputError(f"--out {out}: a folder's name may have letters, digits, '.', '_' and '-' only") from None
    settings = earlier.config
    data = settings.data.model_copy(update={"catalog": catalog})
    train = settings.train.model_copy(update={"init_from": earlier.uri})
    config: Config = settings.model_copy(update={"data": data, "train": train, "run": run})
    return RunRef(out, f"{CHECKPOINT_FOLDER}/{epoch_name(earlier.epoch)}", earlier.epoch, config)


def refresh_folder(out: str, named: str) -> OutputFolder:
    """The output folder, emptied of a refresh that was cut off, and marked. Raises InputError where it holds anything
    else."""
    folder = OutputFolder(out, "the output folder", "a refresh", REFRESHED_FILES, FINISHED, REFRESHING)
    folder.start_empty(named)
    folder.mark()
    return folder


def refresh_rank(
    comm: Communicator, graphs: Graphs | None, run_ref: RunRef, earlier: RunRef, trained_on: dict, dtype: str
) -> dict:
    """Save the earlier run's weights for the catalog of `run_ref`, and export them. Collective: every rank must call
    it.

    Args:
        trained_on: numbers of interactions of valid and test that the earlier run was trained on.

    Returns:
        The manifest's entries of `export_rank`, and `rows_from`.
    """
    config = run_ref.config
    catalog = Catalog(config.data.catalog)
    graphs = graphs or load_graphs(config, catalog)
    network, tables = build_network(config, catalog, comm, trainable=False)
    dense, counts = carry_over(earlier, catalog, graphs, network, tables, config.eval.block_rows)
    dense = {**dense, "network": network.state_dict()}
    head = {"epoch": run_ref.epoch, "catalog": catalog.manifest.fingerprint, "trained_on": trained_on}
    shards = checkpoint_files.weight_shards(list(tables.all()))
    checkpoint_files.save(storage.join(run_ref.uri, run_ref.checkpoint), head, dense, shards, comm)
    del network, tables, shards, dense
    if comm.rank == 0:
        text = yaml.safe_dump(config.model_dump(), sort_keys=False)
        storage.write_bytes(storage.join(run_ref.uri, CONFIG_FILE), text.encode())
    comm.barrier()
    return {**export_rank(comm, graphs, run_ref, run_ref.uri, dtype), "rows_from": counts, "trained_on": trained_on}


def refresh_card(earlier: RunRef, today: RunRef, result: dict, dtype: str) -> str:
    """README.md: what the embeddings are, where each kind of rows comes from, how to load them."""
    seen = result["trained_on"]
    lines = [
        "# Embeddings of users and items, refreshed without training",
        "",
        f"{result['users']:,} users and {result['items']:,} items, {result['dim']} columns of {dtype}: the weights of "
        f"epoch {earlier.epoch} of the run `{earlier.uri}` on the catalog `{today.config.data.catalog}`.",
        "",
        "The score of a user and an item is the dot product of their embeddings; leave out what a user has.",
        "",
        "| rows | users | items |",
        "| --- | --- | --- |",
    ]
    users, items = result["rows_from"]["users"], result["rows_from"]["items"]
    lines += [
        f"| trained by the run | {users['trained']:,} | {items['trained']:,} |",
        f"| users: of those who share items; items: of similar content | {users['folded_in']:,} | "
        f"{items['by_content']:,} |",
        f"| the mean, nothing being near | {users['mean']:,} | {items['mean']:,} |",
        "",
        "Items without a train interaction are then predicted from their content alone.",
        "",
    ]
    if seen:
        lines += [
            "The run was trained on interactions that are in "
            + " and ".join(f"{split} ({count:,})" for split, count in seen.items())
            + " of this catalog: metrics of these would be of what the weights have seen.",
            "",
        ]
    lines += [f"`gtc recommend --run {today.uri}` makes lists of them.", ""]
    return "\n".join([*lines, loading_text(result)])
