"""What a training step asks of a device: few operators, none that the host waits for."""

import pytest
from small import small_catalog
from step_operators import operators_of_a_step
from trainings import trainer_of

from gtc_dist.config_file import build_config
from gtc_dist.distributed.collectives import Communicator


@pytest.fixture(scope="module")
def catalog(tmp_path_factory):
    return small_catalog(tmp_path_factory.mktemp("catalog") / "c", users=300, items=200)


def counted(catalog, run: str, model: dict, train: dict):
    tree = {"data": {"raw": "raw", "catalog": catalog.uri}, "run": {"storage": run, "name": "run"}}
    config = build_config(tree | {"model": model, "train": {"batch_size": 256, **train}}, "test")
    return operators_of_a_step(trainer_of(Communicator(), config, f"{run}/run"))


MASKED, SAMPLED = {"masked_members": 4}, {"masked_members": 4, "propagation": "sampled"}
GATED = {"variant": "gated", "members": 4, "masked_members": 0}


@pytest.mark.parametrize(
    ("model", "train", "most"),
    [
        (MASKED, {}, 360),
        ({"masked_members": 0}, {}, 250),
        (GATED, {"w_tc": 0.02}, 650),
        (SAMPLED, {}, 410),
        (SAMPLED, {"negatives": {"mode": "shared", "count": 64}, "loss": "softmax", "clip_norm": 1.0}, 460),
        (MASKED, {"log_every": 1}, 370),
    ],
    ids=[
        "default",
        "network alone",
        "four members and total correlation",
        "sampled",
        "sampled softmax",
        "a logged step",
    ],
)
def test_a_step_launches_few_operators_and_never_waits(catalog, tmp_path, model, train, most):
    operators = counted(catalog, str(tmp_path), model, train)
    assert operators.copies == []
    assert operators.launches.total() <= most


def test_the_filter_and_the_network_of_the_paper_never_wait(catalog, tmp_path):
    train = {"w_tc": 0.4, "w_diff": 0.7}
    for name, propagation in (("a", "full"), ("b", "sampled")):
        assert counted(catalog, str(tmp_path / name), {"propagation": propagation}, train).copies == []
