"""The layout `mmssl`: pickled matrices and lists in JSON; pickles of anything else are refused."""

import json
import os
import pickle

import numpy as np
import pytest
import scipy.sparse
from imports import inspected, refusal, rows, run_import

from gtc_dist.import_layout.matrices import NAMINGS, read_interaction_matrix

ENTRIES = {"train": [(0, 1), (0, 3), (2, 0)], "valid": [(1, 3)], "test": [(2, 2)]}
USERS, ITEMS = 3, 4


def matrix_of(pairs, kind=scipy.sparse.coo_matrix, dtype=np.float64):
    users, items = np.array(pairs).T
    return kind((np.ones(len(pairs), dtype), (users, items)), shape=(USERS, ITEMS))


def write_folder(folder, naming=NAMINGS[0], kind=scipy.sparse.coo_matrix, protocol=3) -> None:
    folder.mkdir(parents=True)
    for name, pairs in zip(naming, ENTRIES.values(), strict=True):
        lists = {str(user): [item for u, item in pairs if u == user] for user in range(USERS)}
        is_json = name.endswith(".json")
        data = json.dumps(lists).encode() if is_json else pickle.dumps(matrix_of(pairs, kind), protocol)
        (folder / name).write_bytes(data)
    for name in ("image_feat", "audio_feat"):
        np.save(folder / f"{name}.npy", np.arange(ITEMS * 2, dtype=np.float16).reshape(ITEMS, 2))


@pytest.mark.parametrize("protocol", [0, 2, 5])
@pytest.mark.parametrize("naming", NAMINGS, ids=lambda naming: naming[0])
@pytest.mark.parametrize("kind", ["coo_matrix", "csr_matrix", "csc_array"])
def test_splits_and_vectors(tmp_path, naming, kind, protocol):
    write_folder(tmp_path / "raw", naming, getattr(scipy.sparse, kind), protocol)
    run_import("mmssl", tmp_path / "raw", tmp_path / "out")
    assert {split: rows(tmp_path / "out", split) for split in ENTRIES} == ENTRIES
    assert np.load(tmp_path / "out" / "acoustic.npy").tolist() == [[0, 1], [2, 3], [4, 5], [6, 7]]
    config = inspected(tmp_path / "out")
    assert config.data.split.method == "given"
    assert list(config.data.features) == ["visual", "acoustic"]


def test_zeros_are_no_interactions_and_repeated_entries_are_one(tmp_path):
    matrix = scipy.sparse.coo_matrix(([1.0, 0.0, 2.0, 3.0], ([1, 0, 1, 0], [2, 1, 2, 0])), shape=(2, 3))
    (tmp_path / "m").write_bytes(pickle.dumps(matrix))
    users, items, count = read_interaction_matrix(str(tmp_path / "m"))
    assert (users.tolist(), items.tolist(), count) == ([0, 1], [0, 2], 3)


class Harm:
    def __init__(self, function, *args):
        self.function, self.args = function, args

    def __reduce__(self):
        return self.function, self.args


@pytest.mark.parametrize("function", [os.mkdir, eval, np.load, getattr], ids=lambda function: function.__name__)
def test_a_pickle_with_another_class_is_refused_and_not_run(tmp_path, function):
    write_folder(tmp_path / "raw")
    harm = Harm(function, str(tmp_path / "made"))
    (tmp_path / "raw" / "valMat.pkl").write_bytes(pickle.dumps([matrix_of([(0, 0)]), harm]))
    error = refusal("mmssl", tmp_path / "raw", tmp_path / "out")
    assert f"valMat.pkl is a pickle with {function.__module__}.{function.__name__}, which is refused" in error
    assert not (tmp_path / "made").exists()


def broken_matrix(**changed) -> bytes:
    matrix = scipy.sparse.csr_matrix(matrix_of(ENTRIES["train"]))
    for name, value in changed.items():
        setattr(matrix, name, value)
    return pickle.dumps(matrix)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"version https://git-lfs.github.com/spec/v1\n",
        pickle.dumps(np.zeros((2, 2))),
        pickle.dumps([1, 2]),
        broken_matrix(indices=np.array([1, 3, 900], np.int32)),
        broken_matrix(indices=np.array([1, -3, 0], np.int32)),
        broken_matrix(indptr=np.array([0, 2, 2, 400], np.int32)),
        broken_matrix(data=np.array([{}, {}, {}], object)),
        pickle.dumps(matrix_of(ENTRIES["train"]))[:-40],
    ],
    ids=range(9),
)
def test_what_is_no_matrix_is_refused(tmp_path, data):
    write_folder(tmp_path / "raw")
    (tmp_path / "raw" / "trnMat.pkl").write_bytes(data)
    assert "trnMat.pkl is no pickled SciPy matrix" in refusal("mmssl", tmp_path / "raw", tmp_path / "out")


def test_a_coo_matrix_with_indices_out_of_range_is_refused(tmp_path):
    matrix = matrix_of(ENTRIES["train"])
    matrix.col[0] = 10**9
    (tmp_path / "m").write_bytes(pickle.dumps(matrix))
    with pytest.raises(ValueError, match="is no pickled SciPy matrix"):
        read_interaction_matrix(str(tmp_path / "m"))


def test_missing_files_and_vectors_of_another_release(tmp_path):
    write_folder(tmp_path / "raw")
    np.save(tmp_path / "raw" / "audio_feat.npy", np.zeros((ITEMS - 1, 2)))
    assert "trnMat.pkl has 4 items, but" in refusal("mmssl", tmp_path / "raw", tmp_path / "out")
    np.save(tmp_path / "raw" / "audio_feat.npy", np.array([{}, {}]), allow_pickle=True)
    assert "it holds Python objects" in refusal("mmssl", tmp_path / "raw", tmp_path / "out")
    for name in ("image_feat.npy", "audio_feat.npy"):
        (tmp_path / "raw" / name).unlink()
    (tmp_path / "raw" / "image_feat.npy.zip").write_bytes(b"")
    error = refusal("mmssl", tmp_path / "raw", tmp_path / "out")
    assert "has no image_feat.npy or text_feat.npy or audio_feat.npy" in error
    assert error.endswith("unpack image_feat.npy.zip first")
    (tmp_path / "raw" / "tstMat.pkl").unlink()
    assert "has no trnMat.pkl, valMat.pkl, tstMat.pkl" in refusal("mmssl", tmp_path / "raw", tmp_path / "out")
