"""The limit on waiting: who is said to be missing, and what a world tells of itself."""

import threading
import time

from ranks import run_ranks

from gtc_dist.distributed.collectives import Communicator
from gtc_dist.launch.watchdog import Watchdog

LIMIT = 10.0


class Ranks:
    """Three ranks that tell of one process group each, on a clock of their own."""

    def __init__(self):
        self.now = 0.0
        self.stalls = Watchdog(LIMIT, lambda: self.now)

    def tell(self, second: float, **pulses: tuple[int, bool]) -> list[str]:
        """What each of the named ranks hears."""
        self.now = second
        return [self.stalls.beat("start", int(name[1:]), f"node {name[1:]}", [p]) for name, p in pulses.items()]


def test_a_rank_behind_the_others_is_named():
    ranks = Ranks()
    assert ranks.tell(0, r0=(5, True), r1=(5, True), r2=(4, False)) == ["", "", ""]
    assert ranks.tell(9, r0=(5, True), r1=(5, True), r2=(4, False)) == ["", "", ""]
    told = ranks.tell(11, r2=(4, False), r0=(5, True), r1=(5, True))
    assert told[0] == ""  # it waits for nobody
    assert told[1] == told[2]
    assert told[1].startswith("rank 2 (node 2, behind the others) kept the others waiting for more than 10 s")


def test_a_rank_that_is_not_heard_of_is_named_first():
    ranks = Ranks()
    ranks.tell(0, r0=(5, True), r1=(5, True), r2=(7, True))
    for second in (6, 11):
        ranks.tell(second, r0=(5, True), r1=(5, True))
    told = ranks.tell(12, r1=(5, True), r0=(5, True))
    assert told[1].startswith("rank 2 (node 2, not heard of) kept")


def test_a_rank_outside_the_collective_is_named_and_a_network_where_all_wait():
    ranks = Ranks()
    for second in (0, 6):
        ranks.tell(second, r0=(5, True), r1=(5, False), r2=(5, True))
    assert ranks.tell(11, r1=(5, False), r0=(5, True), r2=(5, True))[1].startswith("rank 1 (node 1, not in the coll")
    ranks = Ranks()
    for second in (0, 6):
        ranks.tell(second, r0=(5, True), r1=(5, True), r2=(5, True))
    assert ranks.tell(11, r1=(5, True), r0=(5, True), r2=(5, True))[2].startswith("all ranks wait for each other")


def test_slow_is_not_stalled_and_a_new_start_forgets_the_old():
    ranks = Ranks()
    for second in range(0, 90, 9):  # each collective takes 9 s, of 10 that are allowed
        n = second // 9
        assert ranks.tell(second, r0=(n, True), r1=(n, True), r2=(n - 1, False)) == ["", "", ""]
    assert ranks.stalls.beat("again", 0, "node 0", [(n, True)]) == ""
    ranks.now += 9
    assert ranks.stalls.beat("again", 0, "node 0", [(n, True)]) == ""


def test_computing_without_an_end_is_no_waiting():
    ranks = Ranks()
    for second in range(0, 1000, 100):
        assert ranks.tell(second, r0=(5, False), r1=(5, False), r2=(5, False)) == ["", "", ""]


def wait_for_a_late_rank(comm: Communicator) -> list:
    """What rank 0's process groups show while it waits for rank 1 in the second of them, and afterwards."""
    other, seen = comm.new_group(), []

    def look() -> None:
        deadline = time.monotonic() + 60
        while not other.pulse.inside and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.2)
        seen.extend([pulse.begun, pulse.inside] for pulse in comm.pulses)

    comm.barrier()
    if comm.rank == 0:
        thread = threading.Thread(target=look)
        thread.start()
        other.all_gather_int(1)
        thread.join()
    else:
        time.sleep(2)
        other.all_gather_int(1)
    with comm.tracked():
        comm.barrier()
    return [*seen, *([pulse.begun, pulse.inside] for pulse in comm.pulses)]


def test_a_world_shows_where_it_waits():
    first, second = run_ranks(wait_for_a_late_rank, 2)
    # the group that `worlds` splits from, the world, the one split from it
    assert first[:3] == [[0, 0], [1, 0], [1, 1]]
    assert first[3:] == second == [[0, 0], [3, 0], [1, 0]]
