"""Read interactions of users who are not in a catalog: a file in the format of the catalog's own interactions."""

import numpy as np
import pyarrow as pa

from gtc_dist.config_data import DataConfig, InteractionsConfig
from gtc_dist.data.catalog import Catalog
from gtc_dist.errors import InputError
from gtc_dist.inference.new_users import NewUsers
from gtc_dist.prepare.split import merge_duplicates, merged_weights
from gtc_dist.raw import ids as id_columns
from gtc_dist.raw import parse
from gtc_dist.raw.bad_rows import REJECTED
from gtc_dist.raw.interaction_file import InteractionFile, format_of, read_schema

DAY = 86_400  # seconds


def read_new_users(data: DataConfig, catalog: Catalog, uri: str) -> NewUsers:
    """Users and their interactions with the catalog's items, as the keys of `data.interactions` say: columns, events,
    weights, repeats, min_rating; their age is counted back from the newest interaction of the file.

    Args:
        uri: a file whose columns are those of the catalog's interactions; or, for users who have none, one without a
            column of items.

    Raises:
        InputError: a file that cannot be read, bad rows, a user that the catalog has, or ids of another type.
    """
    file = _inspect(data, uri)
    tables = [table for table in parse.read_table_file(file) if table.num_rows and not table.schema.equals(REJECTED)]
    if not tables:
        raise InputError(f"{uri} has no user")
    columns = {name: _column(tables, name) for name in ("time", "rating", "weight", "event") if name in file.columns}
    vocabulary = id_columns.Vocabulary("user ids")
    codes = vocabulary.add([(uri, table["user"]) for table in tables])
    ids, position = vocabulary.finish()
    user, ids = position[codes], _new_ids(catalog, ids, uri)
    if "item" not in file.columns:
        return NewUsers(ids, np.zeros(len(ids) + 1, np.int64), np.empty(0, np.int32))
    item = np.concatenate([_item_index(catalog, table["item"]) for table in tables])
    weight = _weights(data, columns)
    counts = np.ones(len(item), bool) if weight is None else weight > 0
    if data.interactions.min_rating is not None:
        counts &= columns["rating"] >= data.interactions.min_rating
    known = counts & (item >= 0)
    unknown = int(np.count_nonzero(counts & (item < 0)))
    user, item, weight = user[known], item[known], None if weight is None else weight[known]
    kept = merge_duplicates(user, item)
    if weight is not None or data.interactions.repeats > 1:
        weight = merged_weights(user, item, None, weight, data.interactions.repeats)
    indptr = np.concatenate([[0], np.cumsum(np.bincount(user[kept], minlength=len(ids)))])
    return NewUsers(ids, indptr.astype(np.int64), item[kept].astype(np.int32), weight, unknown)


def _inspect(data: DataConfig, uri: str) -> InteractionFile:
    """The file, with the roles that its interactions need."""
    settings: InteractionsConfig = data.interactions
    roles = {"user": settings.user}
    format = format_of(uri) if settings.format == "auto" else settings.format
    options = {
        "separator": settings.separator or "",
        "names": tuple(settings.columns or ()),
        "skip": settings.on_bad_rows == "skip",
    }
    found = read_schema(InteractionFile(uri, format, uri.endswith(".gz"), {}, {}, **options)).names
    if any(settings.item in (name, name.partition(":")[0]) for name in found):
        named = {"item": settings.item, "rating": settings.rating, "weight": settings.weight, "event": settings.event}
        if data.recency_half_life is not None:
            named["time"] = settings.time
        roles |= {role: name for role, name in named.items() if name is not None}
    return parse.inspect_table(uri, roles, settings.format, events=settings.event_weights, **options)


def _column(tables: list[pa.Table], name: str) -> np.ndarray:
    """A column of numbers; times in seconds, float64."""
    parts = [table[name].combine_chunks() for table in tables]
    if pa.types.is_timestamp(parts[0].type):
        return np.concatenate([part.cast(pa.int64()).to_numpy() for part in parts]) / 1e6
    return np.concatenate([part.to_numpy(zero_copy_only=False) for part in parts]).astype(np.float64)


def _weights(data: DataConfig, columns: dict[str, np.ndarray]) -> np.ndarray | None:
    """Weight of each row, float32 [E]; None: all weigh one."""
    factors = [columns[name] for name in ("weight", "event") if name in columns]
    if "time" in columns:
        age = columns["time"].max() - columns["time"]
        factors.append(np.exp2(-age / (DAY * data.recency_half_life)))
    return np.prod(factors, axis=0).astype(np.float32) if factors else None


def _new_ids(catalog: Catalog, ids: pa.Array, uri: str) -> pa.Array:
    """The ids in the catalog's type."""
    try:
        index = catalog.index_of("users", ids, allow_unknown=True)
        ids = catalog.cast_ids("users", ids)
    except InputError as error:
        raise InputError(f"{uri}: {error}") from None
    if (index >= 0).any():
        known = np.flatnonzero(index >= 0)
        raise InputError(
            f"{uri}: {len(known):,} of {len(ids):,} users are in the catalog already, such as "
            f"{ids[int(known[0])].as_py()!r}; leave them out, or prepare the grown data and run gtc refresh"
        )
    return ids


def _item_index(catalog: Catalog, column: pa.ChunkedArray) -> np.ndarray:
    """Index of items, int64; -1 for those that the catalog lacks."""
    return id_columns.positions(*id_columns.comparable(column.combine_chunks(), catalog.ids("items"))).astype(np.int64)
