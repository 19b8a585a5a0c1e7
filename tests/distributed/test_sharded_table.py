"""Row-sharded lookup and sparse Adam against torch.nn.Embedding and torch.optim.SparseAdam."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import run_ranks

from gtc_dist.distributed.collectives import Communicator
from gtc_dist.distributed.sharded_table import ShardedTable, plan_lookup, plan_whole_table

ROWS, WIDTH, STEPS = 37, 5, 4


def ids_of(rank: int, step: int) -> torch.Tensor:
    """Row ids with repeats; none on rank 1 in step 2."""
    generator = torch.Generator().manual_seed(100 * step + rank)
    return torch.randint(0, ROWS, (0 if (rank, step) == (1, 2) else 11 + rank,), generator=generator)


def loss_of(rows: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return (rows * (ids[:, None] + torch.arange(WIDTH))).sin().sum() + rows.square().sum()


def train_table(comm: Communicator, whole: bool) -> dict:
    table = ShardedTable("t", ROWS, WIDTH, comm, init_std=0.3, seed=5)
    first = None
    for step in range(STEPS):
        ids = torch.arange(ROWS) if whole else ids_of(comm.rank, step)
        plan = plan_whole_table(ROWS, comm) if whole else plan_lookup(ids, ROWS, comm)
        rows = table.lookup(plan)
        if step == 0:
            first = rows.detach().clone()
        loss_of(rows, ids).backward()
        table.adam_step(lr=0.05)
    return {"first": first, "weight": table.weight, "start": table.start, "avg": table.exp_avg}


def reference(size: int, whole: bool) -> tuple[torch.nn.Embedding, torch.Tensor]:
    table = ShardedTable("t", ROWS, WIDTH, Communicator(), init_std=0.3, seed=5)
    embedding = torch.nn.Embedding(ROWS, WIDTH, sparse=True, _weight=table.weight.clone())
    optimizer = torch.optim.SparseAdam(embedding.parameters(), lr=0.05)
    start = embedding.weight.detach().clone()
    for step in range(STEPS):
        optimizer.zero_grad()
        every = [torch.arange(ROWS) if whole else ids_of(rank, step) for rank in range(size)]
        (sum(loss_of(embedding(ids), ids) for ids in every) / size).backward()
        optimizer.step()
    return embedding, start


@pytest.mark.parametrize("size", [1, 2, 4])
def test_lookup_backward_and_adam_match_embedding_and_sparse_adam(size):
    for whole in (False, True):
        results = run_ranks(train_table, size, whole)
        embedding, start = reference(size, whole)
        for rank, result in enumerate(results):
            ids = torch.arange(ROWS) if whole else ids_of(rank, 0)
            torch.testing.assert_close(result["first"], start[ids])
        together = torch.cat([r["weight"] for r in results])
        torch.testing.assert_close(together, embedding.weight.detach(), rtol=1e-5, atol=1e-6)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, ROWS - 1), max_size=50))
def test_lookup_returns_the_asked_rows_in_order(ids):
    table = ShardedTable("t", ROWS, WIDTH, Communicator(), init_std=1.0, seed=1)
    ids = torch.tensor(ids, dtype=torch.int64)
    torch.testing.assert_close(table.lookup(plan_lookup(ids, ROWS, table.comm)), table.weight[ids], rtol=0, atol=0)


@pytest.mark.parametrize("bad", [-1, ROWS])
def test_ids_outside_the_table_are_refused(bad):
    with pytest.raises(IndexError, match="37"):
        plan_lookup(torch.tensor([3, bad]), ROWS, Communicator())


def initial(comm: Communicator) -> torch.Tensor:
    return ShardedTable("t", 9000, 3, comm, init_std=1.0, seed=2).weight


def test_initial_values_do_not_depend_on_the_number_of_ranks():
    alone = run_ranks(initial, 1)[0]
    torch.testing.assert_close(torch.cat(run_ranks(initial, 2)), alone, rtol=0, atol=0)
    assert alone.std() == pytest.approx(1.0, abs=0.02)
    assert not torch.equal(alone[:4096], alone[4096:8192])


def test_untouched_rows_are_not_changed():
    table = ShardedTable("t", ROWS, WIDTH, Communicator(), init_std=1.0, seed=1)
    before = table.weight.clone()
    table.lookup(plan_lookup(torch.tensor([4, 4, 9]), ROWS, table.comm)).sum().backward()
    table.adam_step(lr=0.1)
    changed = (table.weight != before).any(1).nonzero().flatten().tolist()
    assert changed == [4, 9]


def test_a_gradient_that_is_not_contiguous_moves_the_right_rows():
    factor = torch.randn(WIDTH, ROWS, generator=torch.Generator().manual_seed(0))
    weights = []
    for transposed in (False, True):
        table = ShardedTable("t", ROWS, WIDTH, Communicator(), init_std=1.0, seed=1)
        rows = table.lookup(plan_whole_table(ROWS, table.comm))
        (rows.T * factor if transposed else rows * factor.T.contiguous()).sum().backward()
        assert table.pending[0][1].is_contiguous() != transposed
        table.adam_step(lr=0.1)
        weights.append(table.weight)
    torch.testing.assert_close(weights[1], weights[0], rtol=0, atol=0)


def train_rowwise(comm: Communicator) -> dict:
    table = ShardedTable("t", ROWS, WIDTH, comm, init_std=0.3, seed=5, rowwise_second_moment=True)
    for step in range(STEPS):
        ids = ids_of(comm.rank, step)
        loss_of(table.lookup(plan_lookup(ids, ROWS, comm)), ids).backward()
        table.adam_step(lr=0.05)
    return {"weight": table.weight, "exp_avg_sq": table.exp_avg_sq}


def test_rowwise_adam_keeps_one_second_moment_a_row():
    """Against Adam written out row by row, on one rank and on two."""
    weight = ShardedTable("t", ROWS, WIDTH, Communicator(), init_std=0.3, seed=5).weight.clone()
    avg, avg_sq = torch.zeros(ROWS, WIDTH), torch.zeros(ROWS)
    for step in range(STEPS):
        leaf = weight.clone().requires_grad_()
        sum(loss_of(leaf[ids], ids) for ids in (ids_of(0, step), ids_of(1, step))).div(2).backward()
        for row in set(ids_of(0, step).tolist()) | set(ids_of(1, step).tolist()):
            grad = leaf.grad[row]
            avg[row] = 0.9 * avg[row] + 0.1 * grad
            avg_sq[row] = 0.999 * avg_sq[row] + 0.001 * grad.square().mean()
            size = 0.05 * (1 - 0.999 ** (step + 1)) ** 0.5 / (1 - 0.9 ** (step + 1))
            weight[row] -= size * avg[row] / (avg_sq[row].sqrt() + 1e-8)
    results = run_ranks(train_rowwise, 2)
    torch.testing.assert_close(torch.cat([r["weight"] for r in results]), weight)
    torch.testing.assert_close(torch.cat([r["exp_avg_sq"] for r in results])[:, 0], avg_sq)
