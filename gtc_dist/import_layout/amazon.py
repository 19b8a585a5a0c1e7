"""Layout `amazon`: Amazon Reviews of 2014, 2018 and 2023, a file of reviews or ratings and perhaps one of metadata.

2014 (https://cseweb.ucsd.edu/~jmcauley/datasets/amazon/links.html): reviews_X.json.gz with reviewerID, asin, overall
and unixReviewTime; meta_X.json.gz, a Python dictionary in each line; ratings_X.csv: user, item, rating, time.
2018 (https://nijianmo.github.io/amazon): X.json.gz with the same names; meta_X.json.gz with JSON; X.csv: item, user,
rating, time. 2023 (https://amazon-reviews-2023.github.io): X.jsonl.gz with user_id, parent_asin, rating and timestamp
in milliseconds; meta_X.jsonl.gz; X.csv.gz with these names in a header, also as X.train, X.valid and X.test.

Ids stay text, as `0000031852` is one. Texts are those of items with an interaction. Their ids are held in memory.
"""

import ast
import json
import re
from collections.abc import Iterator
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from gtc_dist.data import formats, storage
from gtc_dist.errors import InputError
from gtc_dist.import_layout.tables import (
    TEXTS,
    ImportedTables,
    LayoutWriter,
    csv_blocks,
    files_by_split,
    files_in,
    header_of,
    line_blocks,
    missing_files,
    split_method,
    write_blocks,
)
from gtc_dist.progress import ProgressPrinter

ASIN_LENGTH = 10  # characters of an item's id, in every year; those of users differ
MILLISECONDS, SECONDS_SINCE_1970 = pa.timestamp("ms"), pa.int64()
REVIEW_KEYS = {  # of users, items, ratings and times
    2023: ("user_id", "parent_asin", "rating", "timestamp"),
    2014: ("reviewerID", "asin", "overall", "unixReviewTime"),  # and 2018
}
TEXT_KEYS = {  # column -> keys of the metadata, the first that is there
    "title": ("title",),
    "brand": ("brand", "store"),
    "categories": ("categories", "category"),
    "description": ("description",),
}
TEXT_SCHEMA = pa.schema([(name, pa.string()) for name in ("item_id", *TEXT_KEYS)])


def find_amazon(folder: str) -> LayoutWriter:
    """Find the files of the layout. Raises InputError for a missing one, or several of one kind."""
    names = [name for name in files_in(folder) if re.search(r"\.(json|jsonl|csv)(\.gz)?$", name)]
    metadata = [name for name in names if name.startswith("meta") and ".csv" not in name]
    interactions = [name for name in names if name not in metadata]
    if not interactions:
        wanted = "file of reviews (X.json.gz, X.jsonl.gz) or ratings (X.csv, X.csv.gz)"
        raise missing_files(folder, wanted, files_in(folder))
    sources = files_by_split(folder, interactions)
    readers = {}
    for stem, name in sources.items():
        uri = storage.join(folder, name)
        if ".csv" in name:
            readers[stem] = partial(read_ratings, uri, *rating_columns(uri))
        else:
            readers[stem] = partial(read_reviews, uri, review_year(uri))
    return partial(write_amazon, folder, sources, readers, metadata)


def write_amazon(
    folder: str, sources: dict[str, str], readers: dict, metadata: list[str], out: str, progress: ProgressPrinter
) -> ImportedTables:
    """Write the interactions, and the texts of their items. Raises InputError for a bad row."""
    items: set[str] = set()
    rows = {}
    for stem, reader in readers.items():
        uri = storage.join(folder, sources[stem])
        rows[stem] = write_blocks(storage.join(out, f"{stem}.parquet"), _noting_items(reader(), items), progress, uri)
    columns = ["rating", "timestamp"]
    result = ImportedTables(rows, columns, split_method(rows, columns))
    if metadata:
        uris = [storage.join(folder, name) for name in metadata]
        texts = storage.join(out, f"{TEXTS}.parquet")
        result.items = write_blocks(texts, read_metadata(uris, items), progress, ", ".join(uris))
        result.texts = list(TEXT_KEYS)
    return result


def review_year(uri: str) -> int:
    """The first year whose names the first review has. Raises InputError if there is none."""
    record = next((record for _, record in read_records(uri)), {})
    for year, keys in REVIEW_KEYS.items():
        if set(keys) <= set(record):
            return year
    wanted = " or ".join(", ".join(keys) for keys in REVIEW_KEYS.values())
    raise InputError(f"{uri} has no reviews with {wanted}; keys of its first line: {', '.join(record) or 'none'}")


def read_reviews(uri: str, year: int) -> Iterator[pa.Table]:
    """Blocks of reviews, one JSON object or Python dictionary a line. Raises InputError with the line's number."""
    keys, time_type = REVIEW_KEYS[year], MILLISECONDS if year == 2023 else SECONDS_SINCE_1970
    block: list[tuple] = []
    for number, record in read_records(uri):
        try:
            block.append(tuple(record[key] for key in keys))
        except KeyError as error:
            raise InputError(f"{uri}: line {number} has no {error.args[0]!r}; remove the line") from None
        if len(block) == formats.ROW_GROUP // 4:
            yield _interactions(uri, block, time_type)
            block = []
    if block:
        yield _interactions(uri, block, time_type)


def rating_columns(uri: str) -> tuple[dict[str, pa.DataType], bool]:
    """Columns of a CSV of ratings, in order, with their types, and whether its first line names them.

    Without a header the columns are user, item, rating, time (2014) or item, user, rating, time (2018): an item's id
    has 10 characters.

    Raises:
        InputError: other columns, or the order is not to be seen from the first block.
    """
    first = [field.strip('"') for field in header_of(uri, ",")]
    user, item, rating, time = REVIEW_KEYS[2023]
    if user in first:
        if not {item, rating, time} <= set(first):
            raise InputError(f"{uri} has the columns {', '.join(first)}; expected {', '.join(REVIEW_KEYS[2023])}")
        return {user: pa.string(), item: pa.string(), rating: pa.float64(), time: pa.int64()}, True
    if len(first) != 4:
        raise InputError(f"{uri} has {len(first)} columns without a header; expected user, item, rating and time")
    names = dict(zip("abcd", (pa.string(), pa.string(), pa.float64(), pa.int64()), strict=True))
    block = next(csv_blocks(uri, names, header=False))
    is_item = [pc.all(pc.equal(pc.utf8_length(block[name]), ASIN_LENGTH)).as_py() for name in "ab"]
    if is_item[0] == is_item[1]:
        raise InputError(
            f"{uri} has no header, and {'both' if is_item[0] else 'neither'} of its first two columns has ids of "
            f"{ASIN_LENGTH} characters, as items have; write user_id,parent_asin,rating,timestamp into its first line"
        )
    order = ("item_id", "user_id") if is_item[0] else ("user_id", "item_id")
    return dict(zip((*order, "rating", "timestamp"), names.values(), strict=True)), False


def read_ratings(uri: str, types: dict[str, pa.DataType], header: bool) -> Iterator[pa.Table]:
    """Blocks of a CSV of ratings, with the columns of `rating_columns`. Raises InputError."""
    for table in csv_blocks(uri, types, header=header):
        if header:
            table = table.rename_columns(["user_id", "item_id", "rating", "timestamp"])
            table = table.set_column(3, "timestamp", table["timestamp"].cast(MILLISECONDS))
        yield table


def read_metadata(uris: list[str], items: set[str]) -> Iterator[pa.Table]:
    """Blocks of item_id, title, brand, categories and description of the given items, the first line of each item."""
    left = set(items)
    for uri in uris:
        block: list[tuple] = []
        for number, record in read_records(uri):
            item = record.get("parent_asin") or record.get("asin")
            if not isinstance(item, str):
                raise InputError(f"{uri}: line {number} has no 'asin' or 'parent_asin'; remove the line")
            if item in left:
                left.remove(item)
                texts = [next((record[k] for k in keys if record.get(k)), None) for keys in TEXT_KEYS.values()]
                block.append((item, *map(plain_text, texts)))
            if len(block) == formats.ROW_GROUP // 16:
                yield _texts(block)
                block = []
        if block:
            yield _texts(block)


def plain_text(value: Any) -> str | None:
    """Text of a value of the metadata; lists, also in lists, joined by spaces, each part once. None: no text."""
    parts: dict[str, None] = {}
    left = [value]
    while left:
        part = left.pop(0)
        if isinstance(part, list | tuple):
            left = [*part, *left]
        elif part is not None and str(part).strip():
            parts[str(part).strip().encode("utf-8", "replace").decode()] = None  # replaces half of a surrogate pair
    return " ".join(parts) or None


def read_records(uri: str) -> Iterator[tuple[int, dict]]:
    """Number and content of each line that is not blank: a JSON object, or a Python dictionary as 2014's metadata have.

    Raises:
        InputError: another line.
    """
    for first, lines in line_blocks(uri):
        for number, line in enumerate(lines, first):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                record = _python_literal(line)
            if not isinstance(record, dict):
                raise InputError(f"{uri}: line {number} is neither a JSON object nor a Python dictionary; remove it")
            yield number, record


def _python_literal(line: bytes) -> Any:
    try:
        return ast.literal_eval(line.decode().strip())
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        return None


def _texts(rows: list[tuple]) -> pa.Table:
    columns = zip(*rows, strict=True)
    return pa.Table.from_arrays([pa.array(column, pa.string()) for column in columns], schema=TEXT_SCHEMA)


def _interactions(uri: str, rows: list[tuple], time_type: pa.DataType) -> pa.Table:
    users, items, ratings, times = zip(*rows, strict=True)
    with formats.parsing(uri, "a file of reviews with text ids, numbers as ratings and whole numbers as times"):
        times = pa.array(times, pa.int64()).cast(time_type)
        columns = {"user_id": pa.array(users, pa.string()), "item_id": pa.array(items, pa.string())}
        return pa.table(columns | {"rating": pa.array(ratings, pa.float64()), "timestamp": times})


def _noting_items(blocks: Iterator[pa.Table], items: set[str]) -> Iterator[pa.Table]:
    for table in blocks:
        items.update(pc.unique(table["item_id"]).to_pylist())
        yield table
