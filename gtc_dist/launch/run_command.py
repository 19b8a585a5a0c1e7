"""What the commands on a finished run share: how they take it, and where they run.

By default a command works in its own process, without a cluster. With `--workers N` it runs on N ranks of the cluster,
each of which loads just its rows of the tables and the features; the graphs are shared by the ranks of a node.
"""

import argparse
import functools
from collections.abc import Callable

import torch

from gtc_dist.config import ClusterConfig
from gtc_dist.data.catalog import Catalog
from gtc_dist.distributed.collectives import Communicator
from gtc_dist.inference.trained_run import RunRef
from gtc_dist.model.build import load_graphs


def parse_run_command(parser: argparse.ArgumentParser, argv: list[str] | None):
    """Add what every command on a finished run takes."""
    parser.add_argument("--run", required=True, help="URI of the run folder: run.storage/run.name")
    parser.add_argument("--workers", type=int, default=0, help="ranks on the cluster (default 0: this process alone)")
    parser.add_argument("--gpu", action="store_true", help="one GPU a rank, with --workers")
    parser.add_argument("--threads", type=int, help="torch threads of a rank")
    args = parser.parse_args(argv)
    if args.workers < 0 or (args.gpu and not args.workers):
        parser.error("--workers must not be negative, and --gpu needs it")
    return args


def run_on_ranks_or_here(args, found: RunRef, work: Callable[..., dict]) -> dict:
    """Run `work(world, graphs, found=...)` in this process, or on the ranks that the command line asks for."""
    work = functools.partial(work, found=found)
    if not args.workers:
        torch.set_num_threads(args.threads or torch.get_num_threads())
        return work(Communicator(), None)

    from gtc_dist.launch import (
        ray_cluster,
        ray_train,  # slow to import, and needed with --workers alone
    )

    graphs = load_graphs(found.config, Catalog(found.config.data.catalog))
    ray_cluster.connect(min(args.workers, ray_cluster.cores()) + 1, dashboard=True, shared_bytes=graphs.bytes)
    wanted = ClusterConfig(workers=args.workers, gpu=args.gpu, threads=args.threads)
    resources = ray_train.worker_resources(wanted)
    shared = ray_train.share_graphs(graphs)
    del graphs
    return ray_train.run_on_ranks(work, wanted, shared, found.uri, resources)
