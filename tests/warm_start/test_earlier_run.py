"""Whether an earlier run fits another catalog, and what its training has seen of it."""

import numpy as np
import pytest
from grown import two_days
from small import refused, small_catalog, small_config, write_catalog, write_config
from trainings import train_without_ray

from gtc_dist.checkpoint.existing_run import find_run
from gtc_dist.data import storage
from gtc_dist.data.catalog import SPLITS, Catalog
from gtc_dist.errors import InputError
from gtc_dist.warm_start.earlier_run import find_earlier_run, refuse_trained_interactions, trained_interactions


@pytest.fixture(scope="module")
def days(tmp_path_factory) -> tuple[str, Catalog]:
    """A run of yesterday, and today's catalog."""
    folder = tmp_path_factory.mktemp("days")
    before, today = two_days(folder)
    return train_without_ray(write_config(folder, before.uri, str(folder / "runs"), epochs=1)), today


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"model": {"width": 16}}, "(model.width: 8 there, 16 here)"),
        (
            {"model": {"members": 2, "variant": "gated"}},
            "model.variant: paper there, gated here; model.members: 1 there",
        ),
        ({"model": {"masked_members": 4}}, "model.masked_members: 0 there, 4 here"),
        ({"model": {"modalities": ["m1"]}}, "model.modalities: m0, m1 there, m1 here"),
        ({"train": {"w_diff": 0}}, "train.w_diff: 0.7 there, 0.0 here"),
        ({"model": {"diffusion": {"steps": 30}}}, "model.diffusion.steps: 20 there, 30 here"),
    ],
)
def test_another_model_is_refused_with_its_keys(days, sections, message):
    uri, today = days
    with pytest.raises(InputError, match="do not fit this configuration") as error:
        find_earlier_run(uri, small_config(today.uri, **sections), today)
    assert message in str(error.value)
    assert find_earlier_run(uri, small_config(today.uri), today).uri == uri


def test_the_command_refuses_before_ray_starts(days, tmp_path):
    uri, today = days
    config = write_config(tmp_path, today.uri, str(tmp_path / "runs"))
    words = ["-m", "gtc_dist.train", "--config", config, f"train.init_from={uri}"]
    refused([*words, "model.width=16"], "model.width: 8 there, 16 here")
    assert not (tmp_path / "runs").exists()


def test_features_of_another_width_are_refused(days, tmp_path):
    uri, today = days
    vectors = {"m0": np.random.default_rng(0).normal(size=(40, 9)), "m1": np.ones((40, 7)) * np.arange(40)[:, None]}
    splits = {name: today.interactions(name) for name in SPLITS}
    ids = {kind: today.ids(kind) for kind in ("users", "items")}
    other = write_catalog(tmp_path / "c", splits, ids, vectors, "wider")
    with pytest.raises(
        InputError, match=r"data\.features\.m0\.path: vectors of width 6 there, vectors of width 9 here"
    ):
        find_earlier_run(uri, small_config(other.uri), other)


def test_a_catalog_without_common_ids_or_that_is_gone_is_refused(days, tmp_path):
    uri, today = days
    splits = {name: today.interactions(name) for name in SPLITS}
    ids = {"users": today.ids("users"), "items": today.ids("users")[:40]}
    other = write_catalog(tmp_path / "c", splits, ids, {"m0": np.random.rand(40, 6), "m1": np.random.rand(40, 7)}, "x")
    with pytest.raises(InputError, match="no id of the items of"):
        find_earlier_run(uri, small_config(other.uri), other)
    with pytest.raises(InputError, match="keep the catalog of a run, and prepare grown data into another folder"):
        find_earlier_run(uri, small_config(today.uri), today, today.uri)
    with pytest.raises(InputError, match="holds no run"):
        find_earlier_run(str(tmp_path), small_config(today.uri), today)


def test_interactions_that_the_run_was_trained_on_are_counted(days, tmp_path):
    uri, today = days
    earlier = find_run(uri)
    assert trained_interactions(earlier, today) == {}
    refuse_trained_interactions(earlier, today)
    before = Catalog(earlier.config.data.catalog)
    assert trained_interactions(earlier, before) == {}
    # a split of the same interactions that draws anew
    other = small_catalog(tmp_path / "c")
    users, items = (np.concatenate(part) for part in zip(*(other.interactions(name) for name in SPLITS), strict=True))
    place = np.random.default_rng(2).permutation(len(users))
    parts = dict(zip(("test", "valid", "train"), np.split(place, [60, 130]), strict=True))
    ids = {kind: other.ids(kind) for kind in ("users", "items")}
    splits = {name: (users[rows], items[rows]) for name, rows in parts.items()}
    vectors = {name: other.features(name).astype(np.float64) for name in other.modalities()}
    drawn = write_catalog(tmp_path / "d", splits, ids, vectors, "drawn anew")
    names = {kind: before.ids(kind).to_pylist() for kind in ("users", "items")}
    seen = {(names["users"][u], names["items"][i]) for u, i in zip(*before.interactions("train"), strict=True)}
    now = {kind: drawn.ids(kind).to_pylist() for kind in ("users", "items")}
    want = {
        name: sum((now["users"][u], now["items"][i]) in seen for u, i in zip(*splits[name], strict=True))
        for name in ("valid", "test")
    }
    assert min(want.values()) > 10
    assert trained_interactions(earlier, drawn) == want
    with pytest.raises(
        InputError, match=f"was trained on {want['valid']} of the 70 valid .* and {want['test']} of the 60"
    ):
        refuse_trained_interactions(earlier, drawn)
    assert not storage.exists(str(tmp_path / "runs"))
