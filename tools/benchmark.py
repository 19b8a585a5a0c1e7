"""Measure the parts of the system on this machine.

    python tools/benchmark.py step --config configs/tiktok.yaml [a.b=c ...] [--threads 1,2] [--epochs 3] [--out FILE]

`step` trains on a prepared catalog in one process, without Ray: seconds and processor seconds per epoch, the same split
by part of a step, seconds of one validation, and peak memory. Every thread count runs in a process of its own; the
first epoch warms up and does not count; medians over the others. One table on screen and one JSON file.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time

THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    step = commands.add_parser("step", help="training steps")
    step.add_argument("--config", required=True)
    step.add_argument("--threads", default="1,2", help="torch threads, one measurement each")
    step.add_argument("--epochs", type=int, default=3, help="measured epochs")
    step.add_argument("--out", default="benchmark.json", help="JSON file")
    step.add_argument("--inside", type=int, help=argparse.SUPPRESS)  # this process measures with so many threads
    args, overrides = parser.parse_known_args()  # a.b=c may stand between the options
    if any(word.startswith("-") for word in overrides):
        parser.error(f"unknown options: {' '.join(word for word in overrides if word.startswith('-'))}")

    if args.inside:
        json.dump(measure_steps(args.config, overrides, args.inside, args.epochs), sys.stdout)
        return
    rows = []
    for threads in (int(n) for n in args.threads.split(",")):
        command = [sys.executable, __file__, "step", "--config", args.config, "--epochs", str(args.epochs)]
        command += ["--inside", str(threads), *overrides]
        environment = os.environ | dict.fromkeys(THREADS, str(threads))
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
    report = {"command": " ".join(sys.argv), "machine": machine(), "step": rows}
    with open(args.out, "w") as file:
        json.dump(report, file, indent=2)
    print(table(rows))
    print(f"machine: {report['machine']}; written to {args.out}")


def measure_steps(config_path: str, overrides: list[str], threads: int, epochs: int) -> dict:
    """One measurement, in this process."""
    import torch

    from gtc_dist.config import load_config
    from gtc_dist.data.catalog import Catalog
    from gtc_dist.engine.build import load_graphs
    from gtc_dist.engine.loop import Trainer
    from gtc_dist.model.collectives import World

    torch.set_num_threads(threads)
    config = load_config(config_path, overrides)
    catalog = Catalog(config.data.catalog)
    with tempfile.TemporaryDirectory(prefix="gtc-benchmark-") as run:
        pairs = catalog.interactions("train")
        trainer = Trainer(config, catalog, run, *pairs, load_graphs(config, catalog), World())
        trainer.monitor.active = False
        wall, processor, parts = [], [], {}
        for epoch in range(1, epochs + 2):
            trainer.logged.clear()
            before, cpu = time.perf_counter(), time.process_time()
            trainer.train_epoch(epoch)
            if epoch > 1:
                wall.append(time.perf_counter() - before)
                processor.append(time.process_time() - cpu)
                for part, seconds in trainer.logged.items():
                    parts.setdefault(part, []).append(seconds)
        before = time.perf_counter()
        trainer.rank(trainer.embed(), "valid")
        validation = time.perf_counter() - before
    return {
        "threads": threads,
        "steps": trainer.loader.steps,
        "batch_size": config.train.batch_size,
        "seconds_per_epoch": statistics.median(wall),
        "processor_seconds_per_epoch": statistics.median(processor),
        "interactions_per_second": sum(trainer.loader.rank_rows) / statistics.median(wall),
        "seconds_by_part": {part: statistics.median(values) for part, values in parts.items()},
        "validation_seconds": validation,
        "peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def table(rows: list[dict]) -> str:
    names = ["seconds_per_epoch", "processor_seconds_per_epoch", "interactions_per_second", "validation_seconds"]
    lines = [("threads", [str(row["threads"]) for row in rows])]
    lines += [(name, [f"{row[name]:,.2f}" for row in rows]) for name in [*names, "peak_memory_mib"]]
    for part in rows[0]["seconds_by_part"]:
        lines.append((f"  {part}", [f"{row['seconds_by_part'][part]:.2f}" for row in rows]))
    return "\n".join(f"{name:<30}" + "".join(f"{value:>12}" for value in values) for name, values in lines)


def machine() -> str:
    model = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as file:
            model = next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{os.cpu_count()} cores ({model}), {gib:.0f} GiB, Python {platform.python_version()}"


if __name__ == "__main__":
    main()
