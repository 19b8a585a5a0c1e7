"""Training from an earlier run: where it begins, what it records, and how it resumes."""

import shutil

import pytest
import torch
import yaml
from grown import two_days
from ranks import run_ranks
from small import small_config, write_config
from trainings import interrupt_after, run_result, train_without_ray, trainer_of

from gtc_dist import train
from gtc_dist.checkpoint.existing_run import find_run, run_status
from gtc_dist.data import storage
from gtc_dist.data.catalog import Catalog
from gtc_dist.distributed.collectives import Communicator
from gtc_dist.warm_start.carry_over import carry_over

MODEL = {"user_hop": False, "masked_members": 1}


@pytest.fixture(scope="module")
def days(tmp_path_factory) -> tuple[str, Catalog]:
    folder = tmp_path_factory.mktemp("days")
    before, today = two_days(folder)
    keys = ["model.user_hop=false", "model.masked_members=1"]
    return train_without_ray(write_config(folder, before.uri, str(folder / "runs"), epochs=6), *keys), today


def config_of(days, **sections):
    return small_config(days[1].uri, model=MODEL, train={"init_from": days[0], "epochs": 1, **sections})


def test_it_begins_where_the_earlier_run_ended(days, tmp_path):
    trainer = trainer_of(Communicator(), config_of(days), str(tmp_path / "run"))
    begun = {}

    def first_step(batch):
        begun.update({table.name: table.weight.clone() for table in trainer.tables.all()})
        raise KeyboardInterrupt

    trainer.train_step = first_step
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()
    cold = trainer_of(Communicator(), small_config(days[1].uri, model=MODEL), str(tmp_path / "cold"))
    random = {table.name: table.weight.clone() for table in cold.tables.all()}
    carry_over(find_run(days[0]), days[1], cold.graphs, cold.network, cold.tables, 9)
    for table in cold.tables.all():  # half of the earlier run's rows, half of new ones; what begins at zero is kept
        want = torch.where(random[table.name].any(0), (table.weight + random[table.name]) / 2, table.weight)
        torch.testing.assert_close(begun[table.name], want)
    assert torch.equal(begun["masked_item"][:, 128:], cold.tables.masked_item.weight[:, 128:])  # biases
    assert trainer.state.progress.init_from["users"] == {"trained": 50, "folded_in": 10, "mean": 0}


def test_a_cut_run_resumes_from_its_own_state_though_the_earlier_one_is_gone(days, tmp_path):
    config = config_of(days, epochs=2, log_every=3, checkpoint_minutes=0.0)
    trainer_of(Communicator(), config, str(tmp_path / "whole")).fit()
    shutil.copytree(days[0], tmp_path / "earlier")
    config = config_of(days, epochs=2, log_every=3, checkpoint_minutes=0.0, init_from=str(tmp_path / "earlier"))
    trainer = trainer_of(Communicator(), config, str(tmp_path / "cut"))
    interrupt_after(trainer, 14)
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()
    shutil.rmtree(tmp_path / "earlier")
    train.check_earlier_run(config, days[1], str(tmp_path / "cut"))  # it is not needed any more
    trainer_of(Communicator(), config, str(tmp_path / "cut")).fit()
    whole, cut = run_result(tmp_path / "whole"), run_result(tmp_path / "cut")
    assert whole.pop("init_from")["run"] == days[0]
    assert cut.pop("init_from")["run"] == str(tmp_path / "earlier")
    assert whole == cut


def begun_metrics(comm: Communicator, config, run: str) -> dict:
    result = trainer_of(comm, config, run).fit()
    return {"valid": result["valid"]["overall"], "init_from": result["init_from"]}


def test_two_ranks_begin_like_one(days, tmp_path):
    one, two = (run_ranks(begun_metrics, size, config_of(days, epochs=0), str(tmp_path / str(size))) for size in (1, 2))
    assert one[0]["init_from"] == two[0]["init_from"] == two[1]["init_from"]
    assert two[0]["valid"] == pytest.approx(one[0]["valid"])


def test_a_run_may_be_resumed_without_the_key(days, tmp_path):
    config = train.with_absolute_uris(config_of(days))
    run = str(tmp_path / "run")
    storage.write_bytes(f"{run}/config.yaml", yaml.safe_dump(config.model_dump()).encode())
    without = config.model_copy(update={"train": config.train.model_copy(update={"init_from": None})})
    assert run_status(without, run, days[1].manifest.fingerprint) == "begun"
    assert find_run(days[0]).config.train.init_from is None
