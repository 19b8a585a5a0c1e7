"""Rows of untrained users and items against plain loops, on one and on three ranks."""

import numpy as np
import pytest
import torch
from ranks import run_ranks
from small import small_catalog

from gtc_dist.data.catalog import Catalog
from gtc_dist.distributed.collectives import Communicator
from gtc_dist.distributed.sharded_table import ShardedTable
from gtc_dist.graph.csc import Graphs
from gtc_dist.warm_start.fold_in import fold_in_items, fold_in_users

WIDTH = 5


@pytest.fixture(scope="module")
def catalog(tmp_path_factory) -> Catalog:
    return small_catalog(tmp_path_factory.mktemp("catalog") / "c")


def table(name: str, rows: int, comm: Communicator) -> ShardedTable:
    return ShardedTable(name, rows, WIDTH, comm, init_std=1.0, trainable=False)


def masks(graphs: Graphs) -> tuple[np.ndarray, np.ndarray]:
    """Trained users and items. The users of item 0 are untrained, and so are the items near item 1, which is, too."""
    users, items = np.arange(graphs.users) % 4 > 0, np.arange(graphs.items) % 3 > 0
    hop = graphs.item_item
    items[hop.indices[hop.indptr[1] : hop.indptr[2]]] = False
    items[1] = False
    return users, items


def folded(comm: Communicator, uri: str, has_graph: bool) -> dict:
    graphs = Graphs.load(Catalog(uri))
    known_users, known_items = masks(graphs)
    users, items, others = (
        table(*each, comm) for each in (("u", graphs.users), ("i", graphs.items), ("o", graphs.items))
    )
    far = fold_in_items([items, others], known_items, graphs.item_item if has_graph else None, 7)
    far_users = fold_in_users(users, known_users, ~known_users, graphs, 7)
    return {"users": users.weight, "items": items.weight, "others": others.weight, "far": far, "far_users": far_users}


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("has_graph", [True, False])
def test_items_get_the_mean_of_similar_trained_ones(catalog, size, has_graph):
    found = run_ranks(folded, size, catalog.uri, has_graph)
    graphs = Graphs.load(catalog)
    trained, far = masks(graphs)[1], 0
    for name, letter in (("items", "i"), ("others", "o")):
        rows = table(letter, graphs.items, Communicator()).weight
        want, hop = rows.clone(), graphs.item_item
        for item in np.flatnonzero(~trained):
            edges = range(hop.indptr[item], hop.indptr[item + 1]) if has_graph else ()
            near = [(hop.weight[e], hop.indices[e]) for e in edges if trained[hop.indices[e]] and hop.weight[e] > 0]
            far += not near
            total = sum(weight for weight, _ in near)
            want[item] = sum(w / total * rows[i] for w, i in near) if near else rows[trained].mean(0)
        torch.testing.assert_close(torch.cat([part[name] for part in found]), want)
    assert found[0]["far"] == far / 2 > 0


@pytest.mark.parametrize("size", [1, 3])
def test_users_get_the_mean_over_their_items_of_their_users(catalog, size):
    found = run_ranks(folded, size, catalog.uri, True)
    graphs = Graphs.load(catalog)
    trained = masks(graphs)[0]
    rows = table("u", graphs.users, Communicator()).weight
    of_item: dict[int, list] = {}
    pairs = list(zip(*catalog.interactions("train"), strict=True))
    for user, item in pairs:
        if trained[user]:
            of_item.setdefault(item, []).append(rows[user])
    want, far = rows.clone(), 0
    for user in np.flatnonzero(~trained):
        items = [torch.stack(of_item[item]).mean(0) for owner, item in pairs if owner == user and item in of_item]
        far += not items
        want[user] = torch.stack(items).mean(0) if items else rows[trained].mean(0)
    torch.testing.assert_close(torch.cat([part["users"] for part in found]), want)
    assert found[0]["far_users"] == far
