"""The noise of the denoising loss is drawn where something reads it."""

import numpy as np
import pytest
from small import small_catalog, small_config
from steps import loader_of

from gtc_dist.distributed.collectives import Communicator
from gtc_dist.model.build import build_network


@pytest.mark.parametrize(("propagation", "w_diff", "width"), [("full", 0.7, 8), ("full", 0, 0), ("sampled", 0, 8)])
def test_noise_is_drawn_where_a_filter_reads_it_or_the_stream_goes_on(tmp_path, propagation, w_diff, width):
    catalog = small_catalog(tmp_path / "c")
    config = small_config(catalog.uri, model={"propagation": propagation}, train={"w_diff": w_diff, "w_tc": 0})
    network, _ = build_network(config, catalog, Communicator())
    drawn = loader_of(config, catalog, Communicator(), network).draw(1, 0, np.arange(5))
    assert drawn.noise.shape == (2, 5, width)
    with_filter = small_config(catalog.uri, model={"propagation": propagation}, train={"w_diff": 0.7, "w_tc": 0})
    network, _ = build_network(with_filter, catalog, Communicator())
    other = loader_of(with_filter, catalog, Communicator(), network).draw(1, 0, np.arange(5))
    assert np.array_equal(drawn.negatives, other.negatives)
    assert np.array_equal(drawn.timesteps, other.timesteps)
    if propagation == "sampled":
        assert drawn.sampler_seed == other.sampler_seed
