"""Today's embeddings from yesterday's run: the same catalog gives the export, new users get lists of their own."""

import functools

import numpy as np
import pytest
import yaml
from grown import two_days
from ranks import run_ranks
from small import small_catalog, write_config
from trainings import read_export, train_without_ray

from gtc_dist import evaluate, export
from gtc_dist.checkpoint.existing_run import find_run, run_status
from gtc_dist.data import storage
from gtc_dist.data.catalog import Catalog
from gtc_dist.errors import InputError
from gtc_dist.evaluation import ranking
from gtc_dist.inference.trained_run import load_run
from gtc_dist.recommend import lists
from gtc_dist.refresh import refresh_run
from gtc_dist.refresh.refresh_run import refresh_rank, run_on_catalog
from gtc_dist.report import write_report
from gtc_dist.warm_start.matched_rows import earlier_rows

HYBRID = ["model.hybrid.graph_filter=3", "model.hybrid.content_profile=4", "model.masked_members=2"]


@pytest.fixture(scope="module")
def days(tmp_path_factory) -> tuple[str, Catalog, Catalog]:
    """A run of yesterday, its catalog and today's."""
    folder = tmp_path_factory.mktemp("days")
    before, today = two_days(folder)
    config = write_config(folder, before.uri, str(folder / "runs"), epochs=8)
    return train_without_ray(config, *HYBRID), before, today


@pytest.fixture(scope="module")
def refreshed(days, tmp_path_factory) -> str:
    out = str(tmp_path_factory.mktemp("refreshed") / "today")
    refresh_run.main(["--run", days[0], "--catalog", days[2].uri, "--out", out])
    return out


def test_the_same_catalog_gives_the_export(days, tmp_path):
    uri, before, _ = days
    refresh_run.main(["--run", uri, "--catalog", before.uri, "--out", str(tmp_path / "same")])
    export.main(["--run", uri, "--out", str(tmp_path / "export")])
    for kind in ("users", "items"):
        (ids, rows), (want_ids, want) = (read_export(str(tmp_path / name), kind) for name in ("same", "export"))
        assert ids == want_ids
        np.testing.assert_allclose(rows, want, rtol=1e-6)


def test_new_users_get_better_lists_than_the_most_popular_items(days, refreshed):
    _, before, today = days
    run = load_run(find_run(refreshed))
    assert (run.catalog.uri, run.config.train.init_from) == (today.uri, days[0])
    is_new = earlier_rows(before, today, "users", 0, today.users) < 0
    truth = ranking.load_ground_truth(today, "test")
    options = run.ranking_options(None)
    recall = {}
    for name, embeddings in (
        ("own", run.final_embeddings()),
        ("popular", ranking.popularity(run.graphs, run.tables.user.comm)),
    ):
        ranked = np.flatnonzero((truth.degree > 0) & (run.graphs.user_degree > 0))
        metrics = ranking.metrics_by_user(*embeddings, run.graphs, truth, options, {"": None})[""]["recall@5"]
        recall[name] = metrics[is_new[ranked]].mean()
    assert is_new.sum() == 10
    assert recall["own"] > 1.5 * recall["popular"]


def test_the_folder_is_an_export_and_a_run(days, refreshed, tmp_path, capsys):
    _, before, today = days
    ids, rows = read_export(refreshed, "users")
    assert ids == today.ids("users").to_pylist()
    manifest = storage.read_json(f"{refreshed}/manifest.json")
    assert manifest["rows_from"]["users"] == {"trained": 50, "folded_in": 10, "mean": 0}
    assert manifest["trained_on"] == {}
    readme = storage.read_bytes(f"{refreshed}/README.md").decode()
    assert "| trained by the run | 50 |" in readme
    export.main(["--run", refreshed, "--out", str(tmp_path / "again")])
    np.testing.assert_array_equal(read_export(str(tmp_path / "again"), "users")[1], rows)
    new = today.ids("users")[int(np.flatnonzero(earlier_rows(before, today, "users", 0, 60) < 0)[0])].as_py()
    capsys.readouterr()
    lists.main(["--run", refreshed, "--user", new, "--top", "3"])
    assert f"user {new}\n   1 " in capsys.readouterr().out
    with pytest.raises(InputError, match="is not empty"):
        refresh_run.main(["--run", days[0], "--catalog", today.uri, "--out", refreshed])
    with pytest.raises(InputError, match="holds embeddings of gtc refresh; choose another"):
        run_status(find_run(refreshed).config, refreshed, today.manifest.fingerprint)


def own_rows(comm, **options) -> dict:
    found = refresh_rank(comm, None, **options)
    return {"rows_from": found["rows_from"], "users": found["users"]}


def test_ranks_write_the_same(days, refreshed, tmp_path):
    uri, _, today = days
    earlier, out = find_run(uri), str(tmp_path / "ranks")
    options = {
        "run_ref": run_on_catalog(earlier, today.uri, out),
        "earlier": earlier,
        "trained_on": {},
        "dtype": "float32",
    }
    found = run_ranks(functools.partial(own_rows, **options), 2)
    rows_from = storage.read_json(f"{refreshed}/manifest.json")["rows_from"]
    assert found[0] == found[1] == {"rows_from": rows_from, "users": 60}
    scores = []
    for folder in (out, refreshed):  # the signs of the filter's modes are free
        (users, of_users), (items, of_items) = (read_export(folder, kind) for kind in ("users", "items"))
        assert (users, items) == (today.ids("users").to_pylist(), today.ids("items").to_pylist())
        scores.append(of_users @ of_items.T)
    np.testing.assert_allclose(*scores, rtol=1e-3, atol=1e-3)


def test_object_storage_and_an_interrupted_refresh(days, refreshed, s3):
    uri, _, today = days
    for name in storage.listing(uri):
        storage.write_bytes(f"{s3}/run/{name}", storage.read_bytes(f"{uri}/{name}"))
    words = ["--run", f"{s3}/run", "--catalog", today.uri, "--run-catalog", days[1].uri, "--out", f"{s3}/today"]
    storage.write_json(f"{s3}/today/refreshing.json", {})
    storage.write_bytes(f"{s3}/today/users/part-000000000000.parquet", b"half")
    refresh_run.main(words)
    np.testing.assert_array_equal(read_export(f"{s3}/today", "items")[1], read_export(refreshed, "items")[1])
    assert find_run(f"{s3}/today").config.train.init_from == f"{s3}/run"


def test_its_report_says_that_nothing_was_trained(days, refreshed, tmp_path):
    write_report.main(["--run", refreshed, "--out", str(tmp_path / "r.html")])
    page = (tmp_path / "r.html").read_text()
    assert f"gtc refresh made this run of {days[0]}, without training" in page
    assert "not finished" not in page
    assert "Lists of some users" in page


def test_metrics_of_what_the_run_has_seen_are_refused(days, tmp_path):
    """A catalog whose valid split has what the run was trained on."""
    uri = days[0]
    other = small_catalog(tmp_path / "other", seed=1)  # the same ids, other interactions
    refresh_run.main(["--run", uri, "--catalog", other.uri, "--out", str(tmp_path / "out")])
    seen = storage.read_json(str(tmp_path / "out/manifest.json"))["trained_on"]
    assert seen["valid"] > 0
    with pytest.raises(InputError, match=f"was trained on {seen['valid']} interactions of valid"):
        evaluate.main(["--run", str(tmp_path / "out"), "--split", "valid"])
    assert "metrics of these would be of what the weights have seen" in (tmp_path / "out/README.md").read_text()


def test_bad_input_is_refused_before_anything_is_written(days, tmp_path):
    uri, before, today = days
    words = ["--run", uri, "--catalog", today.uri]
    with pytest.raises(InputError, match="a folder's name may have letters"):
        refresh_run.main([*words, "--out", str(tmp_path / "a b")])
    config = yaml.safe_load(storage.read_bytes(f"{uri}/config.yaml"))
    assert config["data"]["catalog"] == before.uri
    (tmp_path / "full").mkdir()
    (tmp_path / "full/config.yaml").write_text("mine")
    with pytest.raises(InputError, match="is not empty"):
        refresh_run.main([*words, "--out", str(tmp_path / "full")])
    with pytest.raises(InputError, match="holds no catalog"):
        refresh_run.main(["--run", uri, "--catalog", str(tmp_path), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "full/config.yaml").read_text() == "mine"
