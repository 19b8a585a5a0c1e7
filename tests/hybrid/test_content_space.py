"""Joint content vectors against numpy, alone and over ranks."""

import numpy as np
import torch
from ranks import run_ranks

from gtc_dist.distributed.collectives import Communicator
from gtc_dist.distributed.sharded_table import ShardedTable
from gtc_dist.hybrid.content_space import ContentSpace, weighted_unit_rows

WIDTHS = {"a": 5, "b": 3}


def tables(comm: Communicator) -> dict[str, ShardedTable]:
    return {n: ShardedTable(n, 30, w, comm, init_std=1.0, seed=2, trainable=False) for n, w in WIDTHS.items()}


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def test_modalities_are_centred_scaled_and_projected():
    features = {name: table.weight for name, table in tables(Communicator()).items()}
    features["a"][4] = 0
    fitted = torch.arange(3, 20)
    space = ContentSpace.fit(held(features), 3, fitted)
    rows = space.apply(features, missing_as_zero=True).double().numpy()
    parts = []
    for name, values in features.items():
        raw = values.double().numpy()
        x = unit(raw - raw[fitted].mean(0))
        if WIDTHS[name] > 3:
            x = x @ np.linalg.svd(x[fitted], full_matrices=False)[2][:3].T
        parts.append(x)
    parts[0][4] = 0
    want = np.hstack(parts)
    np.testing.assert_allclose(rows @ rows.T, want @ want.T, atol=1e-5)
    assert not np.allclose(space.apply(features)[4, :3], 0)


def held(features: dict[str, torch.Tensor]) -> dict[str, ShardedTable]:
    return {name: table.with_values(features[name]) for name, table in tables(Communicator()).items()}


def test_products_of_weighted_unit_rows_are_weighted_means_of_cosines():
    features = {name: table.weight for name, table in tables(Communicator()).items()}
    rows = weighted_unit_rows(features, {"a": 3.0, "b": 1.0}).numpy()
    a, b = (unit(features[name].numpy()) for name in WIDTHS)
    np.testing.assert_allclose(rows @ rows.T, 0.75 * a @ a.T + 0.25 * b @ b.T, atol=1e-6)


def rows_of_rank(comm: Communicator) -> torch.Tensor:
    features = tables(comm)
    return ContentSpace.fit(features, 2).apply({name: table.weight for name, table in features.items()})


def test_ranks_fit_the_same_space():
    alone, together = rows_of_rank(Communicator()), torch.cat(run_ranks(rows_of_rank, 3))
    torch.testing.assert_close(together @ together.T, alone @ alone.T, rtol=1e-4, atol=1e-5)
