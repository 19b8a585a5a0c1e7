"""The layout `movielens`: three shapes of files, with titles in their encodings."""

import gzip

import pytest
from imports import inspected, refusal, rows, run_import

from gtc_dist.import_layout.movielens import GENRES

MOVIES = [(1, 'Toy "Story" (1995)', ["Animation", "Children's"]), (20, "Les Misérables,\x85 The (1995)", ["Drama"])]
RATINGS = [(196, 20, 3, 881250949), (186, 1, 4, 891717742), (186, 20, 5, 891717743)]


def u_item(number, title, genres) -> str:
    flags = ["1" if name in genres else "0" for name in GENRES.split("|")]
    return "|".join([str(number), title, "01-Jan-1995", "", "http://us.imdb.com/M/title-exact?x", *flags])


def write_100k(folder) -> None:
    (folder / "u.data").write_text("".join("\t".join(map(str, row)) + "\n" for row in RATINGS))
    (folder / "u.item").write_bytes("".join(u_item(*movie) + "\n" for movie in MOVIES).encode("latin-1"))


def write_dat(folder, encoding="latin-1") -> None:
    (folder / "ratings.dat").write_text("".join("::".join(map(str, row)) + "\n" for row in RATINGS))
    lines = [f"{number}::{title}::{'|'.join(genres)}\n" for number, title, genres in MOVIES]
    (folder / "movies.dat").write_bytes("".join(lines).encode(encoding))


def write_csv(folder) -> None:
    lines = ["userId,movieId,rating,timestamp", *(",".join(map(str, row)) for row in RATINGS)]
    (folder / "ratings.csv").write_bytes("\r\n".join([*lines, ""]).encode())
    quoted = [(number, '"' + title.replace('"', '""') + '"', "|".join(genres)) for number, title, genres in MOVIES]
    movies = [*(",".join(map(str, row)) for row in quoted), "3,Short,(no genres listed)"]
    (folder / "movies.csv").write_text("\n".join(["movieId,title,genres", *movies]) + "\n", encoding="utf-8")


@pytest.mark.parametrize(
    "write",
    [write_100k, write_dat, lambda folder: write_dat(folder, "utf-8"), write_csv],
    ids=["100k", "1m", "10m", "20m"],
)
def test_ratings_and_movies(tmp_path, ray_local, capsys, write):
    (tmp_path / "ml").mkdir()
    write(tmp_path / "ml")
    run_import("movielens", tmp_path / "ml", tmp_path / "out")
    assert rows(tmp_path / "out") == RATINGS
    texts = rows(tmp_path / "out", "texts")
    assert texts[:2] == [(number, title, " ".join(genres)) for number, title, genres in MOVIES]
    assert texts[2:] in ([], [(3, "Short", "")])
    config = inspected(tmp_path / "out", capsys.readouterr().out)
    assert (config.data.split.method, config.data.interactions.rating) == ("global_time", "rating")


def test_errors_name_the_line(tmp_path):
    folder = tmp_path / "ml"
    folder.mkdir()
    (folder / "ratings.csv.gz").write_bytes(gzip.compress(b""))
    assert "has no u.data or ratings.dat or ratings.csv; it has ratings.csv.gz" in refusal(
        "movielens", folder, tmp_path / "out"
    )
    (folder / "ratings.dat").write_text("1::2::5::978300760\n")
    assert "has no movies.dat beside ratings.dat" in refusal("movielens", folder, tmp_path / "out")
    write_dat(folder)
    for line, problem in {"1::2::5": "has 3 fields", "1::x::5::9": "the item_id in line 4 is b'x', no number"}.items():
        (folder / "ratings.dat").write_text("1::2::5::978300760\n" * 3 + line + "\n")
        assert f"{problem}" in refusal("movielens", folder, tmp_path / "out")
    write_dat(folder)
    (folder / "movies.dat").write_text("1::Toy Story\n")
    assert "movies.dat: line 1 is no movie" in refusal("movielens", folder, tmp_path / "out")
