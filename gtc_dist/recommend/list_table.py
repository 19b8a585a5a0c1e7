"""Lists as tables under the original ids, and on the terminal."""

import numpy as np
import pyarrow as pa

from gtc_dist.data.catalog import Catalog
from gtc_dist.recommend.explain import OWN, PART, Explanation
from gtc_dist.recommend.item_choice import catalog_item_ids


def list_table(
    catalog: Catalog,
    key: str,
    of: np.ndarray,
    items: np.ndarray,
    scores: np.ndarray,
    titles: pa.Array | None,
    reasons: Explanation | None = None,
) -> pa.Table:
    """Lists as rows (key, rank, item_id, score, title) under the original ids, and the columns of `reasons`."""
    kind = "users" if key == "user_id" else "items"
    row, place = np.nonzero(items >= 0)
    low, high = (int(of.min()), int(of.max()) + 1) if len(of) else (0, 0)
    names, listed = catalog.ids(kind, low, high), pa.array(items[row, place])
    item_ids = long_text(catalog_item_ids(catalog))
    columns = {
        key: long_text(names).take(pa.array(of[row] - low)),
        "rank": pa.array(place + 1, pa.int32()),
        "item_id": item_ids.take(listed),
        "score": pa.array(scores[row, place].astype(np.float32)),
    }
    columns |= {} if titles is None else {"title": titles.take(listed)}
    return pa.table(columns | ({} if reasons is None else reasons.columns(row, place, item_ids, titles)))


def long_text(ids: pa.Array) -> pa.Array:
    """Strings as large strings, of which an array may hold more than 2 GiB."""
    return ids.cast(pa.large_string()) if pa.types.is_string(ids.type) else ids


def show(rows: list[dict], kind: str) -> None:
    """Print lists, one after the other: rank, score, id and title, then what explains them."""
    key = "user_id" if kind == "user" else "to"
    for n, row in enumerate(rows):
        if row["rank"] == 1:
            print(f"{'' if n == 0 else chr(10)}{kind} {row[key]}")
        print(f"{row['rank']:4}  {row['score']:10.4f}  {row['item_id']}  {row.get('title') or ''}".rstrip())
        parts = [f"{name.removeprefix(PART)} {row[name]:+.4f}" for name in row if name.startswith(PART)]
        if parts:
            print(f"{'':6}= {'  '.join(parts)}")
        for own in row.get(OWN, ()):
            print(f"{'':6}near {own['cosine']:.4f}  {own['item_id']}  {own.get('title') or ''}".rstrip())
    if not rows:
        print("no item is left to list")
