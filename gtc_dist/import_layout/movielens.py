"""Layout `movielens`: the folders that GroupLens publishes (https://grouplens.org/datasets/movielens/).

100K: u.data (tabs) and u.item (`|`, Latin-1), both without a header. 1M and 10M: ratings.dat and movies.dat, fields
separated by `::`; movies.dat is Latin-1 in 1M and UTF-8 in 10M. 20M and later, and the latest ones: ratings.csv and
movies.csv with a header. Ids are integers, times are seconds since 1970.
"""

from collections.abc import Iterator
from functools import partial

import pyarrow as pa

from gtc_dist.data import formats, storage
from gtc_dist.errors import InputError
from gtc_dist.import_layout.tables import (
    INTERACTIONS,
    TEXTS,
    ImportedTables,
    LayoutWriter,
    csv_blocks,
    files_in,
    line_blocks,
    missing_files,
    write_blocks,
)
from gtc_dist.progress import ProgressPrinter
from gtc_dist.raw.ids import refused_positions

RATING_TYPES = {"user_id": pa.int64(), "item_id": pa.int64(), "rating": pa.float64(), "timestamp": pa.int64()}
VERSIONS = {"u.data": "u.item", "ratings.dat": "movies.dat", "ratings.csv": "movies.csv"}  # ratings -> movies
GENRES = (  # of u.item's last 19 columns, by u.genre
    "unknown|Action|Adventure|Animation|Children's|Comedy|Crime|Documentary|Drama|Fantasy|Film-Noir|Horror|Musical|"
    "Mystery|Romance|Sci-Fi|Thriller|War|Western"
)
NO_GENRE = "(no genres listed)"


def find_movielens(folder: str) -> LayoutWriter:
    """Find the files of the layout. Raises InputError for a missing one."""
    names = files_in(folder)
    ratings = next((name for name in VERSIONS if name in names), None)
    if ratings is None:
        raise missing_files(folder, " or ".join(VERSIONS), names)
    if VERSIONS[ratings] not in names:
        raise missing_files(folder, f"{VERSIONS[ratings]} beside {ratings}", names)
    return partial(write_movielens, folder, ratings)


def write_movielens(folder: str, ratings: str, out: str, progress: ProgressPrinter) -> ImportedTables:
    """Write the ratings, and titles and genres of the movies. Raises InputError for a bad row."""
    uri, movies = storage.join(folder, ratings), storage.join(folder, VERSIONS[ratings])
    blocks = read_dat(uri) if ratings == "ratings.dat" else _read_table(uri)
    rows = write_blocks(storage.join(out, f"{INTERACTIONS}.parquet"), blocks, progress, uri)
    items = write_blocks(storage.join(out, f"{TEXTS}.parquet"), read_movies(movies), progress, movies)
    columns = ["rating", "timestamp"]
    return ImportedTables({INTERACTIONS: rows}, columns, "global_time", texts=["title", "genres"], items=items)


def _read_table(uri: str) -> Iterator[pa.Table]:
    if uri.endswith(".data"):
        yield from csv_blocks(uri, RATING_TYPES, "\t", header=False, quoted=False)
        return
    names = ("userId", "movieId", "rating", "timestamp")
    for table in csv_blocks(uri, dict(zip(names, RATING_TYPES.values(), strict=True))):
        yield table.rename_columns(list(RATING_TYPES))


def read_dat(uri: str) -> Iterator[pa.Table]:
    """Blocks of ratings.dat, UserID::MovieID::Rating::Timestamp. Raises InputError with the line's number."""
    for first, lines in line_blocks(uri):
        rows = [line.rstrip(b"\r\n").split(b"::") for line in lines]
        bad = next((n for n, row in enumerate(rows) if len(row) != len(RATING_TYPES)), None)
        if bad is not None:
            raise InputError(f"{uri}: line {first + bad} has {len(rows[bad])} fields separated by '::'; expected 4")
        columns = {}
        for (name, type), values in zip(RATING_TYPES.items(), zip(*rows, strict=True), strict=True):
            texts = pa.array(values, pa.binary())
            try:
                columns[name] = texts.cast(pa.string()).cast(type)
            except pa.ArrowInvalid:
                row = int(refused_positions(texts, lambda part, type=type: part.cast(pa.string()).cast(type))[0])
                raise InputError(f"{uri}: the {name} in line {first + row} is {values[row]!r}, no number") from None
        yield pa.table(columns)


def read_movies(uri: str) -> Iterator[pa.Table]:
    """Id, title and genres of the movies, genres separated by spaces. Raises InputError for a line of another shape."""
    if uri.endswith(".csv"):
        types = {"movieId": pa.int64(), "title": pa.string(), "genres": pa.string()}
        for table in csv_blocks(uri, types):
            genres = pa.array([_genres(text) for text in table["genres"].to_pylist()], pa.string())
            yield pa.table({"item_id": table["movieId"], "title": table["title"], "genres": genres})
        return
    data = storage.read_bytes(uri)
    try:
        lines = formats.lines_of(data.decode())
    except UnicodeDecodeError:
        lines = formats.lines_of(data.decode("latin-1"))
    columns: dict[str, list] = {"item_id": [], "title": [], "genres": []}
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                values = _flagged_movie(line) if uri.endswith(".item") else _dat_movie(line)
            except ValueError:
                raise InputError(f"{uri}: line {number} is no movie of this layout: {line[:60]!r}") from None
            for name, value in zip(columns, values, strict=True):
                columns[name].append(value)
    yield pa.table(columns, pa.schema([("item_id", pa.int64()), ("title", pa.string()), ("genres", pa.string())]))


def _flagged_movie(line: str) -> tuple[int, str, str]:
    """A line of u.item: id, title, three fields, and 0 or 1 for each genre."""
    fields, genres = line.rstrip("\r").split("|"), GENRES.split("|")
    flags = fields[5:]
    return int(fields[0]), fields[1], " ".join(name for name, flag in zip(genres, flags, strict=True) if flag == "1")


def _dat_movie(line: str) -> tuple[int, str, str]:
    """A line of movies.dat: id, title and genres separated by `|`."""
    number, rest = line.rstrip("\r").split("::", 1)
    title, genres = rest.rsplit("::", 1)
    return int(number), title, _genres(genres)


def _genres(text: str) -> str:
    return "" if text == NO_GENRE else text.replace("|", " ")
