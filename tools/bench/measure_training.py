"""Measurements of training, for tools/bench/measure.py: steps, saving the training state, resuming."""

import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial

import numpy as np
import torch
from step_operators import operators_of_a_step
from watching import peak_mib, printed, seconds_until

from gtc_dist.checkpoint import checkpoint_files
from gtc_dist.checkpoint.async_writer import BUSY
from gtc_dist.checkpoint.run_folder import CHECKPOINT_FOLDER, STEP_PREFIX
from gtc_dist.config_file import load_config
from gtc_dist.data import storage
from gtc_dist.data.catalog import Catalog
from gtc_dist.distributed.collectives import Communicator
from gtc_dist.distributed.stopwatch import Stopwatch
from gtc_dist.graph.csc import load_graphs
from gtc_dist.model.batch import Batch
from gtc_dist.training.run_log import RunLog
from gtc_dist.training.trainer import Trainer

MIB = 1 << 20


class SynchronizedStopwatch(Stopwatch):
    """Stopwatch that waits for the GPU at the end of a part, which attributes its work to that part but slows steps."""

    def part(self, name: str | None) -> None:
        torch.cuda.synchronize()
        super().part(name)


def measure_step(case: dict, comm: Communicator) -> dict:
    """Training steps, with the loader prefetching as in training."""
    config = load_config(case["config"], case["overrides"])
    catalog = Catalog(config.data.catalog)
    with tempfile.TemporaryDirectory(prefix="gtc-benchmark-") as run:
        users, items = (column[comm.rank :: comm.size] for column in catalog.interactions("train"))
        trainer = Trainer(config, catalog, run, users, items, load_graphs(config, catalog), comm)
        result = {}
        if comm.device.type == "cuda":
            result = measure_gpu(trainer, case["repeats"])
            trainer.stopwatch = SynchronizedStopwatch()
        result = measure_steps(trainer, case["repeats"]) | result
        result["loader_interactions_per_second"] = measure_loader(trainer, case["repeats"])
        return result if comm.size > 1 else result | measure_floor(trainer, result)


def measure_loader(trainer: Trainer, repeats: int) -> float:
    """Interactions a second that the loader prepares while nothing else runs."""
    batches = trainer.loader.epoch(1)
    next(batches)
    start, seen, count = time.perf_counter(), 0, 0
    for batch in itertools.islice(batches, repeats):
        seen, count = seen + sum(batch.counts), count + 1
    seconds = time.perf_counter() - start
    batches.close()
    return seen / seconds if count else 0.0


def measure_floor(trainer: Trainer, result: dict) -> dict:
    """Operators of a step, and the time that it takes at least: its matrix products at the speed of one large product
    and the rows of its tables, with their moments, read and written at the speed of one large copy."""
    device, train = trainer.comm.device, trainer.config.train
    dtype = torch.bfloat16 if train.precision == "bf16" else torch.float32
    seconds = result.get("gpu/seconds_per_step", result["seconds_per_step"])
    square, rows = torch.ones(2048, 2048, device=device, dtype=dtype), torch.ones(1 << 26, device=device)
    target = torch.zeros_like(rows)
    flops_per_second = 2 * len(square) ** 3 / best_seconds(lambda: square @ square, device)
    bytes_per_second = 2 * rows.nbytes / best_seconds(lambda: target.copy_(rows), device)
    widths = {table.name: table.width for table in trainer.tables.all()}
    item_width = sum(width for name, width in widths.items() if name != "user")
    touched = result["rows_users"] * widths["user"] + result["rows_items"] * item_width
    counted = operators_of_a_step(trainer)
    floor = counted.flops / flops_per_second + 6 * 4 * touched / bytes_per_second
    return {
        "operators/launches": counted.launches.total(),
        "operators/waits": len(counted.copies),
        "operators/gflop": counted.flops / 1e9,
        "operators/gigabytes": counted.bytes / 1e9,
        "floor/gflop_per_second": flops_per_second / 1e9,
        "floor/gigabytes_per_second": bytes_per_second / 1e9,
        "floor/seconds_per_step": floor,
        "floor/share_reached": floor / seconds,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
    }


def best_seconds(work: Callable[[], torch.Tensor], device: torch.device, repeats: int = 10) -> float:
    """Least time of some calls."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times)


def measure_gpu(trainer: Trainer, repeats: int) -> dict:
    """Steps without synchronisation in between, as in training; the share of that time in which the GPU computed, from
    the kernels of as many profiled steps; and the GPU's memory."""
    trainer.network.train()
    batches = endless_batches(trainer)

    def steps(count: int) -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(count):
            trainer.train_step(next(batches))
        torch.cuda.synchronize()
        return (time.perf_counter() - start) / count

    steps(max(3, repeats // 5))
    torch.cuda.reset_peak_memory_stats()
    seconds = steps(repeats)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        steps(repeats)
    batches.close()
    busy = sum(event.self_device_time_total for event in profile.key_averages()) / 1e6 / repeats
    return {
        "gpu/seconds_per_step": seconds,
        "gpu/interactions_per_second": trainer.config.train.batch_size / seconds,
        "gpu/busy_share": busy / seconds,
        "gpu/peak_mib": torch.cuda.max_memory_allocated() / MIB,
    }


def endless_batches(trainer: Trainer) -> Iterator[Batch]:
    """Batches of one epoch after the other; `close` ends the thread that prepares them."""
    for epoch in itertools.count(1):
        with closing(trainer.loader.epoch(epoch)) as batches:
            yield from batches


def measure_steps(trainer: Trainer, repeats: int) -> dict:
    """Median time, traffic and parts of a training step, with its share of the refreshes of the history."""
    comm, loader, dense = trainer.comm, trainer.loader_comm, count_dense(trainer)
    waits, totals, sent, nodes, parts = [], [], [], [], {}
    warm_up, cpu, epoch = max(3, repeats // 5), 0.0, 1
    trainer.network.train()
    refresh = measure_refresh(trainer)
    batches = trainer.loader.epoch(epoch)
    for n in range(warm_up + repeats):
        if n == warm_up:
            comm.barrier()
            trainer.stopwatch.take(), trainer.loader.subgraph_builder.stopwatch.take()
            comm.seconds = loader.seconds = 0.0
            cpu = time.process_time()
        before, start = comm.bytes_sent + loader.bytes_sent + dense[0], time.perf_counter()
        batch = next(batches, None)
        if batch is None:
            epoch += 1
            batches = trainer.loader.epoch(epoch)
            batch = next(batches)
        fetched = time.perf_counter()
        trainer.train_step(batch)
        waits.append(fetched - start)
        totals.append(time.perf_counter() - start)
        sent.append(comm.bytes_sent + loader.bytes_sent + dense[0] - before)
        lookups = (
            (batch.subgraph.user_lookup, trainer.tables.user),
            (batch.subgraph.item_lookup, trainer.tables.item),
        )
        nodes.append([table.rows if plan.position is None else len(plan.position) for plan, table in lookups])
    cpu = time.process_time() - cpu
    batches.close()
    parts = trainer.stopwatch.take() | trainer.loader.subgraph_builder.stopwatch.take()
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


def measure_refresh(trainer: Trainer) -> dict:
    """One refresh of the historical embeddings, and its interval in steps; switched off for the measured steps."""
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
    """One-element list with the bytes of dense gradients that DDP has reduced, updated by a communication hook."""
    sent = [0]
    if trainer.comm.size > 1:
        from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

        def hook(state, bucket):
            sent[0] += bucket.buffer().nbytes
            return allreduce_hook(state, bucket)

        trainer.ddp_network.register_comm_hook(None, hook)
    return sent


def measure_checkpoints(case: dict, comm: Communicator) -> dict:
    """Cost of saving the training state: steps during the write of a state, against as many steps without one.
    `share_every_2_minutes` is the extra time as a share of two minutes."""
    config = load_config(case["config"], case["overrides"])
    catalog = Catalog(config.data.catalog)
    with tempfile.TemporaryDirectory(prefix="gtc-benchmark-") as run:
        users, items = (column[comm.rank :: comm.size] for column in catalog.interactions("train"))
        trainer = Trainer(config, catalog, run, users, items, load_graphs(config, catalog), comm)
        trainer.network.train()
        trainer.log = RunLog(run, 1, 1, active=False)
        trainer.started = time.monotonic()
        batches = endless_batches(trainer)

        def steps(count: int) -> float:
            comm.barrier()
            start = time.perf_counter()
            for _ in range(count):
                trainer.train_step(next(batches))
            comm.barrier()
            return time.perf_counter() - start

        steps(5)
        results: dict[str, list[float]] = {"blocked": [], "written": [], "extra": []}
        for repeat in range(case["repeats"]):
            start = time.perf_counter()
            trainer.state.progress.step = repeat + 1
            trainer.state.save()
            blocked, count = time.perf_counter() - start, 0
            while comm.all_reduce_max(int(trainer.writer.outcome == BUSY)):
                steps(1)
                count += 1
            written = time.perf_counter() - start
            trainer.writer.finalize()
            with_state = time.perf_counter() - start
            for name, value in (("blocked", blocked), ("written", written), ("extra", with_state - steps(count))):
                results[name].append(value)
        # each rank has its own folder here, and only rank 0 prunes older states
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


def measure_resume(case: dict, comm: Communicator) -> dict:
    """Training is killed after its first complete state and started again: seconds until it is ready to resume, and
    until the first progress line, which is printed at the first step that ends ten seconds later."""
    times = []
    for _ in range(case["repeats"]):
        with tempfile.TemporaryDirectory(prefix="gtc-benchmark-") as runs:
            overrides = [*case["overrides"], f"run.storage={runs}", "run.name=resume", "train.log_every=1"]
            words = [sys.executable, "-m", "gtc_dist.train", "--config", case["config"], *overrides]
            states = partial(checkpoint_files.list_checkpoints, f"{runs}/resume", STEP_PREFIX)
            seconds_until(words, {"saved": lambda _, states=states: bool(states()[0])})
            newest = storage.listing(storage.join(runs, "resume", CHECKPOINT_FOLDER, states()[0][-1]))
            times.append(
                seconds_until(words, {"ready": printed("resuming at epoch"), "progress": printed("interactions/s")})
            )
    medians = {
        f"seconds_to_{name}": statistics.median(seconds[name] for seconds in times) for name in ("ready", "progress")
    }
    return medians | {"state_mib": sum(newest.values()) / MIB}
