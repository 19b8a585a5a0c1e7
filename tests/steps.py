"""One training step on given draws, for tests that compare numbers of ranks and subgraph builders."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from gtc_dist.config import Config
from gtc_dist.data.catalog import Catalog
from gtc_dist.distributed.collectives import Communicator
from gtc_dist.distributed.sharded_table import ShardedTable
from gtc_dist.graph.csc import load_graphs
from gtc_dist.graph.neighbor_sampler import NeighborSampler
from gtc_dist.model.batch import DrawnPairs
from gtc_dist.model.build import build_network, load_features
from gtc_dist.subgraph.sampled_graph import SampledGraphBuilder
from gtc_dist.training.data_loader import DataLoader, build_loader


def loader_of(config: Config, catalog: Catalog, comm: Communicator, network, sampler=NeighborSampler) -> DataLoader:
    users, items = catalog.interactions("train")
    mine = slice(comm.rank, None, comm.size)
    thread_comm = comm.new_group()
    features = load_features(network.modalities, catalog, thread_comm)
    graphs = load_graphs(config, catalog)
    loader = build_loader(config, network, users[mine], items[mine], graphs, features, None, thread_comm)
    if config.model.propagation == "sampled":  # build_loader takes DeviceSampler for GPUs; it samples on CPUs, too
        loader.subgraph_builder = SampledGraphBuilder(config, network, graphs, features, sampler)
    return loader


def global_draws(config: Config, catalog: Catalog) -> DrawnPairs:
    """Draws of a batch of 24 pairs, as a single rank makes them."""
    network, _ = build_network(config, catalog, Communicator())
    loader = loader_of(config, catalog, Communicator(), network)
    rows = np.random.default_rng(3).permutation(len(loader.users))[:24]
    return replace(loader.draw(1, 0, rows), counts=[len(rows)])


def share(draws: DrawnPairs, rank: int, counts: list[int]) -> DrawnPairs:
    """A rank's contiguous part of global draws."""
    start = sum(counts[:rank])
    rows = slice(start, start + counts[rank])
    negatives = draws.negatives[rows] if draws.negatives.ndim == 2 else draws.negatives
    return replace(
        draws,
        users=draws.users[rows],
        positives=draws.positives[rows],
        negatives=negatives,
        timesteps=draws.timesteps[rows],
        noise=draws.noise[:, rows],
        dropout=draws.dropout[:, rows],
        counts=counts,
    )


def set_away_from_start(network, seed: int = 11) -> None:
    """Random dense weights, also where training starts at zero, so that every path matters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.dim():
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


def step(
    comm: Communicator,
    catalog_uri: str,
    config: Config,
    draws: DrawnPairs,
    counts: list[int],
    sampler=NeighborSampler,
) -> dict:
    """Loss parts of the global batch and all gradients: dense ones as DDP leaves them, tables' as dense rows."""
    catalog = Catalog(catalog_uri)
    network, tables = build_network(config, catalog, comm)
    set_away_from_start(network)
    loader = loader_of(config, catalog, comm, network, sampler)
    forward = DistributedDataParallel(network, forward_sync_buffers=False) if comm.size > 1 else network
    batch = loader.assemble(share(draws, comm.rank, counts))
    loss, parts = forward(
        batch, tables.user.lookup(batch.subgraph.user_lookup), tables.item.lookup(batch.subgraph.item_lookup)
    )
    loss.backward()
    names = sorted(parts)
    summed = comm.all_reduce(torch.stack([parts[name] for name in names]))
    return {
        "parts": dict(zip(names, summed.tolist(), strict=True)),
        "dense": {name: p.grad for name, p in network.named_parameters()},
        "tables": {table.name: whole_gradient(table) for table in tables.all()},
    }


def whole_gradient(table: ShardedTable) -> torch.Tensor:
    """A table's gradient over all ranks as one dense matrix."""
    rows, values = table.gradient()
    dense = torch.zeros_like(table.weight)
    if rows is None:
        dense += values
    else:
        dense[rows] = values
    return table.comm.all_gather(
        dense,
        [
            table.comm.row_range(table.rows, r)[1] - table.comm.row_range(table.rows, r)[0]
            for r in range(table.comm.size)
        ],
    )


def assert_same_step(got: dict, want: dict, rtol: float = 2e-4, atol: float = 2e-6) -> None:
    assert got["parts"] == {name: pytest.approx(value, rel=1e-4) for name, value in want["parts"].items()}
    for kind in ("dense", "tables"):
        assert got[kind].keys() == want[kind].keys()
        for name, gradient in want[kind].items():
            # the gradient of one factor of all content sums terms that cancel; processors round them differently
            atol_here = max(atol, 4e-6) if name.endswith("content_length") else atol
            torch.testing.assert_close(
                got[kind][name], gradient, rtol=rtol, atol=atol_here, msg=lambda m, n=name: f"{n}: {m}"
            )
