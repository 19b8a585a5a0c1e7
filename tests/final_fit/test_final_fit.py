"""A final fit: what it trains on, what it takes from the selection, and that its figures are not taken for others."""

import numpy as np
import pytest
import torch
from small import refused, small_catalog, write_config
from trainings import interrupt_after, train_without_ray

from gtc_dist import evaluate, export, train
from gtc_dist.checkpoint import checkpoint_files
from gtc_dist.checkpoint.existing_run import find_run
from gtc_dist.config_file import load_config
from gtc_dist.data import storage
from gtc_dist.data.catalog import Catalog
from gtc_dist.distributed.collectives import Communicator
from gtc_dist.errors import InputError
from gtc_dist.final_fit.final_trainer import FinalTrainer
from gtc_dist.final_fit.selection import with_selection
from gtc_dist.graph.csc import load_graphs
from gtc_dist.inference.trained_run import load_run
from gtc_dist.report.model_facts import ListQuestion, model_facts
from gtc_dist.report.run_data import read_run
from gtc_dist.report.write_report import report_page

KEYS = ["model.masked_members=1", "train.ema_decay=0.5", "model.user_hop=false"]
KEYS += ["train.batch_size=32", "eval.metric=ndcg@20"]


@pytest.fixture(scope="module")
def selection(tmp_path_factory) -> tuple[str, str, Catalog]:
    """The configuration, the run that selected, and the catalog."""
    folder = tmp_path_factory.mktemp("selection")
    catalog = small_catalog(folder / "catalog")
    file = write_config(folder, catalog.uri, str(folder / "runs"), log_every=3, checkpoint_minutes=0)
    return file, train_without_ray(file, *KEYS), catalog


def final_trainer(selection, name: str) -> FinalTrainer:
    file, uri, catalog = selection
    config = train.with_absolute_uris(load_config(file, [*KEYS, f"run.name={name}", f"train.final_fit={uri}"]))
    config = with_selection(config, catalog)
    run = storage.join(config.run.storage, name)
    train.storage.write_bytes(f"{run}/config.yaml", train.yaml.safe_dump(config.model_dump()).encode())
    pairs = catalog.interactions(*config.train_splits)
    return FinalTrainer(config, catalog, run, *pairs, load_graphs(config, catalog), Communicator())


@pytest.fixture(scope="module")
def final(selection) -> str:
    trainer = final_trainer(selection, "final")
    trainer.fit()
    return trainer.run


def test_it_trains_on_train_and_valid_and_never_on_test(selection):
    trainer, catalog = final_trainer(selection, "splits"), selection[2]
    edges = set()
    nodes = trainer.graphs.nodes
    for user in range(catalog.users):
        sources = nodes.indices[nodes.indptr[user] : nodes.indptr[user + 1]]
        edges |= {(user, int(node) - catalog.users) for node in sources}
    pairs = {name: set(zip(*catalog.interactions(name), strict=True)) for name in ("train", "valid", "test")}
    assert edges == pairs["train"] | pairs["valid"]
    assert not edges & pairs["test"]
    assert sum(trainer.loader.interactions_per_rank) == len(edges)
    degree = trainer.graphs.item_degree
    assert degree.tolist() == np.bincount([i for _, i in edges], minlength=catalog.items).tolist()


def test_epochs_and_weights_of_the_scorers_are_those_of_the_selection(selection, final):
    uri = selection[1]
    before, found = find_run(uri), find_run(final)
    assert found.epoch == before.epoch > 0
    dense = [checkpoint_files.load(storage.join(ref.uri, ref.checkpoint), []) for ref in (before, found)]
    assert dense[0]["blend"] == dense[1]["blend"]
    assert dense[0]["cold"] == dense[1]["cold"]
    name = next(iter(dense[0]["network"]))
    assert not torch.equal(dense[0]["network"][name], dense[1]["network"][name])
    metrics, selected = (storage.read_json(f"{ref}/metrics.json") for ref in (final, uri))
    for part in ("valid", "test", "popularity"):
        assert metrics[part] == selected[part]
    assert metrics["final_fit"]["selection"] == uri
    assert "the metrics are those of" in train.summary(final, metrics)
    assert not storage.exists(f"{final}/metrics.jsonl") or not storage.read_bytes(f"{final}/metrics.jsonl").strip()


def test_a_resumed_one_ends_with_the_same_weights(selection, final):
    trainer = final_trainer(selection, "cut")
    interrupt_after(trainer, 8)
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()
    with pytest.raises(InputError, match="is a final fit that has not ended"):
        find_run(trainer.run)
    again = final_trainer(selection, "cut")
    again.fit()
    assert again.state.progress.steps >= 8
    ends = [find_run(run) for run in (final, trainer.run)]
    for name in ("user", "item", "masked_item"):
        files = [checkpoint_files.read_manifest(storage.join(ref.uri, ref.checkpoint))["files"] for ref in ends]
        same = [{file: entry["sha256"] for file, entry in each.items() if file.startswith(name)} for each in files]
        assert same[0] == same[1] != {}


def test_its_report_says_what_its_metrics_are_of(selection, final):
    """Valid was trained on, so parts are compared on test, where they have positives."""
    facts = model_facts(Communicator(), None, find_run(final), ListQuestion(None, None))
    assert facts["split"] == "test"
    assert max(part["recall@20"] for part in facts["parts"]) > 0
    page = report_page(read_run(final), None, facts)
    assert f"The metrics are those of the run that selected, {selection[1]}." in page
    assert "The train and valid interactions of the catalog" in page
    assert "users of test; its first 20" in page


def test_its_figures_are_refused_or_marked(selection, final, tmp_path, capsys):
    uri = selection[1]
    with pytest.raises(InputError, match=r"was trained on 60 interactions of valid, so metrics would be of what"):
        evaluate.main(["--run", final, "--split", "valid"])
    with pytest.raises(InputError, match="was trained on more splits; they do not compare"):
        evaluate.main(["--run", uri, "--against", final])
    evaluate.main(["--run", final])
    shown = capsys.readouterr()
    assert '"trained_on": ["train", "valid"]' in shown.out
    assert "warning" in shown.err
    export.main(["--run", final, "--out", str(tmp_path / "e")])
    assert "trained on train and valid; the metrics are those of" in (tmp_path / "e/README.md").read_text()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.final_fit=nowhere"], "holds no run"),
        (["train.final_fit=RUN", "train.lr=0.5"], "has another configuration (train.lr: 0.001 there, 0.5 here)"),
        (["train.final_fit=FINAL"], "is a final fit itself; give the run that selected"),
    ],
)
def test_bad_selections_are_refused(selection, final, overrides, message):
    words = [word.replace("RUN", selection[1]).replace("FINAL", final) for word in overrides]
    with pytest.raises(InputError) as error:
        train.main(["--config", selection[0], *KEYS, "run.name=other", *words])
    assert message in str(error.value)


def test_another_catalog_and_an_unfinished_selection_are_refused(selection, tmp_path):
    file, uri, _ = selection
    words = ["-m", "gtc_dist.train", "--config", file, *KEYS, "run.name=other", f"train.final_fit={uri}"]
    other = small_catalog(tmp_path / "other", seed=5)
    refused([*words, f"data.catalog={other.uri}"], "was trained on")
    for name in storage.listing(uri):
        if name != "metrics.json":
            storage.write_bytes(f"{tmp_path}/unfinished/{name}", storage.read_bytes(f"{uri}/{name}"))
    with pytest.raises(InputError, match="has not ended, so nothing is selected yet"):
        train.main(["--config", file, *KEYS, "run.name=other", f"train.final_fit={tmp_path}/unfinished"])


def test_a_catalog_without_the_weights_of_valid_is_refused(tmp_path):
    catalog = small_catalog(tmp_path / "c", weight=np.linspace(0.5, 1, 500).astype(np.float32))
    file = write_config(tmp_path, catalog.uri, str(tmp_path / "runs"), epochs=1)
    uri = train_without_ray(file)
    with pytest.raises(InputError, match=r"was built by an earlier version, without them; run python -m gtc_dist\.pre"):
        train.main(["--config", file, "run.name=other", f"train.final_fit={uri}"])


def test_weights_of_valid_reach_the_training(tmp_path):
    rng = np.random.default_rng(0)
    ones, heavy = rng.uniform(0.5, 1, 500).astype(np.float32), np.full(500, 9, np.float32)
    catalog = small_catalog(tmp_path / "c", weight=ones, final_weights={"train": ones / 2, "valid": heavy})
    file = write_config(tmp_path, catalog.uri, str(tmp_path / "runs"), epochs=1)
    trainer = final_trainer((file, train_without_ray(file, *KEYS), catalog), "final")
    trainer.fit()
    graphs, pairs = load_run(find_run(trainer.run)).graphs, catalog.interactions("train", "valid")
    trained = len(catalog.interactions("train")[0])
    expected = np.concatenate([ones[:trained] / 2, heavy[: len(pairs[0]) - trained]])
    np.testing.assert_allclose(graphs.relative_weights(*pairs), expected / expected.mean(), rtol=1e-4)
