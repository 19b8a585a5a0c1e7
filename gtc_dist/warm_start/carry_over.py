"""Weights of an earlier run on a grown catalog: rows by original ids, dense weights as they are.

Each rank reads its share of the earlier run's rows, one table at a time, and the ranks exchange them; so a rank holds
one more shard of one table, whatever the number of ranks of both runs. Users and items that the earlier run did not
train get rows from those that it did (`fold_in.py`). Weights that act on features are rewritten for the features of the
grown catalog (`feature_map.py`).
"""

import numpy as np
import torch

from gtc_dist.checkpoint import checkpoint_files
from gtc_dist.checkpoint.existing_run import RunRef, find_run
from gtc_dist.config import Config
from gtc_dist.data import storage
from gtc_dist.data.catalog import Catalog
from gtc_dist.distributed.sharded_table import ShardedTable, plan_lookup
from gtc_dist.graph.csc import Graphs
from gtc_dist.model.gtc import GTC, Tables
from gtc_dist.warm_start.feature_map import FeatureMap
from gtc_dist.warm_start.fold_in import fold_in_items, fold_in_users
from gtc_dist.warm_start.matched_rows import earlier_rows, has_interactions

LOOKUP_ROWS = 1 << 16  # rows that a rank asks for at once
# Share of the earlier run's rows in those that a training starts from. Rows that fit the earlier interactions too well
# generalise worse for good, as networks do that are trained on from a part of the data (shrink and perturb: Ash and
# Adams, NeurIPS 2020; docs/log.md).
EARLIER_SHARE = 0.5


def initial_weights(config: Config, catalog: Catalog, graphs: Graphs, network: GTC, tables: Tables) -> dict:
    """Start a training from the run `train.init_from`; returns the record of what it started from, which is empty where
    the key is not set. Collective: every rank must call it.

    A row is the weighted mean of the earlier run's (EARLIER_SHARE) and the random one of a training without the key.
    """
    if config.train.init_from is None:
        return {}
    earlier = find_run(config.train.init_from, verify="none")
    initial = [table.weight.clone() for table in tables.all()]
    _, counts = carry_over(earlier, catalog, graphs, network, tables, config.eval.block_rows)
    for table, random in zip(tables.all(), initial, strict=True):
        _shrink_and_perturb(table, random)
    shown = "; ".join(f"{kind}: {describe_counts(n)}" for kind, n in counts.items())
    if tables.user.comm.rank == 0:
        print(f"starting from {earlier.uri}, {earlier.checkpoint}: {shown}", flush=True)
    return {"run": earlier.uri, "checkpoint": earlier.checkpoint, **counts}


@torch.no_grad()
def carry_over(
    earlier: RunRef, catalog: Catalog, graphs: Graphs, network: GTC, tables: Tables, chunk: int
) -> tuple[dict, dict[str, dict[str, int]]]:
    """Set the weights of a network and its tables to those of an earlier run. Collective: every rank must call it.

    Args:
        earlier: with a model of the same form (`earlier_run.py`).
        catalog, graphs: of the network.
        chunk: rows of this rank computed at once.

    Returns:
        The checkpoint's dense entries, and the numbers of users and items by where their rows come from: `trained` in
        the earlier run, `folded_in` (`by_content` for items), `mean`.
    """
    before, comm = Catalog(earlier.config.data.catalog), tables.user.comm
    uri, counts, dense = storage.join(earlier.uri, earlier.checkpoint), {}, {}
    for kind, own in (("users", [tables.user]), ("items", [each for each in tables.all() if each is not tables.user])):
        row = earlier_rows(before, catalog, kind, own[0].start, own[0].stop)
        trained = _trained(row, before, kind, graphs, own[0])
        for table in own:
            dense = _load_rows(uri, table, getattr(before, kind), row)
        if kind == "users":
            rest = fold_in_users(tables.user, trained, ~trained, graphs, chunk)
        else:
            rest = fold_in_items(own, trained, graphs.item_item, chunk)
        known = int(trained.sum())
        counts[kind] = {"trained": known, "folded_in": len(trained) - known - rest, "mean": rest}
    counts["items"]["by_content"] = counts["items"].pop("folded_in")
    network.load(dense["network"])
    for number, name in enumerate(network.modalities):
        features = FeatureMap.between(before, catalog, name)
        if not features.is_identity:
            _rewrite(network, number, features)
    comm.barrier()
    return dense, counts


def describe_counts(counts: dict[str, int]) -> str:
    """Numbers by source, in words."""
    return ", ".join(f"{number:,} {name.replace('_', ' ')}" for name, number in counts.items())


def _trained(row: np.ndarray, before: Catalog, kind: str, graphs: Graphs, table: ShardedTable) -> np.ndarray:
    """Mask bool [n] of all users or items that have a trained row. One that had no train interaction then and has some
    now gets a new row; one that still has none keeps its own, as neighbours may depend on it."""
    degree = graphs.user_degree if kind == "users" else graphs.item_degree
    mine = slice(table.start, table.stop)
    own = (row >= 0) & (has_interactions(before, kind)[row] | (degree[mine] == 0))
    counts = [stop - start for start, stop in (table.comm.row_range(table.rows, r) for r in range(table.comm.size))]
    gathered = table.comm.all_gather(torch.from_numpy(own).to(table.comm.device, torch.uint8), counts)
    return gathered.cpu().numpy().astype(bool)


@torch.no_grad()
def _shrink_and_perturb(table: ShardedTable, random: torch.Tensor) -> None:
    """Local. Mix the rows with initial ones, in the columns that begin at random."""
    mixed = torch.lerp(random, table.weight, EARLIER_SHARE)
    table.weight.copy_(torch.where(random.any(dim=0), mixed, table.weight))


def _load_rows(uri: str, table: ShardedTable, rows: int, wanted: np.ndarray) -> dict:
    """Load the rows `wanted` int64 [n] of a table of `rows` rows into the first table's rows, where they are not -1;
    returns the checkpoint's dense entries. A collective."""
    comm = table.comm
    stored = ShardedTable(table.name, rows, table.width, comm, trainable=False)
    dense = checkpoint_files.load(uri, checkpoint_files.weight_shards([stored]))
    place = torch.from_numpy(np.flatnonzero(wanted >= 0)).to(comm.device)
    ids = torch.from_numpy(wanted[wanted >= 0]).to(comm.device)
    for part in range(comm.all_reduce_max(-(-len(ids) // LOOKUP_ROWS))):
        at = slice(part * LOOKUP_ROWS, (part + 1) * LOOKUP_ROWS)
        table.weight[place[at]] = stored.lookup(plan_lookup(ids[at], rows, comm, trained=False))
    return dense


def _rewrite(network: GTC, number: int, features: FeatureMap) -> None:
    """Local. Rewrite the weights that act on a modality, given by its number, for its present features."""
    for member in network.members:
        project = member.project[number]
        project.bias += features.offset(project.weight)
        project.weight.copy_(features.weights(project.weight))
    masked = network.masked
    if masked is None:
        return
    mean = masked.get_buffer(f"content_mean_{number}")
    mean.copy_(features.points(mean[None])[0])
    widths = list(masked.content_widths.values())
    if widths[number] < len(mean):
        rows = masked.get_buffer(f"content_directions_{number}")
    else:
        rows = masked.content_map[sum(widths[:number]) :][: widths[number]]
    # these act on unit rows: of the map of the features only what turns them counts, not how long it makes them
    rows.copy_(features.weights(rows.T).T / features.mean_stretch)
