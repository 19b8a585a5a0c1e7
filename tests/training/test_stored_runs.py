"""Runs and a catalog made by version 0.1.0 open, evaluate, export and resume with the same results (tests/stored)."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from small import ROOT

from gtc_dist import export
from gtc_dist.checkpoint.existing_run import find_run, run_status
from gtc_dist.config_file import read_run_config
from gtc_dist.data.catalog import Catalog
from gtc_dist.distributed.collectives import Communicator
from gtc_dist.graph.csc import load_graphs
from gtc_dist.inference.trained_run import load_run
from gtc_dist.training.trainer import Trainer

STORED = ROOT / "tests" / "stored" / "f099d64"
EXPECTED = json.loads((STORED / "expected.json").read_text())


@pytest.fixture(params=["paper", "gated"])
def stored(request, tmp_path) -> tuple[str, Path]:
    """Name of a stored run, and a copy of it."""
    shutil.copytree(STORED, tmp_path / "s")
    run = tmp_path / "s" / request.param
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("STORED", str(tmp_path / "s")))
    return request.param, run


def test_it_opens_and_evaluates(stored):
    name, run = stored
    trained = load_run(find_run(str(run)))
    users, items = (table.weight.numpy() for table in trained.final_embeddings())
    want = np.load(STORED / f"{name}.npz")
    signs = column_signs(items, want["items"])
    for kind, got in (("users", users), ("items", items)):
        rounding = max(1e-6, 1e-7 * np.abs(want[kind]).max())  # float32; users have values of some hundreds
        np.testing.assert_allclose(got * signs, want[kind], rtol=1e-5, atol=rounding)
    for split in ("valid", "test"):
        assert trained.evaluate(split, None)["overall"] == pytest.approx(EXPECTED[name][split], abs=1e-6)


def test_it_exports(stored, tmp_path):
    name, run = stored
    export.main(["--run", str(run), "--out", str(tmp_path / "out")])
    table = pq.read_table(tmp_path / "out" / "items")
    ids = Catalog(str(run.parent / "catalog")).ids("items").to_pylist()
    rows = dict(zip(table["id"].to_pylist(), table["embedding"].to_pylist(), strict=True))
    got = np.array([rows[item] for item in ids])
    want = np.load(STORED / f"{name}.npz")["items"]
    np.testing.assert_allclose(got * column_signs(got, want), want, rtol=1e-5, atol=1e-6)


def column_signs(got: np.ndarray, want: np.ndarray) -> np.ndarray:
    """1 or -1 for each column: the sign of an eigenvector depends on the processor, and users' columns share it."""
    return np.sign((got * want).sum(axis=0))


def resumed(name: str, run: Path) -> Trainer:
    """A trainer of a stored run with two more epochs."""
    config = read_run_config((run / "config.yaml").read_bytes(), "config.yaml")
    config = config.model_copy(update={"train": config.train.model_copy(update={"epochs": 5})})
    catalog = Catalog(config.data.catalog)
    assert run_status(config, str(run), catalog.manifest.fingerprint) == "begun"
    pairs = catalog.interactions("train")
    return Trainer(config, catalog, str(run), *pairs, load_graphs(config, catalog), Communicator())


@pytest.mark.parametrize("stored", ["paper"], indirect=True)
def test_it_resumes_as_if_nothing_had_changed(stored):
    """Two more epochs give the results of version 0.1.0."""
    name, run = stored
    result = resumed(name, run).fit()
    expected = EXPECTED[name]["after_5_epochs"]
    assert {key: result[key] for key in ("best_epoch", "last_epoch")} == {
        key: expected[key] for key in ("best_epoch", "last_epoch")
    }
    for split in ("valid", "test"):
        assert result[split]["overall"] == pytest.approx(expected[split], abs=1e-6)
    epochs = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(epochs) == len(EXPECTED[name]["epochs"])
    later = {"cold/neighbours", "cold/offset"}  # came with 0.5.0 and 0.9.0
    for got, want in zip(epochs, EXPECTED[name]["epochs"], strict=True):
        assert got.keys() - later == want.keys()
        assert got["valid"] == pytest.approx(want["valid"], abs=1e-6)
        assert {k: got[k] for k in want if k != "valid"} == pytest.approx({k: want[k] for k in want if k != "valid"})


@pytest.mark.parametrize("stored", ["gated"], indirect=True)
def test_a_hybrid_learns_as_if_nothing_had_changed(stored, monkeypatch):
    """The weights of the fusion are now fitted, not searched. With the weights that version 0.1.0 found, two more
    epochs of training rank valid as they did there; fitted ones rank test, which neither has seen, no worse."""
    name, run = stored
    trainer = resumed(name, run)
    validator, ours, theirs = trainer.validator, [], []
    tune = validator.validate

    def on_test() -> float:
        values = validator.rank(validator.scorer.fuse(*validator.embed()), "test")["overall"]
        return values["recall@20"] * values["ndcg@20"]

    def compare(epoch: int, best: float):
        want = EXPECTED[name]["epochs"][epoch]
        before, parts = validator.scorer.state(), {"blend": {}, "cold": {}}
        for key in want.keys() - {"epoch", "valid"}:
            part, _, weight = key.partition("/")
            parts.get(part, {})[weight] = want[key]
        validator.scorer.load(parts)
        fused = validator.scorer.fuse(*validator.embed())
        metrics = validator.rank(validator.scorer.impute_cold(fused), "valid")["overall"]
        assert metrics == pytest.approx(want["valid"], abs=1e-6)
        theirs.append(on_test())
        validator.scorer.load(before)
        out = tune(epoch, best)
        ours.append(on_test())
        return out

    monkeypatch.setattr(validator, "validate", compare)
    assert trainer.fit()["last_epoch"] == 5
    assert len(ours) == 2
    assert all(own >= other for own, other in zip(ours, theirs, strict=True))
