"""MLflow and Weights & Biases, each for real without a network, and the refusals where a package is missing."""

import json
from pathlib import Path

import pytest
import torch
from small import refused, small_catalog, small_config, write_config
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from trainings import trainer_of

from gtc_dist.config import Config
from gtc_dist.distributed.collectives import Communicator
from gtc_dist.errors import InputError
from gtc_dist.tracking import loggers
from gtc_dist.tracking.metric_logger import RunDescription


@pytest.fixture(scope="module")
def catalog(tmp_path_factory):
    torch.set_num_threads(1)
    return small_catalog(tmp_path_factory.mktemp("catalog") / "c")


def config_of(catalog, folder: Path, *names: str) -> Config:
    run = {"loggers": ["tensorboard", *names]}
    return small_config(catalog.uri, str(folder), train={"epochs": 2, "log_every": 3}, run=run)


def trained(config: Config) -> tuple[str, dict]:
    trainer = trainer_of(Communicator(), config, f"{config.run.storage}/small")
    return trainer.run, trainer.fit()


def curve(run: str, tag: str) -> list[tuple[int, float]]:
    events = EventAccumulator(f"{run}/tensorboard", size_guidance={"scalars": 0}).Reload()
    return [(event.step, pytest.approx(event.value, rel=1e-6)) for event in events.Scalars(tag)]


@pytest.fixture
def mlflow_folder(tmp_path, monkeypatch) -> str:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv(loggers.TRACKING_URI, f"file://{tmp_path}/mlruns")
    return f"{tmp_path}/mlruns"


def test_mlflow_gets_the_same_curves_and_a_resumed_run_goes_on(catalog, tmp_path, mlflow_folder):
    mlflow = pytest.importorskip("mlflow")
    config = config_of(catalog, tmp_path, "mlflow")
    run, result = trained(config)
    longer = config.model_copy(update={"train": config.train.model_copy(update={"epochs": 3})})
    resumed = trainer_of(Communicator(), longer, run)
    resumed.fit()
    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name("gtc-dist")
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.info.run_name == "small"
    assert found.info.status == "FINISHED"
    assert found.data.params["train.batch_size"] == "32"
    for tag in ("1_quality/recall@20", "2_loss/total", "4_health/gradient_norm"):
        history = client.get_metric_history(found.info.run_id, tag.replace("@", "_at_"))
        assert sorted((m.step, m.value) for m in history) == curve(run, tag), tag
    test = found.data.metrics["test/recall_at_20"]
    assert test == pytest.approx(resumed.validator.rank(resumed.validator.scorer(*resumed.validator.embed()), "test")
                                 ["overall"]["recall@20"])  # fmt: skip
    folder = Path(client.download_artifacts(found.info.run_id, ""))
    assert {path.name for path in folder.iterdir()} == {"config.yaml", "data.md", "result.md"}
    assert "log_every: 3" in (folder / "config.yaml").read_text()
    assert result["best_epoch"] <= 2


def test_wandb_gets_the_same_curves(catalog, tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    run, result = trained(config_of(catalog, tmp_path, "wandb"))
    wandb.teardown()
    (file,) = Path(run, "wandb").glob("offline-run-*/run-*.wandb")
    records = read_wandb(file)
    values = {}
    for record in records:
        if record.HasField("history"):
            row = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            for tag, value in row.items():
                values.setdefault(tag, []).append((row["_step"], value))
    for tag in ("1_quality/recall@20", "2_loss/total", "4_health/gradient_norm"):
        assert values[tag] == curve(run, tag), tag
    assert values["details_norms/user/_type"][0][1] == "histogram"
    summary = {}
    for record in records:
        for item in record.summary.update if record.HasField("summary") else ():
            summary[item.key or "/".join(item.nested_key)] = json.loads(item.value_json)
    assert summary["test/recall@20"] == pytest.approx(result["test"]["overall"]["recall@20"])


def read_wandb(file: Path) -> list:
    """Records of an offline run: a log as LevelDB writes it, with a header, whose records may span blocks."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, records, begun = file.read_bytes(), 7, [], b""
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:  # padding at the end of a block
            at += left
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        begun += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            records.append(Record.FromString(begun))
            begun = b""
    return records


def test_a_service_that_fails_later_does_not_end_the_training(catalog, tmp_path, mlflow_folder, capsys):
    pytest.importorskip("mlflow")
    config = config_of(catalog, tmp_path, "mlflow")
    trainer = trainer_of(Communicator(), config, f"{config.run.storage}/small")
    step = trainer.train_step

    def broken_store(batch):
        for file in Path(mlflow_folder).rglob("meta.yaml"):
            file.unlink()
        return step(batch)

    trainer.train_step = broken_store
    assert trainer.fit()["last_epoch"] == 2
    assert capsys.readouterr().out.count("warning: nothing more is sent to mlflow") == 1
    assert curve(trainer.run, "2_loss/total")


def test_a_package_that_is_missing_is_refused_before_any_work(catalog, tmp_path, monkeypatch, mlflow_folder):
    monkeypatch.setattr(loggers.importlib.util, "find_spec", lambda name: None)
    for name in ("mlflow", "wandb"):
        with pytest.raises(InputError, match=rf"{name}, which is not installed; `pip install 'gtc-dist\[{name}\]'"):
            loggers.check_loggers(["tensorboard", name])
    loggers.check_loggers(["tensorboard"])


def test_the_command_refuses_a_service_without_its_address(catalog, tmp_path, monkeypatch):
    pytest.importorskip("mlflow")
    monkeypatch.delenv(loggers.TRACKING_URI, raising=False)
    file = write_config(tmp_path, catalog.uri, str(tmp_path / "runs"))
    refused(["-m", "gtc_dist.train", "--config", file, "run.loggers=[mlflow]"], f"set {loggers.TRACKING_URI}")
    refused(["-m", "gtc_dist.train", "--config", file, "run.loggers=[other]"], "run.loggers")
    assert not (tmp_path / "runs").exists()


def test_a_service_that_refuses_the_run_is_named(catalog, tmp_path, monkeypatch):
    pytest.importorskip("mlflow")
    monkeypatch.setenv(loggers.TRACKING_URI, "nonsense://here")
    config = config_of(catalog, tmp_path, "mlflow")
    with pytest.raises(InputError, match=r"run\.loggers: mlflow cannot be used: "):
        loggers.open_loggers(RunDescription(f"{tmp_path}/small", config, catalog.manifest, 5, 0))
