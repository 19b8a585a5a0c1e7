"""Network, tables and features of one rank, from a configuration and a catalog."""

import importlib.util
import os
import shutil

import torch

from gtc_dist.config import Config
from gtc_dist.data.catalog import FEATURE_ROWS, Catalog
from gtc_dist.distributed.collectives import Communicator
from gtc_dist.distributed.sharded_table import ShardedTable
from gtc_dist.errors import InputError
from gtc_dist.model.gtc import GTC, Tables
from gtc_dist.model.variant import Variant


def build_network(
    config: Config, catalog: Catalog, comm: Communicator, trainable: bool = True, variant: Variant | None = None
) -> tuple[GTC, Tables]:
    """The dense network and the tables, with the same initial values for any world size.

    Args:
        trainable: False where weights are only read: no optimizer state is allocated then.
        variant: parts of the network; None: those of `model.variant`.

    Raises:
        InputError: a modality that the catalog lacks.
    """
    modalities = catalog.modalities(config.model.modalities)
    torch.manual_seed(config.train.seed)
    network = GTC(modalities, config.model, config.train, comm, variant).to(comm.device)
    options = {"trainable": trainable, "rowwise_second_moment": config.train.table_optimizer == "rowwise_adam"}
    return network, Tables.build(network, catalog.users, catalog.items, comm, config.train.seed, **options)


def compile_step(network: GTC, backend: str = "inductor") -> None:
    """Compile the network's forward and backward pass, at the first step.

    Raises:
        InputError: what torch.compile needs on this machine is missing.
    """
    on_gpu = network.comm.device.type == "cuda"
    variable, language, *compilers = ("CC", "C", "gcc", "clang") if on_gpu else ("CXX", "C++", "g++", "clang++")
    has_compiler = any(map(shutil.which, (os.environ.get(variable, compilers[0]), *compilers)))
    missing = [] if has_compiler else [f"a {language} compiler"]
    if on_gpu and importlib.util.find_spec("triton") is None:
        missing.append("the package triton")
    if missing and backend == "inductor":
        raise InputError(f"train.compile is true, but {' and '.join(missing)} is missing: install it, or set false")
    # The whole graph keeps its shapes; sizes of the batch become symbols at the second step. Sampled, all differ.
    sampled = network.model_config.propagation == "sampled"
    torch._dynamo.config.optimize_ddp = False  # it would cut the graph where gradients are averaged, for overlap
    network.compile(backend=backend, dynamic=True if sampled else None)


def load_features(modalities: dict[str, int], catalog: Catalog, comm: Communicator) -> dict[str, ShardedTable]:
    """Frozen float16 tables of the modalities' features (name -> width); each rank reads its own rows, in blocks."""
    tables = {}
    for name, width in modalities.items():
        table = ShardedTable(name, catalog.items, width, comm, dtype=torch.float16, trainable=False)
        for first in range(table.start, table.stop, FEATURE_ROWS):
            rows = catalog.features(name, first, min(first + FEATURE_ROWS, table.stop))
            at = first - table.start
            table.weight[at : at + len(rows)] = torch.from_numpy(rows)
        tables[name] = table
    return tables


def with_communicator(tables: dict[str, ShardedTable], comm: Communicator) -> dict[str, ShardedTable]:
    """The same rows (shared, not copied) looked up through another process group, or copied to its device."""
    moved = {}
    for name, table in tables.items():
        moved[name] = ShardedTable(name, 0, table.width, Communicator(), dtype=table.weight.dtype, trainable=False)
        moved[name].rows, moved[name].comm = table.rows, comm
        moved[name].start, moved[name].stop = table.start, table.stop
        moved[name].weight = table.weight.to(comm.device)
    return moved
