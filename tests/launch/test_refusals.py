"""Bad input of train is refused: before Ray starts, or as one error of all ranks."""

import numpy as np
import pytest
from small import refused, small_catalog, write_config

from gtc_dist import train
from gtc_dist.config import ClusterConfig
from gtc_dist.data import storage
from gtc_dist.data.catalog import CatalogWriter
from gtc_dist.errors import InputError, find_shown
from gtc_dist.graph import user_item_graph
from gtc_dist.preflight import room


@pytest.fixture(scope="module")
def plain_catalog(tmp_path_factory) -> str:
    return small_catalog(tmp_path_factory.mktemp("plain") / "catalog").uri


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.modalities=[m0,smell]"], "'smell', which the catalog"),
        (["train.epoch=3"], "did you mean 'epochs'"),
        (["data.catalog=nowhere"], "run python -m gtc_dist.prepare first"),
    ],
)
def test_bad_input_is_refused_before_anything_starts(plain_catalog, tmp_path, overrides, message):
    config = write_config(tmp_path, plain_catalog, str(tmp_path / "runs"))
    refused(["-m", "gtc_dist.train", "--config", config, *overrides], message)
    assert not (tmp_path / "runs").exists()


def test_more_workers_than_cpus_are_refused_with_their_number(ray_local, plain_catalog, tmp_path):
    config = write_config(tmp_path, plain_catalog, str(tmp_path / "runs"))
    with pytest.raises(InputError, match=r"needs 9 CPUs, and 0\.25 to read data; the cluster has 4 on 1 nodes"):
        train.main(["--config", config, "cluster.workers=9"])
    with pytest.raises(InputError, match=r"needs 4 CPUs, and 0\.25 to read data; the cluster has 4"):
        train.main(["--config", config, "cluster.workers=2", "cluster.cpus_per_worker=2"])
    with pytest.raises(InputError, match="needs 5 CPUs"):  # no node has 5 CPUs
        train.main(["--config", config, "cluster.workers=1", "cluster.cpus_per_worker=5"])
    with pytest.raises(InputError, match="needs 1 GPUs; the cluster has 0"):
        train.main(["--config", config, "cluster.gpu=true"])
    assert not (tmp_path / "runs").exists()


def test_ranks_that_no_node_has_room_for_are_refused_though_the_sum_suffices():
    nodes = [room.ClusterNode("", name, {"CPU": cpus}) for name, cpus in (("a", 4.0), ("b", 2.0), ("c", 2.0))]
    message = r"needs 6 CPUs, .* has 8 on 3 nodes, with room for 1 such ranks \(a rank does not span nodes\)"
    with pytest.raises(InputError, match=message):
        room.worker_resources(ClusterConfig(workers=2, cpus_per_worker=3), nodes)


@pytest.mark.long
def test_more_workers_than_cores_are_refused_where_ray_is_started_here(plain_catalog, tmp_path):
    config = write_config(tmp_path, plain_catalog, str(tmp_path / "runs"))
    refused(["-m", "gtc_dist.train", "--config", config, "cluster.workers=40", "train.batch_size=80"], "needs 40 CPUs")
    assert not (tmp_path / "runs").exists()


def test_an_error_of_a_rank_arrives_as_one_line_and_leaves_no_run_folder(ray_local, tmp_path):
    catalog = small_catalog(tmp_path / "catalog")
    path = tmp_path / "catalog/features/m0/part-00000.parquet"
    data = path.read_bytes()
    path.write_bytes(data[:-4] + b"XXXX")  # the same size, but no Parquet file
    config = write_config(tmp_path, catalog.uri, str(tmp_path / "runs"))
    with pytest.raises(Exception, match=r"(?s).*") as caught:
        train.main(["--config", config, "data.verify=size"])
    found = find_shown(caught.value)
    assert "part-00000.parquet is not a readable Parquet file" in str(found)
    assert not storage.listing(str(tmp_path / "runs"))


def test_splits_that_cannot_be_scored_are_refused(tmp_path):
    catalog = small_catalog(tmp_path / "catalog", users=5, items=12, per_user=2)  # no interaction remains for train
    with pytest.raises(InputError, match=r"the valid split .* has no user with a train interaction"):
        train.main(["--config", write_config(tmp_path, catalog.uri, str(tmp_path / "runs"))])


def test_a_user_with_every_item_is_refused_by_id(tmp_path):
    catalog = small_catalog(tmp_path / "catalog", users=5, items=6, per_user=8, cold=0)
    users, items = catalog.interactions("train")
    writer = CatalogWriter(catalog.uri)
    writer.files.update(catalog.manifest.files)
    everything = (np.r_[users, [3] * 6], np.r_[items, np.arange(6)])
    everything = np.unique(np.stack(everything), axis=1)
    for name, graph in zip(
        ("item_user", "user_item"), user_item_graph.build_user_item_graph(*everything, 5, 6), strict=True
    ):
        writer.graph(name, graph)
    fields = catalog.manifest.model_dump(exclude={"files", "schema_version"})
    writer.finish(**fields)
    with pytest.raises(InputError, match="user 'u003' interacted with all 6 items"):
        train.main(["--config", write_config(tmp_path, catalog.uri, str(tmp_path / "runs"))])


def test_a_folder_with_foreign_files_is_refused(tmp_path):
    catalog = small_catalog(tmp_path / "catalog")
    (tmp_path / "runs/r").mkdir(parents=True)
    (tmp_path / "runs/r/notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"is not empty; choose another run\.name"):
        train.main(["--config", write_config(tmp_path, catalog.uri, str(tmp_path / "runs"))])


def test_a_changed_catalog_is_refused_by_file(tmp_path):
    catalog = small_catalog(tmp_path / "catalog")
    path = tmp_path / "catalog/graph/user_user.weight.npy"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"user_user\.weight\.npy was changed"):
        train.main(["--config", write_config(tmp_path, catalog.uri, str(tmp_path / "runs"))])
