"""New users: embeddings of users who are not in the catalog, from their interactions with its items.

They are added to the graph as destinations alone (`graph/added_users.py`), and their rows of the user table are folded
in (`warm_start/fold_in.py`); then they are embedded like any other user, while nothing changes for the others. One
without an interaction with an item of the catalog gets the mean of the users who have some.
"""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch

from gtc_dist.checkpoint.existing_run import RunRef
from gtc_dist.data.catalog import Catalog
from gtc_dist.distributed.collectives import Communicator
from gtc_dist.distributed.sharded_table import ShardedTable
from gtc_dist.evaluation.beyond_accuracy import mean_user
from gtc_dist.graph.added_users import add_users
from gtc_dist.graph.csc import Graphs, load_graphs
from gtc_dist.hybrid.embeddings import Embeddings
from gtc_dist.inference.trained_run import TrainedRun, load_run
from gtc_dist.warm_start.fold_in import fold_in_users


@dataclass(frozen=True)
class NewUsers:
    """Users outside a catalog and their interactions.

    ids: [n], in the catalog's type.
    indptr: int64 [n + 1], first interaction of each.
    items: int32 [E], catalog indexes, sorted within a user.
    weight: float32 [E]; None: 1 each.
    unknown: number of rows with an item that the catalog lacks.
    """

    ids: pa.Array
    indptr: np.ndarray
    items: np.ndarray
    weight: np.ndarray | None = None
    unknown: int = 0

    def __len__(self) -> int:
        return len(self.ids)


class CatalogWithUsers(Catalog):
    """A catalog whose last users come from outside: only their ids are known to it."""

    def __init__(self, catalog: Catalog, more: pa.Array):
        self.uri, self.manifest, self.more = catalog.uri, catalog.manifest, more

    @property
    def users(self) -> int:
        return self.manifest.users + len(self.more)

    def ids(self, kind: str, start: int = 0, stop: int | None = None) -> pa.Array:
        if kind != "users":
            return super().ids(kind, start, stop)
        known, stop = self.manifest.users, self.users if stop is None else stop
        first, last = max(start - known, 0), max(stop - known, 0)
        return pa.concat_arrays([super().ids(kind, min(start, known), min(stop, known)), self.more[first:last]])


def load_run_with_new_users(
    run_ref: RunRef, new: NewUsers, comm: Communicator, graphs: Graphs | None = None
) -> TrainedRun:
    """`load_run`, with the new users behind those of the catalog; in one process alone."""
    graphs = graphs or load_graphs(run_ref.config, Catalog(run_ref.config.data.catalog))
    weight = new.weight
    if graphs.nodes.weighted_degree is None:
        weight = None
    elif weight is None:
        weight = np.ones(len(new.items), np.float32)
    run = load_run(run_ref, comm, add_users(graphs, new.indptr, new.items, weight))
    known = run.tables.user
    users = ShardedTable(known.name, known.rows + len(new), known.width, comm, trainable=False)
    users.weight[: known.rows] = known.weight
    is_new = np.arange(users.rows) >= known.rows
    fold_in_users(users, run.graphs.counted_users, is_new, run.graphs, run.config.eval.block_rows)
    run.tables.user, run.catalog = users, CatalogWithUsers(run.catalog, new.ids)
    return run


def with_mean_row(run: TrainedRun, embeddings: Embeddings) -> Embeddings:
    """Final embeddings in which new users without an interaction have the mean of the users who have some."""
    users, graphs = embeddings.users, run.graphs
    alone = (graphs.user_degree == 0) & (np.arange(graphs.users) >= graphs.users - graphs.added_users)
    rows = users.weight.clone()
    rows[torch.from_numpy(alone)] = mean_user(users, graphs, run.config.eval.block_rows).to(rows.dtype)
    return Embeddings(users.with_values(rows), embeddings.items)


def without_new_users(run: TrainedRun, embeddings: Embeddings) -> tuple[Embeddings, torch.Tensor]:
    """Final embeddings of the catalog's users and items, and the rows of the new users, [n, width]."""
    users, known = with_mean_row(run, embeddings).users, run.graphs.users - run.graphs.added_users
    table = ShardedTable(users.name, known, 0, users.comm, trainable=False)
    return Embeddings(table.with_values(users.weight[:known]), embeddings.items), users.weight[known:]
