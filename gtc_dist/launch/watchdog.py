"""Watchdog: a limit on how long ranks wait for each other, which names the rank that hangs.

A rank that hangs (stuck disk or device, stopped process, node off the network) would keep the others in a collective
for ever. Every rank sends heartbeats with the progress of its process groups (`Communicator.progress_counters`) to an
actor. When a rank has waited longer than the limit, the actor answers with the name of the rank it waits for, and the
waiting ranks exit, so that Ray Train restarts all ranks from the last checkpoint. A slow rank is waited for as long as
each collective stays within the limit.
"""

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import ray
from ray.exceptions import RayError

if TYPE_CHECKING:  # the actor's process does not import torch
    from gtc_dist.distributed.collectives import Communicator

HEARTBEAT_SECONDS = 5.0  # longest interval


@dataclass
class _RankState:
    name: str
    last_heartbeat: float
    counters: list[tuple[int, bool]] = field(default_factory=list)  # collectives begun, whether inside one
    since: list[float] = field(default_factory=list)  # time of the last change of each counter


class Watchdog:
    """Progress of the ranks of a process group (a Ray actor).

    Args:
        seconds: longest time that a rank may wait for others.
    """

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic):
        self.seconds, self.clock = seconds, clock
        self.start, self.ranks = "", {}

    def heartbeat(self, start: str, rank: int, name: str, counters: list[tuple[int, bool]]) -> str:
        """Record a heartbeat; returns the reason if the rank has waited too long for others, else "".

        Args:
            start: identifies this start of the ranks; records of an earlier start are dropped.
            name: process and host of the rank, for the message.
            counters: of each process group, in the order in which all ranks made them: number of collectives begun,
                and whether the rank is inside one.
        """
        now = self.clock()
        if start != self.start:
            self.start, self.ranks = start, {}
        known = self.ranks.setdefault(rank, _RankState(name, now))
        for group, counter in enumerate(counters):
            if group == len(known.counters):
                known.counters.append(counter)
                known.since.append(now)
            elif counter != known.counters[group]:
                known.counters[group], known.since[group] = counter, now
        known.last_heartbeat = now
        for group, (_, inside) in enumerate(known.counters):
            if inside and now - known.since[group] > self.seconds:
                return self._missing(group, now)
        return ""

    def _missing(self, group: int, now: float) -> str:
        """Name the ranks that keep a process group waiting: first silent ones, then those behind, then outside."""
        silent = [rank for rank, state in self.ranks.items() if now - state.last_heartbeat > self.seconds / 2]
        at = {rank: state.counters[group] for rank, state in self.ranks.items() if len(state.counters) > group}
        first = max((begun for begun, _ in at.values()), default=0)
        behind = [rank for rank in self.ranks if rank not in at or at[rank][0] < first]
        outside = [rank for rank, (_, inside) in at.items() if not inside]
        limit = f"for more than {self.seconds:g} s (cluster.wait_minutes)"
        for ranks, why in ((silent, "no heartbeat"), (behind, "behind the others"), (outside, "not in the collective")):
            if ranks:
                names = ", ".join(f"rank {rank} ({self.ranks[rank].name}, {why})" for rank in sorted(ranks))
                return f"{names} kept the others waiting {limit}"
        return f"all ranks wait for each other {limit}; is the network between them down?"


@contextmanager
def watch_rank(comm: "Communicator", watchdog: ray.actor.ActorHandle | None, seconds: float) -> Iterator[None]:
    """Exit this process, a rank, when it has waited too long for others. Collective: every rank must call it.

    Args:
        watchdog: a `Watchdog` actor; None for a single rank.
        seconds: the watchdog's limit.
    """
    if comm.size == 1:
        yield
        return
    name = f"pid {os.getpid()} on {socket.gethostname()}"
    start = comm.all_gather_json([name, time.time()])
    closing = threading.Event()

    def send_heartbeats() -> None:
        while not closing.wait(min(HEARTBEAT_SECONDS, seconds / 4)):
            counters = [(progress.begun, progress.inside > 0) for progress in list(comm.progress_counters)]
            try:
                reason = ray.get(watchdog.heartbeat.remote(str(start), comm.rank, name, counters), timeout=60)
            except RayError:
                continue  # the actor is busy, or lost with its node: Ray Train notices lost ranks by itself
            if reason and not closing.is_set():
                print(f"{reason}; rank {comm.rank} exits, Ray restarts all ranks from the last checkpoint", flush=True)
                time.sleep(1)  # Ray collects the line
                os._exit(1)

    thread = threading.Thread(target=send_heartbeats, name="watchdog", daemon=True)
    thread.start()
    try:
        yield
    finally:
        closing.set()
        thread.join(1)
