"""Shared by the commands on a trained run (evaluate, export): their options, and where they execute.

By default a command works in its own process, without a cluster. With `--workers N` it runs on N ranks of the cluster,
each of which loads only its rows of the tables and features; the ranks of a node share one copy of the graphs.
"""

import argparse
import functools
import sys
from collections.abc import Callable

import torch

from gtc_dist.checkpoint.existing_run import RunRef
from gtc_dist.checkpoint.run_folder import CONFIG_FILE
from gtc_dist.config import ClusterConfig
from gtc_dist.data import storage
from gtc_dist.data.catalog import MANIFEST, Catalog
from gtc_dist.distributed.collectives import Communicator
from gtc_dist.graph.csc import load_graphs


def parse_run_command(
    parser: argparse.ArgumentParser, argv: list[str] | None, catalog: str = "the run's catalog, if it has moved"
):
    """Add the options that every command on a trained run has, and parse the command line.

    Args:
        catalog: help of --catalog.
    """
    parser.add_argument("--run", required=True, help="URI of the run folder: run.storage/run.name")
    parser.add_argument("--catalog", metavar="URI", help=catalog)
    parser.add_argument(
        "--workers", type=int, default=0, help="number of ranks on the cluster (default 0: this process alone)"
    )
    parser.add_argument("--gpu", action="store_true", help="one GPU per rank; needs --workers")
    parser.add_argument("--threads", type=int, help="torch threads per rank")
    args = parser.parse_args(argv)
    if args.workers < 0 or (args.gpu and not args.workers):
        parser.error("--workers must not be negative, and --gpu needs it")
    return args


def run_on_ranks_or_here(args, run_ref: RunRef, work: Callable[..., dict]) -> dict:
    """Run `work(comm, graphs, run_ref=...)` in this process or, with --workers, on ranks; returns rank 0's result."""
    print(f"run {args.run}, {run_ref.checkpoint}: computing embeddings", file=sys.stderr, flush=True)
    work = functools.partial(work, run_ref=run_ref)
    if not args.workers:
        torch.set_num_threads(args.threads or torch.get_num_threads())
        return work(Communicator(), None)

    from gtc_dist.launch import ray_cluster, ray_train  # slow to import; needed only with --workers
    from gtc_dist.preflight import node_checks, room

    catalog = Catalog(run_ref.config.data.catalog)
    graphs = load_graphs(run_ref.config, catalog)
    ray_cluster.connect(min(args.workers, ray_cluster.cores()) + 1, dashboard=True, shared_bytes=graphs.bytes)
    cluster = ClusterConfig(workers=args.workers, gpu=args.gpu, threads=args.threads)
    resources = room.room_for_ranks(cluster)
    node_checks.check_nodes(
        {"--run": storage.join(run_ref.uri, CONFIG_FILE), "data.catalog": storage.join(catalog.uri, MANIFEST)}
    )
    shared = ray_train.share_graphs(graphs)
    del graphs
    return ray_train.run_on_ranks(work, cluster, shared, run_ref.uri, resources)
