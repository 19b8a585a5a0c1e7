"""Measure the parts of the system on this machine: a table on screen and a JSON file.

    python tools/benchmark.py sampling                                seeds per second, graph of 4 M interactions
    python tools/benchmark.py lookup    --ranks 1,2                   a row-wise sharded table: lookup, gradient, Adam
    python tools/benchmark.py step      --config C.yaml [a.b=c ...]   training steps on a prepared catalog
    python tools/benchmark.py scale     --config C.yaml --config D.yaml --ranks 1,2 [a.b=c ...]   the same steps on each
    python tools/benchmark.py peer      --config C.yaml [a.b=c ...]   an epoch beside one of LightGCN
    python tools/benchmark.py checkpoint --config C.yaml [a.b=c ...]  cost of saving the training state
    python tools/benchmark.py resume    --config C.yaml [a.b=c ...]   time to resume a killed training
    python tools/benchmark.py inference --config C.yaml               embeddings of the whole catalog and their export
    python tools/benchmark.py ranking   --config C.yaml --users 10000  users against all items
    python tools/benchmark.py lists     --config C.yaml --users 1000,2000   `gtc recommend`, from random embeddings
    python tools/benchmark.py formats   --rows 1000000                formats of an export beside Parquet, random rows
    python tools/benchmark.py ingest    --config C.yaml --config D.yaml   prepare: raw tables to a catalog
    python tools/benchmark.py command -- python -m gtc_dist.train ...  time and memory of any command

Common options: --threads 1,2 (threads of torch and DGL, one measurement each), --repeats N (after an uncounted
warm-up), --out FILE, --compare FILE (prints the ratio of each figure to that in an earlier file). `step
cluster.gpu=true` measures on GPUs. Every measurement runs in its own processes; ranks are processes that communicate
over gloo (NCCL on GPUs). Figures are medians. Memory is the largest peak resident set of a rank; for commands, the peak
sum of the proportional sets of all processes, Ray's included. Bytes sent are counted by the collectives.
"""

import argparse
import itertools
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
CONFIGURED = ("step", "scale", "peer", "checkpoint", "resume", "inference", "ranking", "lists", "ingest")
COMMANDS = ("ingest", "resume", "command")  # measured as whole commands, in one process
MEASURE = Path(__file__).parent / "bench" / "measure.py"


def main() -> None:
    args = parse()
    earlier = None if args.compare is None else json.loads(Path(args.compare).read_text())["rows"]
    rows = []
    for case in cases(args):
        print(f"measuring {describe(case)}", file=sys.stderr, flush=True)
        rows.append({"case": case, "result": run_case(case)})
    report = {"called": " ".join(sys.argv), "machine": machine(), "measured": args.command, "rows": rows}
    with open(args.out, "w") as file:
        json.dump(report, file, indent=2)
    print(table(rows))
    if earlier is not None:
        print(comparison(rows, earlier))
    print(f"machine: {report['machine']}; written to {args.out}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("sampling", "lookup", "formats", *CONFIGURED, "command"):
        sub = commands.add_parser(name, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
        sub.add_argument("--repeats", type=int, default=1 if name in COMMANDS or name == "inference" else 20)
        sub.add_argument("--out", default=f"benchmark-{name}.json", help="JSON file")
        sub.add_argument("--compare", help="JSON file of an earlier measurement, to print ratios to")
        if name not in COMMANDS:
            sub.add_argument("--threads", default="1", help="comma-separated")
        if name == "peer":
            sub.set_defaults(ranks="1")
        elif name not in COMMANDS:
            sub.add_argument("--ranks", default="1", help="comma-separated")
        if name in CONFIGURED:
            sub.add_argument("--config", action="append", required=True, help="YAML file; may be repeated")
        if name == "sampling":
            sub.add_argument("--nodes", type=int, default=200_000, help="number of users, and of items")
            sub.add_argument("--interactions", type=int, default=4_000_000)
            sub.add_argument("--fanout", default="10,10")
            sub.add_argument("--seeds", type=int, default=6144, help="seed nodes of a batch")
            sub.add_argument("--sampler", default="dgl,torch", help="comma-separated: dgl, torch (that for GPUs)")
        if name == "lookup":
            sub.add_argument("--rows", default="10000,1000000", help="rows of the table, comma-separated")
            sub.add_argument("--ids", type=int, default=50_000, help="rows that each rank looks up")
            sub.add_argument("--width", type=int, default=64)
        if name == "ranking":
            sub.add_argument("--users", type=int, default=10_000)
        if name == "lists":
            sub.add_argument("--users", default="1000,2000", help="users to make lists for, comma-separated")
            sub.add_argument("--width", type=int, default=785, help="columns of the embeddings (default: %(default)s)")
            sub.add_argument("--explain", action="store_true", help="with the nearest items of each user's own")
        if name == "formats":
            sub.add_argument("--rows", type=int, default=1_000_000, help="items (default: %(default)s)")
            sub.add_argument("--width", type=int, default=785)
            sub.add_argument("--formats", default="numpy,jsonl,faiss", help="comma-separated")
        if name == "inference":
            sub.add_argument("--export", help="URI for the embeddings (default: a temporary folder)")
    words = sys.argv[1:]
    end = words.index("--") if "--" in words else len(words)  # the command to measure follows
    args, args.rest = parser.parse_known_args(words[:end])  # overrides a.b=c may stand between options
    unknown = [word for word in args.rest if word.startswith("-")]
    if unknown:
        parser.error(f"unknown options: {' '.join(unknown)}")
    if args.command == "command":
        if args.rest or not words[end + 1 :]:
            parser.error("give the command to measure after --")
        args.rest = words[end + 1 :]
    elif args.rest and args.command not in CONFIGURED:
        parser.error(f"{args.command} takes no configuration overrides: {' '.join(args.rest)}")
    if args.compare is not None and not Path(args.compare).is_file():
        parser.error(f"the file {args.compare} of --compare does not exist")
    if args.compare is not None and Path(args.compare).resolve() == Path(args.out).resolve():
        parser.error(f"--out {args.out} would overwrite the file of --compare; name another one")
    return args


def cases(args: argparse.Namespace) -> list[dict]:
    """One dictionary per measurement."""
    if args.command == "command":
        return [{"kind": "command", "command": args.rest, "repeats": args.repeats}]
    shared = {"kind": args.command, "repeats": args.repeats}
    if args.command in COMMANDS:
        return [shared | {"config": config, "overrides": args.rest} for config in args.config]
    grid = {"ranks": numbers(args.ranks), "threads": numbers(args.threads)}
    if args.command == "sampling":
        shared |= {"nodes": args.nodes, "interactions": args.interactions, "seeds": args.seeds}
        shared |= {"fanout": numbers(args.fanout)}
        grid["sampler"] = args.sampler.split(",")
    elif args.command == "formats":
        grid["format"] = args.formats.split(",")
        shared |= {"rows": args.rows, "width": args.width}
    elif args.command == "lookup":
        grid["rows"] = numbers(args.rows)
        shared |= {"ids": args.ids, "width": args.width}
    else:
        grid["config"] = args.config
        shared |= {"overrides": args.rest}
        if args.command == "ranking":
            shared |= {"users": args.users}
        if args.command == "lists":
            grid["users"] = numbers(args.users)
            shared |= {"width": args.width, "explain": args.explain}
        if args.command == "inference":
            shared |= {"export": args.export}
    return [shared | dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def run_case(case: dict) -> dict:
    """Run all ranks of a case; returns the figures of rank 0, with the largest memory of all ranks."""
    ranks, threads = case.get("ranks", 1), case.get("threads", 1)
    environment = os.environ | dict.fromkeys(THREADS, str(threads))
    with tempfile.TemporaryDirectory(prefix="gtc-benchmark-") as folder:
        running = [
            subprocess.Popen(
                [sys.executable, str(MEASURE), json.dumps(case), str(rank), folder],
                env=environment,
                stdout=sys.stderr,
            )
            for rank in range(ranks)
        ]
        if failed(running):
            sys.exit(f"the measurement failed: {describe(case)}")
        results = [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(ranks)]
    merged = results[0]
    if "peak_mib" in merged:
        merged["peak_mib"] = max(result["peak_mib"] for result in results)
    if "seeds_per_second" in merged:  # total of the host: ranks sample concurrently
        merged["seeds_per_second"] = sum(result["seeds_per_second"] for result in results)
    return merged


def failed(running: list[subprocess.Popen]) -> bool:
    """Wait for the ranks. If one fails, kill the others, which would wait for it for ever."""
    left = list(running)
    while left:
        time.sleep(0.1)
        left = [process for process in left if process.poll() is None]
        if any(process.returncode for process in running):
            for process in left:
                process.kill()
            return True
    return False


def table(rows: list[dict]) -> str:
    """Text table: one row per figure, one column per case."""
    headers = [describe(row["case"]) for row in rows]
    lines = [f"case {n}: {header}" for n, header in enumerate(headers, 1)]
    names = list(dict.fromkeys(name for row in rows for name in row["result"]))
    lines.append(f"{'':<32}" + "".join(f"{f'case {n}':>14}" for n in range(1, len(rows) + 1)))
    for name in names:
        values = [row["result"].get(name) for row in rows]
        lines.append(f"{name:<32}" + "".join(f"{show(value):>14}" for value in values))
        if len(rows) > 1 and name in ("seconds", "seconds_per_step") and values[0]:
            ratios = [f"{value / values[0]:.2f}" if value else "" for value in values]
            lines.append(f"{'  ratio to case 1':<32}" + "".join(f"{ratio:>14}" for ratio in ratios))
    return "\n".join(lines)


def comparison(rows: list[dict], earlier: list[dict]) -> str:
    """Ratio of each figure to that of the same case in an earlier file."""
    lines = ["ratio to the earlier file:"]
    for row in rows:
        match = next((old for old in earlier if old["case"] == row["case"]), None)
        if match is None:
            lines.append(f"{describe(row['case'])}: not in the earlier file")
            continue
        for name, value in row["result"].items():
            old = match["result"].get(name)
            if isinstance(value, int | float) and isinstance(old, int | float) and old:
                lines.append(f"{describe(row['case'])}  {name}  {value / old:.3f}")
    return "\n".join(lines)


def describe(case: dict) -> str:
    shown = {name: value for name, value in case.items() if name not in ("kind", "repeats") and value not in ([], None)}
    words = [" ".join(map(str, v)) if isinstance(v, list) else str(v) for v in shown.values()]
    return ", ".join(f"{name} {word}" for name, word in zip(shown, words, strict=True))


def show(value) -> str:
    if value is None:
        return "-"
    if isinstance(value, str):
        return value
    return f"{value:,.0f}" if abs(value) >= 1000 or isinstance(value, int) else f"{value:,.4g}"


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


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
