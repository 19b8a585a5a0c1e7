"""Outage of the object store: actions are retried until it is back."""

import subprocess
import sys
import threading
import time

import numpy as np
import pyarrow as pa
import pytest
import yaml
from raw_files import catalog_config, catalog_contents, write_raw
from seaweed import SeaweedServer
from small import small_catalog, write_config
from trainings import LONG_OVERRIDES, run_result, wait_for_states

from gtc_dist.checkpoint import checkpoint_files
from gtc_dist.data import formats, storage, storage_errors
from gtc_dist.data.catalog import Catalog

BUCKET = "outage"
SECONDS = 12


@pytest.fixture(scope="module")
def server(s3_server):
    """An S3 server for this module alone; other tests need theirs to be up."""
    with SeaweedServer(buckets=[BUCKET]) as server, pytest.MonkeyPatch.context() as patch:
        for name, value in server.env.items():
            patch.setenv(name, value)
        yield server


@pytest.fixture
def folder(server, tmp_path):
    # file systems are cached by their arguments and read the endpoint from the environment when made
    storage.filesystem("s3://x")[0].clear_instance_cache()
    yield f"s3://{BUCKET}/{tmp_path.name}"
    storage.filesystem("s3://x")[0].clear_instance_cache()


class Outage:
    """Halt the server for some seconds."""

    def __init__(self, server: SeaweedServer, seconds: float = SECONDS):
        server.halt()
        self.thread = threading.Timer(seconds, server.resume)
        self.thread.start()

    def wait(self) -> None:
        self.thread.join()


def test_every_action_waits_for_the_store(server, folder, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(storage_errors, "WARN_SECONDS", 2.0)
    vectors = np.arange(4000, dtype=np.float32).reshape(1000, 4)
    column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), 4)
    table = pa.table({"item": np.arange(1000), "vector": column})
    for name in ("before", "old"):
        formats.write_table(f"{folder}/{name}.parquet", table)
        formats.write_array(f"{folder}/{name}.npy", vectors)
    (tmp_path / "local").write_bytes(b"local")
    actions = {
        "write a table": lambda: formats.write_table(f"{folder}/new.parquet", table),
        "write an array": lambda: formats.write_array(f"{folder}/new.npy", vectors),
        "write bytes": lambda: storage.write_bytes(f"{folder}/new", b"abc"),
        "copy": lambda: storage.copy_file(str(tmp_path / "local"), f"{folder}/copy"),
        "read a table": lambda: formats.read_table(f"{folder}/before.parquet"),
        "read vectors": lambda: formats.read_vectors(f"{folder}/before.parquet", "vector", 5, 9),
        "read an array": lambda: formats.read_array(f"{folder}/before.npy"),
        "list": lambda: storage.listing(folder),
        "look up": lambda: storage.exists(f"{folder}/before.npy"),
        "remove": lambda: storage.remove_tree(f"{folder}/old.npy"),
    }
    got, problems = {}, {}

    def act(name: str) -> None:
        try:
            got[name] = actions[name]()
        except Exception as error:
            problems[name] = error

    outage = Outage(server, seconds=4)
    threads = [threading.Thread(target=act, args=(name,)) for name in actions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    outage.wait()
    assert problems == {}
    assert got["read a table"].equals(table)
    assert np.array_equal(got["read vectors"], vectors[5:9])
    assert np.array_equal(got["read an array"], vectors)
    assert got["look up"] is True
    assert formats.read_table(f"{folder}/new.parquet").equals(table)
    assert np.array_equal(formats.read_array(f"{folder}/new.npy"), vectors)
    assert (storage.read_bytes(f"{folder}/new"), storage.read_bytes(f"{folder}/copy")) == (b"abc", b"local")
    assert "old.npy" not in storage.listing(folder)
    assert f"still trying to read {folder}/before" in capfd.readouterr().err


@pytest.mark.long
@pytest.mark.parametrize("line", ["", "interactions read", "features read and checked"])
def test_prepare_and_reading_a_catalog_wait_for_the_store(server, folder, tmp_path, line):
    """Outage of 30 s: from the start, or after prepare has printed `line`."""
    write_raw(f"{folder}/raw")
    catalogs = {name: catalog_config(f"{folder}/raw", f"{folder}/{name}") for name in ("undisturbed", "disturbed")}
    for name, one in catalogs.items():
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(one.model_dump()))
    command = [sys.executable, "-m", "gtc_dist.prepare", "--config"]
    subprocess.run([*command, str(tmp_path / "undisturbed.yaml")], check=True, capture_output=True)
    log = tmp_path / "log"
    with open(log, "wb") as out:
        process = subprocess.Popen([*command, str(tmp_path / "disturbed.yaml")], stdout=out, stderr=out)
    while line not in log.read_text():
        assert process.poll() is None, log.read_text()
        time.sleep(0.01)
    outage = Outage(server, 30)
    assert process.wait(240) == 0, log.read_text()
    outage.wait()
    one, other = (Catalog(one.data.catalog) for one in catalogs.values())
    assert catalog_contents(one) == catalog_contents(other)
    assert "building.json" not in storage.listing(other.uri)

    outage = Outage(server, 30)
    assert catalog_contents(Catalog(other.uri, verify="checksum")) == catalog_contents(other)
    outage.wait()


@pytest.mark.long
def test_training_and_export_survive_an_outage(server, folder, tmp_path):
    """Training while it writes checkpoints; then the export."""
    catalog = small_catalog(f"{folder}/catalog", users=120, items=80)
    runs = {name: f"{folder}/{name}" for name in ("undisturbed", "disturbed")}
    commands = {}
    for name, uri in runs.items():
        (tmp_path / name).mkdir()
        config = write_config(tmp_path / name, catalog.uri, uri)
        commands[name] = [
            sys.executable,
            "-m",
            "gtc_dist.train",
            "--config",
            config,
            *LONG_OVERRIDES,
            "cluster.retries=0",
        ]
    subprocess.run(commands["undisturbed"], check=True, capture_output=True)
    with open(tmp_path / "log", "wb") as log:
        process = subprocess.Popen(commands["disturbed"], stdout=log, stderr=log)
    wait_for_states(f"{runs['disturbed']}/r", 1)
    Outage(server).wait()
    assert process.wait(240) == 0, (tmp_path / "log").read_text()
    assert run_result(f"{runs['disturbed']}/r") == run_result(f"{runs['undisturbed']}/r")
    assert checkpoint_files.list_checkpoints(f"{runs['disturbed']}/r", "step-")[1] == []
    export = [sys.executable, "-m", "gtc_dist.export", "--run", f"{runs['undisturbed']}/r", "--out", f"{folder}/e"]
    process = subprocess.Popen(export, stdout=subprocess.DEVNULL)
    time.sleep(4)
    Outage(server).wait()
    assert process.wait(120) == 0
    assert storage.read_json(f"{folder}/e/manifest.json")["users"] == 120
