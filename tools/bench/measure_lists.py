"""Lists of recommended items for some users of a catalog, written as by `gtc recommend`, from random embeddings."""

import os
import tempfile
import time
from types import SimpleNamespace

import numpy as np
from watching import peak_mib

from gtc_dist.config_file import load_config
from gtc_dist.data.catalog import Catalog
from gtc_dist.distributed.collectives import Communicator
from gtc_dist.distributed.sharded_table import ShardedTable
from gtc_dist.evaluation.ranking import RankingOptions
from gtc_dist.graph.csc import load_graphs
from gtc_dist.hybrid.embeddings import Embeddings
from gtc_dist.hybrid.scorer import HybridScorer
from gtc_dist.recommend.lists import write_lists

TOP = 20


def measure_lists(case: dict, comm: Communicator) -> dict:
    """The search, the filter of what users have, and the Parquet files; neither training nor layer-wise inference."""
    config = load_config(case["config"], case["overrides"])
    catalog = Catalog(config.data.catalog)
    tables = [
        ShardedTable(kind, getattr(catalog, kind), case["width"], comm, init_std=0.1, trainable=False)
        for kind in ("users", "items")
    ]
    run = SimpleNamespace(
        catalog=catalog,
        graphs=load_graphs(config, catalog),
        network=SimpleNamespace(out_width=case["width"]),
        scorer=HybridScorer(None, None),
        ranking_options=lambda users: RankingOptions(config.eval.block_rows, users=users),
    )
    of_rank = np.arange(tables[0].start, tables[0].start + case["users"] // comm.size)
    users = np.concatenate([of_rank - tables[0].start + comm.row_range(catalog.users, r)[0] for r in range(comm.size)])
    before = peak_mib()
    with tempfile.TemporaryDirectory(prefix="gtc-benchmark-") as folder:
        comm.barrier()
        start, busy = time.perf_counter(), os.times()
        result = write_lists(run, Embeddings(*tables), folder, users, TOP, False, None, None, case["explain"])
        comm.barrier()
        seconds, after = time.perf_counter() - start, os.times()
    return {
        "seconds": seconds,
        "cpu_seconds": after.user + after.system - busy.user - busy.system,
        "cpu_ms_per_user": 1000 * (after.user + after.system - busy.user - busy.system) / len(of_rank),
        "rows": result["rows"],
        "items": catalog.items,
        "peak_mib_before": before,
        "peak_mib": peak_mib(),
    }
