"""Fault drill: disturb a training at random moments and compare its result with that of an undisturbed one.

    python tools/drill.py --config FILE --out FOLDER [--kills 20] [--kinds rank,hang] [--seed 0] [a.b=c ...]

Trains the configuration twice under FOLDER (local or s3://) on this machine, with a checkpoint every few seconds. The
second training is disturbed --kills times, after random intervals, by a random one of:

    rank      SIGKILL to a rank; Ray restarts all ranks
    command   SIGKILL to the command, and with it to its Ray cluster; the command is rerun
    stop      SIGTERM to the command, which saves the training state and exits; the command is rerun
    hang      SIGSTOP to a rank; the watchdog ends the waiting ranks (cluster.wait_minutes)
    slow      a rank runs ten times slower for a while

at once, during the next checkpoint, or during the next validation. Afterwards both runs are exported; the export of the
second run is killed once and repeated.

Prints a table of the disturbances and compares both runs: metrics equal to the last digit, the same embeddings, no
incomplete checkpoint, no partial file, no remaining process. Exit status 1 if they differ.
"""

import argparse
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from gtc_dist.checkpoint import checkpoint_files
from gtc_dist.checkpoint.run_folder import EPOCH_PREFIX, METRICS_FILE, STEP_PREFIX
from gtc_dist.config_file import load_config
from gtc_dist.data import storage
from gtc_dist.errors import InputError, run_command
from gtc_dist.train import STOPPED

KINDS = ("rank", "command", "stop", "hang", "slow")
MOMENTS = ("any", "checkpoint", "evaluation")
SECONDS = (3.0, 45.0)  # range of the interval between disturbances
PATIENCE = 60.0  # longest wait for a rank to start, or for a moment
SLOW_SECONDS, SLOW_SHARE = 20.0, 0.1  # duration of slowness, and the share of time that the rank may run
DRILL_OVERRIDES = ["train.checkpoint_minutes=0.05", "cluster.retries=1000", "cluster.wait_minutes=0.5"]


@dataclass
class Disturbance:
    kind: str
    moment: str
    second: float  # since the start of the disturbed training
    after: str  # newest complete training state at that time


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="YAML file; its catalog must exist")
    parser.add_argument("--out", required=True, help="URI of a new folder for the two runs")
    parser.add_argument("--kills", type=int, default=20, help="number of disturbances (default: %(default)s)")
    parser.add_argument("--kinds", default=",".join(KINDS), help="comma-separated (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments and kinds (default: %(default)s)")
    parser.add_argument("overrides", nargs="*", help="a.b=c for both runs")
    args = parser.parse_args(argv)

    kinds = args.kinds.split(",")
    if unknown := sorted(set(kinds) - set(KINDS)):
        raise InputError(f"unknown kinds {unknown}; known are {', '.join(KINDS)}")
    out = storage.absolute(args.out)
    if storage.listing(out):
        raise InputError(f"{args.out} is not empty; name a new folder")
    common = [*args.overrides, *DRILL_OVERRIDES, f"run.storage={out}"]
    load_config(args.config, common)  # reports a wrong key at once
    commands = {name: command(args.config, [*common, f"run.name={name}"]) for name in ("undisturbed", "disturbed")}
    start = time.monotonic()
    with tempfile.TemporaryFile("w+") as log, tempfile.TemporaryDirectory(prefix="gtc-drill-") as scratch:
        os.environ["TMPDIR"] = scratch  # of the trainings; must be empty at the end
        process = begin(commands["undisturbed"], log)
        finish(process, log)
        undisturbed = time.monotonic() - start
        start = time.monotonic()
        run, rng, started = storage.join(out, "disturbed"), random.Random(args.seed), set()
        disturbances = disturb(commands["disturbed"], run, args.kills, kinds, rng, log, started)
        disturbed = time.monotonic() - start
        export(out, rng, log)
        problems = compare(out, scratch, started)
    print(table(disturbances))
    print(f"undisturbed {undisturbed:.0f} s, disturbed {disturbed:.0f} s, {len(disturbances)} disturbances")
    for problem in problems:
        print(f"DIFFERENT: {problem}")
    if not problems:
        print("same result: equal metrics and embeddings, no incomplete checkpoint, partial file or remaining process")
    return 1 if problems else 0


def command(config: str, overrides: list[str]) -> list[str]:
    return [sys.executable, "-m", "gtc_dist.train", "--config", config, *overrides]


def begin(arguments: list[str], log) -> psutil.Process:
    return psutil.Process(subprocess.Popen(arguments, stdout=log, stderr=log, stdin=subprocess.DEVNULL).pid)


def finish(process: psutil.Process, log) -> None:
    """Wait for a training. Raises InputError with the end of its output if it failed."""
    if code := process.wait():
        log.seek(0)
        raise InputError(f"training ended with status {code}: {log.read()[-3000:]}")


def disturb(
    arguments: list[str], run: str, kills: int, kinds: list[str], rng: random.Random, log, started: set[psutil.Process]
) -> list[Disturbance]:
    """Train to the end with up to `kills` disturbances; returns those that happened.

    Args:
        started: filled with the processes of the training.
    """
    start, disturbances, process = time.monotonic(), [], begin(arguments, log)
    for _ in range(kills):
        kind, moment = rng.choice(kinds), rng.choice(MOMENTS)
        try:
            code = process.wait(rng.uniform(*SECONDS))
        except psutil.TimeoutExpired:
            moment = await_moment(moment, process, run, log)
        else:  # finished, or failed
            if code:
                finish(process, log)
            break
        started |= {process, *process.children(recursive=True)}
        states = checkpoint_files.list_checkpoints(run, STEP_PREFIX)[0]
        disturbances.append(Disturbance(kind, moment, time.monotonic() - start, states[-1] if states else "none"))
        print(
            f"{len(disturbances)}: {kind} after {disturbances[-1].second:.0f} s, {disturbances[-1].after}",
            file=sys.stderr,
            flush=True,
        )
        if kind not in ("command", "stop"):
            DISTURB[kind](process, rng)
            continue
        process.send_signal(signal.SIGKILL if kind == "command" else signal.SIGTERM)
        code = process.wait()
        if code == 0:  # it finished before the signal
            return disturbances
        if code not in (-signal.SIGKILL, -signal.SIGTERM, 128 + signal.SIGTERM, STOPPED, signal.SIGTERM):
            finish(process, log)
        process = begin(arguments, log)
    finish(process, log)
    return disturbances


def await_moment(moment: str, process: psutil.Process, run: str, log) -> str:
    """Wait for a moment; returns it, or "any" if it did not come within PATIENCE."""
    deadline = time.monotonic() + PATIENCE
    while moment != "any" and time.monotonic() < deadline and process.is_running():
        if moment == "checkpoint" and any(
            checkpoint_files.list_checkpoints(run, prefix)[1] for prefix in (STEP_PREFIX, EPOCH_PREFIX)
        ):
            return moment
        if moment == "evaluation" and re.search(r"step (\d+)/\1 .*\s*\Z", tail(log)):
            return moment
        time.sleep(0.01)
    return "any"


def tail(log, size: int = 4096) -> str:
    """Last bytes of a file that other processes write to."""
    end = os.fstat(log.fileno()).st_size
    return os.pread(log.fileno(), size, max(end - size, 0)).decode(errors="replace")


def random_rank(process: psutil.Process, rng: random.Random) -> psutil.Process | None:
    """A random rank, as soon as there is one; None if none starts."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline and process.is_running():
        ranks = [p for p in process.children(recursive=True) if "RayTrainWorker" in p.name()]
        if ranks:
            return rng.choice(sorted(ranks, key=lambda p: p.pid))
        time.sleep(0.2)
    return None


def kill_rank(process: psutil.Process, rng: random.Random) -> None:
    if rank := random_rank(process, rng):
        rank.kill()


def stop_rank(process: psutil.Process, rng: random.Random) -> None:
    if rank := random_rank(process, rng):
        rank.suspend()


def slow_rank(process: psutil.Process, rng: random.Random) -> None:
    """Let one rank run only SLOW_SHARE of the time for SLOW_SECONDS."""
    rank, deadline = random_rank(process, rng), time.monotonic() + SLOW_SECONDS
    with suppress(psutil.NoSuchProcess):
        while rank and time.monotonic() < deadline:
            rank.suspend()
            time.sleep(1 - SLOW_SHARE)
            rank.resume()
            time.sleep(SLOW_SHARE)


DISTURB = {"rank": kill_rank, "hang": stop_rank, "slow": slow_rank}


def export(out: str, rng: random.Random, log) -> None:
    """Export both runs; the export of the disturbed one is killed once and repeated."""
    for name in ("undisturbed", "disturbed"):
        run, to = storage.join(out, name), storage.join(out, f"{name}-export")
        arguments = [sys.executable, "-m", "gtc_dist.export", "--run", run, "--out", to]
        if name == "disturbed":
            process = begin(arguments, log)
            while process.is_running() and process.status() != psutil.STATUS_ZOMBIE and not storage.listing(to):
                time.sleep(0.01)
            time.sleep(rng.uniform(0, 0.05))
            process.kill()
            process.wait()
            storage.remove_tree(storage.join(to, "manifest.json"))  # in case it had finished
        finish(begin(arguments, log), log)


def compare(out: str, scratch: str, started: set[psutil.Process]) -> list[str]:
    """Differences between the two runs, and leftovers.

    Args:
        scratch: temporary folder of the trainings.
        started: processes of the disturbed training, which should have ended.
    """
    results = {}
    for name in ("undisturbed", "disturbed"):
        found = storage.read_json(storage.join(out, name, METRICS_FILE))
        results[name] = {key: value for key, value in found.items() if not key.startswith("seconds")}
    problems = []
    for key, value in results["undisturbed"].items():
        if value != results["disturbed"][key]:
            problems.append(f"{key}: {json.dumps(value)[:200]} and {json.dumps(results['disturbed'][key])[:200]}")
    manifests = [storage.read_json(storage.join(out, f"{name}-export", "manifest.json")) for name in results]
    if manifests[0]["files"] != manifests[1]["files"]:
        problems.append("the exports differ")
    run = storage.join(out, "disturbed")
    incomplete = [
        name for prefix in (STEP_PREFIX, EPOCH_PREFIX) for name in checkpoint_files.list_checkpoints(run, prefix)[1]
    ]
    problems += [f"checkpoint {name} has no manifest" for name in incomplete]
    problems += [f"{name} is a partial file" for name in storage.listing(out) if name.endswith(".partial")]
    _, alive = psutil.wait_procs(started, timeout=120)  # Ray's agents poll for their parent's death
    problems += [f"process {p.pid} ({p.name()}) is still running" for p in alive]
    return problems + [f"{path} is left" for path in Path(scratch).glob("gtc-*")]


def table(disturbances: list[Disturbance]) -> str:
    lines = ["| | disturbance | moment | second | newest state |", "| --- | --- | --- | --- | --- |"]
    lines += [
        f"| {n} | {d.kind} | {d.moment} | {d.second:.0f} | {d.after} |" for n, d in enumerate(disturbances, start=1)
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    run_command(main)
