"""Sharded sparse-dense products against a dense matrix, in chunks and over ranks."""

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from ranks import run_ranks

from gtc_dist.distributed.collectives import Communicator
from gtc_dist.distributed.sharded_spmm import ShardedSpMM
from gtc_dist.distributed.sharded_table import ShardedTable

ROWS, SOURCES, WIDTH, BASE = 11, 17, 4, 5


def graph() -> sp.csr_matrix:
    """Destinations 2 to 12 are rows 0 to 10; source BASE is row 0. The first row has no edge."""
    matrix = sp.random(ROWS + 2, SOURCES + BASE, density=0.3, random_state=0, dtype=np.float32).tolil()
    matrix[:, :BASE], matrix[2] = 0, 0
    return matrix.tocsr()


def products(comm: Communicator, chunk: int, mean: bool) -> torch.Tensor:
    edges = graph()
    rows = ShardedTable("rows", ROWS, 0, comm, trainable=False)
    sources = ShardedTable("sources", SOURCES, WIDTH, comm, init_std=1.0, trainable=False)
    weight = None if mean else edges.data
    operator = ShardedSpMM(edges.indptr.astype(np.int64), edges.indices, weight, 2, rows, sources, chunk, base=BASE)
    return torch.cat([values for _, _, values in operator.sums(sources)])


@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("chunk", [100, 2])
def test_products_match_the_dense_matrix(chunk, mean):
    matrix = graph()
    if mean:
        matrix.data[:] = np.repeat(1 / np.maximum(np.diff(matrix.indptr), 1), np.diff(matrix.indptr))
    sources = ShardedTable("sources", SOURCES, WIDTH, Communicator(), init_std=1.0, trainable=False)
    want = torch.from_numpy(matrix.toarray()[2:, BASE:]) @ sources.weight
    torch.testing.assert_close(products(Communicator(), chunk, mean), want)
    torch.testing.assert_close(torch.cat(run_ranks(products, 3, chunk, mean)), want)


def products_with_kept_blocks(comm: Communicator, chunk: int) -> list[torch.Tensor]:
    """Products with two tables, one after the other, as on a GPU, which keeps the edges."""
    edges = graph()
    rows = ShardedTable("rows", ROWS, 0, comm, trainable=False)
    sources = [ShardedTable(n, SOURCES, WIDTH, comm, init_std=1.0, trainable=False) for n in ("sources", "other")]
    operator = ShardedSpMM(
        edges.indptr.astype(np.int64), edges.indices, edges.data, 2, rows, sources[0], chunk, base=BASE
    )
    operator.keeps_blocks = True
    first, second, again = (
        torch.cat([values for _, _, values in operator.sums(table)]) for table in (*sources, sources[0])
    )
    assert len(operator.blocks) == len(operator.bounds)
    assert torch.equal(first, again)
    return [first, second]


@pytest.mark.parametrize("ranks", [1, 3])
def test_kept_blocks_serve_other_tables(ranks):
    parts = run_ranks(products_with_kept_blocks, ranks, 2)
    for number, name in enumerate(("sources", "other")):
        table = ShardedTable(name, SOURCES, WIDTH, Communicator(), init_std=1.0, trainable=False)
        want = torch.from_numpy(graph().toarray()[2:, BASE:]) @ table.weight
        torch.testing.assert_close(torch.cat([part[number] for part in parts]), want)
