"""Raw features to catalog features against plain numpy; every kind of bad input."""

import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gtc_dist.config import ModalityConfig
from gtc_dist.data import formats, storage
from gtc_dist.data.catalog import CatalogWriter
from gtc_dist.data.scratch import Scratch
from gtc_dist.errors import InputError
from gtc_dist.prepare import feature_files, features
from gtc_dist.prepare.features import FeatureTransform, Gathered

ROWS, WIDTH = 40, 6


def matrix(seed: int = 0, rows: int = ROWS, width: int = WIDTH) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(rows, width)) @ rng.normal(size=(width, width)) + 3).astype(np.float32)


def gathered_of(x: np.ndarray, present: np.ndarray | None = None) -> Gathered:
    return Gathered(x, np.ones(len(x), bool) if present is None else present, 0)


@pytest.fixture
def scratch():
    with Scratch() as scratch:
        yield scratch


def inspect(folder: Path | str, path: str = "v.npy", **settings) -> feature_files.Source:
    return feature_files.inspect_features("visual", ModalityConfig(path=path, **settings), str(folder))


def read_rows(source: feature_files.Source) -> np.ndarray:
    """All rows of a source, chunk by chunk, without Ray; NaN where there is no vector."""
    out = np.full((source.rows, source.width), np.nan)
    for chunk in source.chunks:
        for table in feature_files.read_feature_chunk(chunk):
            assert table.column_names == ["row", "vector"], table
            out[table["row"].to_numpy()] = np.stack(table["vector"].to_numpy(zero_copy_only=False))
    return out


def write_parquet(path: Path, ids, rows: list, type: pa.DataType) -> None:
    pq.write_table(pa.table({"item_id": ids, "vector": pa.array(rows, type)}), path, row_group_size=7)


# --- the transform ---


def test_standardised_over_the_items_that_have_a_vector():
    x = matrix() * [1, 100, 1e-3, 1e4, 1, 1]
    present = np.random.default_rng(1).random(ROWS) < 0.8
    transform = features.fit_feature_transform(gathered_of(x, present))
    np.testing.assert_allclose(transform.mean, x[present].mean(0), rtol=1e-12)
    np.testing.assert_allclose(transform.std, x[present].std(0), rtol=1e-9)
    out = transform.apply(x[present])
    assert out.dtype == np.float16
    np.testing.assert_allclose(out, (x[present] - x[present].mean(0)) / x[present].std(0), rtol=1e-3, atol=1e-3)


def test_digits_survive_a_large_mean():
    x = matrix().astype(np.float64) + 1e9
    np.testing.assert_allclose(features.fit_feature_transform(gathered_of(x)).std, x.std(0), rtol=1e-6)


def test_statistics_do_not_depend_on_the_size_of_blocks(monkeypatch):
    whole = [features.fit_feature_transform(gathered_of(matrix()), pca) for pca in (None, 3)]
    monkeypatch.setattr(features, "BLOCK_BYTES", 8 * WIDTH * 3)  # 3 rows
    for one, other in zip(
        whole, [features.fit_feature_transform(gathered_of(matrix()), pca) for pca in (None, 3)], strict=True
    ):
        np.testing.assert_allclose(one.std, other.std, rtol=1e-9)
        np.testing.assert_allclose(one.apply(matrix()), other.apply(matrix()), atol=2e-3)


@pytest.mark.parametrize("constant", [0.0, 0.1, -7.3, 1e30])
def test_a_dimension_without_variance_becomes_zeros(constant):
    x = matrix()
    x[:, 2] = constant
    transform = features.fit_feature_transform(gathered_of(x))
    assert transform.std[2] == 0
    out = transform.apply(x)
    assert (out[:, 2] == 0).all()
    assert np.isfinite(out).all()
    assert (
        features.fit_feature_transform(gathered_of(np.full((9, 4), constant, np.float32)), 2).apply(x[:, :4] * 0) == 0
    ).all()


def test_values_beyond_float16_are_clipped():
    transform = FeatureTransform(np.zeros(2), np.array([1e-8, 1.0]))
    assert transform.apply(np.array([[1.0, -1e6]], np.float32)).tolist() == [[65504.0, -65504.0]]


@pytest.mark.parametrize("width", [1, 3, WIDTH])
def test_pca_is_the_svd_on_one_common_scale(width):
    x = matrix()
    transform = features.fit_feature_transform(gathered_of(x), width)
    centred = x.astype(np.float64) - x.mean(0)
    _, singular, axes = np.linalg.svd(centred, full_matrices=False)
    variance = singular**2 / ROWS
    np.testing.assert_allclose(transform.explained_variance, variance[:width].sum() / variance.sum(), rtol=1e-9)
    np.testing.assert_allclose(np.abs(np.sum(transform.components * axes[:width], axis=1)), 1, rtol=1e-6)
    peaks = transform.components[np.arange(width), np.abs(transform.components).argmax(1)]
    assert (peaks > 0).all()  # signs are fixed
    out = transform.apply(x).astype(np.float64)
    np.testing.assert_allclose(out.var(0), variance[:width] / variance[:width].mean(), rtol=5e-3)
    np.testing.assert_allclose(out.var(0).mean(), 1, rtol=5e-3)
    if width == WIDTH:  # nothing lost: distances are those of the raw vectors up to the scale
        raw = np.linalg.norm(x[:, None] - x[None], axis=2)
        new = np.linalg.norm(out[:, None] - out[None], axis=2)
        np.testing.assert_allclose(new * transform.std[0], raw, atol=0.05)


@pytest.mark.parametrize("pca", [None, 2])
def test_written_transform_gives_new_vectors_the_same_features(tmp_path, scratch, pca):
    x, present = matrix(), np.arange(ROWS) % 5 != 0
    transform = features.fit_feature_transform(gathered_of(x, present), pca)
    entry, out = features.write_features(
        CatalogWriter(str(tmp_path)), "visual", gathered_of(x, present), transform, scratch
    )
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
        writer, "visual", gathered_of(matrix()), features.fit_feature_transform(gathered_of(matrix())), scratch
    )
    assert isinstance(out, np.memmap)
    names = sorted(name for name in writer.files if "part-" in name)
    assert [(writer.files[n].first, writer.files[n].rows) for n in names] == [(0, 16), (16, 16), (32, 8)]
    tables = [formats.read_table(str(tmp_path / name)) for name in names]
    assert np.array_equal(np.concatenate([np.stack(t["vector"].to_numpy()) for t in tables]), out)
    assert np.concatenate([t["item"].to_numpy() for t in tables]).tolist() == list(range(ROWS))


# --- reading ---


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8", ">f4", "i4", "u1"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_npy_of_any_number_type(tmp_path, monkeypatch, dtype, order):
    monkeypatch.setattr(feature_files, "CHUNK_BYTES", 100)
    x = np.abs(matrix()).astype(dtype, order=order)
    np.save(tmp_path / "v.npy", x)
    source = inspect(tmp_path)
    assert len(source.chunks) > 1 or order == "F"
    assert source.dtype == ("float16" if dtype == "f2" else "float32")
    assert np.array_equal(read_rows(source), x.astype(source.dtype))


@pytest.mark.parametrize("order", ["C", "F"])
def test_npy_in_object_storage_is_read_by_range(s3, monkeypatch, order):
    monkeypatch.setattr(feature_files, "CHUNK_BYTES", 300)
    x = np.asarray(matrix(), order=order)
    with tempfile.NamedTemporaryFile(suffix=".npy") as file:
        np.save(file, x)
        file.flush()
        storage.copy_file(file.name, f"{s3}/v.npy")
    assert np.array_equal(read_rows(inspect(s3)), x)


VECTOR_TYPES = [
    pa.list_(pa.float32()),
    pa.large_list(pa.float64()),
    pa.list_(pa.float16(), WIDTH),
    pa.list_(pa.float32(), WIDTH),
    pa.list_(pa.int32()),
]


@pytest.mark.parametrize("type", VECTOR_TYPES, ids=str)
def test_parquet_lists_of_any_kind(tmp_path, monkeypatch, type):
    monkeypatch.setattr(feature_files, "CHUNK_BYTES", 150)
    x = np.round(matrix()).astype(np.float16)
    rows = [[t(v) for v in row] for row in x.tolist() for t in [int if type.value_type == pa.int32() else np.float16]]
    rows[3] = rows[8] = None
    for part in range(2):
        write_parquet(
            tmp_path / f"p{part}.parquet", list(range(20 * part, 20 * part + 20)), rows[20 * part :][:20], type
        )
    source = inspect(tmp_path, "p*.parquet")
    assert source.ids.to_pylist() == list(range(ROWS))
    assert source.dtype == ("float16" if type.value_type == pa.float16() else "float32")
    expected = x.astype(np.float64)
    expected[[3, 8]] = np.nan  # a null vector is no vector
    np.testing.assert_array_equal(read_rows(source), expected)


ITEMS = pa.array([30, 3, 77, 12, 5], pa.int32())  # in index order


@pytest.mark.parametrize("kind", [".npy", ".txt", ".parquet", "vectors in parquet"])
@pytest.mark.parametrize("text", [False, True])
def test_rows_go_to_their_items(tmp_path, ray_local, kind, text):
    """Ids in any order; one item without a vector, two vectors without an item."""
    x = matrix(rows=6)
    row_ids = [5, 30, 1000, 77, 4, 3]
    row_ids = [str(i) for i in row_ids] if text else row_ids
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
        write_parquet(tmp_path / "v.parquet", row_ids, x.tolist(), pa.list_(pa.float32()))
    sources = {"visual": inspect(tmp_path, **settings)}
    assert sorted(features.item_ids(sources, items.type).to_pylist()) == sorted(row_ids)
    for memory in (1, 3 * WIDTH * 8, 1 << 30):  # ranges of one item, of some, of all
        with Scratch(memory_bytes=memory) as scratch:
            found = features.gather_features(sources, items, scratch)["visual"]
            assert found.unknown == 2
            assert found.present.tolist() == [True, True, True, False, True]
            assert np.array_equal(found.vectors[found.present], x[[1, 5, 3, 0]])
            assert (found.vectors[~found.present] == 0).all()
            assert list(scratch.path.iterdir()) == [Path(found.vectors.filename)]


def test_several_modalities_and_row_numbers_as_ids(tmp_path, ray_local, scratch, monkeypatch):
    monkeypatch.setattr(feature_files, "CHUNK_BYTES", 2000)
    wide, narrow = matrix(rows=78), matrix(1, rows=90, width=3).astype(np.float16)
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


# --- bad input ---


def refused(*args, **settings) -> str:
    with pytest.raises(InputError) as caught:
        inspect(*args, **settings)
    return str(caught.value)


def refused_rows(source: feature_files.Source, items: pa.Array = ITEMS) -> str:
    """What reading says, through Ray."""
    with pytest.raises(InputError) as caught, Scratch() as scratch:
        features.gather_features({"visual": source}, items, scratch)
    assert not scratch.path.exists()
    return str(caught.value)


def test_a_missing_file_is_named_with_its_key(tmp_path):
    assert f"data.features.visual.path: {tmp_path}/v.npy does not exist" in refused(tmp_path)
    np.save(tmp_path / "v.npy", matrix())
    assert f"data.features.visual.ids: {tmp_path}/i.npy does not exist" in refused(tmp_path, ids="i.npy")


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.array([[1, "a"]], object), "Python objects"),
        (np.array([["a", "b"]]), "must be float or integer"),
        (np.ones((3, 2), complex), "must be float or integer"),
        (np.ones(5, np.float32), r"has shape (5,)"),
        (np.ones((5, 0), np.float32), r"has shape (5, 0)"),
        (np.ones((2, 2, 2), np.float32), r"has shape (2, 2, 2)"),
    ],
)
def test_arrays_that_are_no_matrix_of_numbers(tmp_path, array, message):
    np.save(tmp_path / "v.npy", array, allow_pickle=True)
    found = refused(tmp_path)
    assert message in found
    assert str(tmp_path / "v.npy") in found


def test_broken_npy_files(tmp_path):
    (tmp_path / "v.npy").write_bytes(b"no array")
    assert f"{tmp_path}/v.npy is not a .npy file" in refused(tmp_path)
    np.save(tmp_path / "v.npy", matrix())
    data = (tmp_path / "v.npy").read_bytes()
    (tmp_path / "v.npy").write_bytes(data[:-100])
    assert "v.npy is truncated: " in refused(tmp_path)
    (tmp_path / "v.bin").write_bytes(data)
    assert "v.bin is neither .npy nor .parquet" in refused(tmp_path, "v.bin")


def test_broken_or_unsuitable_parquet_files(tmp_path):
    path = tmp_path / "v.parquet"
    write_parquet(path, [1, 2], [[1.0], [2.0]], pa.list_(pa.float32()))
    assert "no column 'asin'; columns found: item_id, vector" in refused(tmp_path, "v.parquet", id_column="asin")
    assert "'item_id' has type int64; lists of numbers" in refused(tmp_path, "v.parquet", vector_column="item_id")
    assert "visual.ids goes with .npy" in refused(tmp_path, "v.parquet", ids="x.txt")
    path.write_bytes(path.read_bytes()[:-20])
    assert f"{path} is not a readable Parquet file" in refused(tmp_path, "v.parquet")
    write_parquet(path, [1.5, 2.5], [[1.0], [2.0]], pa.list_(pa.float32()))
    assert "'item_id' has type double" in refused(tmp_path, "v.parquet")
    write_parquet(path, [1, 2], [None, None], pa.list_(pa.float32()))
    assert "hold no vector" in refused(tmp_path, "v.parquet")


def test_ids_that_are_null_repeated_or_too_few(tmp_path):
    write_parquet(tmp_path / "v.parquet", [1, None], [[1.0], [2.0]], pa.list_(pa.float32()))
    assert "v.parquet: the item id of row 2 is null" in refused(tmp_path, "v.parquet")
    write_parquet(tmp_path / "v.parquet", [7, 1, 7], [[1.0]] * 3, pa.list_(pa.float32()))
    assert "item 7 has 2 vectors" in refused(tmp_path, "v.parquet")
    np.save(tmp_path / "v.npy", matrix())
    (tmp_path / "i.txt").write_text("1\n2\n")
    assert f"i.txt has 2 ids, but {tmp_path}/v.npy has {ROWS} rows" in refused(tmp_path, ids="i.txt")
    np.save(tmp_path / "i.npy", np.ones(ROWS))
    assert "i.npy holds float64" in refused(tmp_path, ids="i.npy")


def test_pca_wider_than_the_vectors(tmp_path):
    np.save(tmp_path / "v.npy", matrix())
    assert "data.features.visual.pca is 7, but the vectors have just 6" in refused(tmp_path, pca=7)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_name_file_and_item(tmp_path, ray_local, value):
    x = matrix(rows=80)
    x[12, 4] = value
    np.save(tmp_path / "v.npy", x)
    message = refused_rows(inspect(tmp_path))
    assert (
        f"{tmp_path}/v.npy: the vector of item 12 (row 13) has a value that is not finite ({value}, position 4)"
        in message
    )


def test_values_that_are_not_finite_in_parquet_and_beyond_float32(tmp_path, ray_local):
    type = pa.list_(pa.float64())
    write_parquet(tmp_path / "a.parquet", ["x", "y"], [[1.0, 2.0]] * 2, type)
    for value in (None, 1e300):
        write_parquet(tmp_path / "b.parquet", ["z", "w"], [[1.0, 2.0], [1.0, value]], type)
        message = refused_rows(inspect(tmp_path, "*.parquet"), pa.array(["x", "z"]))
        assert f"{tmp_path}/b.parquet: the vector of item 'w' (row 2) has a value that is not finite" in message


def test_vectors_of_another_width_name_file_and_item(tmp_path, ray_local):
    type = pa.list_(pa.float32())
    write_parquet(tmp_path / "v.parquet", [30, 3, 5], [[1.0, 2.0], [1.0, 2.0], [1.0, 2.0, 3.0]], type)
    message = refused_rows(inspect(tmp_path, "v.parquet"))
    assert "v.parquet: the vector of item 5 (row 3) has 3 values where others have 2" in message


def test_fewer_rows_than_items(tmp_path):
    np.save(tmp_path / "v.npy", matrix(rows=77))
    with pytest.raises(InputError, match=r"v\.npy has 77 rows, .* have item 77"):
        features.match_rows(inspect(tmp_path), ITEMS)
    with pytest.raises(InputError, match="have item -1"):
        features.match_rows(inspect(tmp_path), pa.array([-1, 3]))


def test_ids_of_another_type_than_the_interactions(tmp_path):
    np.save(tmp_path / "v.npy", matrix())
    with pytest.raises(InputError, match=r"rows by integer item id, but .* are strings; list each row's id"):
        features.match_rows(inspect(tmp_path), pa.array(["a", "b"]))
    write_parquet(tmp_path / "v.parquet", ["1", "2"], [[1.0]] * 2, pa.list_(pa.float32()))
    with pytest.raises(InputError, match=r"v\.parquet are string, but those of the interactions int32"):
        features.match_rows(inspect(tmp_path, "v.parquet"), ITEMS)


def test_no_item_in_common(tmp_path, ray_local):
    write_parquet(tmp_path / "v.parquet", [100, 200], [[1.0]] * 2, pa.list_(pa.float32()))
    with pytest.raises(
        InputError, match=r"none of its ids \(such as 100\) is an item of the interactions \(such as 30"
    ):
        features.match_rows(inspect(tmp_path, "v.parquet"), ITEMS)
    write_parquet(tmp_path / "v.parquet", [3, 200], [None, [1.0]], pa.list_(pa.float32()))
    assert "no item of the interactions has a vector" in refused_rows(inspect(tmp_path, "v.parquet"))
