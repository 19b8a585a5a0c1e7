"""A limit on how long ranks wait for each other, which names the one that is missing.

A rank that hangs (a stuck disk or device, a stopped process, a node that is off the network) would keep the others in
a collective for ever. Every rank tells an actor now and then how far its process groups are (`Communicator.pulses`). When one
has waited longer than allowed, the actor says for whom, and the ranks that wait end themselves, so that Ray Train
starts all of them again from the last checkpoint. A rank that is slow, but not by that much, is waited for.
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

if TYPE_CHECKING:  # the actor's process does without torch
    from gtc_dist.distributed.collectives import Communicator

BEAT_SECONDS = 5.0  # at most, between two looks


@dataclass
class _Rank:
    name: str
    heard: float  # when
    pulses: list[tuple[int, bool]] = field(default_factory=list)  # collectives begun, whether inside one
    since: list[float] = field(default_factory=list)  # when each became what it is


class Watchdog:
    """How far the ranks of a world are.

    Args:
        seconds: that a rank may wait for others.
    """

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic):
        self.seconds, self.clock = seconds, clock
        self.start, self.ranks = "", {}

    def beat(self, start: str, rank: int, name: str, pulses: list[tuple[int, bool]]) -> str:
        """Take note of a rank; returns what to say where it has waited too long for others, else nothing.

        Args:
            start: names this start of the ranks; what was known of another is forgotten.
            name: where the rank runs, for a person.
            pulses: of its process groups, in the order in which all ranks made them: the number of collectives that
                were begun, and whether one is under way.
        """
        now = self.clock()
        if start != self.start:
            self.start, self.ranks = start, {}
        known = self.ranks.setdefault(rank, _Rank(name, now))
        for group, pulse in enumerate(pulses):
            if group == len(known.pulses):
                known.pulses.append(pulse)
                known.since.append(now)
            elif pulse != known.pulses[group]:
                known.pulses[group], known.since[group] = pulse, now
        known.heard = now
        for group, (_, inside) in enumerate(known.pulses):
            if inside and now - known.since[group] > self.seconds:
                return self._missing(group, now)
        return ""

    def _missing(self, group: int, now: float) -> str:
        silent = [rank for rank, one in self.ranks.items() if now - one.heard > self.seconds / 2]
        at = {rank: one.pulses[group] for rank, one in self.ranks.items() if len(one.pulses) > group}
        first = max((begun for begun, _ in at.values()), default=0)
        behind = [rank for rank in self.ranks if rank not in at or at[rank][0] < first]
        away = [rank for rank, (_, inside) in at.items() if not inside]
        limit = f"for more than {self.seconds:g} s (cluster.wait_minutes)"
        for ranks, why in ((silent, "not heard of"), (behind, "behind the others"), (away, "not in the collective")):
            if ranks:
                names = ", ".join(f"rank {rank} ({self.ranks[rank].name}, {why})" for rank in sorted(ranks))
                return f"{names} kept the others waiting {limit}"
        return f"all ranks wait for each other {limit}; is the network between them down?"


@contextmanager
def watch_rank(comm: "Communicator", stalls: ray.actor.ActorHandle | None, seconds: float) -> Iterator[None]:
    """End this process, a rank, when it has waited too long for others. A collective.

    Args:
        stalls: a `Watchdog` actor, None for a world of one; seconds: its limit.
    """
    if comm.size == 1:
        yield
        return
    name = f"pid {os.getpid()} on {socket.gethostname()}"
    start = comm.all_gather_json([name, time.time()])
    over = threading.Event()

    def look() -> None:
        while not over.wait(min(BEAT_SECONDS, seconds / 4)):
            pulses = [(pulse.begun, pulse.inside > 0) for pulse in list(comm.pulses)]
            try:
                said = ray.get(stalls.beat.remote(str(start), comm.rank, name, pulses), timeout=60)
            except RayError:
                continue  # the actor is gone with its node, or busy: ranks that are lost show in other ways
            if said and not over.is_set():
                print(f"{said}; rank {comm.rank} gives up, to start again from the last checkpoint", flush=True)
                time.sleep(1)  # Ray takes the line up
                os._exit(1)

    thread = threading.Thread(target=look, name="stalls", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(1)
