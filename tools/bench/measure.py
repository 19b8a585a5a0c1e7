"""One rank of one measurement of tools/benchmark.py.

    measure.py CASE RANK FOLDER

CASE is JSON; the rank writes its figures to FOLDER/RANK.json.
"""

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from measure_formats import measure_formats
from measure_lists import measure_lists
from measure_peer import measure_peer
from measure_training import measure_checkpoints, measure_resume, measure_step
from watching import peak_mib, run_watched

from gtc_dist.config_file import load_config
from gtc_dist.data import storage
from gtc_dist.data.catalog import CSC, Catalog
from gtc_dist.distributed.collectives import Communicator
from gtc_dist.distributed.sharded_table import ShardedTable, plan_lookup
from gtc_dist.evaluation.ranking import RankingOptions, top_k_items
from gtc_dist.graph.csc import both_directions, load_graphs
from gtc_dist.graph.device_sampler import DeviceSampler
from gtc_dist.inference.embedding_files import FILE_ROWS, write_catalog_rows
from gtc_dist.inference.layerwise import embed_catalog
from gtc_dist.launch.rank_memory import keep_memory
from gtc_dist.model.build import build_network, load_features


def main() -> None:
    case, rank, folder = json.loads(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(case.get("threads", 1))
    keep_memory()  # as in training
    ranks, device = case.get("ranks", 1), device_of(case, rank)
    comm = Communicator(device=device)
    if ranks > 1:
        backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
        dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
        comm = Communicator(rank, ranks).new_group(device)
    result = KINDS[case["kind"]](case, comm)
    (folder / f"{rank}.json").write_text(json.dumps(result))
    comm.barrier()
    if ranks > 1:
        dist.destroy_process_group()


def device_of(case: dict, rank: int) -> torch.device:
    """Device of a rank: a GPU for training steps with cluster.gpu, else the CPU."""
    if case["kind"] not in ("step", "scale") or not load_config(case["config"], case["overrides"]).cluster.gpu:
        return torch.device("cpu")
    device = torch.device("cuda", rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def measure_sampling(case: dict, comm: Communicator) -> dict:
    """Seeds per second through all layers of a batch, sampled as in training."""
    from gtc_dist.graph.neighbor_sampler import NeighborSampler  # slow to import

    graph = zipf_graph(case["nodes"], case["interactions"])
    rng = np.random.default_rng(comm.rank)
    by_dgl = case["sampler"] == "dgl"
    sampler = NeighborSampler(graph, case["threads"]) if by_dgl else DeviceSampler(graph, comm.device)
    times, edges = [], 0
    for repeat in range(case["repeats"] + 2):
        sampler.seed(repeat)
        frontier, edges = torch.from_numpy(rng.permutation(len(graph.indptr) - 1)[: case["seeds"]]), 0
        comm.barrier()
        start = time.perf_counter()
        for fanout in case["fanout"]:
            layer = sampler.layer(frontier, fanout)
            frontier, edges = layer.sources, edges + len(layer.edges)
        times.append(time.perf_counter() - start)
    seconds = statistics.median(times[2:])
    return {"seeds_per_second": case["seeds"] / seconds, "seconds": seconds, "edges": edges, "nodes": len(frontier)}


def zipf_graph(nodes: int, interactions: int) -> CSC:
    """User-item graph of `nodes` users and as many items; item popularity follows Zipf's law with exponent 0.8."""
    rng = np.random.default_rng(0)
    mass = np.cumsum(np.arange(1, nodes + 1) ** -0.8)
    item = rng.permutation(nodes)[np.minimum(np.searchsorted(mass / mass[-1], rng.random(interactions)), nodes - 1)]
    pairs = np.unique(rng.integers(0, nodes, interactions) * nodes + item)
    user, item = pairs // nodes, pairs % nodes
    return both_directions(_csc(user, item, nodes), _csc(item, user, nodes))


def _csc(destination: np.ndarray, source: np.ndarray, nodes: int) -> CSC:
    order = np.lexsort((source, destination))
    indptr = np.concatenate([[0], np.cumsum(np.bincount(destination, minlength=nodes))])
    return CSC(indptr, source[order].astype(np.int32), np.ones(len(source), np.float32))


def measure_lookup(case: dict, comm: Communicator) -> dict:
    """Lookup plan, lookup, gradient and Adam for random ids of a row-wise sharded table."""
    table, rng = ShardedTable("t", case["rows"], case["width"], comm, init_std=0.1), np.random.default_rng(comm.rank)
    parts: dict[str, list[float]] = {"plan": [], "lookup": [], "backward": [], "adam": []}
    sent = []
    for _ in range(case["repeats"] + 2):
        ids = torch.from_numpy(rng.integers(0, case["rows"], case["ids"]))
        comm.barrier()
        before, clock = comm.bytes_sent, [time.perf_counter()]
        plan = plan_lookup(ids, case["rows"], comm)
        clock.append(time.perf_counter())
        rows = table.lookup(plan)
        clock.append(time.perf_counter())
        rows.sum().backward()
        clock.append(time.perf_counter())
        table.adam_step(1e-3)
        clock.append(time.perf_counter())
        sent.append(comm.bytes_sent - before)
        for name, seconds in zip(parts, np.diff(clock), strict=True):
            parts[name].append(float(seconds))
    medians = {f"seconds/{name}": statistics.median(values[2:]) for name, values in parts.items()}
    total = statistics.median([sum(values) for values in zip(*parts.values(), strict=True)][2:])
    return {"seconds": total, **medians, "sent_bytes": statistics.median(sent[2:]), "peak_mib": peak_mib()}


def measure_inference(case: dict, comm: Communicator) -> dict:
    """Layer-wise inference of all embeddings and their export, with the initial weights."""
    config = load_config(case["config"], case["overrides"])
    catalog = Catalog(config.data.catalog)
    graphs = load_graphs(config, catalog)
    model, tables = build_network(config, catalog, comm, trainable=False)
    features = load_features(model.modalities, catalog, comm)
    seconds, export = [], []
    for _ in range(case["repeats"]):
        with tempfile.TemporaryDirectory(prefix="gtc-benchmark-") as folder:
            comm.barrier()
            start = time.perf_counter()
            embedded = embed_catalog(model, tables, features, graphs, config.eval.block_rows)
            comm.barrier()
            seconds.append(time.perf_counter() - start)
            out = case["export"] or folder
            for kind, table in zip(("users", "items"), embedded, strict=True):
                for first in range(table.start, table.stop, FILE_ROWS):
                    uri = storage.join(out, kind, f"part-{first:012d}.parquet")
                    write_catalog_rows(catalog, kind, table, first, uri, "float32")
            comm.barrier()
            export.append(time.perf_counter() - start - seconds[-1])
    total = statistics.median(a + b for a, b in zip(seconds, export, strict=True))
    parts = {"seconds/inference": statistics.median(seconds), "seconds/export": statistics.median(export)}
    return {"seconds": total, **parts, "sent_bytes": comm.bytes_sent // case["repeats"], "peak_mib": peak_mib()}


def measure_ranking(case: dict, comm: Communicator) -> dict:
    """Top 50 of `users` users among all items, for random embeddings of the model's width."""
    config = load_config(case["config"], case["overrides"])
    catalog = Catalog(config.data.catalog)
    graphs = load_graphs(config, catalog)
    width = config.model.width * (1 + len(catalog.modalities(config.model.modalities)))
    users = ShardedTable("users", catalog.users, width, comm, init_std=0.1, trainable=False)
    items = ShardedTable("items", catalog.items, width, comm, init_std=0.1, trainable=False)
    rank_users = np.arange(users.start, users.stop)[: case["users"] // comm.size]
    options = RankingOptions(config.eval.block_rows)
    seconds = []
    for _ in range(max(case["repeats"] // 20, 1)):
        comm.barrier()
        start = time.perf_counter()
        top_k_items(users, items, graphs, rank_users, 50, options)
        comm.barrier()
        seconds.append(time.perf_counter() - start)
    return {
        "seconds": statistics.median(seconds),
        "users": case["users"],
        "items": catalog.items,
        "peak_mib": peak_mib(),
    }


def measure_ingest(case: dict, comm: Communicator) -> dict:
    """The prepare command; it replaces the configured catalog."""
    config = load_config(case["config"], case["overrides"])
    words = [sys.executable, "-m", "gtc_dist.prepare", "--force", "--config", case["config"], *case["overrides"]]
    results = [run_watched(words) for _ in range(case["repeats"])]
    manifest = Catalog(config.data.catalog).manifest
    result = sorted(results, key=lambda r: r["seconds"])[len(results) // 2]
    rows = sum(manifest.interactions.values())
    result |= {"interactions": rows, "interactions_per_second": rows / result["seconds"]}
    return result | {"users": manifest.users, "items": manifest.items} | manifest.graph_quality


def measure_command(case: dict, comm: Communicator) -> dict:
    """Any command: the run with the median time."""
    results = [run_watched(case["command"]) for _ in range(case["repeats"])]
    return sorted(results, key=lambda r: r["seconds"])[len(results) // 2]


KINDS = {
    "sampling": measure_sampling,
    "lookup": measure_lookup,
    "step": measure_step,
    "scale": measure_step,
    "peer": measure_peer,
    "checkpoint": measure_checkpoints,
    "resume": measure_resume,
    "inference": measure_inference,
    "ranking": measure_ranking,
    "lists": measure_lists,
    "formats": measure_formats,
    "ingest": measure_ingest,
    "command": measure_command,
}

if __name__ == "__main__":
    main()
