"""What a finished and a resumed run show in TensorBoard, read back by TensorBoard's own reader."""

import itertools

import numpy as np
import pytest
import torch
from small import small_catalog, small_config
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import metadata as hparams
from trainings import trainer_of

from gtc_dist.data import storage
from gtc_dist.distributed.collectives import Communicator
from gtc_dist.tracking.charts import PAGE, TIMED


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("catalog")
    catalog = small_catalog(folder / "c")
    return small_config(catalog.uri, str(folder), train={"epochs": 3, "log_every": 3})


@pytest.fixture(scope="module")
def trained(config):
    torch.set_num_threads(1)
    trainer = trainer_of(Communicator(), config, f"{config.run.storage}/small")
    return trainer, trainer.fit()


@pytest.fixture(scope="module")
def events(trained) -> EventAccumulator:
    return EventAccumulator(f"{trained[0].run}/tensorboard", size_guidance={"tensors": 0}).Reload()


def text(events: EventAccumulator, tag: str) -> str:
    return events.Tensors(tag)[-1].tensor_proto.string_val[0].decode()


def test_every_curve_has_a_description(trained, events):
    for tag in (*events.Tags()["scalars"], "details_norms/user", "configuration", "data", "result"):
        assert events.SummaryMetadata(tag).summary_description, tag


def test_texts_say_what_was_trained_on_what(config, events):
    assert "log_every: 3" in text(events, "configuration")
    assert "| users | 60 |" in text(events, "data")
    assert "best epoch" in text(events, "result").lower()


def test_test_metrics_are_points_beside_those_of_valid(trained):
    trainer, result = trained
    found = EventMultiplexer().AddRunsFromDirectory(f"{trainer.run}/tensorboard").Reload()
    assert set(found.Runs()) == {".", "test"}
    (point,) = found.Tensors("test", "1_quality/recall@20")
    assert point.step == result["best_epoch"] * trainer.loader.steps
    assert point.tensor_proto.float_val[0] == pytest.approx(result["test"]["overall"]["recall@20"])


def test_hyperparameters_and_the_page(events):
    start = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    values = hparams.parse_session_start_info_plugin_data(start).hparams
    assert values["train.batch_size"].number_value == 32
    assert values["model.variant"].string_value == "paper"
    table = hparams.parse_experiment_plugin_data(events.SummaryMetadata("_hparams_/experiment").plugin_data.content)
    first = {info.name for info in table.hparam_infos if info.differs}  # TensorBoard shows these before the others
    assert {"train.batch_size", "model.width"} <= first
    assert not first & {"model.variant", "train.lr", "eval.block_rows", "cluster.workers"}
    layout = layout_pb2.Layout.FromString(events.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0])
    assert [category.title for category in layout.category] == list(PAGE)


def test_histograms_count_every_row(trained, events):
    trainer, _ = trained
    for table in trainer.tables.all():
        first = events.Tensors(f"details_norms/{table.name}")[0].tensor_proto
        rows = np.frombuffer(first.tensor_content).reshape(-1, 3)
        assert rows[:, 2].sum() == table.rows
        assert (rows[:, 0] < rows[:, 1]).all()
    counts = trainer.validator.row_norms()["norms/user"]
    norms = trainer.tables.user.weight.norm(dim=1).double().numpy()
    assert np.array_equal(counts.counts, np.histogram(norms, counts.edges)[0])


def test_total_loss_and_gradient_norm_are_those_of_the_step(trained, config, events):
    curves = {tag: {e.step: e.value for e in events.Scalars(tag)} for tag in events.Tags()["scalars"]}
    weights = {"details_loss/tc": 0.4, "details_loss/diffusion": 0.7, "details_loss/l2": 1e-3, "2_loss/bpr": 1.0}
    for step, total in curves["2_loss/total"].items():
        assert total == pytest.approx(sum(w * curves[tag][step] for tag, w in weights.items()), rel=1e-5)
    trainer = trainer_of(Communicator(), config, f"{config.run.storage}/norms")
    for batch in itertools.islice(trainer.loader.epoch(1, 0), 3):
        gradients = gradients_of(trainer)
        trainer.train_step(batch)
        trainer.state.progress.step += 1
    square = sum(float(values.double().square().sum()) for values in gradients)
    assert curves["4_health/gradient_norm"][3] == pytest.approx(square**0.5, rel=1e-4)


def gradients_of(trainer) -> list[torch.Tensor]:
    """List that the trainer's next step fills with its gradients."""
    found, check = [], trainer.guard.check

    def checked(*args, **options):
        found.extend(p.grad.clone() for p in trainer.network.parameters() if p.grad is not None)
        found.extend(values.clone() for table in trainer.tables.all() for _, values in table.pending)
        trainer.guard.check = check
        return check(*args, **options)

    trainer.guard.check = checked
    return found


def test_a_run_in_object_storage_has_the_same_files(config, trained, s3):
    trainer = trainer_of(Communicator(), config, f"{s3}/run")
    trainer.fit()
    names = [name.split("/")[1] for name in storage.listing(f"{s3}/run") if name.startswith("tensorboard/")]
    local = [name.split("/")[1] for name in storage.listing(trained[0].run) if name.startswith("tensorboard/")]
    kinds = [sorted(name.split(".")[0] for name in each) for each in (names, local)]
    assert kinds[0] == kinds[1]
    assert "test" in kinds[0]


def test_tags_that_measure_time_are_named(events):
    tags = events.Tags()["scalars"]
    assert {tag for tag in tags if tag.startswith(TIMED)} == {
        tag for tag in tags if "3_speed" in tag or "seconds_per" in tag or "memory" in tag
    }
