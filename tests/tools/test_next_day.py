"""Data of the day before, and the comparison of a run's embeddings a day later."""

import hold_back
import next_day
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from grown import two_days
from small import write_config
from trainings import train_without_ray

from gtc_dist.checkpoint.existing_run import find_run
from gtc_dist.inference.trained_run import load_run
from gtc_dist.refresh import refresh_run


def test_users_items_and_interactions_are_held_back(tmp_path, capsys):
    rng = np.random.default_rng(0)
    (tmp_path / "raw").mkdir()
    before = {}
    for name, rows in (("train", 2000), ("valid", 200), ("test", 200)):
        before[name] = pa.table({"user_id": rng.integers(0, 50, rows), "item_id": rng.integers(0, 40, rows)})
        pq.write_table(before[name], tmp_path / f"raw/{name}.parquet")
    text = f"data:\n  raw: {tmp_path}/raw\n  catalog: c\n  split: {{method: given}}\nrun: {{storage: s, name: n}}\n"
    (tmp_path / "c.yaml").write_text(text)
    words = ["--config", str(tmp_path / "c.yaml"), "--out", str(tmp_path / "out"), "--share"]
    hold_back.main([*words, "0.2"])
    found = {name: pq.read_table(tmp_path / f"out/{name}.parquet") for name in before}
    for column, count in (("user_id", 40), ("item_id", 32)):
        kept = {value for table in found.values() for value in table[column].to_pylist()}
        assert len(kept) == count
        for name in ("valid", "test"):  # nothing else is left out of these
            rest = [row for row in before[name].to_pylist() if row[column] in kept]
            assert {row[column] for row in found[name].to_pylist()} <= {row[column] for row in rest}
    assert 0.7 < len(found["train"]) / (2000 * 0.64) < 0.9
    assert f"train: {len(found['train']):,} of 2,000 rows" in capsys.readouterr().out


def test_the_table_compares_yesterday_with_today(tmp_path, capsys):
    before, today = two_days(tmp_path)
    uri = train_without_ray(write_config(tmp_path, before.uri, str(tmp_path / "runs"), epochs=2))
    out = str(tmp_path / "refreshed")
    refresh_run.main(["--run", uri, "--catalog", today.uri, "--out", out])
    capsys.readouterr()
    next_day.main(["--run", uri, "--refreshed", out, "--also", out, "--threads", "1"])
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in capsys.readouterr().out.splitlines()]
    table = {name: [float(cell) for cell in cells] for name, *cells in rows[2:]}
    assert list(table) == ["popularity", "yesterday's", "refreshed"]
    want = load_run(find_run(out)).evaluate("valid", None)["overall"]
    assert table["refreshed"][:2] == pytest.approx([want["recall@20"], want["ndcg@20"]], abs=1e-4)
    assert table["yesterday's"][4] == 0  # it does not know the items
    assert table["yesterday's"][2] > 0
