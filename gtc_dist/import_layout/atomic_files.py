"""Layouts of tab-separated tables: `recbole`, atomic files of RecBole, and `mmrec`, the folders of MMRec.

recbole (https://recbole.io/docs/user_guide/data/atomic_files.html): NAME.inter, or NAME.train.inter, NAME.valid.inter
and NAME.test.inter, whose header has a type behind each name (user_id:token, rating:float), and NAME.item with texts
(title:token_seq). Tokens are text.

mmrec (https://github.com/enoche/MMRec, src/utils/dataset.py and src/configs): NAME.inter with the columns userID,
itemID, x_label (0 train, 1 valid, 2 test) and perhaps rating and timestamp. The ids are row numbers; image_feat.npy and
text_feat.npy have a row for each item.
"""

import re
from collections.abc import Iterator
from functools import partial

import pyarrow as pa

from gtc_dist.data import storage
from gtc_dist.errors import InputError
from gtc_dist.import_layout.tables import (
    INTERACTIONS,
    TEXTS,
    ImportedTables,
    LayoutWriter,
    copy_vectors,
    csv_blocks,
    files_by_split,
    files_in,
    find_vectors,
    header_of,
    missing_files,
    split_method,
    write_blocks,
)
from gtc_dist.init.look_at_files import columns_by_role
from gtc_dist.progress import ProgressPrinter

ROLE_NAMES = {"user": "user_id", "item": "item_id", "rating": "rating", "time": "timestamp"}
LABEL = "x_label"  # as data.split.label has it by default
TEXT_TOKEN = r"title|name|description|brand|categor|genre|text"  # columns of one token that are texts nevertheless
Columns = dict[str, tuple[str, pa.DataType | None]]  # column of the file -> its new name, type to read it as


def find_recbole(folder: str) -> LayoutWriter:
    """Find the files of the layout and their columns. Raises InputError for a missing one."""
    names = files_in(folder)
    inter = [name for name in names if name.endswith(".inter")]
    if not inter:
        raise missing_files(folder, "file NAME.inter", names)
    sources = files_by_split(folder, inter)
    columns = {stem: interaction_columns(storage.join(folder, name), pa.string()) for stem, name in sources.items()}
    items = [name for name in names if name.endswith(".item")]
    if len(items) > 1:
        raise InputError(f"{folder} has {len(items)} files of items ({', '.join(items[:6])}); leave one there")
    texts = {name: text_columns(storage.join(folder, name)) for name in items}
    return partial(write_atomic_files, folder, sources, columns, texts, {})


def find_mmrec(folder: str) -> LayoutWriter:
    """Find the files of the layout and their columns. Raises InputError for a missing one."""
    names = files_in(folder)
    inter = [name for name in names if name.endswith(".inter")]
    if len(inter) != 1:
        found = f" ({', '.join(inter[:6])})" if inter else f", but {', '.join(names[:8])}"
        raise InputError(f"{folder} has {len(inter)} files NAME.inter{found}; MMRec's folders have one")
    uri = storage.join(folder, inter[0])
    columns = interaction_columns(uri, pa.int64())
    fields = header_of(uri, "\t")
    if LABEL not in fields:
        raise InputError(
            f"{uri} has no column {LABEL!r}, MMRec's split; columns found: {', '.join(fields)} (the layout recbole "
            "takes interactions without a split)"
        )
    columns[LABEL] = (LABEL, pa.int64())
    vectors = find_vectors(folder, names)
    return partial(write_atomic_files, folder, {INTERACTIONS: inter[0]}, {INTERACTIONS: columns}, {}, vectors)


def write_atomic_files(
    folder: str,
    sources: dict[str, str],
    columns: dict[str, Columns],
    texts: dict[str, Columns],
    vectors: dict[str, tuple[str, int]],
    out: str,
    progress: ProgressPrinter,
) -> ImportedTables:
    """Write interactions, texts and vectors. Raises InputError for a bad row."""
    rows = {}
    for stem, name in sources.items():
        uri = storage.join(folder, name)
        rows[stem] = write_blocks(storage.join(out, f"{stem}.parquet"), read_columns(uri, columns[stem]), progress, uri)
    named = [{new for new, _ in of.values()} for of in columns.values()]
    common = [name for name in ("rating", "timestamp", LABEL) if all(name in names for names in named)]
    method = "label" if LABEL in common else split_method(rows, common)
    result = ImportedTables(rows, common, method, copy_vectors(folder, out, vectors))
    for name, found in texts.items():
        uri = storage.join(folder, name)
        result.texts = [new for new, _ in found.values() if new != "item_id"]
        if result.texts:
            parquet = storage.join(out, f"{TEXTS}.parquet")
            result.items = write_blocks(parquet, read_columns(uri, found), progress, uri)
    return result


def interaction_columns(uri: str, id_type: pa.DataType) -> Columns:
    """The columns of users, items, ratings and times by the names in the header. Raises InputError."""
    fields = header_of(uri, "\t")
    schema = pa.schema(
        [(field, pa.string() if field.endswith((":token", "_seq")) else pa.float64()) for field in fields]
    )
    roles = {role: column for role, column in columns_by_role(schema).items() if not column.endswith("_seq")}
    for role in ("user", "item"):
        if role not in roles:
            raise InputError(
                f"{uri} has no column of {role}s, such as {ROLE_NAMES[role]}:token; columns found: "
                f"{', '.join(fields)} (fields are separated by tabs)"
            )
    types = {"user": id_type, "item": id_type, "rating": pa.float64()}
    types["time"] = pa.float64() if roles.get("time", "").endswith(":float") else None
    return {roles[role]: (name, types[role]) for role, name in ROLE_NAMES.items() if role in roles}


def text_columns(uri: str) -> Columns:
    """The item's id and the columns with words. Raises InputError if there is no id."""
    fields = header_of(uri, "\t")
    ids = columns_by_role(pa.schema([(field, pa.string()) for field in fields])).get("item")
    if ids is None:
        raise InputError(f"{uri} has no column of items, such as item_id:token; columns found: {', '.join(fields)}")
    columns: Columns = {ids: ("item_id", pa.string())}
    for field in fields:
        name, _, kind = field.partition(":")
        if field != ids and (kind == "token_seq" or (kind == "token" and re.search(TEXT_TOKEN, name.lower()))):
            columns[field] = (name.replace(",", "_"), pa.string())  # gtc features separates columns by commas
    return columns


def read_columns(uri: str, columns: Columns) -> Iterator[pa.Table]:
    """Blocks of a tab-separated file with the new names. Quotes are characters, as RecBole's tools write them."""
    for table in csv_blocks(uri, {old: type for old, (_, type) in columns.items()}, "\t", quoted=False):
        yield table.rename_columns([new for new, _ in columns.values()])
