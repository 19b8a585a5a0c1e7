"""Raw feature files of every format; every kind of invalid file."""

import tempfile

import numpy as np
import pyarrow as pa
import pytest
from raw_files import (
    ROWS,
    WIDTH,
    catalog_config,
    feature_matrix,
    inspect_visual,
    write_feature_parquet,
    write_raw,
)

from gtc_dist.data import storage
from gtc_dist.data.output_folder import DATASET_FILES, FEATURES_FILES, IMPORT_FILES
from gtc_dist.errors import InputError
from gtc_dist.prepare import build_catalog, feature_files
from gtc_dist.prepare.vector_formats import feature_chunk


def read_rows(source: feature_files.FeatureSource) -> np.ndarray:
    """All rows of a source, chunk by chunk, without Ray; NaN where there is no vector."""
    out = np.full((source.rows, source.width), np.nan)
    for chunk in source.chunks:
        for table in feature_files.read_feature_chunk(chunk):
            assert table.column_names == ["row", "vector"], table
            out[table["row"].to_numpy()] = np.stack(table["vector"].to_numpy(zero_copy_only=False))
    return out


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8", ">f4", "i4", "u1"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_npy_of_any_number_type(tmp_path, monkeypatch, dtype, order):
    monkeypatch.setattr(feature_chunk, "CHUNK_BYTES", 100)
    x = np.abs(feature_matrix()).astype(dtype, order=order)
    np.save(tmp_path / "v.npy", x)
    source = inspect_visual(tmp_path)
    assert len(source.chunks) > 1 or order == "F"
    assert source.dtype == ("float16" if dtype == "f2" else "float32")
    assert np.array_equal(read_rows(source), x.astype(source.dtype))


@pytest.mark.parametrize("order", ["C", "F"])
def test_npy_in_object_storage_is_read_by_range(s3, monkeypatch, order):
    monkeypatch.setattr(feature_chunk, "CHUNK_BYTES", 300)
    x = np.asarray(feature_matrix(), order=order)
    with tempfile.NamedTemporaryFile(suffix=".npy") as file:
        np.save(file, x)
        file.flush()
        storage.copy_file(file.name, f"{s3}/v.npy")
    assert np.array_equal(read_rows(inspect_visual(s3)), x)


VECTOR_TYPES = [
    pa.list_(pa.float32()),
    pa.large_list(pa.float64()),
    pa.list_(pa.float16(), WIDTH),
    pa.list_(pa.float32(), WIDTH),
    pa.list_(pa.int32()),
]


@pytest.mark.parametrize("type", VECTOR_TYPES, ids=str)
def test_parquet_lists_of_any_kind(tmp_path, monkeypatch, type):
    monkeypatch.setattr(feature_chunk, "CHUNK_BYTES", 150)
    x = np.round(feature_matrix()).astype(np.float16)
    rows = [[t(v) for v in row] for row in x.tolist() for t in [int if type.value_type == pa.int32() else np.float16]]
    rows[3] = rows[8] = None
    for part in range(2):
        write_feature_parquet(
            tmp_path / f"p{part}.parquet", list(range(20 * part, 20 * part + 20)), rows[20 * part :][:20], type
        )
    source = inspect_visual(tmp_path, "p*.parquet")
    assert source.ids.to_pylist() == list(range(ROWS))
    assert source.dtype == ("float16" if type.value_type == pa.float16() else "float32")
    expected = x.astype(np.float64)
    expected[[3, 8]] = np.nan  # null: no vector
    np.testing.assert_array_equal(read_rows(source), expected)


def refused(*args, **settings) -> str:
    with pytest.raises(InputError) as caught:
        inspect_visual(*args, **settings)
    return str(caught.value)


def test_a_missing_file_is_named_with_its_key(tmp_path):
    assert f"data.features.visual.path: {tmp_path}/v.npy does not exist" in refused(tmp_path)
    np.save(tmp_path / "v.npy", feature_matrix())
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
def test_arrays_that_are_not_a_matrix_of_numbers(tmp_path, array, message):
    np.save(tmp_path / "v.npy", array, allow_pickle=True)
    found = refused(tmp_path)
    assert message in found
    assert str(tmp_path / "v.npy") in found


def test_broken_npy_files(tmp_path):
    (tmp_path / "v.npy").write_bytes(b"no array")
    assert f"{tmp_path}/v.npy is not a readable .npy file" in refused(tmp_path)
    np.save(tmp_path / "v.npy", feature_matrix())
    data = (tmp_path / "v.npy").read_bytes()
    (tmp_path / "v.npy").write_bytes(data[:-100])
    assert "v.npy is truncated: " in refused(tmp_path)
    (tmp_path / "v.bin").write_bytes(data)
    assert "v.bin has an unknown extension; vectors are in .npy, .npz, .pt" in refused(tmp_path, "v.bin")


def test_broken_or_unsuitable_parquet_files(tmp_path):
    path = tmp_path / "v.parquet"
    write_feature_parquet(path, [1, 2], [[1.0], [2.0]], pa.list_(pa.float32()))
    assert "no column 'asin'; columns found: item_id, vector" in refused(tmp_path, "v.parquet", id_column="asin")
    assert "'item_id' has type int64; expected lists of" in refused(tmp_path, "v.parquet", vector_column="item_id")
    assert "visual.ids is for .npy files" in refused(tmp_path, "v.parquet", ids="x.txt")
    path.write_bytes(path.read_bytes()[:-20])
    assert f"{path} is not a readable Parquet file" in refused(tmp_path, "v.parquet")
    write_feature_parquet(path, [1.5, 2.5], [[1.0], [2.0]], pa.list_(pa.float32()))
    assert "'item_id' has type double" in refused(tmp_path, "v.parquet")
    write_feature_parquet(path, [1, 2], [None, None], pa.list_(pa.float32()))
    assert "hold no vector" in refused(tmp_path, "v.parquet")


def test_ids_that_are_null_repeated_or_too_few(tmp_path):
    write_feature_parquet(tmp_path / "v.parquet", [1, None], [[1.0], [2.0]], pa.list_(pa.float32()))
    assert "v.parquet: the item id of row 2 is null" in refused(tmp_path, "v.parquet")
    write_feature_parquet(tmp_path / "v.parquet", [7, 1, 7], [[1.0]] * 3, pa.list_(pa.float32()))
    assert "item 7 has 2 vectors" in refused(tmp_path, "v.parquet")
    np.save(tmp_path / "v.npy", feature_matrix())
    (tmp_path / "i.txt").write_text("1\n2\n")
    assert f"i.txt has 2 ids, but {tmp_path}/v.npy has {ROWS} rows" in refused(tmp_path, ids="i.txt")
    np.save(tmp_path / "i.npy", np.ones(ROWS))
    assert "i.npy holds float64" in refused(tmp_path, ids="i.npy")


def test_pca_wider_than_the_vectors(tmp_path):
    np.save(tmp_path / "v.npy", feature_matrix())
    assert "data.features.visual.pca is 7, but the vectors have only 6" in refused(tmp_path, pca=7)


@pytest.mark.parametrize(
    ("files", "command"),
    [(FEATURES_FILES, "gtc features"), (DATASET_FILES, "tools/make_dataset.py"), (IMPORT_FILES, "gtc import")],
)
def test_a_folder_that_a_command_has_not_finished(folder, files, command):
    """Of raw files, or of vectors alone; a crash after the manifest leaves both files."""
    write_raw(folder)
    config = catalog_config(folder, f"{folder}/catalog")
    build_catalog.inspect_raw_data(config)
    storage.write_json(f"{folder}/{files.marker}", {})
    with pytest.raises(
        InputError, match=rf"{folder} is not complete: {command} is writing it, or was interrupted; run"
    ):
        build_catalog.inspect_raw_data(config)
    storage.write_json(f"{folder}/{files.manifest}", {})
    build_catalog.inspect_raw_data(config)
