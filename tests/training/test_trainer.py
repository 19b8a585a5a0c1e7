"""The training loop on ranks that are plain processes: switches, cadence, odd shapes."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from ranks import run_ranks
from small import small_catalog, small_config
from trainings import fit, trainer_of

from gtc_dist.checkpoint.existing_run import best_checkpoint
from gtc_dist.distributed.collectives import Communicator
from gtc_dist.errors import InputError
from gtc_dist.graph.csc import load_graphs
from gtc_dist.training.trainer import Trainer


@pytest.fixture(scope="module")
def catalog(tmp_path_factory):
    return small_catalog(tmp_path_factory.mktemp("catalog") / "c")


ABLATIONS = {
    "as by default": {
        "model": {"masked_members": 2, "hybrid": {"graph_filter": 4, "content_profile": 3}},
        "train": {"w_diff": 0, "w_tc": 0, "ema_decay": 0.7},
    },
    "untrained scorers": {"model": {"hybrid": {"graph_filter": 4, "content_profile": 3}}},
    "no filter": {"train": {"w_diff": 0}},
    "gated, no total correlation": {"model": {"variant": "gated"}, "train": {"w_tc": 0}},
    "no hops, sampled": {
        "model": {"item_hop": False, "user_hop": False, "propagation": "sampled", "fanout": [2, 2]},
        "train": {"negatives": {"mode": "shared", "count": 10}},
    },
    "no convolution, sampled": {"model": {"layers": 0, "fanout": [], "propagation": "sampled"}},
}


@pytest.mark.parametrize("name", ABLATIONS)
def test_every_switch_trains_on_two_ranks(catalog, tmp_path, name):
    config = small_config(catalog.uri, **ABLATIONS[name])
    one, other = run_ranks(fit, 2, str(tmp_path / "run"), config)
    assert one == other
    assert one["epochs"] == [0, 1, 2]
    assert one["test"]["overall"]["recall@50"] == 1.0  # of 40 items: nobody's positive was lost or masked


def test_ranks_without_interactions_take_every_step(tmp_path):
    """Four ranks share a catalog whose batches hold less than one pair a rank."""
    catalog = small_catalog(tmp_path / "c", users=6, items=12, per_user=4, cold=0)
    config = small_config(catalog.uri, train={"batch_size": 4}, model={"propagation": "sampled", "fanout": [2, 2]})
    results = run_ranks(fit, 4, str(tmp_path / "run"), config)
    assert sum(results[0]["rows"]) == catalog.manifest.interactions["train"]
    assert all(result == results[0] for result in results)


def test_validation_runs_at_its_interval_and_at_the_end(catalog, tmp_path):
    config = small_config(catalog.uri, train={"epochs": 5}, eval={"every": 2})
    result = fit(Communicator(), str(tmp_path / "run"), config)
    assert result["epochs"] == [0, 2, 4, 5]
    lines = [json.loads(line) for line in Path(tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [0, 2, 4, 5]


def test_the_projector_gets_the_most_popular_items_in_their_principal_directions(catalog, tmp_path):
    trainer = trainer_of(Communicator(), small_config(catalog.uri, model={"width": 32}), str(tmp_path / "run"))
    items = trainer.tables.item
    rows = np.random.default_rng(0).standard_normal((items.rows, 60)).astype(np.float32)
    points, labels = trainer.validator.projector_points(items.with_values(torch.from_numpy(rows)))
    popular = np.argsort(-trainer.graphs.item_degree, kind="stable")
    assert labels == [str(i) for i in catalog.ids("items").take(popular).to_pylist()]
    assert points.shape[1] <= 50
    centred = (rows - rows.mean(axis=0))[popular]
    np.testing.assert_allclose(points @ points.T, centred @ centred.T, atol=1e-3)  # 40 items: no direction is left out


def test_the_same_seed_gives_the_same_result_bit_for_bit(catalog, tmp_path):
    config = small_config(catalog.uri)
    first, second = (fit(Communicator(), str(tmp_path / name), config) for name in "ab")
    assert first == second
    a, b = (sorted((tmp_path / name / "checkpoints").rglob("*.npy")) for name in "ab")
    assert [p.name for p in a] == [p.name for p in b]
    assert all(p.read_bytes() == q.read_bytes() for p, q in zip(a, b, strict=True))


def test_missing_interactions_stop_the_run(catalog, tmp_path):
    config = small_config(catalog.uri)
    users, items = catalog.interactions("train")
    graphs = load_graphs(config, catalog)
    with pytest.raises(InputError, match=f"the ranks read {len(users) - 1} train interactions, the manifest"):
        Trainer(config, catalog, str(tmp_path / "run"), users[1:], items[1:], graphs, Communicator())


def test_training_beats_popularity_where_there_is_something_to_learn(tmp_path):
    catalog = small_catalog(tmp_path / "c", users=300, items=120, per_user=12)
    config = small_config(catalog.uri, train={"epochs": 15, "table_lr": 1e-2, "batch_size": 64})
    fit(Communicator(), str(tmp_path / "run"), config)
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    assert metrics["test"]["overall"]["recall@20"] > 1.5 * metrics["popularity"]["recall@20"]


def test_early_stopping_keeps_the_best(catalog, tmp_path):
    config = small_config(catalog.uri, train={"epochs": 40, "table_lr": 0.1}, eval={"patience": 2})
    result = fit(Communicator(), str(tmp_path / "run"), config)
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    assert metrics["last_epoch"] == result["epochs"][-1] < 40
    assert metrics["last_epoch"] - metrics["best_epoch"] == 2
    assert best_checkpoint(str(tmp_path / "run")) == metrics["checkpoint"]
