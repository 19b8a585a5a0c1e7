"""tools/suite.py and tools/references.py: missing runs are trained, and the page holds the metrics of the runs."""

import json
import signal
import subprocess
import sys
from pathlib import Path
from statistics import mean

import numpy as np
import pytest
import torch
import yaml
from references import Protocol, closed_form_references, item_regression, top_items, unit_content
from small import refused, small_catalog, write_config
from suite import VARIANTS, main, read_variants
from trainings import train_without_ray, wait_for_states

from gtc_dist.config_file import load_config
from gtc_dist.data.catalog import Catalog
from gtc_dist.distributed.collectives import Communicator
from gtc_dist.distributed.sharded_table import ShardedTable
from gtc_dist.errors import InputError
from gtc_dist.evaluation.metrics import flat_metrics
from gtc_dist.evaluation.ranking import evaluate_split

ROOT = Path(__file__).resolve().parents[2]
CHANGES = {"default": [], "no-tc": ["train.w_tc=0"]}


def files_of(folder: Path, **train_keys) -> tuple[str, str]:
    """A configuration of a small catalog that is named like one of configs/peers.yaml, and a file of variants."""
    catalog = small_catalog(folder / "catalog")
    config = Path(write_config(folder, catalog.uri, str(folder / "unused"), **train_keys)).rename(
        folder / "lastfm.yaml"
    )
    variants = folder / "variants.yaml"
    variants.write_text(yaml.safe_dump(CHANGES, sort_keys=False))
    return str(config), str(variants)


def metrics_of(out: Path, run: str) -> dict:
    return json.loads((out / "runs/lastfm" / run / "metrics.json").read_text())


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, list[str], dict]:
    """Folder of a suite of two variants and two seeds, its command line, and suite.json."""
    folder = tmp_path_factory.mktemp("suite")
    config, variants = files_of(folder, epochs=1)
    out = folder / "out"
    for name, changes in CHANGES.items():
        for seed in (3, 4):
            place = [f"train.seed={seed}", f"run.storage={out}/runs/lastfm", f"run.name={name}-{seed}"]
            train_without_ray(config, *changes, *place)
    words = ["--configs", config, "--out", str(out), "--variants", variants, "--seeds", "3,4"]
    main(words)
    return out, words, json.loads((out / "suite.json").read_text())


def test_the_figures_are_those_of_the_runs(finished):
    out, _, summary = finished
    catalog = summary["catalogs"]["lastfm"]
    flat = {
        (name, split): [flat_metrics(metrics_of(out, f"{name}-{seed}")[split]) for seed in (3, 4)]
        for name in CHANGES
        for split in ("valid", "test")
    }
    for (name, split), runs in flat.items():
        for metric, cell in catalog["variants"][name][split].items():
            a, b = (run[metric] for run in runs)
            assert cell["mean"] == pytest.approx((a + b) / 2)
            assert cell["sd"] == pytest.approx(abs(a - b) / 2**0.5)
    assert {"head_free/recall@20", "mean_list/ndcg@20", "coverage@20"} <= catalog["variants"]["no-tc"]["test"].keys()
    for split in ("valid", "test"):
        for metric in ("recall@20", "ndcg@20", "head_free/ndcg@20"):
            ours, theirs = (mean(run[metric] for run in flat[name, split]) for name in ("no-tc", "default"))
            row = catalog["differences"]["no-tc"][split][metric]
            assert row["difference"] == pytest.approx(100 * (ours / theirs - 1))
            assert row["low"] <= row["difference"] <= row["high"]
    moved = catalog["differences"]["no-tc"]["valid"]["ndcg@20"]["difference"]
    ranks = (1, 2) if moved < 0 else (2, 1)
    assert summary["over_catalogs"] == {
        "default": {"catalogs": 1, "difference": 0, "rank": ranks[0]},
        "no-tc": {"catalogs": 1, "difference": moved, "rank": ranks[1]},
    }


def test_the_page_has_a_row_for_each_variant_and_reference(finished):
    out, _, summary = finished
    tables = [part.splitlines() for part in (out / "suite.md").read_text().split("\n\n") if part.startswith("|")]
    assert [[line.split(" | ")[0] for line in rows[2:]] for rows in tables[:3]] == [
        ["| default", "| no-tc"],
        ["| default", "| no-tc"],
        ["| no-tc"],
    ]
    methods = [line.split(" | ")[0].split(" (")[0] for line in tables[3][2:]]
    assert methods == ["| LightGCN", "| MGCN", "| FREEDOM", "| popularity", "| EASE", "| CEASE"]
    own = summary["catalogs"]["lastfm"]["variants"]["default"]["valid"]["recall@20"]["mean"]
    assert f"0.4150 ({100 * (own / 0.415 - 1):+.1f})" in tables[3][2]
    for rows in tables:
        assert len({line.count("|") for line in rows}) == 1


def test_finished_runs_are_kept_and_those_with_another_configuration_refused(finished, capsys):
    out, words, summary = finished
    stamps = {path: path.stat().st_mtime_ns for path in (out / "runs").rglob("*") if path.is_file()}
    main(words)
    shown = capsys.readouterr().err
    assert "4 runs, 4 of them finished" in shown
    assert "references" not in shown
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
    assert json.loads((out / "suite.json").read_text()) == summary
    with pytest.raises(InputError, match="default-3 holds a run with another configuration"):
        main([*words, "train.lr=0.5"])


@pytest.mark.long
def test_an_interrupted_suite_goes_on_and_failures_do_not_stop_it(tmp_path):
    config, variants = files_of(tmp_path, epochs=100_000, checkpoint_minutes=0)
    broken = {"breaks": ["train.lr=1e30", "train.table_lr=1e30"], "default": []}
    Path(variants).write_text(yaml.safe_dump(broken, sort_keys=False))
    out = tmp_path / "out"
    command = [sys.executable, "tools/suite.py", "--configs", config, "--out", str(out), "--seeds", "0"]
    command += ["--variants", variants, "--jobs", "2"]
    started = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    wait_for_states(out / "runs/lastfm/default-0", 1)
    started.send_signal(signal.SIGTERM)
    started.communicate(timeout=100)
    assert started.returncode == 143
    log = out / "runs/lastfm/default-0.log"
    assert "state saved; rerun the same command to resume" in log.read_text()

    epochs = len((out / "runs/lastfm/default-0/metrics.jsonl").read_text().splitlines())
    done = subprocess.run([*command, f"train.epochs={epochs}"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert "2 runs, 0 of them finished" in done.stderr
    assert "resuming" in log.read_text()
    assert "1 runs failed: lastfm/breaks-0; rerun the same command" in done.stderr
    summary = json.loads((out / "suite.json").read_text())["catalogs"]["lastfm"]
    assert {name: row["seeds"] for name, row in summary["variants"].items()} == {"default": 1}


def test_unknown_variants_are_refused_before_any_work(tmp_path):
    config, _ = files_of(tmp_path)
    words = ["tools/suite.py", "--configs", config, "--out", str(tmp_path / "out"), "--variants"]
    refused([*words, "default,no-such"], "unknown variants ['no-such']; known are default,")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("change", ["data.items=all", "model.user_hop=true"])
def test_a_variant_that_needs_another_catalog_is_refused(tmp_path, change):
    config, variants = files_of(tmp_path)
    Path(variants).write_text(yaml.safe_dump({"default": [], "other": [change]}))
    words = ["--configs", config, "--out", str(tmp_path / "out"), "--variants", variants, "model.user_hop=false"]
    with pytest.raises(InputError, match=r"the variant other .* cannot be compared with others of"):
        main(words)
    assert not (tmp_path / "out").exists()


def test_a_file_without_lists_of_overrides_is_refused(tmp_path):
    file = tmp_path / "v.yaml"
    with pytest.raises(InputError, match=r"v\.yaml of --variants does not exist"):
        read_variants(str(file))
    for text in ("a", "[a]", "{a: b}", "{a: [1]}"):
        file.write_text(text)
        with pytest.raises(InputError, match=r"v\.yaml must be a mapping"):
            read_variants(str(file))


@pytest.mark.parametrize("name", read_variants(str(VARIANTS)))
@pytest.mark.parametrize("catalog", ["tiktok", "lastfm", "beauty"])
def test_every_variant_is_a_configuration(name, catalog):
    """The command reads all of them before it trains the first."""
    config = load_config(ROOT / f"configs/{catalog}.yaml", [*read_variants(name)[name], f"run.name={name}-0"])
    assert config.run.name == f"{name}-0"


@pytest.fixture
def small(tmp_path) -> Catalog:
    return small_catalog(tmp_path / "catalog")


@pytest.mark.parametrize("weight", [0.0, 2.0])
def test_item_regression_is_a_ridge_regression_of_each_item_on_the_others(small, weight):
    """EASE without content. With content its columns are further rows of the interactions (CEASE)."""
    interactions = Protocol.of(small, 4).interactions
    content = unit_content(small, "m0")
    found = item_regression(interactions, 5.0, content if weight else None, weight)
    dense = interactions.toarray()
    degree = np.maximum(dense.sum(axis=1, keepdims=True), 1)
    rows = np.concatenate([dense * degree**-0.25, weight**0.5 * content.T])
    for item in range(small.items):
        others = np.delete(np.arange(small.items), item)
        x = rows[:, others]
        expected = np.linalg.solve(x.T @ x + 5.0 * np.eye(len(others)), x.T @ rows[:, item])
        np.testing.assert_allclose(found[others, item], expected, atol=1e-10)
        assert found[item, item] == 0


def test_content_is_centred_raw_content(small):
    """Standardisation is undone: the columns of the raw features have their own variance."""
    content = unit_content(small, "m0")
    np.testing.assert_allclose(np.linalg.norm(content, axis=1), 1)
    std = np.load(f"{small.uri}/features/m0/std.npy")
    raw = small.features("m0").astype(float) * std
    raw -= raw.mean(axis=0)
    cosine = raw @ raw.T / np.outer(*[np.linalg.norm(raw, axis=1)] * 2)
    np.testing.assert_allclose(content @ content.T, cosine, atol=1e-12)


def test_the_protocol_is_that_of_evaluate(small):
    """Rows of the interactions as users' embeddings and columns of the weights as items' give the same scores."""
    protocol = Protocol.of(small, 4)
    weights = item_regression(protocol.interactions, 5.0, unit_content(small, "m1"), 3.0)
    users, items = (
        ShardedTable(name, len(rows), small.items, Communicator(), trainable=False).with_values(torch.tensor(rows))
        for name, rows in (("u", protocol.interactions.toarray()), ("i", weights.T))
    )
    for split in ("valid", "test"):
        expected = flat_metrics(
            evaluate_split(users, items, protocol.graphs, protocol.truth[split], head=protocol.head)
        )
        found = protocol.metrics(weights, split)
        assert {name: expected[name] for name in found} == pytest.approx(found)
        assert {"recall@20", "head_free/ndcg@20", "cold/recall@20", "mean_list/ndcg@20", "coverage@20"} <= found.keys()


def test_the_best_choice_on_valid_is_kept(small):
    found = closed_form_references(small, 4)
    protocol = Protocol.of(small, 4)
    best = max(
        protocol.metrics(item_regression(protocol.interactions, ridge), "valid")["ndcg@20"]
        for ridge in (3.0, 10.0, 30.0, 100.0, 300.0)
    )
    assert found["EASE"]["valid"]["ndcg@20"] == best
    assert found["CEASE"]["valid"]["ndcg@20"] > best
    assert found["popularity"]["test"] == protocol.metrics(None, "test")


def test_top_items_breaks_ties_by_index():
    scores = np.array([[1.0, 2.0, 1.0, 1.0], [-np.inf, 0.0, -np.inf, -np.inf]])
    assert top_items(scores, 3).tolist() == [[1, 0, 2], [1, -1, -1]]
    assert top_items(scores, 5).tolist() == [[1, 0, 2, 3, -1], [1, -1, -1, -1, -1]]
