"""The commands from raw tables to exported embeddings, on local Ray, on disk and in object storage."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from ranks import run_ranks
from small import refused, small_catalog, write_config
from trainings import read_export, train_on, train_without_ray

from gtc_dist import evaluate, export, train
from gtc_dist.checkpoint import checkpoint_files
from gtc_dist.checkpoint.existing_run import find_run
from gtc_dist.config import Config
from gtc_dist.data import storage
from gtc_dist.data.catalog import Catalog
from gtc_dist.distributed.collectives import Communicator
from gtc_dist.errors import InputError
from gtc_dist.inference.trained_run import load_run
from gtc_dist.model.build import build_network


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> str:
    """Folder of a finished run of one rank, trained without Ray."""
    folder = tmp_path_factory.mktemp("run")
    catalog = small_catalog(folder / "catalog")
    return train_without_ray(write_config(folder, catalog.uri, str(folder / "runs")))


def metrics_of(run: str) -> dict:
    return storage.read_json(storage.join(run, "metrics.json"))


def resolved_catalog(run: str) -> str:
    return yaml.safe_load(storage.read_bytes(f"{run}/config.yaml"))["data"]["catalog"]


def test_contents_of_a_run_folder(run):
    names = storage.listing(run)
    for name in ("config.yaml", "metrics.json", "metrics.jsonl"):
        assert name in names
    assert any(name.startswith("tensorboard/events.out") for name in names)
    assert any("items" in name and name.endswith("tensors.tsv") for name in names)
    metrics = metrics_of(run)
    checkpoints = {name.split("/")[1] for name in names if name.startswith("checkpoints/")}
    last = 3 * -(-storage.read_json(f"{resolved_catalog(run)}/manifest.json")["interactions"]["train"] // 64)
    assert checkpoints == {f"epoch-{metrics['best_epoch']:05d}", f"step-{last:012d}"}  # the best, and how it ended
    lines = [json.loads(line) for line in storage.read_bytes(f"{run}/metrics.jsonl").splitlines()]
    assert [line["epoch"] for line in lines] == [0, 1, 2, 3]
    best = max(lines, key=lambda line: line["valid"]["recall@20"])
    assert best["epoch"] == metrics["best_epoch"]
    assert metrics["valid"]["overall"] == pytest.approx(best["valid"])
    resolved = yaml.safe_load(storage.read_bytes(f"{run}/config.yaml"))
    assert resolved["model"]["width"] == 8
    assert resolved["train"]["w_tc"] == 0.4


def test_tensorboard_has_every_curve(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(f"{run}/tensorboard")
    events.Reload()
    tags = set(events.Tags()["scalars"])
    wanted = {f"loss/{part}" for part in ("tc", "diffusion", "l2")} | {"total_correlation/bound_nats", "valid/ndcg@5"}
    wanted |= {f"gate/{view}" for view in ("id", "m0", "m1")} | {"kept_energy/m0", "kept_energy/m1"}
    parts = ("data", "sampling", "features", "lookup", "forward", "backward", "optimizer", "communication")
    wanted |= {"lr/dense", "lr/tables"} | {f"seconds_per_step/{part}" for part in parts}
    wanted = {f"details_{name}" for name in wanted} | {"1_quality/recall@20", "2_loss/total", "2_loss/bpr"}
    wanted |= {"3_speed/interactions_per_second", "3_speed/waiting_for_data"}
    wanted |= {"4_health/gradient_norm", "4_health/host_memory_gib"}
    assert wanted <= tags
    assert len([tag for tag in tags if not tag.startswith("details_")]) <= 12
    for tag in wanted:
        assert np.isfinite([event.value for event in events.Scalars(tag)]).all(), tag


def test_evaluate_prints_the_metrics_of_the_run(run, capsys):
    for split in ("valid", "test"):
        capsys.readouterr()
        evaluate.main(["--run", run, "--split", split])
        printed = json.loads(capsys.readouterr().out)
        expected = metrics_of(run)[split]
        assert printed["users"] == expected["users"]
        assert printed["cold_users"] == expected["cold_users"]
        assert printed["overall"] == pytest.approx(expected["overall"])
        assert printed["cold"] == pytest.approx(expected["cold"])
        assert set(printed["overall"]) == {
            f"{m}@{k}" for m in ("recall", "ndcg", "precision", "hitrate", "mrr") for k in (5, 10, 20, 50)
        }


def untrained_run(folder: str, config: Config, catalog: Catalog) -> str:
    """A run folder whose checkpoint holds initial weights, of another seed: the best epoch of a short run may be 0."""
    train = config.train.model_copy(update={"seed": config.train.seed + 1})
    data = config.data.model_copy(update={"catalog": catalog.uri})
    config = config.model_copy(update={"data": data, "train": train})
    storage.write_bytes(f"{folder}/config.yaml", yaml.safe_dump(config.model_dump()).encode())
    network, tables = build_network(config, catalog, Communicator())
    head = {"epoch": 0, "catalog": catalog.manifest.fingerprint}
    weights = checkpoint_files.weight_shards(list(tables.all()))
    uri = f"{folder}/checkpoints/epoch-00000"
    checkpoint_files.save(uri, head, {"network": network.state_dict(), "cold": {}}, weights, Communicator())
    return folder


def test_evaluate_against_another_run(run, tmp_path, capsys):
    """With itself: no difference. With an untrained run: the difference of the means."""
    catalog = Catalog(find_run(run).config.data.catalog)
    folder = untrained_run(str(tmp_path / "other"), find_run(run).config, catalog)
    for than, same in ((run, True), (folder, False)):
        capsys.readouterr()
        evaluate.main(["--run", run, "--against", than])
        printed = json.loads(capsys.readouterr().out)
        against = printed.pop("against")
        assert against.pop("run") == than
        assert set(against) == set(printed["overall"])
        for row in against.values():
            assert row["low"] <= row["difference"] <= row["high"]
            if same:
                assert (row["low"], row["high"]) == (0, 0)
        if not same:
            capsys.readouterr()
            evaluate.main(["--run", folder])
            theirs = json.loads(capsys.readouterr().out)["overall"]
            for name, row in against.items():
                assert row["difference"] == pytest.approx(printed["overall"][name] - theirs[name], abs=1e-9)
            assert any(row["low"] < row["high"] for row in against.values())


def test_exported_embeddings_rank_as_evaluate_does(run, tmp_path):
    out = str(tmp_path / "e")
    export.main(["--run", run, "--out", out])
    users, user_vectors = read_export(out, "users")
    items, item_vectors = read_export(out, "items")
    catalog = load_run(find_run(run)).catalog
    assert users == catalog.ids("users").to_pylist()
    assert items == catalog.ids("items").to_pylist()
    train_pairs, test_pairs = catalog.interactions("train"), catalog.interactions("test")
    hits, total = [], 0
    for u in sorted(set(test_pairs[0].tolist()) & set(train_pairs[0].tolist())):
        scores = item_vectors @ user_vectors[u]
        scores[train_pairs[1][train_pairs[0] == u]] = -np.inf
        truth = set(test_pairs[1][test_pairs[0] == u].tolist())
        hits.append(len(truth & set(np.argsort(-scores)[:5].tolist())) / len(truth))
        total += 1
    assert total == metrics_of(run)["test"]["users"]
    assert float(np.mean(hits)) == pytest.approx(metrics_of(run)["test"]["overall"]["recall@5"], abs=1e-4)
    manifest = storage.read_json(f"{out}/manifest.json")
    assert (manifest["users"], manifest["items"], manifest["dim"]) == (60, 40, 24)
    assert manifest["metric"] == "dot product"
    assert manifest["checkpoint"] == metrics_of(run)["checkpoint"]


def test_export_is_deterministic_typed_and_in_half_precision(run, tmp_path):
    for name in ("a", "b"):
        export.main(["--run", run, "--out", str(tmp_path / name), "--dtype", "float16", "--faiss"])
    a, b = ((tmp_path / n / "items" / "part-000000000000.parquet").read_bytes() for n in ("a", "b"))
    assert a == b
    schema = pq.read_schema(tmp_path / "a" / "users" / "part-000000000000.parquet")
    assert str(schema.field("embedding").type) == "fixed_size_list<element: halffloat>[24]"
    assert str(schema.field("id").type) == "string"
    import faiss

    index = faiss.read_index(str(tmp_path / "a" / "items.faiss"))
    assert (index.ntotal, index.d) == (40, 24)


def test_ray_and_object_storage_give_the_same_run(run, ray_local, s3, tmp_path):
    catalog = small_catalog(f"{s3}/catalog")
    train.main(["--config", write_config(tmp_path, catalog.uri, f"{s3}/runs")])
    there = metrics_of(f"{s3}/runs/r")
    here = metrics_of(run)
    for part in ("valid", "test", "popularity", "best_epoch"):
        assert there[part] == here[part]
    export.main(["--run", f"{s3}/runs/r", "--out", f"{s3}/embeddings"])
    export.main(["--run", run, "--out", str(tmp_path / "e")])
    assert np.array_equal(read_export(f"{s3}/embeddings", "items")[1], read_export(str(tmp_path / "e"), "items")[1])
    names = storage.listing(f"{s3}/runs/r")
    assert any(name.startswith("tensorboard/events.out") for name in names)


LARGE = ["model.propagation=sampled", "model.fanout=[3,3]", "model.layer_nodes=64", "train.negatives.mode=shared"]
LARGE += ["train.table_optimizer=rowwise_adam", "train.epoch_steps=5", "eval.users=50"]


HYBRID = ["model.hybrid.graph_filter=4", "model.hybrid.content_profile=4"]


@pytest.fixture(scope="module", params=[LARGE, pytest.param(HYBRID, marks=pytest.mark.long)])
def run_of_two(tmp_path_factory, request) -> tuple[str, list[str]]:
    """Folder of a finished run of two ranks, trained without Ray, and its overrides."""
    folder = tmp_path_factory.mktemp("two")
    catalog = small_catalog(folder / "catalog", users=120, items=80, seed=1)
    assert catalog.manifest.interactions["train"] % 2 == 1  # an uneven split over the ranks
    config = write_config(folder, catalog.uri, str(folder / "runs"))
    run_ranks(train_on, 2, config, request.param)
    return str(folder / "runs/r"), request.param


def test_one_process_scores_as_two_ranks(run_of_two):
    run, _ = run_of_two
    metrics = metrics_of(run)
    assert metrics["workers"] == 2
    names = storage.listing(f"{run}/{metrics['checkpoint']}")
    assert {n for n in names if n.startswith("user.weight")} == {
        "user.weight.000000000000-000000000060.npy",
        "user.weight.000000000060-000000000120.npy",
    }
    run_ref = find_run(run)
    alone = load_run(run_ref).evaluate("test", run_ref.config.eval.users)
    assert alone["users"] == metrics["test"]["users"]
    assert alone["overall"] == pytest.approx(metrics["test"]["overall"], abs=1e-6)
    assert not [n for n in storage.listing(run) if n.startswith("ray-")]


@pytest.mark.long
def test_two_workers_evaluate_as_one_process(ray_local, run_of_two, capsys, monkeypatch):
    run, _ = run_of_two
    capsys.readouterr()
    monkeypatch.chdir(Path(run).parent)  # ranks work in other folders
    evaluate.main(["--run", Path(run).name, "--workers", "2"])
    printed = capsys.readouterr()
    assert "computing embeddings" in printed.err.splitlines()[0]
    together, alone = json.loads(printed.out), metrics_of(run)["test"]
    assert together["users"] == alone["users"]
    assert together["overall"] == pytest.approx(alone["overall"], abs=1e-6)


def test_two_workers_export_as_one_process(ray_local, run_of_two, tmp_path):
    run, overrides = run_of_two
    for name, workers in (("one", "0"), ("two", "2")):
        export.main(["--run", run, "--out", str(tmp_path / name), "--workers", workers])
    assert len(storage.listing(str(tmp_path / "two/items"))) == 2
    one, two = (
        {kind: read_export(str(tmp_path / name), kind) for kind in ("users", "items")} for name in ("one", "two")
    )
    for kind in ("users", "items"):
        assert two[kind][0] == one[kind][0]
        # embeddings of the members; eigenvectors are unique up to a rotation, so the rest differs while scores do not
        own = slice(None if overrides is not HYBRID else 24)
        np.testing.assert_allclose(two[kind][1][:, own], one[kind][1][:, own], rtol=1e-4, atol=1e-5)
    scores = [np.asarray(out["users"][1]) @ np.asarray(out["items"][1]).T for out in (one, two)]
    np.testing.assert_allclose(*scores, rtol=1e-4, atol=1e-4)
    assert not [n for n in storage.listing(run) if n.startswith("ray-")]


def test_evaluate_refuses_a_run_on_another_catalog(run, tmp_path):
    catalog = small_catalog(tmp_path / "c", seed=5)
    folder = untrained_run(str(tmp_path / "other"), find_run(run).config, catalog)
    with pytest.raises(InputError, match="another catalog"):
        evaluate.main(["--run", run, "--against", folder])


def test_an_interrupted_export_is_repeated(run, tmp_path, capsys):
    arguments = ["--run", run, "--out", str(tmp_path / "e")]
    export.main(arguments)
    complete = {p: p.read_bytes() for p in sorted((tmp_path / "e").rglob("*.parquet"))}
    with pytest.raises(InputError, match="is not empty"):
        export.main(arguments)
    (tmp_path / "e/manifest.json").unlink()
    first, *_ = complete
    first.rename(f"{first}.12345678.partial")
    (tmp_path / "e/manifest.json.12345678.partial").write_text("{")
    capsys.readouterr()
    export.main(arguments)
    assert "was cut off: starting again" in capsys.readouterr().out
    assert {p: p.read_bytes() for p in sorted((tmp_path / "e").rglob("*.p*"))} == complete


def test_evaluate_and_export_refuse_other_folders(run, tmp_path):
    refused(["-m", "gtc_dist.evaluate", "--run", str(tmp_path)], "holds no run")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/x").write_text("1")
    refused(["-m", "gtc_dist.export", "--run", run, "--out", str(tmp_path / "full")], "is not empty")
    assert sorted(p.name for p in (tmp_path / "full").iterdir()) == ["x"]
