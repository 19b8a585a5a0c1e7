"""The layouts `recbole` and `mmrec`: typed headers, texts, given splits, row numbers as ids."""

import numpy as np
import pyarrow.parquet as pq
from imports import inspected, refusal, rows, run_import

INTER = """user_id:token\titem_id:token\trating:float\ttimestamp:float
007\tB01\t5\t978300760
7\t"B02\t3.5\t978302109
007\t"B02\t4\t978301968
"""
ITEM = """item_id:token\tmovie_title:token_seq\trelease_year:token\tbrand:token\tprice:float\tclass, kind:token_seq
B01\tToy Story\t1995\tÉclair\t3.5\tAnimation Children's Comedy
"B02\t"Jumanji\t1995\t\t\tAdventure
"""


def write_mmrec(folder, header="userID\titemID\trating\ttimestamp\tx_label") -> None:
    folder.mkdir()
    lines = [f"{n // 2}\t{n % 3}\t5.0\t13{n}0000000\t{n % 3}" for n in range(6)]
    (folder / "baby.inter").write_text("\n".join([header, *lines]) + "\n")
    np.save(folder / "image_feat.npy", np.ones((3, 4), np.float32))
    np.save(folder / "text_feat.npy", np.ones((3, 2), np.float64))


def test_recbole_texts_stay_text(tmp_path, ray_local, capsys):
    (tmp_path / "ml").mkdir()
    (tmp_path / "ml" / "ml.inter").write_text(INTER)
    (tmp_path / "ml" / "ml.item").write_text(ITEM)
    run_import("recbole", tmp_path / "ml", tmp_path / "out")
    assert rows(tmp_path / "out") == [
        ("007", "B01", 5.0, 978300760.0),
        ("7", '"B02', 3.5, 978302109.0),
        ("007", '"B02', 4.0, 978301968.0),
    ]
    texts = pq.read_table(tmp_path / "out" / "texts.parquet")
    assert texts.column_names == ["item_id", "movie_title", "brand", "class_ kind"]
    assert texts.to_pylist()[1] == {
        "item_id": '"B02',
        "movie_title": '"Jumanji',
        "brand": "",
        "class_ kind": "Adventure",
    }
    config = inspected(tmp_path / "out", capsys.readouterr().out)
    assert (config.data.split.method, config.data.interactions.time) == ("global_time", "timestamp")


def test_recbole_files_of_a_given_split(tmp_path):
    (tmp_path / "ml").mkdir()
    for n, split in enumerate(("train", "valid", "test")):
        (tmp_path / "ml" / f"ml.{split}.inter").write_text(f"user_id:token\titem_id:token\nu{n}\ti{n}\n")
    run_import("recbole", tmp_path / "ml", tmp_path / "out")
    assert [rows(tmp_path / "out", split) for split in ("train", "valid", "test")] == [
        [(f"u{n}", f"i{n}")] for n in range(3)
    ]
    assert "features: {}   # needs one modality at least" in (tmp_path / "out" / "config.yaml").read_text()
    (tmp_path / "ml" / "ml.inter").write_text(INTER)
    assert "has 4 files of interactions" in refusal("recbole", tmp_path / "ml", tmp_path / "out2")


def test_recbole_errors(tmp_path):
    folder = tmp_path / "ml"
    assert f"{folder} has no file" in refusal("recbole", folder, tmp_path / "out")
    folder.mkdir()
    (folder / "ml.item").write_text(ITEM)
    assert "has no file NAME.inter; it has ml.item" in refusal("recbole", folder, tmp_path / "out")
    (folder / "ml.inter").write_text("")
    assert "ml.inter has no line" in refusal("recbole", folder, tmp_path / "out")
    (folder / "ml.inter").write_text("user_id:token,item_id:token\n1,2\n")
    assert "has no column of items, such as item_id:token" in refusal("recbole", folder, tmp_path / "out")
    (folder / "ml.inter").write_text(INTER.splitlines()[0] + "\n")
    assert "ml.inter has no row" in refusal("recbole", folder, tmp_path / "out")
    (folder / "ml.inter").write_text(INTER + "\tB03\t1\t1\n")
    assert "ml.inter: the user_id of row 4 is null or empty" in refusal("recbole", folder, tmp_path / "out")
    (folder / "ml.inter").write_text(INTER + "8\tB03\tgood\t1\n")
    assert "ml.inter is not a table with the columns" in refusal("recbole", folder, tmp_path / "out")


def test_mmrec_split_by_label(tmp_path):
    write_mmrec(tmp_path / "baby")
    run_import("mmrec", tmp_path / "baby", tmp_path / "out")
    table = pq.read_table(tmp_path / "out" / "interactions.parquet")
    assert table.column_names == ["user_id", "item_id", "rating", "timestamp", "x_label"]
    assert table["x_label"].to_pylist() == [0, 1, 2] * 2
    config = inspected(tmp_path / "out")
    assert (config.data.split.method, config.data.split.label) == ("label", "x_label")
    assert list(config.data.features) == ["visual", "textual"]


def test_mmrec_without_ratings_and_errors(tmp_path):
    folder = tmp_path / "micro"
    write_mmrec(folder)
    (folder / "baby.inter").write_text("userID\titemID\tx_label\n0\t0\t0\n1\t1\t1\n0\t2\t2\n")
    run_import("mmrec", folder, tmp_path / "out")
    assert rows(tmp_path / "out") == [(0, 0, 0), (1, 1, 1), (0, 2, 2)]
    inspected(tmp_path / "out")
    (folder / "baby.inter").write_text("userID\titemID\tx_label\n0\tA7\t0\n")
    assert "invalid value 'A7'" in refusal("mmrec", folder, tmp_path / "out2")
    (folder / "baby.inter").write_text("userID\titemID\n0\t0\n")
    assert "has no column 'x_label'" in refusal("mmrec", folder, tmp_path / "out2")
    (folder / "other.inter").write_text("userID\titemID\n0\t0\n")
    assert "has 2 files NAME.inter" in refusal("mmrec", folder, tmp_path / "out2")
