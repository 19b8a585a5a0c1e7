"""Which items may be listed: candidates, exclusions and attributes; and their titles."""

import functools

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from gtc_dist.data.catalog import Catalog
from gtc_dist.errors import InputError
from gtc_dist.features.item_content import read_ids, read_texts
from gtc_dist.raw import ids as id_columns


def where_conditions(texts: list[str]) -> dict[str, list[str]]:
    """Column -> the texts that it may have, of `COLUMN=TEXT`. Raises InputError for another form."""
    wanted: dict[str, list[str]] = {}
    for text in texts:
        column, equals, value = text.partition("=")
        if not column or not equals:
            raise InputError(f"--where {text} is not of the form COLUMN=TEXT")
        wanted.setdefault(column, []).append(value)
    return wanted


def item_attributes(catalog: Catalog, uri: str, id_column: str, wanted: dict[str, list[str]]) -> np.ndarray:
    """Mask bool [items] of those that have one of the texts in each column of a table.

    Raises:
        InputError: a column that is missing or not text, or a text that it nowhere has.
    """
    fitting = np.ones(catalog.items, bool)
    for column, texts in wanted.items():
        content = read_texts(uri, id_column, [column])
        for text in texts:
            if not pc.any(pc.equal(content.content, text)).as_py():
                raise InputError(f"no item of {uri} has {text!r} in the column {column!r}")
        has = pc.fill_null(pc.is_in(content.content, pa.array(texts, content.content.type)), False)
        index = index_of_known(catalog, content.ids)
        known = np.zeros(catalog.items, bool)
        known[index[(index >= 0) & has.to_numpy(zero_copy_only=False)]] = True
        fitting &= known
    return fitting


def allowed_items(
    catalog: Catalog, candidates: str | None, exclude: str | None, attributes: np.ndarray | None = None
) -> np.ndarray | None:
    """Mask bool [items] of what may be listed; None: all. Ids that the catalog lacks have no effect.

    Args:
        attributes: of `item_attributes`.

    Raises:
        InputError: nothing is left.
    """
    if candidates is None and exclude is None and attributes is None:
        return None
    allowed = np.full(catalog.items, candidates is None)
    for uri, value in ((candidates, True), (exclude, False)):
        if uri is not None:
            index = index_of_known(catalog, read_ids(uri, "item_id"))
            allowed[index[index >= 0]] = value
    if attributes is not None:
        allowed &= attributes
    if not allowed.any():
        raise InputError(f"no item of {catalog.uri} is left to list by --candidates, --exclude and --where")
    return allowed


def item_titles(catalog: Catalog, uri: str, id_column: str, column: str) -> pa.Array:
    """Title of each item by its index, null where the table has none."""
    content = read_texts(uri, id_column, [column])
    index = index_of_known(catalog, content.ids)
    row = np.full(catalog.items, -1)
    row[index[index >= 0]] = np.flatnonzero(index >= 0)
    return content.content.take(pa.array(row, mask=row < 0))


def index_of_known(catalog: Catalog, ids: pa.Array) -> np.ndarray:
    """Index of items, -1 for ids that the catalog lacks; integers and texts compare as they are written."""
    known = catalog_item_ids(catalog)
    if id_columns.is_text(ids.type) != id_columns.is_text(known.type):
        ids, known = ids.cast(pa.large_string()), known.cast(pa.large_string())
    return id_columns.positions(ids, known).astype(np.int64)


@functools.lru_cache(maxsize=1)
def catalog_item_ids(catalog: Catalog) -> pa.Array:
    """All item ids of a catalog, read once."""
    return catalog.ids("items")
