"""Lists of recommended items, by the command, against the dot products of an export."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ranks import run_ranks
from small import small_catalog, write_config
from trainings import train_without_ray

from gtc_dist import export
from gtc_dist.checkpoint.existing_run import find_run
from gtc_dist.data import formats, storage
from gtc_dist.data.catalog import SPLITS, Catalog
from gtc_dist.errors import InputError
from gtc_dist.inference.trained_run import load_run
from gtc_dist.recommend import lists
from gtc_dist.recommend.lists import recommend_rank


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    catalog = small_catalog(folder / "catalog")
    return train_without_ray(write_config(folder, catalog.uri, str(folder / "runs")))


@pytest.fixture(scope="module")
def expected(run, tmp_path_factory):
    """(scores of every user and item by an export, what each user has) by original ids."""
    out = str(tmp_path_factory.mktemp("export") / "e")
    export.main(["--run", run, "--out", out])
    tables = {kind: pq.read_table(f"{out}/{kind}") for kind in ("users", "items")}
    rows = {k: np.array(t["embedding"].to_pylist(), np.float64) for k, t in tables.items()}
    ids = {kind: table["id"].to_pylist() for kind, table in tables.items()}
    scores = rows["users"] @ rows["items"].T
    catalog, has = Catalog(find_run(run).config.data.catalog), {}
    users, items = catalog.ids("users").to_pylist(), catalog.ids("items").to_pylist()
    for split in SPLITS:
        for user, item in zip(*catalog.interactions(split), strict=True):
            has.setdefault(users[user], set()).add(items[item])
    table = {user: dict(zip(ids["items"], scores[row].tolist(), strict=True)) for row, user in enumerate(ids["users"])}
    return table, has


def lists_of(out) -> dict:
    """User -> [(item, score)] of an output, in the order of ranks."""
    found = {}
    for name in sorted(storage.listing(str(out))):
        if name.startswith("part-"):
            for row in formats.read_table(storage.join(str(out), name)).to_pylist():
                found.setdefault(row["user_id"], []).append((row["item_id"], row["score"]))
                assert row["rank"] == len(found[row["user_id"]])
    return found


def best(scores: dict, without: set, top: int) -> list:
    left = [(score, item) for item, score in scores.items() if item not in without]
    return sorted(left, key=lambda pair: -pair[0])[:top]


def assert_lists(found: dict, scores: dict, without: dict, top: int) -> None:
    for user, rows in found.items():
        want = best(scores[user], without.get(user, set()), top)
        assert len(rows) == len(want)
        assert [score for _, score in rows] == pytest.approx([score for score, _ in want], abs=1e-4)
        for item, score in rows:
            assert score == pytest.approx(scores[user][item], abs=1e-4)
            assert item not in without.get(user, set())


def test_all_users_get_their_best_items_without_what_they_have(run, expected, tmp_path, capsys):
    lists.main(["--run", run, "--out", str(tmp_path / "lists"), "--top", "7"])
    scores, has = expected
    found = lists_of(tmp_path / "lists")
    assert len(found) == 60
    assert_lists(found, scores, has, 7)
    assert "lists of 60 users, 420 rows" in capsys.readouterr().out
    manifest = storage.read_json(f"{tmp_path}/lists/_manifest.json")
    assert (manifest["users"], manifest["rows"], manifest["top"]) == (60, 420, 7)
    assert pq.read_table(tmp_path / "lists").num_rows == 420  # the folder reads as one table
    with pytest.raises(InputError, match="is not empty, it holds lists"):
        lists.main(["--run", run, "--out", str(tmp_path / "lists")])


def test_lists_in_object_storage(run, expected, s3):
    lists.main(["--run", run, "--out", f"{s3}/lists", "--top", "7"])
    assert_lists(lists_of(f"{s3}/lists"), *expected, 7)
    assert storage.read_json(f"{s3}/lists/_manifest.json")["users"] == 60


def test_what_a_user_has_is_listed_where_asked_for(run, expected, tmp_path):
    lists.main(["--run", run, "--out", str(tmp_path / "lists"), "--top", "9", "--include-seen"])
    assert_lists(lists_of(tmp_path / "lists"), expected[0], {}, 9)


def test_candidates_exclusions_and_users_of_files(run, expected, tmp_path):
    scores, has = expected
    items = sorted(next(iter(scores.values())))
    (tmp_path / "users.txt").write_text("u003\n\nu010\n")
    pq.write_table(pa.table({"item_id": [*map(str, items[:20]), "X1"]}), tmp_path / "candidates.parquet")
    (tmp_path / "exclude.csv").write_text("item_id\n" + "\n".join(map(str, items[:5])) + "\n")
    files = ["--candidates", tmp_path / "candidates.parquet", "--exclude", tmp_path / "exclude.csv"]
    words = ["--run", run, "--users", tmp_path / "users.txt", *files, "--out", tmp_path / "lists"]
    lists.main([str(word) for word in words])
    found = lists_of(tmp_path / "lists")
    assert sorted(found) == ["u003", "u010"]
    without = {user: has[user] | set(items[:5]) | set(items[20:]) for user in found}
    assert_lists(found, scores, without, 20)
    (tmp_path / "exclude.txt").write_text("\n".join(map(str, items)))
    with pytest.raises(InputError, match=r"no item of .* is left"):
        lists.main(["--run", run, "--user", "u003", "--exclude", str(tmp_path / "exclude.txt")])


@pytest.mark.parametrize(("name", "text"), [("users.txt", "\n"), ("users.csv", "user_id\n")])
def test_a_file_without_users_is_refused(run, tmp_path, name, text):
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=rf"--users {tmp_path}/{name} has no user"):
        lists.main(["--run", run, "--users", str(tmp_path / name), "--out", str(tmp_path / "lists")])
    assert not (tmp_path / "lists").exists()


def test_lists_on_the_terminal_have_titles(run, expected, tmp_path, capsys):
    scores, has = expected
    items = sorted(scores["u003"])
    names = pa.table({"sku": items[:-1], "name": [f"thing {item}" for item in items[:-1]]})
    pq.write_table(names, tmp_path / "items.parquet")
    titles = ["--titles", str(tmp_path / "items.parquet"), "--id", "sku", "--title", "name"]
    lists.main(["--run", run, "--user", "u003", "--user", "u001", "--top", "3", *titles])
    shown = capsys.readouterr().out
    assert [line for line in shown.splitlines() if line.startswith("user")] == ["user u003", "user u001"]
    score, item = best(scores["u003"], has["u003"], 1)[0]
    assert f"   1  {score:10.4f}  {item}  thing {item}" in shown
    with pytest.raises(InputError, match=r"1 of 1 ids are no users of .*, such as 'nobody'"):
        lists.main(["--run", run, "--user", "nobody"])


def test_items_are_chosen_by_an_attribute(run, expected, tmp_path, capsys):
    scores, has = expected
    items = sorted(scores["u003"])
    kinds = ["boots" if n % 3 == 0 else "tea" if n % 3 == 1 else None for n in range(len(items))]
    pq.write_table(pa.table({"item_id": items, "title": ["x"] * len(items), "kind": kinds}), tmp_path / "items.parquet")
    table = ["--titles", str(tmp_path / "items.parquet")]
    for where, out in (["boots"], "one"), (["boots", "tea"], "two"):
        more = [option for kind in where for option in ("--where", f"kind={kind}")]
        lists.main(["--run", run, "--out", str(tmp_path / out), *table, *more])
        without = {item for item, kind in zip(items, kinds, strict=True) if kind not in where}
        found = lists_of(tmp_path / out)
        assert_lists(found, scores, {user: has.get(user, set()) | without for user in found}, 20)
    for where, says in (("kind=hat", "has 'hat' in the column 'kind'"), ("kind", "not of the form COLUMN=TEXT")):
        with pytest.raises(InputError, match=says):
            lists.main(["--run", run, "--user", "u003", *table, "--where", where])
    with pytest.raises(SystemExit):
        lists.main(["--run", run, "--user", "u003", "--where", "kind=tea"])


def test_similar_items_are_those_with_the_largest_cosine(run, tmp_path, capsys):
    """Without the columns of popularity: activity, taste and the constant."""
    out = str(tmp_path / "e")
    export.main(["--run", run, "--out", out])
    table = pq.read_table(f"{out}/items")
    rows = np.array(table["embedding"].to_pylist(), np.float64)
    first = load_run(find_run(run)).scorer.special_columns(rows.shape[1]).popularity
    assert first == (3 if rows.shape[1] > 24 else 0)  # this run has no fusion; where there is one, three columns
    rows = rows[:, first:] / np.linalg.norm(rows[:, first:], axis=1, keepdims=True)
    ids = table["id"].to_pylist()
    capsys.readouterr()
    lists.main(["--run", run, "--item", str(ids[4]), "--top", "5"])
    lines = capsys.readouterr().out.splitlines()
    cosine = rows @ rows[4]
    cosine[4] = -2
    assert lines[0] == f"item {ids[4]}"
    assert [float(line.split()[1]) for line in lines[1:]] == pytest.approx(np.sort(cosine)[::-1][:5], abs=1e-4)
    assert int(lines[1].split()[2]) == ids[int(cosine.argmax())]


def on_ranks(comm, run_ref, out: str) -> dict:
    options = {"top": 6, "include_seen": False, "allowed": None, "titles": None}
    return recommend_rank(comm, None, run_ref, users=None, out=out, **options)


def test_ranks_write_the_same_lists(run, tmp_path, monkeypatch):
    monkeypatch.setattr(lists, "CHUNK_USERS", 11)
    for size in (1, 3):
        results = run_ranks(on_ranks, size, find_run(run), f"{tmp_path}/{size}")
        assert {part["rows"] for part in results} == {360}
    one, three = lists_of(tmp_path / "1"), lists_of(tmp_path / "3")
    assert one.keys() == three.keys()
    for user, rows in one.items():
        assert [item for item, _ in rows] == [item for item, _ in three[user]]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give one of --user, --item and --out"),
        (["--user", "a", "--out", "x"], "give one of --user, --item and --out"),
        (["--user", "a", "--users", "x"], "--users goes with --out"),
        (["--user", "a", "--workers", "2"], "--workers goes with --out"),
        (["--user", "a", "--top", "0"], "--top must be positive"),
    ],
)
def test_options_that_do_not_fit_together(run, capsys, words, message):
    with pytest.raises(SystemExit):
        lists.main(["--run", run, *words])
    assert message in capsys.readouterr().err
