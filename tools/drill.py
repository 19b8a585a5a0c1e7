"""Kill a training again and again at random moments, and compare its result with that of an undisturbed one.

    python tools/drill.py --config FILE --out FOLDER [--kills 20] [--seed 0] [a.b=c ...]

Trains the configuration twice under FOLDER (local, or s3://), with a checkpoint every few seconds, on this machine.
The second one is disturbed: after a random time a random one of these happens, until there were so many:

    rank      SIGKILL for one of its ranks; Ray starts all of them again
    command   SIGKILL for the command, with the Ray cluster that it started; the command is given again
    stop      SIGTERM for the command, which saves and leaves; it is given again

Prints what was done as a table, and whether both ended alike: metrics to the last digit, no checkpoint without its
manifest, no unfinished file, no process left. Exit status 1 if not.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

from gtc_dist.config import load_config
from gtc_dist.data import storage
from gtc_dist.engine import checkpoint
from gtc_dist.errors import InputError, run_command
from gtc_dist.train import LEFT

KINDS = ("rank", "command", "stop")
SECONDS = (3.0, 45.0)  # from one to the next
OFTEN = ["train.checkpoint.minutes=0.05", "cluster.retries=1000"]


@dataclass
class Disturbance:
    kind: str
    second: float  # since the disturbed training began
    after: str  # newest whole state at the time


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="YAML file; its catalog must exist")
    parser.add_argument("--out", required=True, help="URI of a new folder for the two runs")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the moments and kinds (default: %(default)s)")
    parser.add_argument("overrides", nargs="*", help="a.b=c for both runs")
    args = parser.parse_args(argv)

    out = storage.absolute(args.out)
    if storage.listing(out):
        raise InputError(f"{args.out} is not empty; name a new folder")
    common = [*args.overrides, *OFTEN, f"run.storage={out}"]
    load_config(args.config, common)  # a wrong key shows at once
    commands = {name: command(args.config, [*common, f"run.name={name}"]) for name in ("undisturbed", "disturbed")}
    start = time.monotonic()
    with tempfile.TemporaryFile("w+") as log, tempfile.TemporaryDirectory(prefix="gtc-drill-") as scratch:
        os.environ["TMPDIR"] = scratch  # of the trainings: nothing may be left there
        process = begin(commands["undisturbed"], log)
        finish(process, log)
        undisturbed = time.monotonic() - start
        start = time.monotonic()
        run, rng, started = storage.join(out, "disturbed"), random.Random(args.seed), set()
        done = disturb(commands["disturbed"], run, args.kills, rng, log, started)
        problems = compare(out, scratch, started)
    print(table(done))
    print(f"undisturbed {undisturbed:.0f} s, disturbed {time.monotonic() - start:.0f} s, {len(done)} times")
    for problem in problems:
        print(f"NOT ALIKE: {problem}")
    if not problems:
        print("both ended alike: the same metrics, no torn checkpoint, no unfinished file, no process left")
    return 1 if problems else 0


def command(config: str, overrides: list[str]) -> list[str]:
    return [sys.executable, "-m", "gtc_dist.train", "--config", config, *overrides]


def begin(arguments: list[str], log) -> psutil.Process:
    return psutil.Process(subprocess.Popen(arguments, stdout=log, stderr=log, stdin=subprocess.DEVNULL).pid)


def finish(process: psutil.Process, log) -> None:
    """Wait for a training. Raises InputError with the end of what it said if it failed."""
    if code := process.wait():
        log.seek(0)
        raise InputError(f"training ended with status {code}: {log.read()[-3000:]}")


def disturb(
    arguments: list[str], run: str, kills: int, rng: random.Random, log, started: set[psutil.Process]
) -> list[Disturbance]:
    """Train to the end with so many disturbances, as far as it does not end before.

    Args:
        started: filled with processes of the trainings.
    """
    start, done, process = time.monotonic(), [], begin(arguments, log)
    for _ in range(kills):
        kind = rng.choice(KINDS)
        try:
            code = process.wait(rng.uniform(*SECONDS))
        except psutil.TimeoutExpired:
            pass
        else:  # it is through, or failed
            if code:
                finish(process, log)
            break
        started |= {process, *process.children(recursive=True)}
        states = checkpoint.names(run, "step-")[0]
        done.append(Disturbance(kind, time.monotonic() - start, states[-1] if states else "none"))
        print(f"{len(done)}: {kind} after {done[-1].second:.0f} s, {done[-1].after}", file=sys.stderr, flush=True)
        if kind == "rank":
            kill_rank(process, rng)
            continue
        process.send_signal(signal.SIGKILL if kind == "command" else signal.SIGTERM)
        code = process.wait()
        if code == 0:  # it was through before it heard of it
            return done
        if code not in (-signal.SIGKILL, -signal.SIGTERM, 128 + signal.SIGTERM, LEFT, signal.SIGTERM):
            finish(process, log)
        process = begin(arguments, log)
    finish(process, log)
    return done


def kill_rank(process: psutil.Process, rng: random.Random, patience: float = 60) -> None:
    """SIGKILL for a random one of the ranks, as soon as there are any."""
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline and process.is_running():
        ranks = [p for p in process.children(recursive=True) if "RayTrainWorker" in p.name()]
        if ranks:
            rng.choice(sorted(ranks, key=lambda p: p.pid)).kill()
            return
        time.sleep(0.2)


def compare(out: str, scratch: str, started: set[psutil.Process]) -> list[str]:
    """What is not as it should be after both.

    Args:
        scratch: temporary folder of the trainings; started: processes that should be gone.
    """
    results = {}
    for name in ("undisturbed", "disturbed"):
        found = storage.read_json(storage.join(out, name, "metrics.json"))
        results[name] = {key: value for key, value in found.items() if not key.startswith("seconds")}
    problems = []
    for key, value in results["undisturbed"].items():
        if value != results["disturbed"][key]:
            problems.append(f"{key}: {json.dumps(value)[:200]} and {json.dumps(results['disturbed'][key])[:200]}")
    run = storage.join(out, "disturbed")
    torn = [name for prefix in ("step-", "epoch-") for name in checkpoint.names(run, prefix)[1]]
    problems += [f"checkpoint {name} has no manifest" for name in torn]
    problems += [f"{name} is an unfinished file" for name in storage.listing(run) if name.endswith(".partial")]
    _, alive = psutil.wait_procs(started, timeout=120)  # Ray's agents look for their parent once in a while
    problems += [f"process {p.pid} ({p.name()}) is left" for p in alive]
    return problems + [f"{path} is left" for path in Path(scratch).glob("gtc-*")]


def table(done: list[Disturbance]) -> str:
    lines = ["| | what | second | newest state |", "| --- | --- | --- | --- |"]
    lines += [f"| {n} | {one.kind} | {one.second:.0f} | {one.after} |" for n, one in enumerate(done, start=1)]
    return "\n".join(lines)


if __name__ == "__main__":
    run_command(main)
