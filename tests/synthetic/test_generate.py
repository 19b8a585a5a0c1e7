"""The generator: reproducible bytes, also as Ray tasks; planted structure in the tables; formats; refusals."""

import hashlib
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gtc_dist.data import storage
from gtc_dist.errors import InputError
from gtc_dist.synthetic import choice
from gtc_dist.synthetic import generate as generator
from gtc_dist.synthetic.generate import generate_dataset, list_parts, write_part
from gtc_dist.synthetic.planted_world import PlantedWorld, visible_factors
from gtc_dist.synthetic.spec import Spec

SPEC = Spec(
    users=900, items=400, interactions=14_000, cold_share=0.1, missing_share=0.05, user_chunk=256, item_chunk=128
)


class Dataset:
    """A dataset read back with plain tools; ids are mapped to rows of the truth tables."""

    def __init__(self, folder: Path, spec: Spec):
        self.spec = spec
        self.users, self.items = pq.read_table(folder / "truth/users"), pq.read_table(folder / "truth/items")
        self.user_ids = {v: i for i, v in enumerate(self.users["user_id"].to_pylist())}
        self.item_ids = {v: i for i, v in enumerate(self.items["item_id"].to_pylist())}
        self.factors = np.stack(self.items["factors"].to_numpy())
        self.taste = np.stack(self.users["taste"].to_numpy())
        self.group = self.users["group"].to_numpy()
        self.masks = np.load(folder / "truth/masks.npy")
        self.table = pq.read_table(folder / "interactions")
        self.user, self.item = self.positions(self.table)

    def positions(self, table: pa.Table) -> tuple[np.ndarray, np.ndarray]:
        user = np.array([self.user_ids[v] for v in table["user_id"].to_pylist()])
        return user, np.array([self.item_ids[v] for v in table["item_id"].to_pylist()])


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("synthetic") / "raw"
    generate_dataset(SPEC, str(path))
    return path


@pytest.fixture(scope="module")
def data(folder) -> Dataset:
    return Dataset(folder, SPEC)


def digests(folder: Path) -> dict[str, str]:
    files = (p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def test_same_seed_same_bytes_another_seed_other_bytes(folder, tmp_path):
    generate_dataset(SPEC, str(tmp_path / "same"))
    generate_dataset(replace(SPEC, seed=1), str(tmp_path / "other"))
    assert digests(tmp_path / "same") == digests(folder)
    other = digests(tmp_path / "other")
    assert other.keys() == digests(folder).keys()
    assert [n for n, d in digests(folder).items() if other[n] == d] == []


@pytest.mark.parametrize("order", ["reversed", "each in a new world"])
def test_parts_may_be_written_in_any_order_and_process(folder, tmp_path, order):
    shared = PlantedWorld(SPEC)
    for kind, chunk in reversed(list_parts(SPEC)):
        write_part(shared if order == "reversed" else PlantedWorld(SPEC), str(tmp_path), kind, chunk)
    expected = digests(folder)
    del expected[generator.DATASET]
    assert digests(tmp_path) == expected


def test_counts_do_not_depend_on_which_part_finished_first(folder):
    counts = storage.read_json(f"{folder}/{generator.DATASET}")["counts"]
    counts = {name: counts[name] for name in reversed(counts) if name not in ("users", "items")}
    before = digests(folder)
    generator.finalize_dataset(SPEC, str(folder), counts)
    assert digests(folder) == before


def test_ray_tasks_give_the_same_bytes(folder, tmp_path, ray_local):
    dataset = generate_dataset(SPEC, str(tmp_path / "raw"), parallel=True)
    assert digests(tmp_path / "raw") == digests(folder)
    assert dataset == storage.read_json(f"{folder}/{generator.DATASET}")


@pytest.mark.parametrize("parallel", [False, True], ids=["in process", "Ray"])
@pytest.mark.parametrize(
    ("obstacle", "message"),
    [("file", r"part \d+ of users cannot be written: .*truth/users"), ("/proc", r"does not exist .*write it")],
)
def test_a_failing_part_ends_the_run_and_names_the_cause(tmp_path, ray_local, parallel, obstacle, message):
    """The folder of one kind becomes unwritable after the start; the dataset stays incomplete."""
    out = tmp_path / "raw"

    def spoil(done, total):
        if done:
            return
        (out / "truth").mkdir()
        if obstacle == "file":
            (out / "truth/users").write_text("in the way")
        else:
            (out / "truth/users").symlink_to(obstacle)

    with pytest.raises(InputError, match=message):
        generate_dataset(SPEC, str(out), progress=spoil, parallel=parallel)
    assert (out / generator.DATASET_MARKER).exists()
    assert not (out / generator.DATASET).exists()
    (out / "truth/users").unlink()
    generate_dataset(SPEC, str(out), force=True, parallel=parallel)
    assert (out / generator.DATASET).exists()


def test_missing_parts_leave_the_dataset_incomplete(tmp_path):
    """For example with a local folder on a cluster of several machines."""
    out = tmp_path / "raw"

    def lose(done, total):
        if done == total:
            shutil.rmtree(out / "interactions")
            shutil.rmtree(out / "features/visual")

    with pytest.raises(InputError, match=r"features/visual/part-00000\.parquet was written but does not exist; if Ray"):
        generate_dataset(SPEC, str(out), progress=lose)
    assert not (out / generator.DATASET).exists()


def test_block_size_changes_nothing(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(choice, "PAIR_BLOCK", 1000)
    generate_dataset(SPEC, str(tmp_path / "raw"))
    assert digests(tmp_path / "raw") == digests(folder)


def test_counts(folder, data):
    counts = storage.read_json(f"{folder}/{generator.DATASET}")["counts"]
    assert counts["interactions"] == data.table.num_rows
    assert abs(data.table.num_rows / SPEC.interactions - 1) < 0.15
    assert np.bincount(data.user, minlength=SPEC.users).min() >= SPEC.minimum
    pairs = data.user * SPEC.items + data.item
    assert len(np.unique(pairs)) == len(pairs)
    assert len(data.user_ids) == SPEC.users
    assert len(data.item_ids) == SPEC.items
    assert np.diff(np.sort(list(data.item_ids))).max() > 1  # ids have gaps, so they must be mapped


def test_popularity_follows_zipf_and_shows_in_the_counts(data):
    popularity = np.sort(data.items["popularity"].to_numpy())[::-1]
    rank = np.arange(1, SPEC.items + 1)
    np.testing.assert_allclose(popularity, rank**-SPEC.zipf, rtol=1e-4)
    counts = np.sort(np.bincount(data.item, minlength=SPEC.items))[::-1]
    middle = slice(2, SPEC.items // 3)  # taste spreads the counts; the tail is too thin to fit
    slope = np.polyfit(np.log(rank[middle]), np.log(counts[middle]), 1)[0]
    assert -1.5 * SPEC.zipf < slope < -0.4 * SPEC.zipf
    assert np.corrcoef(data.items["popularity"].to_numpy(), np.bincount(data.item, minlength=SPEC.items))[0, 1] > 0.5
    activity = np.sort(np.bincount(data.user))[::-1]
    assert activity[0] > 5 * np.median(activity)


def test_drift_moves_popularity_and_nothing_else(folder, tmp_path):
    """The times alone differ. With drift the items of the last eighth are others than those of the first half; without,
    both halves of the time have the same popular items."""
    generate_dataset(replace(SPEC, drift=3.0), str(tmp_path / "drift"))
    after, before = digests(tmp_path / "drift"), digests(folder)
    changed = {name.split("/")[0] for name in before if after[name] != before[name]}
    assert changed == {"interactions", "cold", generator.DATASET}
    correlation = []
    for path in (folder, tmp_path / "drift"):
        table = pq.read_table(path / "interactions")
        item, time = table["item_id"].to_numpy(), table["timestamp"].to_numpy()
        assert generator.START <= time.min() < time.max() < generator.START + generator.SPAN
        share = (time - generator.START) / generator.SPAN
        assert abs(np.mean(share > 0.875) - 0.125) < 0.05  # the activity does not drift
        known = np.unique(item)
        counts = [np.searchsorted(known, item[part]) for part in (share < 0.5, share > 0.875)]
        counts = [np.bincount(part, minlength=len(known)) for part in counts]
        correlation.append(np.corrcoef(*counts)[0, 1])
    assert correlation[0] > 0.8
    assert correlation[1] < 0.4


def test_users_follow_the_factors_in_their_masks_only(data):
    warm = ~data.items["cold"].to_numpy()
    centred = data.factors - data.factors[warm].mean(0)
    profile = np.zeros_like(data.taste)
    np.add.at(profile, data.user, centred[data.item])
    profile /= np.bincount(data.user, minlength=SPEC.users)[:, None]
    mask = data.masks[data.group]
    assert (data.masks.sum(1) == SPEC.kept).all()
    assert (data.taste[~mask] == 0).all()
    assert np.corrcoef(profile[mask], data.taste[mask])[0, 1] > 0.8  # sign and size of the taste
    assert np.abs(profile[mask]).mean() > 2.5 * np.abs(profile[~mask]).mean()


def test_item_knn_beats_popularity_and_the_ground_truth_beats_item_knn(data):
    """Recall@20 of held-out interactions: the planted structure leaves room for a model to gain."""
    held = np.random.default_rng(0).random(len(data.user)) < 0.2
    train = np.zeros((SPEC.users, SPEC.items), np.float32)
    train[data.user[~held], data.item[~held]] = 1
    test = np.zeros_like(train)
    test[data.user[held], data.item[held]] = 1
    popularity = train.sum(0)
    similarity = train.T @ train / np.sqrt(np.outer(popularity + 1, popularity + 1))
    np.fill_diagonal(similarity, 0)
    truth = np.log(data.items["popularity"].to_numpy()) + SPEC.strength * data.taste @ data.factors.T

    def recall(scores):
        top = np.argsort(np.where(train > 0, -np.inf, scores), axis=1)[:, -20:]
        users = test.sum(1) > 0
        return (np.take_along_axis(test, top, 1).sum(1)[users] / test.sum(1)[users]).mean()

    found = [recall(s) for s in (np.broadcast_to(popularity, train.shape), train @ similarity, truth)]
    assert found[0] > 2 * 20 / SPEC.items
    assert found[1] > 1.3 * found[0]
    assert found[2] > 1.2 * found[1]


def test_features_hold_factors_and_nuisance(folder, data):
    """Linear regression recovers the visible factors from the features; most of the other variance is nuisance."""
    for modality, seen in visible_factors(SPEC).items():
        ids, vectors = read_features(folder, modality)
        factors = data.factors[[data.item_ids[i] for i in ids]]
        x = np.c_[vectors, np.ones(len(vectors))]
        explained = 1 - ((factors - x @ np.linalg.lstsq(x, factors)[0]) ** 2).sum(0) / (factors**2).sum(0)
        hidden = np.setdiff1d(np.arange(SPEC.factors), seen)
        # explained by chance: width relative to the number of items
        chance = vectors.shape[1] / len(vectors)
        assert (explained[seen] > chance + 0.25).all()
        if len(hidden):
            assert explained[hidden].mean() < chance + 0.15
        f = np.c_[factors, np.ones(len(factors))]
        rest = vectors - f @ np.linalg.lstsq(f, vectors)[0]
        assert 0.4 < rest.var(0).sum() / vectors.var(0).sum() < 0.75
        share = np.linalg.svd(rest, compute_uv=False) ** 2
        assert share[: SPEC.nuisance].sum() / share.sum() > 0.8  # low rank, besides white noise


def read_features(folder: Path, modality: str) -> tuple[list[int], np.ndarray]:
    if modality == SPEC.npy_modality:
        ids = pq.read_table(folder / f"features/{modality}_ids.parquet")["item_id"].to_pylist()
        return ids, np.load(folder / f"features/{modality}.npy")
    table = pq.read_table(folder / f"features/{modality}")
    return table["item_id"].to_pylist(), np.stack(table["vector"].to_numpy()).astype(np.float32)


def test_formats(folder, data):
    types = {f.name: str(f.type) for f in data.table.schema}
    assert types == {
        "user_id": "string",
        "item_id": "int64",
        "rating": "float",
        "timestamp": "int64",
        "x_label": "int8",
    }
    assert len(list((folder / "interactions").iterdir())) == 4  # 900 users by 256
    assert set(np.unique(data.table["rating"].to_numpy())) <= {1, 2, 3, 4, 5}
    assert set(np.unique(data.table["x_label"].to_numpy())) == {0, 1, 2}
    counts = storage.read_json(f"{folder}/{generator.DATASET}")["counts"]
    for modality, width in SPEC.modalities.items():
        ids, vectors = read_features(folder, modality)
        assert vectors.shape == (SPEC.items - counts[f"missing_{modality}"], width)
        assert len(set(ids)) == len(ids)
        assert set(ids) <= data.item_ids.keys()
        assert np.isfinite(vectors).all()
        assert counts[f"missing_{modality}"] > 0
    parquet = pq.read_schema(folder / "features/visual/part-00000.parquet")
    assert str(parquet.field("vector").type) == "fixed_size_list<element: halffloat>[64]"
    ids, _ = read_features(folder, SPEC.npy_modality)
    assert ids != sorted(ids)  # rows are not in item order


def test_cold_start_items_are_only_in_cold(folder, data):
    cold = data.items["cold"].to_numpy()
    assert cold.sum() == round(SPEC.items * SPEC.cold_share)
    assert not cold[data.item].any()
    table = pq.read_table(folder / "cold")
    _, item = data.positions(table)
    assert len(item) > 0
    assert cold[item].all()
    assert set(table["x_label"].to_pylist()) == {2}
    assert table.schema.remove_metadata() == data.table.schema.remove_metadata()


def test_activity_exponent_sets_the_tail(folder, data, tmp_path):
    generate_dataset(replace(SPEC, activity=1.5), str(tmp_path / "raw"))
    heavy = Dataset(tmp_path / "raw", SPEC)
    counts = [np.sort(np.bincount(d.user))[::-1] for d in (data, heavy)]
    assert counts[1][: SPEC.users // 100].mean() > counts[0][: SPEC.users // 100].mean()
    assert np.median(counts[1]) < np.median(counts[0])


def test_large_datasets_have_no_npy_matrix(tmp_path):
    """The last of several modalities is one .npy matrix only up to 65,536 items."""
    spec = Spec(users=50, items=1 << 16, interactions=400, modalities={"text": 2, "audio": 2}, factors=2, kept=1)
    assert (spec.npy_modality, replace(spec, modalities={"text": 2}).npy_modality) == ("audio", None)
    spec = replace(spec, items=(1 << 16) + 1)
    assert spec.npy_modality is None
    dataset = generate_dataset(spec, str(tmp_path))
    assert dataset["counts"]["missing_audio"] == 0
    assert sorted(p.name for p in (tmp_path / "features").iterdir()) == ["audio", "text"]
    assert [pq.read_metadata(p).num_rows for p in sorted((tmp_path / "features/audio").iterdir())] == [32768, 32768, 1]
    user = pq.read_table(tmp_path / "interactions")["user_id"]  # drawn from candidates, because there are many items
    assert user.value_counts().field("counts").to_numpy().min() >= spec.minimum


def test_object_storage_gets_the_same_bytes(folder, s3):
    spec = replace(SPEC, users=200, interactions=2_000)
    dataset = generate_dataset(spec, f"{s3}/raw")
    assert storage.read_json(f"{s3}/raw/{generator.DATASET}") == dataset
    names = storage.listing(f"{s3}/raw")
    assert generator.DATASET_MARKER not in names
    items = "truth/items/part-00000.parquet"  # items do not depend on users
    assert storage.read_bytes(f"{s3}/raw/{items}") == (folder / items).read_bytes()
    with pytest.raises(InputError, match="holds a dataset"):
        generate_dataset(spec, f"{s3}/raw")
    generate_dataset(spec, f"{s3}/raw", force=True)
    assert storage.listing(f"{s3}/raw") == names


def test_a_folder_that_is_not_empty_is_refused(tmp_path):
    spec = Spec(users=20, items=100, interactions=120, modalities={"text": 4})
    (tmp_path / "notes.txt").write_text("mine")
    for force in (False, True):  # only a dataset may be replaced
        with pytest.raises(InputError, match=r"is not empty.*notes\.txt"):
            generate_dataset(spec, str(tmp_path), force)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]
    storage.write_json(f"{tmp_path}/half/{generator.DATASET_MARKER}", {})
    with pytest.raises(InputError, match="incomplete"):
        generate_dataset(spec, f"{tmp_path}/half")
    generate_dataset(spec, f"{tmp_path}/half", force=True)
    (tmp_path / "half/runs").mkdir()
    (tmp_path / "half/runs/metrics.json").write_text("mine")
    for force in (False, True):  # files of others are never removed
        with pytest.raises(InputError, match=r"1 of \d+ files are not part of a dataset, such as runs/m"):
            generate_dataset(spec, f"{tmp_path}/half", force)
    assert (tmp_path / "half/runs/metrics.json").read_text() == "mine"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"users": 0}, "users is 0"),
        ({"kept": 99}, "only 16 factors"),
        ({"interactions": 100}, "the minimum is 5"),
        ({"interactions": 10**7}, "more than a quarter of the 1500 warm items"),
        ({"cold_share": 1.0}, "cold_share is 1.0"),
        ({"modalities": {}}, "name at least one"),
        ({"noise": -1.0}, "noise is -1.0"),
        ({"drift": -1.0}, "drift is -1.0"),
        ({"noise": float("nan")}, "noise is nan; expected a finite number"),
        ({"activity": 1.0}, "activity is 1.0; it must be above 1"),
        ({"users": 10.5}, "users is 10.5; expected a whole number"),
        ({"modalities": {"a/b": 4}}, "modalities has the name 'a/b'"),
    ],
)
def test_invalid_parameters_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        Spec(**changes)


def test_titles_name_the_strongest_factors(data, folder):
    names = pq.read_table(folder / "items")
    assert names["item_id"].to_pylist() == data.items["item_id"].to_pylist()
    factors = np.array(data.items["factors"].to_pylist())
    first, second = (np.argsort(-np.abs(factors), axis=1)[:, place] for place in (0, 1))
    words = {}
    for title, *strongest in zip(names["title"].to_pylist(), first, second, range(len(factors)), strict=True):
        adjective, noun, number = title.split()
        a, b, item = strongest
        assert int(number) == item
        words.setdefault(("first", a, factors[item, a] > 0), set()).add(adjective)
        words.setdefault(("second", b, factors[item, b] > 0), set()).add(noun)
    assert {len(each) for each in words.values()} == {1}
    assert len(words) == len({(key[0], *each) for key, each in words.items()}) == 2 * 2 * factors.shape[1]
