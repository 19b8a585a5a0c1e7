"""The part of an export's README.md that says how to load each of its formats, with lines that run as they are."""

from typing import Any

PARQUET = """## Parquet

`users/` and `items/` hold Parquet files with the columns `id` (as in your data) and `embedding`, lists of {dim}
numbers.

```python
import pyarrow.parquet as pq
items = pq.read_table("items")
vectors = items["embedding"].combine_chunks().flatten().to_numpy().reshape(len(items), -1)
```

```python
import polars as pl
items = pl.read_parquet("items/*.parquet")
ids, vectors = items["id"], items["embedding"].to_numpy()
```

```python
import duckdb, numpy as np
items = duckdb.sql("select id, embedding from 'items/*.parquet'").fetchnumpy()
ids, vectors = items["id"], np.stack(items["embedding"])
```
"""

NUMPY = """## NumPy

`users.npy` and `items.npy` are arrays of {dtype} [rows, {dim}]; the ids of their rows are in `{users_ids}` and
`{items_ids}`.

```python
import json, numpy as np
users, items = np.load("users.npy", mmap_mode="r"), np.load("items.npy", mmap_mode="r")
user_ids = {load_users}
item_ids = {load_items}
best = np.argsort(-(items @ users[0]))[:20]  # rows of the first user's best items: item_ids[n]
```
"""

FAISS = """## FAISS

`items.faiss` finds the items with the largest inner product. It is {kind}.{recall}

```python
import faiss, json, numpy as np
index, queries = faiss.read_index("items.faiss"), np.random.rand(3, {dim}).astype("float32")  # or rows of users
scores, found = index.search(queries, 20)
{ids}
```
"""

KIND_NAMES = {
    "flat": "a flat index (`IndexFlatIP`), which is exact",
    "hnsw": "a graph (`IndexHNSWFlat`), which is approximate",
    "ivf": "made of inverted lists (`IndexIVFFlat`), which are approximate",
}

JSON_LINES = """## JSON lines

`users.jsonl` and `items.jsonl` have a line for each row: `{{"id": {example}, "vector": [0.25, ...]}}`. Scores are inner
products, so make the index for these. `rows` of the lines below:

```python
import itertools, json
rows = map(json.loads, open("items.jsonl"))
batches = iter(lambda: list(itertools.islice(rows, 500)), [])
```

Qdrant ({qdrant_ids}):

```python
from qdrant_client import QdrantClient, models
client = QdrantClient("http://localhost:6333")
client.create_collection("items", vectors_config=models.VectorParams(size={dim}, distance=models.Distance.DOT))
for number, batch in enumerate(batches):
    client.upsert("items", {qdrant_points})
```

Milvus:

```python
from pymilvus import MilvusClient
client = MilvusClient("http://localhost:19530")
client.create_collection("items", dimension={dim}, metric_type="IP", {milvus_ids})
for batch in batches:
    client.insert("items", batch)
```

pgvector, with psql (an index on vectors of more than 2,000 columns needs `halfvec`):

```sql
create extension if not exists vector;
create temporary table lines (line jsonb);
\\copy lines from 'items.jsonl' with (format csv, quote e'\\x01', delimiter e'\\x02')
create table items as select (line->>'id'){sql_cast} as id, (line->>'vector')::vector({dim}) as vector from lines;
select id from items order by vector <#> (select vector from items limit 1) limit 20;
```
"""


def loading_text(manifest: dict[str, Any]) -> str:
    """How to load the formats of an export.

    Args:
        manifest: of the export, with `formats`, `dim`, `dtype` and, with faiss, `index`; `id_types` of users and items,
            `integer` or `text`.
    """
    types, dim = manifest["id_types"], manifest["dim"]
    is_text = {kind: types[kind] == "text" for kind in ("users", "items")}
    parts, chosen = [], manifest["formats"]
    if "parquet" in chosen:
        parts.append(PARQUET.format(dim=dim))
    if "numpy" in chosen:
        parts.append(
            NUMPY.format(
                dim=dim,
                dtype=manifest["dtype"],
                **{f"{kind}_ids": ids_name(kind, is_text[kind]) for kind in is_text},
                **{f"load_{kind}": load_ids(ids_name(kind, is_text[kind])) for kind in is_text},
            )
        )
    if "faiss" in chosen:
        parts.append(faiss_text(manifest["index"], dim))
    if "jsonl" in chosen:
        text = is_text["items"]
        parts.append(
            JSON_LINES.format(
                dim=dim,
                example='"B0042"' if text else 17,
                qdrant_ids="whose points have numbers: the id goes into the payload" if text else "the ids are points",
                qdrant_points=QDRANT_TEXT if text else QDRANT_INTEGERS,
                milvus_ids='id_type="string", max_length=512' if text else 'id_type="int"',
                sql_cast="" if text else "::bigint",
            )
        )
    return "\n".join(parts)


QDRANT_INTEGERS = '[models.PointStruct(id=row["id"], vector=row["vector"]) for row in batch]'
QDRANT_TEXT = (
    '[models.PointStruct(id=500 * number + n, vector=row["vector"], payload={"id": row["id"]})\n'
    "                            for n, row in enumerate(batch)]"
)


def ids_name(kind: str, is_text: bool) -> str:
    """The file with the ids of rows that are not Parquet."""
    return f"{kind}_ids.jsonl" if is_text else f"{kind}_ids.npy"


def load_ids(name: str) -> str:
    """An expression of Python that reads such a file."""
    return f'np.load("{name}")' if name.endswith(".npy") else f'[json.loads(line) for line in open("{name}")]'


def faiss_text(index: dict[str, Any], dim: int) -> str:
    """The section on FAISS."""
    parameter = next((name for name in ("nprobe", "efSearch") if name in index), None)
    recall = ""
    if parameter is not None:
        found = f"{index['recall@20']:.1%} of the 20 best items of {index['recall_users']:,} users"
        stored = f"With {parameter} {index[parameter]}, which is\nstored in it"
        recall = f" {stored}, it finds {found}; a larger one finds more and takes longer."
    if index["ids"] == "original":
        ids = "# found: your ids, int64 [3, 20], -1 where there are fewer items"
    else:
        ids = f"item_ids = {load_ids(index['ids'])}  # found: rows; the id of row n is item_ids[n]"
    return FAISS.format(kind=KIND_NAMES[index["kind"]], recall=recall, dim=dim, ids=ids)
