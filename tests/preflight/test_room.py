"""Room for the ranks: what a rank reserves, what a cluster with too little says, and what is waited for."""

import pytest
import ray

from gtc_dist.config import ClusterConfig
from gtc_dist.errors import InputError
from gtc_dist.preflight import room
from gtc_dist.preflight.room import ClusterNode


def nodes(*resources: dict[str, float]) -> list[ClusterNode]:
    return [ClusterNode(str(n), f"node-{n}", found) for n, found in enumerate(resources)]


@pytest.mark.parametrize(
    ("keys", "cpus", "each"),
    [
        ({"workers": 2}, [4.0], 1),
        ({"workers": 4}, [4.0], 0.75),  # a share of a CPU is left for Ray Data
        ({"workers": 2, "cpus_per_worker": 3}, [4.0, 4.0], 3),
        ({"workers": 8, "min_workers": 2}, [1.0, 1.0], 0.75),  # on every node
    ],
)
def test_a_rank_reserves(keys, cpus, each):
    assert room.worker_resources(ClusterConfig(**keys), nodes(*({"CPU": c} for c in cpus))) == {"CPU": each}


def test_what_there_is_is_listed_by_node():
    message = r"needs 3 GPUs; the cluster has 2: node-0 8 CPU, 0 GPU; node-1 16 CPU, 2 GPU\. Use fewer"
    with pytest.raises(InputError, match=message):
        room.worker_resources(ClusterConfig(workers=3, gpu=True), nodes({"CPU": 8.0}, {"CPU": 16.0, "GPU": 2.0}))
    with pytest.raises(InputError, match=r"needs 20 CPUs.*has 10 on 10 nodes: node-0 1 CPU.*; and 2 more nodes"):
        room.worker_resources(ClusterConfig(workers=20), nodes(*[{"CPU": 1.0}] * 10))
    with pytest.raises(InputError, match=r"cluster\.min_workers=3 needs 3 CPUs"):
        room.worker_resources(ClusterConfig(workers=9, min_workers=3), nodes({"CPU": 2.0}))


def test_a_cluster_without_autoscaler_is_not_waited_for(ray_local, monkeypatch):
    monkeypatch.setattr(room, "started_here", lambda: False)
    with pytest.raises(
        InputError, match=r"cluster\.workers=9 needs 9 CPUs, .* the cluster has 4 on 1 nodes: \S+ 4 CPU"
    ):
        room.room_for_ranks(ClusterConfig(workers=9))


def test_room_that_others_have_taken_is_named(ray_local, monkeypatch, capsys):
    monkeypatch.setattr(room, "started_here", lambda: False)
    assert room.room_for_ranks(ClusterConfig(workers=2)) == {"CPU": 1}
    assert capsys.readouterr().err == ""
    other = ray.util.placement_group([{"CPU": 3}])
    assert other.wait(30)
    try:
        assert room.room_for_ranks(ClusterConfig(workers=2)) == {"CPU": 1}
    finally:
        ray.util.remove_placement_group(other)
    line = capsys.readouterr().err
    assert line.startswith("room for 1 of 2 ranks is free (")
    assert "1 CPU, 0 GPU); training starts when other jobs end\n" in line
