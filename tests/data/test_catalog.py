"""Looking original ids up in a catalog."""

import numpy as np
import pyarrow as pa
import pytest
from small import small_catalog

from gtc_dist.errors import InputError


@pytest.fixture(scope="module")
def catalog(tmp_path_factory):
    return small_catalog(tmp_path_factory.mktemp("catalog"))


@pytest.mark.parametrize("kind", ["users", "items"])
def test_every_id_has_its_index(catalog, kind):
    ids = catalog.ids(kind)
    order = np.random.default_rng(0).permutation(len(ids))[:25]
    wanted = ids.take(pa.array(order))
    for column in (wanted, pa.chunked_array([wanted[:10], wanted[10:]])):
        index = catalog.index_of(kind, column)
        assert index.dtype == np.int64
        assert np.array_equal(index, order)
    assert catalog.index_of(kind, ids[:0]).shape == (0,)


def test_ids_of_another_type_are_cast(catalog):
    assert catalog.index_of("items", pa.array([107, 100], pa.int16())).tolist() == [1, 0]
    assert catalog.index_of("users", pa.array(["u003"], pa.large_string())).tolist() == [3]
    with pytest.raises(InputError, match=r"the items of .* have int64 ids, not string: .*'x1'"):
        catalog.index_of("items", pa.array(["x1"]))
    with pytest.raises(InputError, match="have int64 ids, not double"):
        catalog.index_of("items", pa.array([100.5]))


def test_unknown_ids_are_named_or_have_the_index_minus_one(catalog):
    ids = pa.array([100, 5, 107, None])
    with pytest.raises(InputError, match=r"2 of 4 ids are no items of .*, such as 5, None \(row 2\)"):
        catalog.index_of("items", ids)
    assert catalog.index_of("items", ids, allow_unknown=True).tolist() == [0, -1, 1, -1]
