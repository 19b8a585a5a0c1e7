"""A run that head-free NDCG selects: training, its logs, and what the commands print of it."""

import json
import os
import pty
import shutil
import subprocess
import sys
from contextlib import suppress

import pytest
import torch
from ranks import run_ranks
from small import ROOT, small_catalog, write_config
from trainings import train_on, train_without_ray

from gtc_dist import evaluate, train
from gtc_dist.checkpoint.existing_run import find_run
from gtc_dist.config_file import load_config
from gtc_dist.data import storage
from gtc_dist.errors import InputError
from gtc_dist.evaluation.bootstrap import paired_bootstrap
from gtc_dist.evaluation.metrics import flat_metrics, metric_value
from gtc_dist.graph.csc import load_graphs
from gtc_dist.inference.trained_run import load_run
from gtc_dist.tracking.charts import chart_tag, quality_metrics

METRIC = "head_free/ndcg@10"
OVERRIDES = ["model.hybrid.graph_filter=4", "model.hybrid.content_profile=4", "train.epochs=2", "cluster.threads=1"]


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> str:
    """A configuration file with a catalog of many cold items."""
    folder = tmp_path_factory.mktemp("selection")
    return write_config(folder, small_catalog(folder / "c", users=80, items=60, cold=10).uri, str(folder / "runs"))


@pytest.fixture(scope="module")
def run(config) -> str:
    torch.set_num_threads(1)
    return train_without_ray(config, *OVERRIDES, f"eval.metric={METRIC}", "run.name=one")


def lines_of(run: str) -> list[dict]:
    return [json.loads(line) for line in storage.read_bytes(f"{run}/metrics.jsonl").splitlines()]


def test_the_metric_selects_the_epoch_and_the_log_has_it(run):
    values = {line["epoch"]: line[f"valid/{METRIC}"] for line in lines_of(run)}
    result = storage.read_json(f"{run}/metrics.json")
    assert list(values) == [0, 1, 2]
    assert result["best_epoch"] == max(values, key=values.get)
    assert metric_value(result["valid"], METRIC) == pytest.approx(values[result["best_epoch"]])


def test_tensorboard_has_the_curves(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(f"{run}/tensorboard")
    events.Reload()
    names = {"recall@5", "head_free/ndcg@20", "cold/recall@20", "strata/tail/ndcg@20", "mean_list/recall@20"}
    names |= {"personal_gain/ndcg@20", "coverage@20", "head_share@20", METRIC}
    tags = {name: chart_tag(f"valid/{name}", quality_metrics(METRIC)) for name in names}
    assert set(tags.values()) <= set(events.Tags()["scalars"])
    assert tags[METRIC] == f"1_quality/{METRIC}"
    for tag in tags.values():
        assert [event.step for event in events.Scalars(tag)] == sorted(
            {event.step for event in events.Scalars("1_quality/recall@20")}
        )
    best = storage.read_json(f"{run}/metrics.json")["best_epoch"]
    for name, value in flat_metrics(storage.read_json(f"{run}/metrics.json")["valid"]).items():
        if (tag := chart_tag(f"valid/{name}", quality_metrics(METRIC))) in events.Tags()["scalars"]:
            assert events.Scalars(tag)[best].value == pytest.approx(value, abs=1e-5)


@pytest.mark.parametrize("metric", [METRIC, "cold/recall@20", "coverage@20"])
def test_ranks_train_and_select_alike(config, run, metric):
    """Two ranks validate every epoch as the trained weights' evaluation by one process does."""
    run_ranks(train_on, 2, config, [*OVERRIDES, f"eval.metric={metric}", f"run.name=two-{metric[:4]}"])
    two = f"{storage.join(run, '..')}/two-{metric[:4]}"
    result = storage.read_json(f"{two}/metrics.json")
    values = {line["epoch"]: line[f"valid/{metric}"] for line in lines_of(two)}
    assert result["best_epoch"] == max(values, key=values.get)
    for name in ("valid", "test"):
        alone = flat_metrics(load_run(find_run(two)).evaluate(name, None))
        assert flat_metrics(result[name]) == pytest.approx(alone, abs=1e-6)


def cells_of(text: str) -> dict[str, list[str]]:
    """Row of the table -> its cells; the names have one word or two."""
    lines = [line for line in text.splitlines() if line.startswith(("overall", "head", "tail", "cold", "mean"))]
    return {line[:12].strip(): line[12:].split() for line in lines if "@" not in line}


def test_evaluate_prints_json_and_a_table(run, capsys):
    capsys.readouterr()
    evaluate.main(["--run", run])
    printed = capsys.readouterr()
    result, expected = json.loads(printed.out), storage.read_json(f"{run}/metrics.json")["test"]
    assert printed.out.count("\n") == 1
    assert flat_metrics(result) == pytest.approx(flat_metrics(expected))
    rows = cells_of(printed.err)
    tail = expected["strata"]["tail"]
    wanted = {"overall": (expected["users"], expected["overall"]), "tail items": (tail["users"], tail)}
    wanted |= {"head-free": (expected["head_free_users"], expected["head_free"])}
    wanted |= {"mean list": (expected["users"], expected["mean_list"])}
    for name, (users, values) in wanted.items():
        shown = [f"{values[metric]:.4f}" for metric in ("recall@10", "recall@20", "ndcg@10", "ndcg@20")]
        assert rows[name] == [f"{users:,}", *shown]
    assert f"coverage@20 {expected['coverage@20']:.4f}" in printed.err


def test_a_group_without_users_has_no_metrics():
    zeros = {f"{metric}@{k}": 0.0 for metric in ("recall", "ndcg") for k in (10, 20)}
    strata = {name: {"users": 2000, **zeros} for name in ("head", "middle", "tail")}
    groups = {"overall": zeros, "head_free": zeros, "cold": zeros, "mean_list": zeros, "strata": strata}
    counts = {"users": 2000, "head_free_users": 1990, "cold_users": 0, "coverage@20": 0.5, "head_share@20": 0.25}
    rows = cells_of("\n".join(evaluate.metric_table("test", groups | counts)))
    assert rows["cold items"] == ["0", "-", "-", "-", "-"]
    assert rows["overall"] == ["2,000", "0.0000", "0.0000", "0.0000", "0.0000"]


def test_on_a_terminal_evaluate_prints_the_table_alone(run):
    """In a pseudo-terminal, as in a shell."""
    parent, child = pty.openpty()
    command = [sys.executable, "-m", "gtc_dist.evaluate", "--run", run]
    with subprocess.Popen(command, stdout=child, stderr=child, cwd=ROOT) as process:
        os.close(child)
        shown = b""
        with suppress(OSError):  # the end of a pseudo-terminal
            while part := os.read(parent, 1 << 16):
                shown += part
    os.close(parent)
    assert process.returncode == 0
    assert b"overall" in shown
    assert b"{" not in shown


@pytest.mark.parametrize("head_items", [4, 9])
def test_evaluate_compares_head_free_metrics(config, run, capsys, head_items):
    other = train_without_ray(config, *OVERRIDES, "train.epochs=1", f"run.name=other-{head_items}")
    capsys.readouterr()
    evaluate.main(["--run", run, "--against", other, *(["--head-items", "9"] if head_items == 9 else [])])
    printed = capsys.readouterr()
    result = json.loads(printed.out)
    assert set(result["against_head_free"]) == set(result["head_free"])
    ours, theirs = (load_run(find_run(uri)).metrics_by_user("test", None, head_items) for uri in (run, other))
    assert result["head_free"]["ndcg@20"] == pytest.approx(ours["head_free"]["ndcg@20"].mean(), abs=1e-6)
    ours, theirs = ours["head_free"], theirs["head_free"]
    assert len(ours["recall@20"]) == result["head_free_users"] < result["users"]
    assert result["against_head_free"] == paired_bootstrap(ours, theirs)
    row = result["against_head_free"]["ndcg@20"]
    assert row["difference"] == pytest.approx(ours["ndcg@20"].mean() - theirs["ndcg@20"].mean())
    assert 0 < row["standard_error"] < 0.2
    shown = f"ndcg@20 {row['difference']:+.4f} ± {row['standard_error']:.4f} [{row['low']:+.4f}, {row['high']:+.4f}]"
    assert shown in printed.err.splitlines()[-1]


def test_a_negative_head_is_refused(run, capsys):
    with pytest.raises(SystemExit):
        evaluate.main(["--run", run, "--head-items", "-1"])
    assert "--head-items must not be negative" in capsys.readouterr().err


@pytest.mark.parametrize("metric", ["head_free/recall@20", "cold/recall@20"])
def test_a_metric_that_counts_nothing_in_valid_is_refused(tmp_path, metric):
    catalog = small_catalog(tmp_path / "c", cold=0)
    config = load_config(write_config(tmp_path, catalog.uri, str(tmp_path / "runs")), [f"eval.metric={metric}"])
    graphs = load_graphs(config, catalog)
    if metric.startswith("cold"):
        with pytest.raises(InputError, match="is cold/recall@20, but the valid split"):
            train.check_metric(config, catalog, graphs)
        return
    train.check_metric(config, catalog, graphs)
    head_alone = small_catalog(tmp_path / "head", items=4, per_user=3, cold=0)
    with pytest.raises(InputError, match="is head_free/recall@20, but the valid split"):
        train.check_metric(config, head_alone, load_graphs(config, head_alone))


def test_results_of_older_runs_are_shown(config, run, tmp_path, capsys):
    """metrics.json of version 0.2 has only overall and cold."""
    shutil.copytree(run, tmp_path / "old" / "one")
    old = storage.read_json(f"{run}/metrics.json")
    for part in ("valid", "test"):
        old[part] = {name: old[part][name] for name in ("users", "overall", "cold_users", "cold")}
    storage.write_json(str(tmp_path / "old/one/metrics.json"), old)
    capsys.readouterr()
    for storage_folder, lines in ((tmp_path / "old", 4), (storage.join(run, ".."), 6)):
        words = [*OVERRIDES, f"eval.metric={METRIC}", "run.name=one", f"run.storage={storage_folder}"]
        assert train.main(["--config", config, *words]) == 0
        assert len(capsys.readouterr().out.splitlines()) == lines
