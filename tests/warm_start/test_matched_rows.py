"""Rows of one catalog in another, by original ids."""

import numpy as np
import pyarrow as pa
import pytest
from grown import two_days
from small import write_catalog

from gtc_dist.data.catalog import Catalog
from gtc_dist.warm_start import matched_rows
from gtc_dist.warm_start.matched_rows import earlier_rows, has_interactions


@pytest.fixture(scope="module")
def days(tmp_path_factory) -> tuple[Catalog, Catalog]:
    return two_days(tmp_path_factory.mktemp("days"))


@pytest.mark.parametrize("kind", ["users", "items"])
@pytest.mark.parametrize("block", [1 << 20, 7])
def test_rows_are_those_with_the_same_id(days, kind, block, monkeypatch):
    monkeypatch.setattr(matched_rows, "ID_BLOCK", block)
    before, today = days
    place = {value: n for n, value in enumerate(before.ids(kind).to_pylist())}
    want = [place.get(value, -1) for value in today.ids(kind).to_pylist()]
    assert earlier_rows(before, today, kind, 0, getattr(today, kind)).tolist() == want
    assert earlier_rows(before, today, kind, 5, 17).tolist() == want[5:17]
    assert -1 in want


def test_ids_that_became_text_since_compare_as_they_are_written(tmp_path):
    pairs = np.array([0, 1], np.int32), np.array([0, 1], np.int32)
    splits, vectors = dict.fromkeys(("train", "valid", "test"), pairs), {"m": np.arange(4.0).reshape(2, 2)}
    old = {"users": pa.array([7, 12]), "items": pa.array([1, 2])}
    new = {"users": pa.array(["007", "12"]), "items": pa.array(["2", "x"])}
    before, today = (
        write_catalog(tmp_path / name, splits, ids, vectors, name) for name, ids in (("old", old), ("new", new))
    )
    assert earlier_rows(before, today, "users", 0, 2).tolist() == [-1, 1]
    assert earlier_rows(before, today, "items", 0, 2).tolist() == [1, -1]
    assert earlier_rows(today, before, "items", 0, 2).tolist() == [-1, 0]


def test_interactions_of_train_count(days):
    for catalog in days:
        users, items = catalog.interactions("train")
        assert has_interactions(catalog, "users").tolist() == np.isin(np.arange(catalog.users), users).tolist()
        assert has_interactions(catalog, "items").tolist() == np.isin(np.arange(catalog.items), items).tolist()
