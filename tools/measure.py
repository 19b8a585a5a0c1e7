"""One rank of one measurement of tools/benchmark.py:  measure.py CASE(JSON) RANK FOLDER -> FOLDER/RANK.json"""

import itertools
import json
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from watching import peak_mib, says, seconds_until, watched

from gtc_dist.checkpoint import checkpoint_files
from gtc_dist.checkpoint.async_writer import BUSY
from gtc_dist.config import Config
from gtc_dist.config_file import load_config
from gtc_dist.data import storage
from gtc_dist.data.catalog import CSC, Catalog
from gtc_dist.distributed.collectives import Communicator
from gtc_dist.distributed.sharded_table import ShardedTable, plan_lookup
from gtc_dist.evaluation.ranking import RankingOptions, top_k_items
from gtc_dist.graph.csc import both_directions
from gtc_dist.inference.export import ROWS, write_part
from gtc_dist.inference.layerwise import embed_catalog
from gtc_dist.model.build import build_network, load_features, load_graphs
from gtc_dist.training.run_log import RunLog, Stopwatch
from gtc_dist.training.trainer import Trainer

MIB = 1 << 20


def main() -> None:
    case, rank, folder = json.loads(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(case.get("threads", 1))
    ranks, device = case.get("ranks", 1), device_of(case, rank)
    comm = Communicator(device=device)
    if ranks > 1:
        backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
        dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
        comm = Communicator(rank, ranks).split(device)
    kinds = {"sampling": sampling, "lookup": lookup, "step": step, "scale": step, "inference": inference}
    kinds |= {"checkpoint": saving, "resume": resume, "ranking": ranking, "ingest": ingest, "command": command}
    result = kinds[case["kind"]](case, comm)
    (folder / f"{rank}.json").write_text(json.dumps(result))
    comm.barrier()
    if ranks > 1:
        dist.destroy_process_group()


def device_of(case: dict, rank: int) -> torch.device:
    """The GPU of a rank, for training steps where the configuration asks for GPUs."""
    steps = case["kind"] in ("step", "scale")
    if not steps or not load_config(case["config"], case["overrides"]).cluster.gpu:
        return torch.device("cpu")
    device = torch.device("cuda", rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


class Synchronized(Stopwatch):
    """Waits for the GPU where a part ends: its work is counted where it belongs, and steps take a little longer."""

    def part(self, name: str | None) -> None:
        torch.cuda.synchronize()
        super().part(name)


def sampling(case: dict, comm: Communicator) -> dict:
    """Seeds a second through the layers of a batch, as the planner draws them."""
    from gtc_dist.graph.neighbor_sampler import Sampler  # slow to import

    graph = zipf_graph(case["nodes"], case["interactions"])
    sampler, rng = Sampler(graph, case["sampler"], case["threads"]), np.random.default_rng(comm.rank)
    times, edges = [], 0
    for repeat in range(case["repeats"] + 2):
        sampler.seed(repeat)
        frontier, edges = rng.permutation(len(graph.indptr) - 1)[: case["seeds"]], 0
        comm.barrier()
        start = time.perf_counter()
        for fanout in case["fanout"]:
            layer = sampler.layer(frontier, fanout)
            frontier, edges = layer.sources, edges + len(layer.edges)
        times.append(time.perf_counter() - start)
    seconds = statistics.median(times[2:])
    return {"seeds_per_second": case["seeds"] / seconds, "seconds": seconds, "edges": edges, "nodes": len(frontier)}


def zipf_graph(nodes: int, interactions: int) -> CSC:
    """A user-item graph over `nodes` users and as many items, item popularity by Zipf's law with exponent 0.8."""
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


def lookup(case: dict, comm: Communicator) -> dict:
    """Route, look-up, gradient and Adam for random ids of a row-sharded table."""
    table, rng = ShardedTable("t", case["rows"], case["width"], comm, init_std=0.1), np.random.default_rng(comm.rank)
    parts: dict[str, list[float]] = {"route": [], "lookup": [], "backward": [], "adam": []}
    sent = []
    for _ in range(case["repeats"] + 2):
        ids = torch.from_numpy(rng.integers(0, case["rows"], case["ids"]))
        comm.barrier()
        before, clock = comm.bytes_sent, [time.perf_counter()]
        route = plan_lookup(ids, case["rows"], comm)
        clock.append(time.perf_counter())
        rows = table.lookup(route)
        clock.append(time.perf_counter())
        rows.sum().backward()
        clock.append(time.perf_counter())
        table.step(1e-3)
        clock.append(time.perf_counter())
        sent.append(comm.bytes_sent - before)
        for name, seconds in zip(parts, np.diff(clock), strict=True):
            parts[name].append(float(seconds))
    medians = {f"seconds/{name}": statistics.median(values[2:]) for name, values in parts.items()}
    total = statistics.median([sum(values) for values in zip(*parts.values(), strict=True)][2:])
    return {"seconds": total, **medians, "sent_bytes": statistics.median(sent[2:]), "peak_mib": peak_mib()}


def step(case: dict, comm: Communicator) -> dict:
    """Training steps, with the loader running ahead as in a training."""
    config = load_config(case["config"], case["overrides"])
    catalog = Catalog(config.data.catalog)
    with tempfile.TemporaryDirectory(prefix="gtc-benchmark-") as run:
        users, items = (column[comm.rank :: comm.size] for column in catalog.interactions("train"))
        trainer = Trainer(config, catalog, run, users, items, load_graphs(config, catalog), comm)
        if comm.device.type != "cuda":
            return measure_steps(trainer, case["repeats"])
        gpu = measure_gpu(trainer, case["repeats"])
        trainer.watch = Synchronized()
        return measure_steps(trainer, case["repeats"]) | gpu


def measure_gpu(trainer: Trainer, repeats: int) -> dict:
    """Steps as a training takes them, which wait for the GPU at the end only; the share of that time in which it
    computed, by the kernels of as many steps again under the profiler; and its memory."""
    trainer.network.train()
    batches = itertools.chain.from_iterable(trainer.loader.epoch(epoch) for epoch in itertools.count(1))

    def steps(count: int) -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(count):
            trainer.step(next(batches).to(trainer.comm.device))
        torch.cuda.synchronize()
        return (time.perf_counter() - start) / count

    steps(max(3, repeats // 5))
    torch.cuda.reset_peak_memory_stats()
    seconds = steps(repeats)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        steps(repeats)
    busy = sum(event.self_device_time_total for event in profile.key_averages()) / 1e6 / repeats
    return {
        "gpu/seconds_per_step": seconds,
        "gpu/interactions_per_second": trainer.config.train.batch_size / seconds,
        "gpu/busy_share": busy / seconds,
        "gpu/peak_mib": torch.cuda.max_memory_allocated() / MIB,
    }


def resume(case: dict, comm: Communicator) -> dict:
    """A training that is killed once a state of it is whole, and the same command again: seconds until it is ready to
    go on, and until the first line of progress, which comes with the first step that ends ten seconds after that."""
    times = []
    for _ in range(case["repeats"]):
        with tempfile.TemporaryDirectory(prefix="gtc-benchmark-") as runs:
            overrides = [*case["overrides"], f"run.storage={runs}", "run.name=resume", "train.log_every=1"]
            words = [sys.executable, "-m", "gtc_dist.train", "--config", case["config"], *overrides]
            states = partial(checkpoint_files.list_checkpoints, f"{runs}/resume", "step-")
            seconds_until(words, {"saved": lambda _, states=states: bool(states()[0])})
            newest = storage.listing(storage.join(runs, "resume", checkpoint_files.FOLDER, states()[0][-1]))
            times.append(
                seconds_until(words, {"ready": says("going on from epoch"), "progress": says("interactions/s")})
            )
    medians = {f"seconds_to_{name}": statistics.median(one[name] for one in times) for name in ("ready", "progress")}
    return medians | {"state_mib": sum(newest.values()) / MIB}


def measure_steps(trainer: Trainer, repeats: int) -> dict:
    comm, loader, dense = trainer.comm, trainer.loader_comm, count_dense(trainer)
    waits, totals, sent, nodes, parts = [], [], [], [], {}
    warm_up, cpu, epoch = max(3, repeats // 5), 0.0, 1
    trainer.network.train()
    refresh = measure_refresh(trainer)
    batches = trainer.loader.epoch(epoch)
    for n in range(warm_up + repeats):
        if n == warm_up:
            comm.barrier()
            trainer.watch.take(), trainer.loader.planner.watch.take()
            comm.seconds = loader.seconds = 0.0
            cpu = time.process_time()
        before, start = comm.bytes_sent + loader.bytes_sent + dense[0], time.perf_counter()
        batch = next(batches, None)
        if batch is None:
            epoch += 1
            batches = trainer.loader.epoch(epoch)
            batch = next(batches)
        fetched = time.perf_counter()
        trainer.step(batch.to(comm.device))
        waits.append(fetched - start)
        totals.append(time.perf_counter() - start)
        sent.append(comm.bytes_sent + loader.bytes_sent + dense[0] - before)
        nodes.append(
            [
                len(route.position) if route.position is not None else trainer.graphs.users
                for route in (batch.user_route, batch.item_route)
            ]
        )
    cpu = time.process_time() - cpu
    batches.close()
    parts = trainer.watch.take() | trainer.loader.planner.watch.take()
    parts["communication"], parts["communication_ahead"] = comm.seconds, loader.seconds
    waits, totals, sent = waits[warm_up:], totals[warm_up:], sent[warm_up:]
    tables = trainer.tables.all()
    table_bytes = sum(table.rows * table.width * 4 for table in tables)
    seconds = statistics.median(totals) + refresh["seconds"] / refresh["every"]
    result = {
        "seconds_per_step": seconds,
        "seconds_per_refresh": refresh["seconds"],
        "steps_per_refresh": refresh["every"],
        "sent_bytes_per_refresh": refresh["sent_bytes"],
        "waiting_for_batch": sum(waits) / sum(totals),
        "processor_seconds_per_step": cpu / repeats,
        "interactions_per_second": trainer.config.train.batch_size / seconds,
        "steps_per_pass": trainer.loader.pass_steps,
        "rows_users": int(np.median([n[0] for n in nodes])),
        "rows_items": int(np.median([n[1] for n in nodes])),
        "sent_bytes_per_step": statistics.median(sent) + refresh["sent_bytes"] / refresh["every"],
        "dense_all_reduce_bytes": table_bytes if comm.size > 1 else 0,
        "peak_mib": peak_mib(),
    }
    return result | {f"seconds/{name}": value / repeats for name, value in parts.items()}


def saving(case: dict, comm: Communicator) -> dict:
    """What it costs to save the state of training: as many steps with a state being written beside them as that takes,
    against as many without. `share_every_2_minutes` is the extra time over two minutes."""
    config = load_config(case["config"], case["overrides"])
    catalog = Catalog(config.data.catalog)
    with tempfile.TemporaryDirectory(prefix="gtc-benchmark-") as run:
        users, items = (column[comm.rank :: comm.size] for column in catalog.interactions("train"))
        trainer = Trainer(config, catalog, run, users, items, load_graphs(config, catalog), comm)
        trainer.network.train()
        trainer.monitor = RunLog(run, 1, 1, active=False)
        trainer.started = time.monotonic()
        batches = itertools.chain.from_iterable(trainer.loader.epoch(epoch) for epoch in itertools.count(1))

        def steps(count: int) -> float:
            comm.barrier()
            start = time.perf_counter()
            for _ in range(count):
                trainer.step(next(batches).to(comm.device))
            comm.barrier()
            return time.perf_counter() - start

        steps(5)
        results: dict[str, list[float]] = {"blocked": [], "written": [], "extra": []}
        for repeat in range(case["repeats"]):
            start = time.perf_counter()
            trainer.state.progress.step = repeat + 1
            trainer.state.save()
            blocked, count = time.perf_counter() - start, 0
            while comm.all_reduce_max(int(trainer.saver.outcome == BUSY)):
                steps(1)
                count += 1
            written = time.perf_counter() - start
            trainer.saver.settle(0)
            with_state = time.perf_counter() - start
            for name, value in (("blocked", blocked), ("written", written), ("extra", with_state - steps(count))):
                results[name].append(value)
        # every rank has a folder of its own here, and only the first one removes older states
        states = len({name.split("/")[1] for name in storage.listing(run)})
        saved = comm.all_reduce(torch.tensor(sum(storage.listing(run).values()) / states)).item()
        alone = steps(10) / 10
    medians = {f"seconds/{name}": statistics.median(values) for name, values in results.items()}
    share = medians["seconds/extra"] / 120
    return {
        "seconds_per_step": alone,
        **medians,
        "share_every_2_minutes": share,
        "state_mib": saved / MIB,
        "peak_mib": peak_mib(),
    }


def measure_refresh(trainer: Trainer) -> dict:
    """The refresh of the history that every so many steps share; none is left for the steps that are measured."""
    if trainer.history is None:
        return {"seconds": 0.0, "sent_bytes": 0, "every": 1}
    every, trainer.history.every, trainer.history.steps = trainer.history.every, 10**9, 10**9
    trainer.comm.barrier()
    before, start = trainer.comm.bytes_sent, time.perf_counter()
    trainer.history.refresh()
    trainer.comm.barrier()
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "sent_bytes": trainer.comm.bytes_sent - before, "every": every}


def count_dense(trainer: Trainer) -> list[int]:
    """Bytes of dense gradients that DDP reduces, counted in its hook."""
    sent = [0]
    if trainer.comm.size > 1:
        from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

        def hook(state, bucket):
            sent[0] += bucket.buffer().nbytes
            return allreduce_hook(state, bucket)

        trainer.forward.register_comm_hook(None, hook)
    return sent


def inference(case: dict, comm: Communicator) -> dict:
    """Layer-wise embeddings of everything, and their export; the weights are the initial ones."""
    config = load_config(case["config"], case["overrides"])
    catalog, graphs, model, tables, features = parts_of(config, comm)
    seconds, export = [], []
    for _ in range(case["repeats"]):
        with tempfile.TemporaryDirectory(prefix="gtc-benchmark-") as folder:
            comm.barrier()
            start = time.perf_counter()
            embedded = embed_catalog(model, tables, features, graphs, config.model.layers, config.eval.chunk)
            comm.barrier()
            seconds.append(time.perf_counter() - start)
            out = case["export"] or folder
            for kind, table in zip(("users", "items"), embedded, strict=True):
                for first in range(table.start, table.stop, ROWS):
                    uri = storage.join(out, kind, f"part-{first:012d}.parquet")
                    write_part(catalog, kind, table, first, uri, "float32")
            comm.barrier()
            export.append(time.perf_counter() - start - seconds[-1])
    total = statistics.median(a + b for a, b in zip(seconds, export, strict=True))
    parts = {"seconds/inference": statistics.median(seconds), "seconds/export": statistics.median(export)}
    return {"seconds": total, **parts, "sent_bytes": comm.bytes_sent // case["repeats"], "peak_mib": peak_mib()}


def parts_of(config: Config, comm: Communicator) -> tuple:
    catalog = Catalog(config.data.catalog)
    model, tables = build_network(config, catalog, comm, trainable=False)
    return catalog, load_graphs(config, catalog), model, tables, load_features(model.shape, catalog, comm)


def ranking(case: dict, comm: Communicator) -> dict:
    """Top 50 of a number of users among all items, for random embeddings of the model's width."""
    config = load_config(case["config"], case["overrides"])
    catalog = Catalog(config.data.catalog)
    graphs = load_graphs(config, catalog)
    width = config.model.width * (1 + len(catalog.modalities(config.model.modalities)))
    users = ShardedTable("users", catalog.users, width, comm, init_std=0.1, trainable=False)
    items = ShardedTable("items", catalog.items, width, comm, init_std=0.1, trainable=False)
    mine = np.arange(users.start, users.stop)[: case["users"] // comm.size]
    options = RankingOptions(config.eval.item_block, config.eval.user_block)
    seconds = []
    for _ in range(max(case["repeats"] // 20, 1)):
        comm.barrier()
        start = time.perf_counter()
        top_k_items(users, items, graphs, mine, 50, options)
        comm.barrier()
        seconds.append(time.perf_counter() - start)
    return {
        "seconds": statistics.median(seconds),
        "users": case["users"],
        "items": catalog.items,
        "peak_mib": peak_mib(),
    }


def ingest(case: dict, comm: Communicator) -> dict:
    """prepare, as its command, into the configured catalog (replacing one that is there)."""
    config = load_config(case["config"], case["overrides"])
    words = [sys.executable, "-m", "gtc_dist.prepare", "--force", "--config", case["config"], *case["overrides"]]
    results = [watched(words) for _ in range(case["repeats"])]
    manifest = Catalog(config.data.catalog).manifest
    result = sorted(results, key=lambda r: r["seconds"])[len(results) // 2]
    rows = sum(manifest.interactions.values())
    result |= {"interactions": rows, "interactions_per_second": rows / result["seconds"]}
    return result | {"users": manifest.users, "items": manifest.items} | manifest.graph_quality


def command(case: dict, comm: Communicator) -> dict:
    results = [watched(case["command"]) for _ in range(case["repeats"])]
    return sorted(results, key=lambda r: r["seconds"])[len(results) // 2]


if __name__ == "__main__":
    main()
