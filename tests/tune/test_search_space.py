"""Search spaces: what a file may say, and errors that name the place."""

import pytest
import yaml
from small import ROOT, small_config

from gtc_dist.config_file import load_config
from gtc_dist.errors import InputError
from gtc_dist.tune.search_space import read_space, with_settings
from gtc_dist.tune.trials import domain

GOOD = {
    "trials": 3,
    "parameters": {
        "train.lr": {"log_uniform": [1e-4, 1e-2]},
        "train.ema_decay": {"uniform": [0, 0.9]},
        "model.layers": {"integer": [1, 3]},
        "train.loss": {"choice": ["bpr", "softmax"]},
    },
}


@pytest.fixture
def config(tmp_path):
    return small_config(str(tmp_path / "catalog"))


def read(tmp_path, tree, config):
    path = tmp_path / "space.yaml"
    path.write_text(yaml.safe_dump(tree))
    return read_space(str(path), config)


def test_draws_lie_in_the_ranges_of_the_file(tmp_path, config):
    space = read(tmp_path, GOOD, config)
    assert (space.trials, space.first_epochs, space.factor) == (3, 10, 3)
    draws = {key: {domain(parameter).sample() for _ in range(200)} for key, parameter in space.parameters.items()}
    assert all(1e-4 <= value <= 1e-2 for value in draws["train.lr"])
    assert min(draws["train.lr"]) < 1e-3 < max(draws["train.lr"])
    assert all(0 <= value <= 0.9 for value in draws["train.ema_decay"])
    assert draws["model.layers"] == {1, 2, 3}
    assert draws["train.loss"] == {"bpr", "softmax"}
    changed = with_settings(config, {"train.lr": 0.002, "model.layers": 3}, "x")
    assert (changed.train.lr, changed.model.layers, changed.train.table_lr) == (0.002, 3, config.train.table_lr)


def test_every_value_of_the_file_is_checked_before_the_search(tmp_path, config):
    tree = {"trials": 1, "parameters": {"model.layers": {"choice": [1, 2, -1]}}}
    with pytest.raises(InputError, match=r"model\.layers.*found -1"):
        read(tmp_path, tree, config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"trials": 0}, "trials: Input should be greater than or equal to 1; found 0"),
        ({"trial": 1}, "unknown key 'trial'; known keys: trials, first_epochs, factor, parameters"),
        ({"parameters": {}}, "parameters: Dictionary should have at least 1 item"),
        ({"parameters": {"train.rate": {"choice": [1]}}}, "unknown key 'train.rate'"),
        ({"parameters": {"data.catalog": {"choice": ["a"]}}}, "data.catalog cannot vary"),
        ({"parameters": {"eval.metric": {"choice": ["ndcg@20"]}}}, "eval.metric cannot vary"),
        ({"parameters": {"train.lr": [1, 2]}}, r"parameters.train.lr: found \[1, 2\]; write one of choice, uniform"),
        ({"parameters": {"train.lr": {"normal": [1, 2]}}}, "write one of choice, uniform, log_uniform, integer"),
        ({"parameters": {"train.lr": {"choice": 1}}}, "choice is 1; write a list of values"),
        ({"parameters": {"train.lr": {"uniform": [2, 1]}}}, "the first must be below the second"),
        ({"parameters": {"train.lr": {"log_uniform": [0, 1]}}}, "the first must be below the second and be positive"),
        ({"parameters": {"model.layers": {"integer": [1, 2.5]}}}, "write the lowest and the highest number"),
        ({"parameters": {"train.lr": {"uniform": [1, 2, 3]}}}, "write the lowest and the highest number"),
    ],
)
def test_refusals(tmp_path, config, change, message):
    with pytest.raises(InputError, match=message) as error:
        read(tmp_path, GOOD | change, config)
    assert "\n" not in str(error.value)
    assert str(tmp_path / "space.yaml") in str(error.value)


def test_missing_files_and_other_files_are_refused(tmp_path, config):
    with pytest.raises(InputError, match="does not exist"):
        read_space(str(tmp_path / "none.yaml"), config)
    with pytest.raises(InputError, match="key 'trials' is missing"):
        read(tmp_path, ["a"], config)
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="is not UTF-8 text"):
        read_space(str(tmp_path / "bytes.yaml"), config)


def test_the_space_that_comes_with_the_package_is_valid():
    paths = sorted((ROOT / "configs/tune").glob("*.yaml"))
    assert paths
    for path in paths:
        assert read_space(str(path), load_config(ROOT / "configs/demo.yaml")).trials > 1
