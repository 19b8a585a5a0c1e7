"""One rank and several on the same global batch: the same loss and the same gradients, dense modules and tables."""

import pytest
from ranks import run_ranks
from small import GATED, small_catalog, small_config
from steps import assert_same_step, global_draws, step

MODELS = {
    "full": {"propagation": "full"},
    "sampled": {"propagation": "sampled", "fanout": [-1, -1], "item_fanout": -1},
}


@pytest.fixture(scope="module")
def catalog(tmp_path_factory):
    return small_catalog(tmp_path_factory.mktemp("catalog") / "c")


@pytest.mark.parametrize(
    ("propagation", "model", "tc_rows"),
    [("full", {}, 512), ("full", GATED, 0), ("sampled", {}, 0), ("sampled", GATED, 0)],
)
def test_two_ranks_give_the_loss_and_gradients_of_one(catalog, propagation, model, tc_rows):
    config = small_config(catalog.uri, model={**MODELS[propagation], **model}, train={"tc_rows": tc_rows})
    draws = global_draws(config, catalog)
    alone = run_ranks(step, 1, catalog.uri, config, draws, [24])[0]
    assert set(alone["parts"]) == {"bpr", "tc", "diffusion", "l2"}
    assert all(gradient.abs().sum() > 0 for gradient in [*alone["dense"].values(), *alone["tables"].values()])
    for result in run_ranks(step, 2, catalog.uri, config, draws, [12, 12]):
        assert_same_step(result, alone)


def test_four_ranks_with_uneven_and_empty_shares_give_the_same(catalog):
    config = small_config(
        catalog.uri,
        model=MODELS["sampled"],
        train={"tc_rows": 0, "negatives": {"mode": "shared", "count": 9}},
    )
    draws = global_draws(config, catalog)
    alone = run_ranks(step, 1, catalog.uri, config, draws, [24])[0]
    for result in run_ranks(step, 4, catalog.uri, config, draws, [15, 0, 8, 1]):
        assert_same_step(result, alone)
