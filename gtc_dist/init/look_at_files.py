"""What the files of a folder are for, by their names, columns and types: interactions, vectors, texts, pictures."""

import json
import posixpath
import re
from collections import Counter
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import numpy as np
import pyarrow as pa

from gtc_dist.config_data import ModalityConfig
from gtc_dist.data import formats, storage
from gtc_dist.errors import InputError
from gtc_dist.features.item_content import PICTURES
from gtc_dist.prepare.feature_files import inspect_features
from gtc_dist.prepare.vector_formats.text_tables import text_table
from gtc_dist.prepare.vector_formats.vector_columns import split_text
from gtc_dist.raw.interaction_file import FORMATS, format_of, numbered_batches, read_schema

# names of columns, lower-case, in the order of preference; a type suffix as in `user_id:token` is left out
ROLES = {
    "user": ["user_?id", "user|uid", "(customer|client|visitor|member|reader|reviewer|account)(_?(id|no|number))?"],
    "item": [
        "item_?id",
        "item|iid",
        "parent_asin",
        "asin|sku|isbn",
        "(product|article|movie|book|track|song|video|artist|business)_?id",
        "product|article|movie|book|track|song",
    ],
    "time": [
        "timestamp|time|datetime|date|ts",
        "(event|unix_?review|order|purchase)_?(time|date)",
        "(created|ordered|purchased)_?(at|on)",
    ],
    "rating": ["rating", "stars|overall|score"],
}
EVENT = r"event(_?(type|name|kind))?|action|behaviou?r(_?type)?|interaction(_?type)?"
COUNT = r"quantity|qty|count|amount|times|plays|play_?count|listens|weight"
SHOWN_KINDS = 10  # of events
MIN_DIMENSIONS = 8  # columns that are called a vector, such as v0 to v7
TEXT = r"title|name|description|brand|category|categories|text|features?"


@dataclass
class Found:
    """Files of a folder by their use, each as a pattern relative to the folder.

    interactions: pattern -> role -> column. vectors: pattern -> id column, vector column or None (.npy). texts: pattern
    -> id column, text columns. pictures: folder -> number of pictures. unknown: files that were not understood.
    broken: what is wrong with those that cannot be read. hints: pattern of interactions -> further lines of
    data.interactions, most of them comments.
    """

    interactions: dict[str, dict[str, str]] = field(default_factory=dict)
    vectors: dict[str, tuple[str, str | None]] = field(default_factory=dict)
    texts: dict[str, tuple[str, list[str]]] = field(default_factory=dict)
    pictures: dict[str, int] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    hints: dict[str, list[str]] = field(default_factory=dict)


def look_at_folder(folder: str) -> Found:
    """Look at every file of a folder, its head alone (of .pt: all). Raises InputError if the folder is empty."""
    names = sorted(
        name for name in storage.listing(folder) if not any(p.startswith((".", "_")) for p in name.split("/"))
    )
    if not names:
        raise InputError(f"{folder} has no file")
    found = Found()
    for name in names:
        extension = posixpath.splitext(name.removesuffix(".gz"))[1].lower()
        if extension in PICTURES:
            top = posixpath.dirname(name).partition("/")[0] or "."
            found.pictures[top] = found.pictures.get(top, 0) + 1
        elif extension == ".npy":
            _look_at_array(folder, name, names, found)
        elif extension in (".npz", ".pt"):
            _look_at_saved(folder, name, found)
        elif extension in FORMATS:
            _look_at_table(folder, name, found)
        elif extension != ".txt":
            found.unknown.append(name)
    return found


def columns_by_role(schema: pa.Schema) -> dict[str, str]:
    """Role -> column, of the roles that a column's name and type fit."""
    found: dict[str, str] = {}
    for role, patterns in ROLES.items():
        for wanted in patterns:
            plain = {column.name: column.name.partition(":")[0].strip().lower() for column in schema}
            fitting = [column for column in schema if re.fullmatch(wanted, plain[column.name])]
            for column in fitting:
                number = pa.types.is_integer(column.type) or pa.types.is_floating(column.type)
                if role not in found and column.name not in found.values() and (number or role != "rating"):
                    found[role] = column.name
    return found


def _look_at_array(folder: str, name: str, names: list[str], found: Found) -> None:
    with storage.open_input(storage.join(folder, name)) as file, formats.parsing(name, "a .npy array"):
        shape, _, dtype = formats.read_array_header(file)
    if len(shape) == 2 and np.issubdtype(dtype, np.floating):
        stem = name.removesuffix(".npy")
        ids = [other for other in names if re.fullmatch(rf"{re.escape(stem)}[_.-]?ids?\.(txt|npy|parquet)", other)]
        found.vectors[name] = (ids[0] if ids else "", None)
    elif len(shape) != 1:
        found.unknown.append(name)


def _look_at_saved(folder: str, name: str, found: Found) -> None:
    """A `.npz` or `.pt` file; what holds no vectors, such as the weights of a network, is not understood."""
    try:
        source = inspect_features("vectors", ModalityConfig(path=name), folder)
    except InputError:
        found.unknown.append(name)
    else:
        if source.ids is None:
            found.vectors[name] = ("", None)
        else:
            found.vectors[_pattern(name)] = ("item_id", "vector")


def _look_at_table(folder: str, name: str, found: Found) -> None:
    uri = storage.join(folder, name)
    pattern = _pattern(name)
    try:
        table = text_table(uri, pa.schema([]))
        schema = read_schema(table)
    except InputError as error:
        found.unknown.append(name)
        found.broken.append(str(error))
        return
    roles = columns_by_role(schema)
    texts = [c.name for c in schema if re.fullmatch(TEXT, c.name.lower()) and _is_text(c.type)]
    if "user" in roles and "item" in roles:
        found.interactions[pattern] = roles
        found.hints[pattern] = [f"separator: {json.dumps(table.separator)}"] if table.separator else []
        found.hints[pattern] += _weight_hints(uri, schema)
    elif "item" in roles and (vectors := _vector_columns(uri, schema)):
        found.vectors[pattern] = (roles["item"], "vector" if "vector" in vectors else vectors[0])
    elif "item" in roles and texts:
        found.texts[pattern] = (roles["item"], texts)
    elif re.search(r"[_.-]?ids?\.parquet$", name) is None:
        found.unknown.append(name)


def _weight_hints(uri: str, schema: pa.Schema) -> list[str]:
    """Comments on columns by which interactions could weigh differently."""
    hints = []
    for column in schema:
        name = column.name.partition(":")[0].lower()
        if re.fullmatch(EVENT, name) and _is_text(column.type):
            weights = json.dumps(dict.fromkeys(_first_kinds(uri, column), 1), ensure_ascii=False)
            hints.append(f"# event: {json.dumps(column.name)}   # with, and weights of yours: event_weights: {weights}")
        elif re.fullmatch(COUNT, name) and (pa.types.is_integer(column.type) or pa.types.is_floating(column.type)):
            hints.append(f"# weight: {json.dumps(column.name)}   # heavier interactions count more")
    return [*hints, "# repeats: 3   # several interactions with an item count, up to three; now one"]


def _first_kinds(uri: str, column: pa.Field) -> list[str]:
    """The most frequent texts of a column at the head of a file, at most `SHOWN_KINDS`."""
    head = next(numbered_batches(text_table(uri, pa.schema([column.with_type(pa.string())]))), None)
    kinds = Counter(text for text in head[1][column.name].to_pylist() if text) if head else Counter()
    return [kind for kind, _ in kinds.most_common(SHOWN_KINDS)]


def _vector_columns(uri: str, schema: pa.Schema) -> list[str]:
    """Columns of lists, or of texts with numbers; else the pattern of many columns with a number at the end."""
    lists = [c.name for c in schema if pa.types.is_list(c.type) or pa.types.is_fixed_size_list(c.type)]
    texts = [c.name for c in schema if _is_text(c.type)] if format_of(uri) != "parquet" else []
    table = text_table(uri, pa.schema([(name, pa.string()) for name in texts]))
    first = next(numbered_batches(table), None) if texts else None
    if first is not None:
        lists += [name for name in texts if _holds_vectors(first[1][name])]
    numbers = [c.name for c in schema if pa.types.is_floating(c.type) or pa.types.is_integer(c.type)]
    prefixes = Counter(name.rstrip("0123456789") for name in numbers if name[-1:].isdigit())
    patterns = [f"{prefix}*" for prefix, count in prefixes.items() if prefix and count >= MIN_DIMENSIONS]
    return lists + [p for p in patterns if all(fnmatchcase(name, p) <= (name in numbers) for name in schema.names)]


def _holds_vectors(column: pa.ChunkedArray) -> bool:
    """Whether the first text that is not empty is two numbers or more."""
    first = next((text for text in column.to_pylist()[:1000] if text), "")
    try:
        return len(split_text(pa.array([first])).flatten().cast(pa.float64())) > 1
    except pa.ArrowInvalid:
        return False


def _is_text(type: pa.DataType) -> bool:
    return pa.types.is_string(type) or pa.types.is_large_string(type)


def _pattern(name: str) -> str:
    """A file in a folder of its own, or with a number at the end, stands for all of its kind: a glob."""
    folder, base = posixpath.split(name)
    stem, dot, extension = base.partition(".")
    numbered = re.fullmatch(r"(.*?)[_-]?\d+", stem)
    return posixpath.join(folder, f"{numbered[1]}*{dot}{extension}") if numbered else name
