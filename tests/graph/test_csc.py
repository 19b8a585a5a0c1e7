"""Graphs of a catalog: missing graphs are refused; edge weights from similarities."""

import numpy as np
import pytest
from small import small_catalog

from gtc_dist.errors import InputError
from gtc_dist.graph.csc import Graphs, similarity_weights


@pytest.mark.parametrize("name", ["item_item", "user_user"])
def test_a_graph_that_the_catalog_lacks_is_refused(tmp_path, name):
    catalog = small_catalog(tmp_path / "catalog")
    assert getattr(Graphs.load(catalog), name) is not None
    del catalog.manifest.graphs[name]
    with pytest.raises(InputError, match=rf"catalog has no graph {name}, which the configured network uses; run"):
        Graphs.load(catalog)
    assert getattr(Graphs.load(catalog, **{name: False}), name) is None


def test_similarities_become_weights_with_a_sum_of_one():
    weight = similarity_weights(np.array([[0.6, 0.2, -0.5], [-1, -0.1, 0]], np.float32))
    assert weight.dtype == np.float32
    np.testing.assert_allclose(weight, [[0.75, 0.25, 0], [0, 0, 0]], rtol=1e-6)
