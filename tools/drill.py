"""Disturb a training again and again at random moments, and compare its result with that of an undisturbed one.

    python tools/drill.py --config FILE --out FOLDER [--kills 20] [--kinds rank,hang] [--seed 0] [a.b=c ...]

Trains the configuration twice under FOLDER (local, or s3://), with a checkpoint every few seconds, on this machine.
The second one is disturbed: after a random time a random one of these happens, until there were so many:

    rank      SIGKILL for one of its ranks; Ray starts all of them again
    command   SIGKILL for the command, with the Ray cluster that it started; the command is given again
    stop      SIGTERM for the command, which saves and leaves; it is given again
    hang      SIGSTOP for one of its ranks, which the others give up after a while (cluster.wait_minutes)
    slow      one of its ranks runs ten times slower for a while

at once, or as soon as a checkpoint is being written, or as soon as the valid split is being ranked. Afterwards both
runs are exported, the second one with a SIGKILL on the way.

Prints what was done as a table, and whether both ended alike: metrics to the last digit, the same embeddings, no
checkpoint without its manifest, no unfinished file, no process left. Exit status 1 if not.
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
from gtc_dist.config_file import load_config
from gtc_dist.data import storage
from gtc_dist.errors import InputError, run_command
from gtc_dist.train import LEFT

EXPORT = Path(__file__).resolve().parent / "export_embeddings.py"
KINDS = ("rank", "command", "stop", "hang", "slow")
MOMENTS = ("any", "checkpoint", "evaluation")
SECONDS = (3.0, 45.0)  # from one to the next
PATIENCE = 60.0  # for a rank, or a moment, to come
SLOW_SECONDS, SLOW_SHARE = 20.0, 0.1  # how long a rank is slow, and the share of the time that it may work then
OFTEN = ["train.checkpoint.minutes=0.05", "cluster.retries=1000", "cluster.wait_minutes=0.5"]


@dataclass
class Disturbance:
    kind: str
    moment: str
    second: float  # since the disturbed training began
    after: str  # newest whole state at the time


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="YAML file; its catalog must exist")
    parser.add_argument("--out", required=True, help="URI of a new folder for the two runs")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--kinds", default=",".join(KINDS), help="comma-separated (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and kinds (default: %(default)s)")
    parser.add_argument("overrides", nargs="*", help="a.b=c for both runs")
    args = parser.parse_args(argv)

    kinds = args.kinds.split(",")
    if unknown := sorted(set(kinds) - set(KINDS)):
        raise InputError(f"unknown kinds {unknown}; known are {', '.join(KINDS)}")
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
        done = disturb(commands["disturbed"], run, args.kills, kinds, rng, log, started)
        disturbed = time.monotonic() - start
        export(out, rng, log)
        problems = compare(out, scratch, started)
    print(table(done))
    print(f"undisturbed {undisturbed:.0f} s, disturbed {disturbed:.0f} s, {len(done)} times")
    for problem in problems:
        print(f"NOT ALIKE: {problem}")
    if not problems:
        print(
            "both ended alike: the same metrics and embeddings, no torn checkpoint, no unfinished file, no process left"
        )
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
    arguments: list[str], run: str, kills: int, kinds: list[str], rng: random.Random, log, started: set[psutil.Process]
) -> list[Disturbance]:
    """Train to the end with so many disturbances, as far as it does not end before.

    Args:
        started: filled with processes of the trainings.
    """
    start, done, process = time.monotonic(), [], begin(arguments, log)
    for _ in range(kills):
        kind, moment = rng.choice(kinds), rng.choice(MOMENTS)
        try:
            code = process.wait(rng.uniform(*SECONDS))
        except psutil.TimeoutExpired:
            moment = await_moment(moment, process, run, log)
        else:  # it is through, or failed
            if code:
                finish(process, log)
            break
        started |= {process, *process.children(recursive=True)}
        states = checkpoint_files.list_checkpoints(run, "step-")[0]
        done.append(Disturbance(kind, moment, time.monotonic() - start, states[-1] if states else "none"))
        print(f"{len(done)}: {kind} after {done[-1].second:.0f} s, {done[-1].after}", file=sys.stderr, flush=True)
        if kind not in ("command", "stop"):
            DISTURB[kind](process, rng)
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


def await_moment(moment: str, process: psutil.Process, run: str, log) -> str:
    """Wait until it is the moment; returns it, or "any" where it did not come."""
    deadline = time.monotonic() + PATIENCE
    while moment != "any" and time.monotonic() < deadline and process.is_running():
        if moment == "checkpoint" and any(
            checkpoint_files.list_checkpoints(run, prefix)[1] for prefix in ("step-", "epoch-")
        ):
            return moment
        if moment == "evaluation" and re.search(r"step (\d+)/\1 .*\s*\Z", tail(log)):
            return moment
        time.sleep(0.01)
    return "any"


def tail(log, size: int = 4096) -> str:
    """The end of what was written to a file that others write to."""
    end = os.fstat(log.fileno()).st_size
    return os.pread(log.fileno(), size, max(end - size, 0)).decode(errors="replace")


def a_rank(process: psutil.Process, rng: random.Random) -> psutil.Process | None:
    """A random one of the ranks, as soon as there are any."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline and process.is_running():
        ranks = [p for p in process.children(recursive=True) if "RayTrainWorker" in p.name()]
        if ranks:
            return rng.choice(sorted(ranks, key=lambda p: p.pid))
        time.sleep(0.2)
    return None


def kill_rank(process: psutil.Process, rng: random.Random) -> None:
    if rank := a_rank(process, rng):
        rank.kill()


def stop_rank(process: psutil.Process, rng: random.Random) -> None:
    if rank := a_rank(process, rng):
        rank.suspend()


def slow_rank(process: psutil.Process, rng: random.Random) -> None:
    """One rank works a tenth of the time for a while."""
    rank, deadline = a_rank(process, rng), time.monotonic() + SLOW_SECONDS
    with suppress(psutil.NoSuchProcess):
        while rank and time.monotonic() < deadline:
            rank.suspend()
            time.sleep(1 - SLOW_SHARE)
            rank.resume()
            time.sleep(SLOW_SHARE)


DISTURB = {"rank": kill_rank, "hang": stop_rank, "slow": slow_rank}


def export(out: str, rng: random.Random, log) -> None:
    """Export both runs, the disturbed one in two tries of which the first is killed on the way."""
    for name in ("undisturbed", "disturbed"):
        run, to = storage.join(out, name), storage.join(out, f"{name}-export")
        arguments = [sys.executable, str(EXPORT), "--run", run, "--out", to]
        if name == "disturbed":
            process = begin(arguments, log)
            while process.is_running() and process.status() != psutil.STATUS_ZOMBIE and not storage.listing(to):
                time.sleep(0.01)
            time.sleep(rng.uniform(0, 0.05))
            process.kill()
            process.wait()
            storage.remove_tree(storage.join(to, "manifest.json"))  # it may have been through
        finish(begin(arguments, log), log)


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
    manifests = [storage.read_json(storage.join(out, f"{name}-export", "manifest.json")) for name in results]
    if manifests[0]["files"] != manifests[1]["files"]:
        problems.append("the exports differ")
    run = storage.join(out, "disturbed")
    torn = [name for prefix in ("step-", "epoch-") for name in checkpoint_files.list_checkpoints(run, prefix)[1]]
    problems += [f"checkpoint {name} has no manifest" for name in torn]
    problems += [f"{name} is an unfinished file" for name in storage.listing(out) if name.endswith(".partial")]
    _, alive = psutil.wait_procs(started, timeout=120)  # Ray's agents look for their parent once in a while
    problems += [f"process {p.pid} ({p.name()}) is left" for p in alive]
    return problems + [f"{path} is left" for path in Path(scratch).glob("gtc-*")]


def table(done: list[Disturbance]) -> str:
    lines = ["| | what | moment | second | newest state |", "| --- | --- | --- | --- | --- |"]
    lines += [
        f"| {n} | {one.kind} | {one.moment} | {one.second:.0f} | {one.after} |" for n, one in enumerate(done, start=1)
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    run_command(main)
