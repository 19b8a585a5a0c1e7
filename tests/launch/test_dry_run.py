"""`--dry-run` checks what the command checks, prints what it would take, starts no Ray and writes nothing."""

import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import ray
import yaml
from raw_files import catalog_config, write_raw, write_table_file
from small import small_catalog, write_config

from gtc_dist import train
from gtc_dist.errors import InputError, Unreachable
from gtc_dist.prepare import build_catalog


def tree_of(folder: Path) -> dict:
    """Size and time of every file and folder."""
    return {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in folder.rglob("*")}


@pytest.fixture
def training(tmp_path) -> list[str]:
    """Arguments of a train command."""
    catalog = small_catalog(tmp_path / "catalog")
    return ["--config", write_config(tmp_path, catalog.uri, str(tmp_path / "runs")), "--dry-run"]


@pytest.fixture
def preparation(tmp_path) -> list[str]:
    write_raw(str(tmp_path / "raw"))
    config = catalog_config(str(tmp_path / "raw"), tmp_path / "catalog")
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    return ["--config", str(tmp_path / "c.yaml"), "--dry-run"]


def test_training(tmp_path, training, capsys):
    before, connected = tree_of(tmp_path), ray.is_initialized()
    assert train.main([*training, "cluster.workers=2", "train.epochs=7"]) == 0
    assert tree_of(tmp_path) == before
    assert ray.is_initialized() == connected
    shown = capsys.readouterr().out
    assert "60 users, 40 items" in shown
    edges = int(re.search(r"(\d+) train interactions", shown)[1])
    assert f"{-(-edges // 64)} steps of 64 interactions, up to 7 epochs" in shown
    assert re.search(r"memory +0\.\d\d GiB a rank \(process 0\.56\)", shown)
    assert re.search(r"traffic +0\.\d MB a rank and step\n", shown)
    assert re.search(r"time +about \d+s without validations, \d\S* s a step", shown)
    assert re.search(r"ranks +2; the command starts a local Ray cluster", shown)


def test_training_without_room_or_cluster(tmp_path, training, monkeypatch):
    with pytest.raises(InputError, match="needs 500 CPUs"):
        train.main([*training, "train.batch_size=500", "cluster.workers=500"])
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with pytest.raises(Unreachable, match="nothing answers there"):
        train.main(training)
    assert not (tmp_path / "runs").exists()


def test_preparation(tmp_path, preparation, capsys, monkeypatch):
    before = tree_of(tmp_path / "raw")
    assert build_catalog.main(preparation) == 0
    assert not (tmp_path / "catalog").exists()
    assert tree_of(tmp_path / "raw") == before
    shown = capsys.readouterr().out
    assert f"{tmp_path}/catalog would be built" in shown
    assert "600 rows in 3 files" in shown
    assert re.search(r"visual +40 items, 8 values each", shown)
    assert re.search(r"time +about \d+s on two cores", shown)
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with pytest.raises(Unreachable, match="nothing answers there"):
        build_catalog.main(preparation)


def test_preparation_of_bad_data(tmp_path, preparation):
    (tmp_path / "raw" / "train.parquet").write_bytes(b"PAR1")
    with pytest.raises(InputError, match=r"train\.parquet"):
        build_catalog.main(preparation)


@pytest.mark.parametrize("name", ["log.csv", "log.csv.gz", "short.jsonl"])
def test_rows_of_text_are_estimated_from_the_head(tmp_path, preparation, capsys, name):
    """Within 5 %, however long a row is."""
    rng, rows = np.random.default_rng(0), 3 if name == "short.jsonl" else 20_000
    table = pa.table(
        {"user_id": rng.integers(0, 9, rows), "item_id": rng.integers(0, 9, rows), "note": ["x" * 90] * rows}
    )
    write_table_file(tmp_path / "raw" / name, table)
    files = ["data.split.method=ratio", f"data.interactions.files=[{name}]"]
    build_catalog.main([*preparation, *files])
    found = int(re.search(r"about ([\d,]+) rows", capsys.readouterr().out)[1].replace(",", ""))
    assert abs(found / rows - 1) <= 0.05
