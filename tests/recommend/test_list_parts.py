"""An interrupted `gtc recommend --out` goes on behind the files that it has finished."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ranks import run_ranks
from small import small_catalog, write_config
from trainings import train_without_ray

from gtc_dist.checkpoint.existing_run import find_run
from gtc_dist.data import formats, storage
from gtc_dist.errors import InputError
from gtc_dist.recommend import lists

CHUNK, PARTS = 7, 9  # of 60 users
# The command, whose process kills itself while it writes a part: the rows are in the file, which has no name yet.
KILLED = f"""
import os, signal, sys
from gtc_dist.data import storage
from gtc_dist.recommend import lists
lists.CHUNK_USERS, replace, written = {CHUNK}, os.replace, []
def kill_at_the_fourth_part(old, new):
    if "part-" in str(new):
        written.append(new)
        if len(written) == 4:
            os.kill(os.getpid(), signal.SIGKILL)
    replace(old, new)
os.replace = kill_at_the_fourth_part
lists.main(sys.argv[1:])
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("run")
    catalog = small_catalog(folder / "catalog")
    return write_config(folder, catalog.uri, str(folder / "runs"))


@pytest.fixture(scope="module")
def run(config) -> str:
    return train_without_ray(config)


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(lists, "CHUNK_USERS", CHUNK)


def contents(folder) -> dict[str, bytes]:
    return {name: Path(f"{folder}/{name}").read_bytes() for name in storage.listing(str(folder))}


def killed(*words) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, *map(str, words)], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr


def test_a_killed_command_goes_on_and_ends_as_if_uninterrupted(run, tmp_path, small_chunks, capsys):
    names = pa.table({"item_id": range(100, 140), "title": [f"thing {n}" for n in range(40)]})
    pq.write_table(names, tmp_path / "items.parquet")
    words = ["--run", run, "--top", "6", "--explain", "--titles", f"{tmp_path}/items.parquet"]
    lists.main([*words, "--out", f"{tmp_path}/whole"])
    killed(*words, "--out", f"{tmp_path}/cut")
    left = contents(tmp_path / "cut")
    parts = {name: data for name, data in left.items() if name.endswith(".parquet")}
    assert len(parts) == 3
    assert sum(name.endswith(".partial") for name in left) == 1
    before = {name: os.stat(tmp_path / "cut" / name).st_mtime_ns for name in parts}
    capsys.readouterr()
    lists.main([*words, "--out", f"{tmp_path}/cut"])
    shown = capsys.readouterr().out
    assert "going on with the lists that an interrupted command has written" in shown
    assert "lists of 60 users, 360 rows" in shown
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")
    assert len(storage.listing(f"{tmp_path}/cut")) == PARTS + 1
    assert {name: os.stat(tmp_path / "cut" / name).st_mtime_ns for name in parts} == before  # were not written again


def test_other_options_and_another_run_are_refused(run, config, tmp_path, small_chunks):
    (tmp_path / "users.txt").write_text("u003\nu010\n")
    (tmp_path / "exclude.txt").write_text("100\n")
    killed("--run", run, "--out", tmp_path / "cut")
    before = contents(tmp_path / "cut")
    other = train_without_ray(config, "run.name=other", "train.seed=9")
    for words in (
        ["--run", run, "--top", "6"],
        ["--run", run, "--include-seen"],
        ["--run", run, "--explain"],
        ["--run", run, "--users", f"{tmp_path}/users.txt"],
        ["--run", run, "--exclude", f"{tmp_path}/exclude.txt"],
        ["--run", other],
    ):
        with pytest.raises(InputError, match="lists of an interrupted command with another run or other options"):
            lists.main([*words, "--out", f"{tmp_path}/cut"])
    assert contents(tmp_path / "cut") == before
    lists.main(["--run", run, "--out", f"{tmp_path}/cut"])
    assert pq.read_table(tmp_path / "cut").num_rows == 60 * 20


def on_ranks(comm, run_ref, out: str) -> dict:
    lists.CHUNK_USERS = CHUNK  # a rank is a process of its own
    options = {"users": None, "top": 6, "include_seen": False, "allowed": None, "titles": None}
    return lists.recommend_rank(comm, None, run_ref, out=out, **options)


def test_ranks_go_on_where_each_of_them_was(run, tmp_path):
    """Of three ranks with 20 users each, in three parts: one has finished all, one two, one none."""
    whole = run_ranks(on_ranks, 3, find_run(run), f"{tmp_path}/whole")
    expected = contents(tmp_path / "whole")
    for first in (0, 7, 14, 20, 34):
        name = f"part-{first:012d}.parquet"
        storage.write_bytes(f"{tmp_path}/cut/{name}", expected[name])
    assert run_ranks(on_ranks, 3, find_run(run), f"{tmp_path}/cut") == whole
    assert contents(tmp_path / "cut") == expected


def test_lists_in_object_storage_go_on(run, s3, small_chunks, monkeypatch):
    words = ["--run", run, "--top", "6"]
    lists.main([*words, "--out", f"{s3}/whole"])
    write, written = formats.write_table, []

    def fail_at_the_third(uri, table):
        written.append(uri)
        if len(written) == 3:
            raise KeyboardInterrupt
        return write(uri, table)

    monkeypatch.setattr(formats, "write_table", fail_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        lists.main([*words, "--out", f"{s3}/cut"])
    monkeypatch.setattr(formats, "write_table", write)
    lists.main([*words, "--out", f"{s3}/cut"])
    whole, cut = (
        {name: storage.read_bytes(f"{s3}/{folder}/{name}") for name in storage.listing(f"{s3}/{folder}")}
        for folder in ("whole", "cut")
    )
    assert cut == whole
    assert len(whole) == PARTS + 1
