"""Batches: every interaction once an epoch, true negatives, deterministic, errors that arrive."""

import threading
from math import comb

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import run_ranks
from small import small_catalog, small_config
from steps import loader_of

from gtc_dist.data.catalog import Catalog
from gtc_dist.distributed.collectives import Communicator
from gtc_dist.graph.csc import Graphs, by_destination, find_edges, kth_non_neighbour, take_edges
from gtc_dist.model.build import build_network
from gtc_dist.training import data_loader as loader_module
from gtc_dist.training.data_loader import (
    DataLoader,
    _prefetch,
    inclusion_chance,
    repartition_by_hash,
)

CATALOG_USERS, CATALOG_ITEMS = 60, 40


@pytest.fixture(scope="module")
def catalog(tmp_path_factory):
    return small_catalog(tmp_path_factory.mktemp("catalog") / "c", CATALOG_USERS, CATALOG_ITEMS)


def make_loader(comm: Communicator, catalog: Catalog, **sections) -> DataLoader:
    config = small_config(catalog.uri, **sections)
    network, _ = build_network(config, catalog, comm)
    return loader_of(config, catalog, comm, network)


def pairs_of(batch) -> list[tuple[int, int]]:
    """Catalog indexes of a full-mode batch's pairs."""
    users = batch.subgraph.users_in_seeds[batch.users]
    return list(zip(users.tolist(), batch.item_ids[batch.positives].tolist(), strict=True))


def test_an_epoch_holds_every_interaction_once_and_the_next_in_another_order(catalog):
    loader = make_loader(Communicator(), catalog)
    epochs = [[pair for batch in loader.epoch(n) for pair in pairs_of(batch)] for n in (1, 1, 2)]
    users, items = catalog.interactions("train")
    assert sorted(epochs[0]) == sorted(zip(users.tolist(), items.tolist(), strict=True))
    assert epochs[0] == epochs[1]
    assert epochs[0] != epochs[2]
    assert sorted(epochs[0]) == sorted(epochs[2])


def test_batches_differ_by_one_pair_at_most(catalog):
    loader = make_loader(Communicator(), catalog)
    sizes = [sum(loader.pairs_per_rank(step)) for step in range(loader.steps)]
    assert loader.steps == -(-len(loader.users) // 32)
    assert sum(sizes) == len(loader.users)
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("epoch_steps", [3, 23])
def test_epochs_of_some_steps_continue_where_the_last_one_stopped(catalog, epoch_steps):
    """Three passes, cut into epochs of another length, hold every interaction three times, each pass in its order."""
    whole = make_loader(Communicator(), catalog)
    want = [pairs_of(batch) for turn in (1, 2, 3) for batch in whole.epoch(turn)]
    loader = make_loader(Communicator(), catalog, train={"epoch_steps": epoch_steps})
    assert loader.steps == epoch_steps
    assert loader.pass_steps == whole.steps
    epochs = -(-len(want) // epoch_steps)
    got = [pairs_of(batch) for epoch in range(1, epochs + 1) for batch in loader.epoch(epoch)]
    assert len(got) == epochs * epoch_steps
    assert got[: len(want)] == want


def test_is_interacted_finds_every_train_interaction_between_users_and_items(catalog):
    graphs = Graphs.load(catalog)
    users, items = np.array([5, 0, 59, 5]), np.array([7, 3, 7, 39, 0])
    known = set(zip(*(a.tolist() for a in catalog.interactions("train")), strict=True))
    want = [[(u, i) in known for i in items.tolist()] for u in users.tolist()]
    assert graphs.is_interacted(users, items).tolist() == want
    assert graphs.is_interacted(np.arange(CATALOG_USERS), np.arange(CATALOG_ITEMS)).sum() == len(known)
    assert graphs.is_interacted(users, items[:0]).shape == (4, 0)


@pytest.mark.parametrize(
    "negatives", [{"mode": "uniform", "count": 3}, {"mode": "shared", "count": 20}, {"mode": "in_batch"}]
)
def test_negatives_are_never_train_positives_of_their_user(catalog, negatives):
    loader = make_loader(Communicator(), catalog, train={"negatives": negatives})
    known = set(zip(*(a.tolist() for a in catalog.interactions("train")), strict=True))
    drawn = set()
    for batch in loader.epoch(1):
        users = batch.subgraph.users_in_seeds[batch.users].tolist()
        items = batch.item_ids[batch.negatives]
        for n, user in enumerate(users):
            if batch.negative_mask is None:
                mine = items[n].tolist()
            else:
                mine = items[batch.negative_mask[n]].tolist()
                masked = items[~batch.negative_mask[n]].tolist()
                assert all((user, item) in known for item in masked)
            assert not any((user, item) in known for item in mine)
            drawn.update(mine)
    taken = len(np.unique(catalog.interactions("train")[1]))
    assert len(drawn) == (taken if negatives["mode"] == "in_batch" else CATALOG_ITEMS)  # else cold items too


def test_uniform_negatives_are_uniform_over_the_others(catalog):
    graphs = Graphs.load(catalog)
    user = int(graphs.user_degree.argmax())
    drawn = graphs.draw_negatives(np.full(40_000, user), np.random.default_rng(0))
    counts = np.bincount(drawn, minlength=graphs.items)
    mine = catalog.interactions("train")[1][catalog.interactions("train")[0] == user]
    assert (counts[mine] == 0).all()
    others = np.delete(counts, mine)
    assert abs(others / 40_000 - 1 / len(others)).max() < 5 * np.sqrt(1 / len(others) / 40_000)


@settings(max_examples=80, deadline=None)
@given(st.sets(st.tuples(st.integers(0, 6), st.integers(0, 9))), st.integers(0, 6), st.integers(0, 9))
def test_graph_look_ups_match_sets(pairs, destination, source):
    d, s = (np.array([p[k] for p in sorted(pairs)], dtype=np.int64) for k in (0, 1))
    graph = by_destination(d, s, 7)
    found = find_edges(graph, np.array([destination]), np.array([source]))[0]
    assert (found >= 0) == ((destination, source) in pairs)
    if found >= 0:
        assert graph.indices[found] == source
    mine = sorted(item for who, item in pairs if who == destination)
    absent = [item for item in range(10) if item not in mine]
    got = kth_non_neighbour(graph, np.full(len(absent), destination), np.arange(len(absent)))
    assert got.tolist() == absent
    indptr, edges = take_edges(graph, np.array([destination, destination]))
    assert indptr.tolist() == [0, len(mine), 2 * len(mine)]
    assert graph.indices[edges].tolist() == mine * 2


def deal_parts(comm: Communicator, scattered: bool) -> dict:
    """The same 101 interactions, read by the ranks in two different ways."""
    users, items = np.arange(101, dtype=np.int32) % 13, (np.arange(101, dtype=np.int32) * 7) % 50
    mine = np.arange(101) % comm.size == comm.rank if scattered else np.full(101, comm.rank == 0)
    u, i = repartition_by_hash(users[mine], items[mine], 50, comm)
    return {"users": torch.from_numpy(u), "items": torch.from_numpy(i)}


def test_the_rank_that_trains_on_an_interaction_does_not_depend_on_the_rank_that_reads_it():
    one, other = run_ranks(deal_parts, 2, True), run_ranks(deal_parts, 2, False)
    for a, b in zip(one, other, strict=True):
        assert torch.equal(a["users"], b["users"])
        assert torch.equal(a["items"], b["items"])
        assert 30 < len(a["users"]) < 71
    assert sum(len(a["users"]) for a in one) == 101


def test_errors_of_the_prefetch_thread_are_raised_here():
    def source():
        yield 1
        raise KeyError("from the thread")

    results = _prefetch(source(), 2)
    assert next(results) == 1
    with pytest.raises(KeyError, match="from the thread"):
        next(results)


def test_leaving_early_ends_the_prefetch_thread():
    produced = []

    def source():
        for n in range(10_000):
            produced.append(n)
            yield n

    results = _prefetch(source(), 2)
    assert next(results) == 0
    results.close()
    assert not any(thread.name == "prefetch" for thread in threading.enumerate())
    assert len(produced) < 10


def test_leaving_early_does_not_wait_for_a_batch_that_never_comes(monkeypatch):
    """A rank that fails must end, though its prefetch thread waits in a collective for ranks that will not come."""
    monkeypatch.setattr(loader_module, "LEAVE_SECONDS", 0.1)
    released = threading.Event()

    def source():
        yield 1
        released.wait()
        yield 2

    results = _prefetch(source(), 2)
    assert next(results) == 1
    results.close()  # returns
    assert any(thread.name == "prefetch" for thread in threading.enumerate())
    released.set()


def test_weighted_in_batch_negatives_count_every_item_equally(catalog):
    """Each item counts once on average over batches, however often it was taken."""
    loader = make_loader(Communicator(), catalog, train={"negatives": {"mode": "in_batch"}})
    sums, batches = np.zeros(CATALOG_ITEMS), 0
    for epoch in range(1, 201):
        for batch in loader.epoch(epoch):
            np.add.at(sums, batch.item_ids[batch.negatives].numpy(), batch.negative_weight.numpy())
            batches += 1
    taken = loader.item_counts > 0
    assert (sums[~taken] == 0).all()
    assert abs(sums[taken] / batches - 1).max() < 0.2
    assert abs((sums[taken] / batches).mean() - 1) < 0.02


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 12), st.data())
def test_inclusion_chance_is_the_hypergeometric_one(total, data):
    count, drawn = data.draw(st.integers(1, total)), data.draw(st.integers(1, total))
    want = 1 - (comb(total - count, drawn) / comb(total, drawn))
    assert inclusion_chance(np.array([count]), total, drawn)[0] == pytest.approx(want, abs=1e-9)
