"""EMA of the weights: its value; training is unaffected by it; the best checkpoint holds it."""

import pytest
import torch
from ranks import run_ranks
from small import small_catalog, small_config

from gtc_dist.checkpoint import checkpoint_files
from gtc_dist.data import storage
from gtc_dist.data.catalog import Catalog
from gtc_dist.distributed.collectives import Communicator
from gtc_dist.graph.csc import load_graphs
from gtc_dist.model.build import build_network
from gtc_dist.training.trainer import Trainer
from gtc_dist.training.weight_averaging import WeightAverage


@pytest.fixture(scope="module")
def catalog(tmp_path_factory):
    return small_catalog(tmp_path_factory.mktemp("catalog") / "c")


def test_the_average_matches_the_formula_and_the_weights_are_restored(catalog):
    network, tables = build_network(small_config(catalog.uri), catalog, Communicator())
    average = WeightAverage(network, tables, 0.75)
    start = tables.user.weight.clone()
    with average.in_place():
        assert torch.equal(tables.user.weight, start)  # nothing to average yet
    average.update()
    tables.user.weight += 1.0
    average.update()
    tables.user.weight += 1.0
    average.update()
    with average.in_place():
        # 0.75 * (0.75 * 0 + 0.25 * 1) + 0.25 * 2
        torch.testing.assert_close(tables.user.weight, start + 0.6875)
        torch.testing.assert_close(tables.item.weight, average.live[-1])
    torch.testing.assert_close(tables.user.weight, start + 2.0)


def fit(comm: Communicator, uri: str, run: str, config) -> dict:
    catalog = Catalog(uri)
    users, items = catalog.interactions("train")
    mine = slice(comm.rank, None, comm.size)
    seen = []
    graphs = load_graphs(config, catalog)
    trainer = Trainer(config, catalog, run, users[mine], items[mine], graphs, comm, seen.append)
    take_in = trainer.train_epoch
    weights = []
    trainer.train_epoch = lambda epoch, done: (take_in(epoch, done), weights.append(trainer.tables.item.weight.clone()))
    trainer.fit()
    return {"weights": weights, "range": (trainer.tables.item.start, trainer.tables.item.stop), "seen": seen}


def test_training_is_unchanged_and_the_checkpoint_holds_the_average(catalog, tmp_path):
    # validated only at the end, so the last epoch is the best checkpoint
    config = {
        share: small_config(
            catalog.uri, train={"ema_decay": share, "epochs": 3}, eval={"every": 3, "metric": "ndcg@20"}
        )
        for share in (0.0, 0.5)
    }
    plain = run_ranks(fit, 2, catalog.uri, str(tmp_path / "plain"), config[0.0])
    averaged = run_ranks(fit, 2, catalog.uri, str(tmp_path / "averaged"), config[0.5])
    for one, other in zip(plain, averaged, strict=True):
        for epoch in range(3):
            torch.testing.assert_close(other["weights"][epoch], one["weights"][epoch])
    whole = [torch.cat([rank["weights"][epoch] for rank in averaged]) for epoch in range(3)]
    assert averaged[0]["seen"] == averaged[1]["seen"]
    best = storage.read_json(str(tmp_path / "averaged" / "metrics.json"))
    assert best["best_epoch"] == 3
    _, tables = build_network(config[0.5], catalog, Communicator())
    checkpoint_files.load(
        str(tmp_path / "averaged" / best["checkpoint"]), checkpoint_files.weight_shards(list(tables.all()))
    )
    torch.testing.assert_close(tables.item.weight, 0.25 * whole[0] + 0.25 * whole[1] + 0.5 * whole[2])
