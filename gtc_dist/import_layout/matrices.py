"""Layout `mmssl`: user-item matrices of a given split, as MMSSL, LLMRec and DiffMM publish them.

A pickled SciPy matrix [users, items] for each split (https://github.com/HKUDS/DiffMM, DataHandler.py: trnMat.pkl,
valMat.pkl, tstMat.pkl; https://github.com/HKUDS/MMSSL, main.py: train_mat) or the same as JSON, user -> list of items
(MMSSL, utility/load_data.py: train.json, val.json, test.json). An entry that is not 0 is an interaction. The row number
of image_feat.npy, text_feat.npy and audio_feat.npy is the item's column.
"""

import json
from functools import partial

import numpy as np
import pyarrow as pa
import scipy.sparse

from gtc_dist.data import storage
from gtc_dist.data.catalog import SPLITS
from gtc_dist.errors import InputError
from gtc_dist.import_layout.matrix_pickles import unpickle_matrix
from gtc_dist.import_layout.tables import (
    ImportedTables,
    LayoutWriter,
    copy_vectors,
    files_in,
    find_vectors,
    missing_files,
    write_blocks,
)
from gtc_dist.progress import ProgressPrinter

NAMINGS = (  # files of train, valid and test
    ("trnMat.pkl", "valMat.pkl", "tstMat.pkl"),
    ("train_mat", "val_mat", "test_mat"),
    ("train.json", "val.json", "test.json"),
)


def find_matrices(folder: str) -> LayoutWriter:
    """Find the files of the layout. Raises InputError for a missing one, or vectors that are no matrix of numbers."""
    names = files_in(folder)
    found = next((naming for naming in NAMINGS if set(naming) <= set(names)), None)
    if found is None:
        raise missing_files(folder, "; nor ".join(", ".join(naming) for naming in NAMINGS), names)
    vectors = find_vectors(folder, names)
    return partial(write_matrices, folder, dict(zip(SPLITS, found, strict=True)), vectors)


def write_matrices(
    folder: str, splits: dict[str, str], vectors: dict[str, tuple[str, int]], out: str, progress: ProgressPrinter
) -> ImportedTables:
    """Write the splits and vectors. Raises InputError for a file that is no such matrix, or vectors of fewer items."""
    rows = {}
    for split, name in splits.items():
        uri = storage.join(folder, name)
        users, items, count = read_interaction_matrix(uri)
        for vector_file, held in vectors.values():
            if held < count:
                raise InputError(
                    f"{uri} has {count} items, but {storage.join(folder, vector_file)} has {held} rows, one for each "
                    "item; take both from one release"
                )
        table = pa.table({"user_id": users.astype(np.int32), "item_id": items.astype(np.int32)})
        rows[split] = write_blocks(storage.join(out, f"{split}.parquet"), [table], progress, uri)
    return ImportedTables(rows, [], "given", copy_vectors(folder, out, vectors))


def read_interaction_matrix(uri: str) -> tuple[np.ndarray, np.ndarray, int]:
    """User and item of each entry that is not 0, in order of users, then items; and the number of items.

    Raises:
        InputError: the file is no such matrix, or holds a class that is refused.
    """
    data = storage.read_bytes(uri)
    try:
        matrix = _matrix_of_lists(json.loads(data)) if uri.endswith(".json") else unpickle_matrix(uri, data)
        matrix.sum_duplicates()
        matrix.eliminate_zeros()
        entries = matrix.tocoo()
    except InputError:
        raise
    except Exception as error:  # unpickling broken bytes raises almost anything
        expected = "JSON of user -> list of items" if uri.endswith(".json") else "pickled SciPy matrix [users, items]"
        message = " ".join(str(error).split())
        raise InputError(f"{uri} is no {expected}; download it again: {message}") from error
    return entries.row, entries.col, entries.shape[1]


def _matrix_of_lists(lists: dict[str, list[int]]) -> scipy.sparse.csr_matrix:
    users = np.repeat([int(user) for user in lists], [len(items) for items in lists.values()])
    items = np.array([item for found in lists.values() for item in found], np.int64)
    return scipy.sparse.coo_matrix((np.ones(len(users)), (users, items))).tocsr()
