"""Watchdog: which rank is named, and the progress counters of a communicator."""

import threading
import time

from ranks import run_ranks

from gtc_dist.distributed.collectives import Communicator
from gtc_dist.launch.watchdog import Watchdog

LIMIT = 10.0


class Ranks:
    """Three ranks with one process group, on a simulated clock."""

    def __init__(self):
        self.now = 0.0
        self.watchdog = Watchdog(LIMIT, lambda: self.now)

    def heartbeats(self, second: float, **counters: tuple[int, bool]) -> list[str]:
        """The watchdog's answers to heartbeats of the named ranks."""
        self.now = second
        return [
            self.watchdog.heartbeat("start", int(name[1:]), f"node {name[1:]}", [c]) for name, c in counters.items()
        ]


def test_a_rank_behind_the_others_is_named():
    ranks = Ranks()
    assert ranks.heartbeats(0, r0=(5, True), r1=(5, True), r2=(4, False)) == ["", "", ""]
    assert ranks.heartbeats(9, r0=(5, True), r1=(5, True), r2=(4, False)) == ["", "", ""]
    answers = ranks.heartbeats(11, r2=(4, False), r0=(5, True), r1=(5, True))
    assert answers[0] == ""  # not waiting itself
    assert answers[1] == answers[2]
    assert answers[1].startswith("rank 2 (node 2, behind the others) kept the others waiting for more than 10 s")


def test_a_rank_without_heartbeats_is_named_first():
    ranks = Ranks()
    ranks.heartbeats(0, r0=(5, True), r1=(5, True), r2=(7, True))
    for second in (6, 11):
        ranks.heartbeats(second, r0=(5, True), r1=(5, True))
    answers = ranks.heartbeats(12, r1=(5, True), r0=(5, True))
    assert answers[1].startswith("rank 2 (node 2, no heartbeat) kept")


def test_a_rank_outside_the_collective_is_named_and_the_network_if_all_wait():
    ranks = Ranks()
    for second in (0, 6):
        ranks.heartbeats(second, r0=(5, True), r1=(5, False), r2=(5, True))
    assert ranks.heartbeats(11, r1=(5, False), r0=(5, True), r2=(5, True))[1].startswith(
        "rank 1 (node 1, not in the coll"
    )
    ranks = Ranks()
    for second in (0, 6):
        ranks.heartbeats(second, r0=(5, True), r1=(5, True), r2=(5, True))
    assert ranks.heartbeats(11, r1=(5, True), r0=(5, True), r2=(5, True))[2].startswith("all ranks wait for each other")


def test_slow_ranks_are_not_reported_and_a_restart_clears_the_records():
    ranks = Ranks()
    for second in range(0, 90, 9):  # each collective takes 9 s; the limit is 10 s
        n = second // 9
        assert ranks.heartbeats(second, r0=(n, True), r1=(n, True), r2=(n - 1, False)) == ["", "", ""]
    assert ranks.watchdog.heartbeat("again", 0, "node 0", [(n, True)]) == ""
    ranks.now += 9
    assert ranks.watchdog.heartbeat("again", 0, "node 0", [(n, True)]) == ""


def test_long_computation_is_not_waiting():
    ranks = Ranks()
    for second in range(0, 1000, 100):
        assert ranks.heartbeats(second, r0=(5, False), r1=(5, False), r2=(5, False)) == ["", "", ""]


def wait_for_a_late_rank(comm: Communicator) -> list:
    """Rank 0's progress counters while it waits for rank 1 in its second process group, and afterwards."""
    other, seen = comm.new_group(), []

    def observe() -> None:
        deadline = time.monotonic() + 60
        while not other.progress.inside and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.2)
        seen.extend([progress.begun, progress.inside] for progress in comm.progress_counters)

    comm.barrier()
    if comm.rank == 0:
        thread = threading.Thread(target=observe)
        thread.start()
        other.all_gather_int(1)
        thread.join()
    else:
        time.sleep(2)
        other.all_gather_int(1)
    with comm.tracked():
        comm.barrier()
    return [*seen, *([progress.begun, progress.inside] for progress in comm.progress_counters)]


def test_progress_counters_show_where_a_rank_waits():
    first, second = run_ranks(wait_for_a_late_rank, 2)
    # the group of run_ranks, the communicator made of it, the one made of that
    assert first[:3] == [[0, 0], [1, 0], [1, 1]]
    assert first[3:] == second == [[0, 0], [3, 0], [1, 0]]
