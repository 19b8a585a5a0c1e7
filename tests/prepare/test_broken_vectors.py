"""Broken files of vectors in tables of text, `.npz` and `.pt`: each gives an InputError in one line with the file, the
problem and the remedy, and leaves no catalog. `.npy` and Parquet: test_broken_inputs.py."""

import gzip

import numpy as np
import pytest
import torch
from broken import EIGHT, NO_NUL, NPY, VECTORS, Case, npz, one, patched, refused, saved
from hypothesis import given, settings
from hypothesis import strategies as st
from raw_files import inspect_visual

from gtc_dist.errors import InputError
from gtc_dist.prepare import feature_files

TEXTS = b"item_id,vector\n" + b"".join(b"%d,%f %f %f\n" % (n, *row) for n, row in enumerate(VECTORS))
WIDE = b"item_id,v0,v1,v2\n" + b"".join(b"%d,%f,%f,%f\n" % (n, *row) for n, row in enumerate(VECTORS))
LISTS = b"".join(b'{"item_id": %d, "vector": [%f, %f, %f]}\n' % (n, *row) for n, row in enumerate(VECTORS))
NPZ, PT = npz(ids=np.arange(8), vectors=VECTORS), saved({"ids": list(range(8)), "vectors": torch.tensor(VECTORS)})


def broken(name: str, data: bytes, *says: str, column: str = "vector") -> Case:
    """A broken file of vectors."""
    overrides = [f"data.features.v.path={name}", f"data.features.v.vector_column='{column}'"]
    return one(name, data, *says, overrides=overrides)


EARLY = {  # found before Ray starts
    "csv without a byte": broken("v.csv", b"", "Empty CSV file"),
    "csv without a row": broken("v.csv", b"item_id,vector\n", "hold no vector"),
    "csv without a vector": broken("v.csv", b"item_id,vector\n1,\n2,\n", "hold no vector"),
    "csv without the column": broken(
        "v.csv", TEXTS, "has no column 'embedding'; columns found: item_id, vector", column="embedding"
    ),
    "csv without columns of the pattern": broken("v.csv", TEXTS, "has no column 'd*'; columns found", column="d*"),
    "csv without ids": broken("v.csv", TEXTS.replace(b"item_id", b"asin"), "has no column 'item_id'"),
    "csv with a column twice": broken("v.csv", b"item_id,v0,v0\n1,2,3\n", "has 2 columns named 'v0'", column="v*"),
    "csv with a column of words": broken(
        "v.csv",
        WIDE.replace(b"v2\n", b"v2,vendor\n").replace(b"\n", b",x\n").replace(b"vendor,x", b"vendor"),
        "column 'vendor' has type string; expected numbers in all columns that match 'v*'",
        column="v*",
    ),
    "csv with text in a column": broken(
        "v.csv", WIDE + b"8,1,x,3\n", "column 'v1' has type string; expected numbers", column="v*"
    ),
    "csv with titles as vectors": broken(
        "v.csv",
        b"item_id,vector\n1,\n2,red shoe\n",
        "column 'vector' has 'red shoe' in row 2; expected numbers separated by spaces, commas or |, or vector_column",
    ),
    "csv with vectors that numpy has shortened": broken(
        "v.csv", b"item_id,vector\n1,[0.1 0.2 ... 0.3]\n", "column 'vector' has '[0.1 0.2 ... 0.3]' in row 1"
    ),
    "csv with an id twice": broken("v.csv", TEXTS + b"7,1 2 3\n", "item '7' has 2 vectors (1 items"),
    "csv with an empty id": broken("v.csv", TEXTS + b",1 2 3\n", "the item id of row 9 is null or empty"),
    "csv with a short row": broken("v.csv", WIDE + b"9,1\n", "Expected 4 columns, got 2", column="v*"),
    "csv in utf-16": broken("v.csv", TEXTS.decode().encode("utf-16"), NO_NUL),
    "csv that is gzipped": broken("v.csv", gzip.compress(TEXTS), "is gzipped, but its name does not end in .gz"),
    "gz that ends early": broken("v.csv.gz", gzip.compress(TEXTS)[:-20], "Truncated compressed stream"),
    "gz that is no gz": broken("v.jsonl.gz", LISTS, "incorrect header check"),
    "jsonl without a byte": broken("v.jsonl", b"", "Empty JSON stream"),
    "jsonl of nulls": broken("v.jsonl", b'{"item_id": 1, "vector": null}\n', "hold no vector"),
    "jsonl without the column": broken(
        "v.jsonl", LISTS.replace(b"vector", b"v"), "has no column 'vector'; columns found"
    ),
    "jsonl with numbers as vectors": broken(
        "v.jsonl", b'{"item_id": 1, "vector": 2}\n', "'vector' has type int64; expected lists of numbers"
    ),
    "jsonl with lists of words": broken(
        "v.jsonl", b'{"item_id": 1, "vector": ["a"]}\n', "'vector' has type list<item: string>; expected lists of"
    ),
    "jsonl with lists of lists": broken(
        "v.jsonl", b'{"item_id": 1, "vector": [[1]]}\n', "has type list<item: list<item: int64>>; expected lists of"
    ),
    "jsonl with ids of fractions": broken(
        "v.jsonl", b'{"item_id": 1.5, "vector": [1]}\n', "'item_id' has type double; expected integers or strings"
    ),
    "jsonl with ids of two kinds": broken(
        "v.jsonl", LISTS + b'{"item_id": "a", "vector": [1, 2, 3]}\n', "changed from number to string in row 9"
    ),
    "jsonl without an id in a row": broken("v.jsonl", LISTS + b'{"vector": [1, 2, 3]}\n', "item id of row 9 is null"),
    "jsonl with an id twice": broken("v.jsonl", LISTS + LISTS.partition(b"\n")[0], "item 0 has 2 vectors"),
    "json that is one array": broken("v.json", b'[{"item_id": 1}]', "is one JSON array; write one object per line"),
    "jsonl with a null line": broken("v.jsonl", LISTS + b"null\n", "line 9 is null; expected one JSON object"),
    "npz without a byte": broken("v.npz", b"", "is not a readable .npz file (repair it or write it again)"),
    "npz that is npy": broken("v.npz", NPY, "is not a readable .npz file", "File is not a zip file"),
    "npz cut at its end": broken("v.npz", NPZ[:-30], "is not a readable .npz file"),
    "npz with broken ids": broken("v.npz", patched(NPZ, 170, 220), "is not a readable .npz file"),
    "npz with other arrays": broken(
        "v.npz",
        npz(emb=VECTORS, item=np.arange(8)),
        "has no array 'ids'; arrays found: emb, item (write it with",
    ),
    "npz without vectors": broken("v.npz", npz(ids=np.arange(8)), "has no array 'vectors'; arrays found: ids"),
    "npz with ids of objects": broken(
        "v.npz", npz(ids=np.array([1, "a"], object), vectors=VECTORS[:2]), "Object arrays cannot be loaded"
    ),
    "npz with vectors of objects": broken(
        "v.npz", npz(ids=np.arange(2), vectors=np.array([[1, "a"]] * 2, object)), "Python objects, which are refused"
    ),
    "npz with vectors of text": broken(
        "v.npz", npz(ids=np.arange(1), vectors=np.array([["a"]])), "features must be float or integer numbers"
    ),
    "npz with vectors of one dimension": broken("v.npz", npz(ids=np.arange(8), vectors=np.ones(8)), "has shape (8,);"),
    "npz with too few ids": broken("v.npz", npz(ids=np.arange(7), vectors=VECTORS), "has 7 ids, but 8 vectors"),
    "npz with ids of fractions": broken(
        "v.npz", npz(ids=np.ones(8), vectors=VECTORS), "expected one integer or string"
    ),
    "npz with an id twice": broken("v.npz", npz(ids=np.ones(8, int), vectors=VECTORS), "item 1 has 8 vectors"),
    "npz without rows": broken("v.npz", npz(ids=np.arange(0), vectors=np.ones((0, 3))), "hold no vector"),
    "npz with ids beside it": Case(
        {"v.npz": NPZ, "i.txt": b"1\n"},
        ["data.features.v.ids is for .npy files; {raw}/v.npz has the ids in it"],
        ["data.features.v.path=v.npz", "data.features.v.ids=i.txt"],
    ),
    "pt without a byte": broken("v.pt", b"", "is not a .pt file that torch.load(weights_only=True) can read"),
    "pt that is parquet": broken("v.pt", EIGHT, "is not a .pt file that", "save a tensor [rows, width], a dict of"),
    "pt cut at its end": broken("v.pt", PT[:-100], "is not a .pt file that"),
    "pt of arrays, which need code": broken(
        "v.pt", saved({"ids": [1], "vectors": np.ones((1, 2))}), "is not a .pt file"
    ),
    "pt of a list": broken("v.pt", saved([1, 2]), "holds a list; save a tensor [rows, width], a dict of"),
    "pt of one dimension": broken("v.pt", saved(torch.ones(8)), "has shape (8,); features must be a matrix"),
    "pt of complex numbers": broken("v.pt", saved(torch.ones(8, 2, dtype=torch.complex64)), "holds torch.complex64"),
    "pt of truth values": broken("v.pt", saved(torch.ones(8, 2) > 0), "holds torch.bool values"),
    "pt of a sparse matrix": broken("v.pt", saved(torch.eye(8).to_sparse()), "features must be float or integer"),
    "pt without rows": broken("v.pt", saved(torch.ones(0, 2)), "hold no vector"),
    "pt of an empty dict": broken("v.pt", saved({}), "hold no vector"),
    "pt with lists as vectors": broken("v.pt", saved({"ids": [1], "vectors": [[1.0]]}), "`vectors` is a list; save a"),
    "pt with too few ids": broken("v.pt", saved({"ids": [1], "vectors": torch.ones(2, 2)}), "has 1 ids, but 2 vectors"),
    "pt with ids of fractions": broken(
        "v.pt", saved({"ids": torch.ones(2), "vectors": torch.ones(2, 2)}), "has ids of type float"
    ),
    "pt with ids of two kinds": broken("v.pt", saved({1: [1.0], "a": [2.0]}), "ids are not all integers or all"),
    "pt with an id twice": broken("v.pt", saved({"ids": [5, 5], "vectors": torch.ones(2, 2)}), "item 5 has 2 vectors"),
    "pt with text in a vector": broken("v.pt", saved({1: [1.0], 2: ["a"]}), "the value of 2 is not a vector of"),
    "pt of a network": broken(
        "v.pt", saved(torch.nn.Linear(2, 2).state_dict()), "the value of 'weight' is not a vector of numbers"
    ),
    "pt with vectors of two widths": broken(
        "v.pt", saved({1: torch.ones(2), 2: torch.ones(3)}), "the vector of item 2 has 3 values, but others have 2"
    ),
}
LATE = {  # found by the tasks that read the vectors
    "csv with a vector of another width": broken(
        "v.csv", TEXTS + b"8,1 2\n", "{raw}/v.csv: the vector of item '8' (row 9) has 2 values, but others have 3"
    ),
    "csv with text in a vector": broken(
        "v.csv", TEXTS + b"8,1 two 3\n", "the vector of item '8' (row 9) holds 'two', which is not a number"
    ),
    "csv with a number left out": broken(
        "v.csv", TEXTS + b'8,"1,,3"\n', "the vector of item '8' (row 9) holds '', which is not a number"
    ),
    "csv with NaN": broken(
        "v.csv", TEXTS + b"8,1 nan 3\n", "item '8' (row 9) has a value that is not finite (nan, position 1)"
    ),
    "csv with NaN in a column": broken(
        "v.csv", WIDE + b"8,1,NaN,3\n", "item '8' (row 9) has a value that is not finite (nan, position 1)", column="v*"
    ),
    "csv with an empty column": broken("v.csv", WIDE + b"8,1,2,\n", "not finite (nan, position 2)", column="v*"),
    "csv beyond float32": broken("v.csv", TEXTS + b"8,1 2 1e300\n", "item '8' (row 9) has a value that is not"),
    "csv of other items": broken("v.csv", b"item_id,vector\nx,1 2\n", "none of its ids (such as 'x') is an item"),
    "jsonl with a vector of another width": broken(
        "v.jsonl",
        LISTS + b'{"item_id": 8, "vector": []}\n',
        "the vector of item 8 (row 9) has 0 values, but others have",
    ),
    "jsonl with text in a vector": broken(
        "v.jsonl", LISTS + b'{"item_id": 8, "vector": [1, "a", 2]}\n', "changed from number to string in row 9"
    ),
    "jsonl with null in a vector": broken(
        "v.jsonl", LISTS + b'{"item_id": 8, "vector": [1, null, 2]}\n', "item 8 (row 9) has a value that is not finite"
    ),
    "jsonl with NaN": broken(
        "v.jsonl", LISTS + b'{"item_id": 8, "vector": [1, NaN, 2]}\n', "not finite (nan, position 1)"
    ),
    "npz with NaN": broken(
        "v.npz", npz(ids=np.arange(2), vectors=np.array([[1, 2], [np.nan, 1]])), "the vector of item 1 (row 2) has a"
    ),
    "npz with broken vectors": broken(
        "v.npz",
        patched(NPZ, NPZ.index(VECTORS.tobytes()), NPZ.index(VECTORS.tobytes()) + 9),
        "is not a readable .npz file",
        "Bad CRC-32",
    ),
    "pt with inf": broken("v.pt", saved(torch.full((8, 2), torch.inf)), "the vector of item 0 (row 1) has a value"),
    "pt with fewer rows than items": broken("v.pt", saved(torch.ones(3, 2)), "has 3 rows, one for each item id from 0"),
}


@pytest.mark.parametrize("name", EARLY)
def test_refused_before_ray_starts(tmp_path, capsys, name):
    assert "\n" not in refused(EARLY[name], tmp_path)
    assert "starting Ray" not in capsys.readouterr().err


@pytest.mark.parametrize("name", LATE)
def test_refused_after_reading(tmp_path, ray_local, name):
    assert "\n" not in refused(LATE[name], tmp_path)


@settings(deadline=None, max_examples=40)
@given(st.sampled_from(["v.csv", "v.csv.gz", "v.jsonl", "v.npz", "v.pt"]), st.data())
def test_a_file_with_any_bytes_changed_is_read_or_refused(tmp_path_factory, name, draw):
    whole = {"v.csv": TEXTS, "v.csv.gz": gzip.compress(TEXTS), "v.jsonl": LISTS, "v.npz": NPZ, "v.pt": PT}[name]
    data = bytearray(whole)
    for place in draw.draw(st.lists(st.integers(0, len(data) - 1), min_size=1, max_size=4)):
        data[place] = draw.draw(st.integers(0, 255))
    folder = tmp_path_factory.mktemp("any")
    (folder / name).write_bytes(data[: draw.draw(st.integers(0, len(data)))] if draw.draw(st.booleans()) else data)
    message = name
    try:
        for chunk in inspect_visual(folder, name).chunks:
            list(feature_files.read_feature_chunk(chunk))
    except InputError as error:
        message = str(error)
    assert name in message
    assert "\n" not in message
