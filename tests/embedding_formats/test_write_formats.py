"""Each format of an export, read as its users read it, gives the lists of a search by hand."""

import json
import re

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gtc_dist.data import storage
from gtc_dist.embedding_formats import json_lines
from gtc_dist.embedding_formats.faiss_index import FLAT_ITEMS, chosen_kind
from gtc_dist.embedding_formats.loading_text import loading_text
from gtc_dist.embedding_formats.write_formats import OWN_FILES, write_formats
from gtc_dist.inference.embedding_files import write_embeddings

DIM, USERS, ITEMS = 6, 30, 500
TEXTS = ["plain", 'quote "', "line\nbreak", "carriage\rreturn", "\u2028", "é", "back\\slash", "", " 7 "]
IDS = {
    "integers": np.arange(ITEMS) * 7 + 1,
    "negative": np.arange(ITEMS) - 3,
    "large": np.arange(ITEMS) + 2**62,
    "texts": [*TEXTS, *(f"item {n}" for n in range(ITEMS - len(TEXTS)))],
}


def write_parts(out: str, item_ids, dtype: str = "float32") -> dict:
    """The Parquet files of an export, items in three parts; returns its entries of the manifest."""
    import torch

    generator = torch.Generator().manual_seed(0)
    files = {}
    for kind, ids, parts in (("users", [f"u{n}" for n in range(USERS)], [USERS]), ("items", item_ids, [300, 150, 50])):
        rows, first = torch.randn(len(ids), DIM, generator=generator), 0
        for count in parts:
            name = f"{kind}/part-{'new-' if count == 50 else ''}{first:012d}.parquet"
            part = slice(first, first + count)
            files[name] = write_embeddings(pa.array(ids[part]), rows[part], storage.join(out, name), dtype)
            first += count
    return {"dim": DIM, "files": files, "dtype": dtype}


def expected_lists(out: str, top: int = 20) -> list[list]:
    """Each user's best items from the Parquet files."""
    tables = {kind: pq.read_table(f"{out}/{kind}") for kind in ("users", "items")}
    users, items = (np.array(t["embedding"].to_pylist(), np.float64) for t in tables.values())
    ids = tables["items"]["id"].to_pylist()
    return [[ids[n] for n in np.argsort(-scores)[:top]] for scores in users @ items.T]


def loaded_ids(out: str, kind: str) -> list:
    """As README.md reads them."""
    if (found := storage.join(out, f"{kind}_ids.npy")) and storage.exists(found):
        return np.load(found).tolist()
    with open(f"{out}/{kind}_ids.jsonl") as file:
        return [json.loads(line) for line in file]


@pytest.mark.parametrize("ids", IDS)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_numpy_files(tmp_path, ids, dtype):
    out = str(tmp_path)
    export = write_formats(out, write_parts(out, IDS[ids], dtype), {"parquet", "numpy"}, dtype)
    users, items = (np.load(f"{out}/{kind}.npy", mmap_mode="r") for kind in ("users", "items"))
    assert (items.dtype, items.shape) == (np.dtype(dtype), (ITEMS, DIM))
    item_ids = loaded_ids(out, "items")
    assert item_ids == list(IDS[ids])
    assert loaded_ids(out, "users") == [f"u{n}" for n in range(USERS)]
    scores = users.astype(np.float64) @ items.T.astype(np.float64)
    assert [[item_ids[n] for n in np.argsort(-row)[:20]] for row in scores] == expected_lists(out)
    storage.check_files(
        out, {n: storage.WrittenFile(f["bytes"], f["sha256"]) for n, f in export["files"].items()}, True
    )


@pytest.mark.parametrize("ids", IDS)
def test_json_lines(tmp_path, ids, monkeypatch):
    monkeypatch.setattr(json_lines, "TEXT_VALUES", 100)
    out = str(tmp_path)
    write_formats(out, write_parts(out, IDS[ids]), {"parquet", "jsonl"}, "float32")
    rows = {}
    for kind in ("users", "items"):
        with open(f"{out}/{kind}.jsonl") as file:
            rows[kind] = [json.loads(line) for line in file]
    assert [row["id"] for row in rows["items"]] == list(IDS[ids])
    users, items = (np.array([row["vector"] for row in rows[kind]], np.float32) for kind in ("users", "items"))
    exact = np.array(pq.read_table(f"{out}/items")["embedding"].to_pylist(), np.float32)
    assert np.array_equal(items, exact)
    best = [
        [rows["items"][n]["id"] for n in np.argsort(-row)[:20]] for row in users.astype(float) @ items.T.astype(float)
    ]
    assert best == expected_lists(out)


@pytest.mark.parametrize("ids", IDS)
@pytest.mark.parametrize("kind", ["flat", "hnsw", "ivf"])
def test_faiss_index(tmp_path, ids, kind):
    out = str(tmp_path)
    export = write_formats(out, write_parts(out, IDS[ids]), {"parquet", "faiss"}, "float32", kind)
    about, index = export["index"], faiss.read_index(f"{out}/items.faiss")
    assert (about["kind"], about["metric"], index.ntotal) == (kind, "inner product", ITEMS)
    assert index.metric_type == faiss.METRIC_INNER_PRODUCT
    queries = np.array(pq.read_table(f"{out}/users")["embedding"].to_pylist(), np.float32)
    found = index.search(queries, 20)[1].tolist()
    if ids in ("integers", "large"):
        assert about["ids"] == "original"
    else:
        assert about["ids"] == f"items_ids.{'jsonl' if ids == 'texts' else 'npy'}"
        names = loaded_ids(out, "items")
        found = [[names[n] for n in row] for row in found]
    expected = expected_lists(out)
    if kind == "flat":
        assert found == expected
        return
    hits = np.mean([len(set(a) & set(b)) / 20 for a, b in zip(found, expected, strict=True)])
    assert about["recall@20"] == pytest.approx(hits)  # of all users here, who are fewer than the sample
    assert about["recall@20"] >= 0.95
    stored = index.nprobe if kind == "ivf" else faiss.downcast_index(index.index).hnsw.efSearch
    assert stored == about["nprobe" if kind == "ivf" else "efSearch"]


def test_the_number_of_items_decides_on_the_index():
    assert [chosen_kind(n) for n in (1, FLAT_ITEMS, FLAT_ITEMS + 1)] == ["flat", "flat", "ivf"]


def test_parquet_is_left_out_where_it_is_not_asked_for(folder):
    """Local, and in object storage."""
    parts = write_parts(folder, IDS["texts"])
    export = write_formats(folder, parts, {"numpy", "faiss", "jsonl"}, "float32")
    names = storage.listing(folder)
    assert set(names) == set(export["files"])
    assert sorted(names) == sorted(
        ["items.faiss", "items.jsonl", "items.npy", "items_ids.jsonl", "users.jsonl", "users.npy", "users_ids.jsonl"]
    )
    assert all(re.fullmatch(OWN_FILES, name) for name in names)
    written = {n: storage.WrittenFile(f["bytes"], f["sha256"]) for n, f in export["files"].items()}
    storage.check_files(folder, written, checksum=True)


READS = {"pyarrow": "pq.read_table", "polars": "pl.read_parquet", "duckdb": "duckdb.sql", "numpy": "users.npy"}
READS |= {"faiss": "faiss.read_index"}


@pytest.mark.parametrize("ids", ["integers", "texts"])
@pytest.mark.parametrize("package", READS)
def test_the_lines_of_the_readme_run(tmp_path, monkeypatch, ids, package):
    """Those whose package is here."""
    pytest.importorskip(package)
    out = str(tmp_path)
    export = write_formats(out, write_parts(out, IDS[ids]), {"parquet", "numpy", "faiss", "jsonl"}, "float32")
    text = loading_text(export)
    (code,) = [code for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if READS[package] in code]
    monkeypatch.chdir(tmp_path)
    space: dict = {}
    exec(code, space)
    items = np.array(pq.read_table("items")["embedding"].to_pylist(), np.float32)
    if package == "faiss":
        want = np.argsort(-(space["queries"] @ items.T), axis=1)[:, :20]
        names = np.array(IDS[ids])
        found = space["found"] if ids == "integers" else np.array(space["item_ids"])[space["found"]]
        assert np.array_equal(found, names[want])
    elif package == "numpy":
        assert [space["item_ids"][n] for n in space["best"]] == expected_lists(out)[0]
    else:
        assert np.array_equal(np.asarray(space["vectors"]), items)


def qdrant_lists(code: dict[str, str], queries: list) -> list[list]:
    from qdrant_client import QdrantClient

    space: dict = {}
    exec(code["rows"] + code["Qdrant"].replace('"http://localhost:6333"', '":memory:"'), space)
    assert isinstance(space["client"], QdrantClient)
    points = [space["client"].query_points("items", query=query, limit=20).points for query in queries]
    return [[point.payload["id"] if point.payload else point.id for point in found] for found in points]


def milvus_lists(code: dict[str, str], queries: list) -> list[list]:
    space: dict = {}
    exec(code["rows"] + code["Milvus"].replace("http://localhost:19530", "milvus.db"), space)
    found = space["client"].search("items", data=queries, limit=20, search_params={"metric_type": "IP"})
    space["client"].close()
    return [[row["id"] for row in rows] for rows in found]


def pgvector_lists(code: dict[str, str], queries: list) -> list[list]:
    import pgserver
    import psycopg

    server = pgserver.get_server("postgres", cleanup_mode="delete")
    try:
        server.psql(code["pgvector"])
        with psycopg.connect(server.get_uri()) as connection:
            search = "select id from items order by vector <#> %s::vector limit 20"
            return [[row[0] for row in connection.execute(search, [json.dumps(query)])] for query in queries]
    finally:
        server.cleanup()


@pytest.mark.long
@pytest.mark.parametrize("ids", ["integers", "texts"])
@pytest.mark.parametrize(
    ("package", "lists"),
    [("qdrant_client", qdrant_lists), ("pymilvus", milvus_lists), ("pgserver", pgvector_lists)],
)
def test_the_lines_of_the_readme_fill_a_database(tmp_path, monkeypatch, package, lists, ids):
    """Databases that Python starts, where they are installed: pip install qdrant-client pymilvus milvus-lite pgserver
    psycopg[binary]. The lines are the README's but for the address of the server."""
    pytest.importorskip(package)
    out = str(tmp_path)
    export = write_formats(out, write_parts(out, IDS[ids]), {"parquet", "jsonl"}, "float32")
    text = loading_text(export)
    blocks = re.findall(r"```(?:python|sql)\n(.*?)```", text[text.index("## JSON lines") :], re.DOTALL)
    code = dict(zip(("rows", "Qdrant", "Milvus", "pgvector"), blocks, strict=True))
    monkeypatch.chdir(tmp_path)
    with open("users.jsonl") as file:
        queries = [json.loads(line)["vector"] for line in file]
    assert lists(code, queries) == expected_lists(out)


def test_the_readme_says_what_the_index_is():
    about = {"kind": "ivf", "metric": "inner product", "ids": "original", "nprobe": 12, "recall@20": 0.957}
    manifest = {"formats": ["faiss"], "dim": 9, "dtype": "float32", "id_types": {"users": "text", "items": "integer"}}
    text = loading_text(manifest | {"index": about | {"recall_users": 256}})
    assert "`IndexIVFFlat`" in text
    assert "With nprobe 12, which is\nstored in it, it finds 95.7% of the 20 best items of 256 users" in text
    assert "Parquet" not in text
