"""Generated tables: the planted structure is in them, in every format."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from planted_dataset import SPEC, Dataset, digests

from gtc_dist.data import storage
from gtc_dist.synthetic import generate as generator
from gtc_dist.synthetic.generate import generate_dataset
from gtc_dist.synthetic.planted_world import visible_factors


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
