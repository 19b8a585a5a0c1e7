"""Raw features to catalog features against plain numpy; vectors and ids that do not fit the interactions."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from raw_files import ROWS, WIDTH, feature_matrix, inspect_visual, write_feature_parquet

from gtc_dist.config_data import ModalityConfig
from gtc_dist.data import formats
from gtc_dist.data.catalog import CatalogWriter
from gtc_dist.data.feature_transform import FeatureTransform
from gtc_dist.data.scratch import Scratch
from gtc_dist.errors import InputError
from gtc_dist.prepare import feature_files, features
from gtc_dist.prepare.features import GatheredFeatures
from gtc_dist.prepare.vector_formats import feature_chunk


def gathered_of(x: np.ndarray, present: np.ndarray | None = None) -> GatheredFeatures:
    return GatheredFeatures(x, np.ones(len(x), bool) if present is None else present, 0)


@pytest.fixture
def scratch():
    with Scratch() as scratch:
        yield scratch


# --- the transform ---


def test_standardised_over_the_items_that_have_a_vector():
    x = feature_matrix() * [1, 100, 1e-3, 1e4, 1, 1]
    present = np.random.default_rng(1).random(ROWS) < 0.8
    transform, explained_variance = features.fit_feature_transform(gathered_of(x, present))
    assert explained_variance == 1
    np.testing.assert_allclose(transform.mean, x[present].mean(0), rtol=1e-12)
    np.testing.assert_allclose(transform.scale, x[present].std(0), rtol=1e-9)
    out = transform.apply(x[present])
    assert out.dtype == np.float16
    np.testing.assert_allclose(out, (x[present] - x[present].mean(0)) / x[present].std(0), rtol=1e-3, atol=1e-3)


def test_a_large_mean_does_not_cancel_digits():
    x = feature_matrix().astype(np.float64) + 1e9
    np.testing.assert_allclose(features.fit_feature_transform(gathered_of(x))[0].scale, x.std(0), rtol=1e-6)


def test_statistics_do_not_depend_on_the_size_of_blocks(monkeypatch):
    def fit() -> list[FeatureTransform]:
        return [features.fit_feature_transform(gathered_of(feature_matrix()), pca)[0] for pca in (None, 3)]

    whole = fit()
    monkeypatch.setattr(features, "BLOCK_BYTES", 8 * WIDTH * 3)  # 3 rows
    for one, other in zip(whole, fit(), strict=True):
        np.testing.assert_allclose(one.scale, other.scale, rtol=1e-9)
        np.testing.assert_allclose(one.apply(feature_matrix()), other.apply(feature_matrix()), atol=2e-3)


@pytest.mark.parametrize("constant", [0.0, 0.1, -7.3, 1e30])
def test_a_dimension_without_variance_becomes_zeros(constant):
    x = feature_matrix()
    x[:, 2] = constant
    transform, _ = features.fit_feature_transform(gathered_of(x))
    assert transform.scale[2] == 0
    out = transform.apply(x)
    assert (out[:, 2] == 0).all()
    assert np.isfinite(out).all()
    by_pca, _ = features.fit_feature_transform(gathered_of(np.full((9, 4), constant, np.float32)), 2)
    assert (by_pca.apply(x[:, :4] * 0) == 0).all()


def test_values_beyond_float16_are_clipped():
    transform = FeatureTransform(np.zeros(2), np.array([1e-8, 1.0]))
    assert transform.apply(np.array([[1.0, -1e6]], np.float32)).tolist() == [[65504.0, -65504.0]]


@pytest.mark.parametrize("width", [1, 3, WIDTH])
def test_pca_is_the_svd_on_one_common_scale(width):
    x = feature_matrix()
    transform, explained_variance = features.fit_feature_transform(gathered_of(x), width)
    centred = x.astype(np.float64) - x.mean(0)
    _, singular, axes = np.linalg.svd(centred, full_matrices=False)
    variance = singular**2 / ROWS
    np.testing.assert_allclose(explained_variance, variance[:width].sum() / variance.sum(), rtol=1e-9)
    np.testing.assert_allclose(np.abs(np.sum(transform.components * axes[:width], axis=1)), 1, rtol=1e-6)
    peaks = transform.components[np.arange(width), np.abs(transform.components).argmax(1)]
    assert (peaks > 0).all()  # fixed signs
    out = transform.apply(x).astype(np.float64)
    np.testing.assert_allclose(out.var(0), variance[:width] / variance[:width].mean(), rtol=5e-3)
    np.testing.assert_allclose(out.var(0).mean(), 1, rtol=5e-3)
    if width == WIDTH:  # no loss: distances equal those of the raw vectors, up to the scale
        raw = np.linalg.norm(x[:, None] - x[None], axis=2)
        new = np.linalg.norm(out[:, None] - out[None], axis=2)
        np.testing.assert_allclose(new * transform.scale[0], raw, atol=0.05)


@pytest.mark.parametrize("pca", [None, 2])
def test_written_transform_gives_new_vectors_the_same_features(tmp_path, scratch, pca):
    x, present = feature_matrix(), np.arange(ROWS) % 5 != 0
    transform, explained_variance = features.fit_feature_transform(gathered_of(x, present), pca)
    entry, out = features.write_features(
        CatalogWriter(str(tmp_path)), "visual", gathered_of(x, present), transform, explained_variance, scratch
    )
    assert entry.explained_variance == explained_variance
    assert (entry.dim, entry.raw_dim, entry.missing) == (pca or WIDTH, WIDTH, 8)
    assert (out[~present] == 0).all()
    assert np.array_equal(FeatureTransform.load(str(tmp_path), "visual").apply(x[present]), out[present])
    table = formats.read_table(str(tmp_path / "features/visual/part-00000.parquet"))
    assert table.schema.field("vector").type == pa.list_(pa.float16(), pca or WIDTH)
    assert np.array_equal(np.stack(table["vector"].to_numpy()), out)


def test_feature_files_are_cut(tmp_path, scratch, monkeypatch):
    monkeypatch.setattr(features, "FEATURE_ROWS", 16)
    writer = CatalogWriter(str(tmp_path))
    _, out = features.write_features(
        writer,
        "visual",
        gathered_of(feature_matrix()),
        *features.fit_feature_transform(gathered_of(feature_matrix())),
        scratch,
    )
    assert isinstance(out, np.memmap)
    names = sorted(name for name in writer.files if "part-" in name)
    assert [(writer.files[n].first, writer.files[n].rows) for n in names] == [(0, 16), (16, 16), (32, 8)]
    tables = [formats.read_table(str(tmp_path / name)) for name in names]
    assert np.array_equal(np.concatenate([np.stack(t["vector"].to_numpy()) for t in tables]), out)
    assert np.concatenate([t["item"].to_numpy() for t in tables]).tolist() == list(range(ROWS))


# --- gathering ---


ITEMS = pa.array([30, 3, 77, 12, 5], pa.int32())  # in index order


@pytest.mark.parametrize("kind", [".npy", ".txt", ".parquet", "vectors in parquet"])
@pytest.mark.parametrize("text", [False, True])
def test_rows_go_to_their_items(tmp_path, ray_local, kind, text):
    """Ids in random order; one item without a vector, two vectors without an item."""
    x = feature_matrix(rows=6)
    row_ids = [5, 30, 1000, 77, 4, 3]
    row_ids = ["10\u202800" if i == 1000 else str(i) for i in row_ids] if text else row_ids
    items = ITEMS.cast(pa.string()) if text else ITEMS
    settings = {"path": "v.npy", "ids": f"ids{kind}"}
    np.save(tmp_path / "v.npy", x)
    if kind == ".npy":
        np.save(tmp_path / "ids.npy", np.array(row_ids))
    elif kind == ".txt":
        (tmp_path / "ids.txt").write_text("".join(f"{i}\n" for i in row_ids))
    elif kind == ".parquet":
        pq.write_table(pa.table({"item_id": row_ids}), tmp_path / "ids.parquet")
    else:
        settings = {"path": "v.parquet"}
        write_feature_parquet(tmp_path / "v.parquet", row_ids, x.tolist(), pa.list_(pa.float32()))
    sources = {"visual": inspect_visual(tmp_path, **settings)}
    assert sorted(features.item_ids(sources, items.type).to_pylist()) == sorted(row_ids)
    for memory in (1, 3 * WIDTH * 8, 1 << 30):  # ranges of one item, several, all
        with Scratch(memory_bytes=memory) as scratch:
            found = features.gather_features(sources, items, scratch)["visual"]
            assert found.unknown == 2
            assert found.present.tolist() == [True, True, True, False, True]
            assert np.array_equal(found.vectors[found.present], x[[1, 5, 3, 0]])
            assert (found.vectors[~found.present] == 0).all()
            assert list(scratch.path.iterdir()) == [Path(found.vectors.filename)]


def test_several_modalities_and_row_numbers_as_ids(tmp_path, ray_local, scratch, monkeypatch):
    monkeypatch.setattr(feature_chunk, "CHUNK_BYTES", 2000)
    wide, narrow = feature_matrix(rows=78), feature_matrix(1, rows=90, width=3).astype(np.float16)
    np.save(tmp_path / "wide.npy", wide)
    np.save(tmp_path / "narrow.npy", narrow)
    sources = {
        name: feature_files.inspect_features(name, ModalityConfig(path=f"{name}.npy"), str(tmp_path))
        for name in ("wide", "narrow")
    }
    rows = ITEMS.to_numpy()
    gathered = features.gather_features(sources, ITEMS, scratch)
    assert np.array_equal(gathered["wide"].vectors, wide[rows])
    assert np.array_equal(gathered["narrow"].vectors, narrow[rows])
    assert gathered["narrow"].unknown == 85


# --- invalid input ---


def refused_rows(source: feature_files.FeatureSource, items: pa.Array = ITEMS) -> str:
    """The error message of reading through Ray."""
    with pytest.raises(InputError) as caught, Scratch() as scratch:
        features.gather_features({"visual": source}, items, scratch)
    assert not scratch.path.exists()
    return str(caught.value)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_name_file_and_item(tmp_path, ray_local, value):
    x = feature_matrix(rows=80)
    x[12, 4] = value
    np.save(tmp_path / "v.npy", x)
    message = refused_rows(inspect_visual(tmp_path))
    assert (
        f"{tmp_path}/v.npy: the vector of item 12 (row 13) has a value that is not finite ({value}, position 4)"
        in message
    )


def test_values_that_are_not_finite_in_parquet_and_beyond_float32(tmp_path, ray_local):
    type = pa.list_(pa.float64())
    write_feature_parquet(tmp_path / "a.parquet", ["x", "y"], [[1.0, 2.0]] * 2, type)
    for value in (None, 1e300):
        write_feature_parquet(tmp_path / "b.parquet", ["z", "w"], [[1.0, 2.0], [1.0, value]], type)
        message = refused_rows(inspect_visual(tmp_path, "*.parquet"), pa.array(["x", "z"]))
        assert f"{tmp_path}/b.parquet: the vector of item 'w' (row 2) has a value that is not finite" in message


def test_vectors_of_another_width_name_file_and_item(tmp_path, ray_local):
    type = pa.list_(pa.float32())
    write_feature_parquet(tmp_path / "v.parquet", [30, 3, 5], [[1.0, 2.0], [1.0, 2.0], [1.0, 2.0, 3.0]], type)
    message = refused_rows(inspect_visual(tmp_path, "v.parquet"))
    assert "v.parquet: the vector of item 5 (row 3) has 3 values, but others have 2" in message


def test_fewer_rows_than_items(tmp_path):
    np.save(tmp_path / "v.npy", feature_matrix(rows=77))
    with pytest.raises(InputError, match=r"v\.npy has 77 rows, .* has item 77"):
        features.match_rows(inspect_visual(tmp_path), ITEMS)
    with pytest.raises(InputError, match="has item -1"):
        features.match_rows(inspect_visual(tmp_path), pa.array([-1, 3]))


def test_ids_of_another_type_than_the_interactions(tmp_path):
    np.save(tmp_path / "v.npy", feature_matrix())
    with pytest.raises(InputError, match=r"rows by integer item id, but .* are strings; list each row's id"):
        features.match_rows(inspect_visual(tmp_path), pa.array(["a", "b"]))
    write_feature_parquet(tmp_path / "v.parquet", [1, 2], [[1.0]] * 2, pa.list_(pa.float32()))
    source = inspect_visual(tmp_path, "v.parquet")
    assert features.match_rows(source, pa.array(["x", "2", "01"])).tolist() == [-1, 1]
    assert not features.has_text_ids({"v": source})


def test_no_item_in_common(tmp_path, ray_local):
    write_feature_parquet(tmp_path / "v.parquet", [100, 200], [[1.0]] * 2, pa.list_(pa.float32()))
    with pytest.raises(InputError, match=r"none of its ids \(such as 100\) is an item of the catalog \(such as 30"):
        features.match_rows(inspect_visual(tmp_path, "v.parquet"), ITEMS)
    write_feature_parquet(tmp_path / "v.parquet", [3, 200], [None, [1.0]], pa.list_(pa.float32()))
    assert "no item of the catalog has a vector" in refused_rows(inspect_visual(tmp_path, "v.parquet"))
