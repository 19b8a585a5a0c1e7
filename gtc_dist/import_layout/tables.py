"""What the layouts share: files of a folder, text files block by block, and the files of the result.

A layout is a function that looks at a folder, refuses it if a file is missing, and returns a function that writes. A
table is a block of rows; nothing here holds a whole file of interactions in memory.
"""

import gzip
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from gtc_dist.data import formats, storage
from gtc_dist.data.catalog import SPLITS
from gtc_dist.errors import InputError
from gtc_dist.progress import ProgressPrinter
from gtc_dist.raw import ids as id_columns
from gtc_dist.raw.interaction_file import TEXT_BLOCK_BYTES

INTERACTIONS, TEXTS = "interactions", "texts"  # stems of the written files, beside the splits
MODALITIES = {"image_feat.npy": "visual", "text_feat.npy": "textual", "audio_feat.npy": "acoustic"}
BLOCK_LINES = 1 << 14  # lines of a text file that are parsed at once
SPLIT_NAMES = {
    "train": "train",
    "valid": "valid",
    "validation": "valid",
    "val": "valid",
    "dev": "valid",
    "test": "test",
}


@dataclass
class ImportedTables:
    """What a layout wrote.

    Attributes:
        rows: stem of each file of interactions -> number of its rows.
        columns: columns of the interactions beside user_id and item_id.
        split: method of data.split.
        features: modality -> .npy file whose row number is the item id.
        texts: columns of texts.parquet beside item_id; empty if there is no such file.
        items: number of rows of texts.parquet.
    """

    rows: dict[str, int]
    columns: list[str]
    split: str
    features: dict[str, str] = field(default_factory=dict)
    texts: list[str] = field(default_factory=list)
    items: int = 0


LayoutWriter = Callable[[str, ProgressPrinter], ImportedTables]  # writes into the folder of this URI


def files_in(folder: str) -> list[str]:
    """Names of the files directly in a folder, sorted. Raises InputError if there is none."""
    names = sorted(name for name in storage.listing(folder) if "/" not in name)
    if not names:
        raise InputError(f"{folder} has no file; name the folder with the files of the data set")
    return names


def missing_files(folder: str, wanted: str, names: list[str]) -> InputError:
    """The error that a folder lacks what a layout needs, with what is there instead."""
    zipped = [name for name in names if name.endswith((".zip", ".tar.gz", ".rar", ".7z"))]
    hint = f"unpack {zipped[0]} first" if zipped else "name the folder with these files, or another layout"
    shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
    return InputError(f"{folder} has no {wanted}; it has {shown}: {hint}")


def files_by_split(folder: str, found: list[str]) -> dict[str, str]:
    """Stem of the written file -> name: one file for `interactions`, or three for train, valid and test.

    Raises:
        InputError: other files than one, or one of each split, named as in `x.train.csv`.
    """
    if len(found) == 1:
        return {INTERACTIONS: found[0]}
    splits = {}
    for name in found:
        match = re.search(rf"(?:^|[._-])({'|'.join(SPLIT_NAMES)})\.", name)
        splits[SPLIT_NAMES[match[1]] if match else name] = name
    if set(splits) != set(SPLITS) or len(found) > len(SPLITS):
        raise InputError(
            f"{folder} has {len(found)} files of interactions ({', '.join(found[:6])}); one is expected, or three "
            "named NAME.train, NAME.valid and NAME.test: put the wanted ones into a folder of their own"
        )
    return {split: splits[split] for split in SPLITS}


def split_method(stems: Iterable[str], columns: list[str]) -> str:
    """The method of data.split that fits the files and columns."""
    if INTERACTIONS not in stems:
        return "given"
    return "global_time" if "timestamp" in columns else "ratio"


def line_blocks(uri: str) -> Iterator[tuple[int, list[bytes]]]:
    """Yield blocks of lines of a text file, plain or gzipped, each with the number of its first line, from 1.

    Raises InputError for a broken or truncated gzip file.
    """
    first = 1
    with storage.open_input(uri) as file, formats.parsing(uri, "a readable file"):
        stream = gzip.GzipFile(fileobj=file) if uri.endswith(".gz") else file
        lines = iter(stream)
        while True:
            try:
                block = list(islice(lines, BLOCK_LINES))
            except (EOFError, zlib.error) as error:
                raise InputError(f"{uri} is a broken or truncated gzip file; download it again: {error}") from error
            if not block:
                return
            yield first, block
            first += len(block)


def csv_blocks(
    uri: str,
    types: dict[str, pa.DataType | None],
    delimiter: str = ",",
    header: bool = True,
    quoted: bool = True,
) -> Iterator[pa.Table]:
    """Yield the columns of a UTF-8 table, plain or gzipped, block by block.

    Args:
        types: column -> type to read it as; None: the type of its first block. All columns, in order, without a header.
        quoted: fields may be in double quotes; else a quote is a character of the field.

    Raises:
        InputError: another number of columns or a value that does not fit, with its row.
    """
    source = pa.PythonFile(storage.open_input(uri), mode="r")
    source = pa.CompressedInputStream(source, "gzip") if uri.endswith(".gz") else source
    names = None if header else list(types)
    batches: Iterator[pa.RecordBatch] | None = None
    while True:
        with formats.parsing(uri, f"a table with the columns {', '.join(types)}"):
            batches = batches or pa.csv.open_csv(
                source,
                read_options=pa.csv.ReadOptions(use_threads=False, block_size=TEXT_BLOCK_BYTES, column_names=names),
                parse_options=pa.csv.ParseOptions(
                    delimiter=delimiter, quote_char='"' if quoted else False, newlines_in_values=quoted
                ),
                convert_options=pa.csv.ConvertOptions(
                    column_types={name: type for name, type in types.items() if type is not None},
                    include_columns=list(types),
                ),
            )
            batch = next(batches, None)
        if batch is None:
            return
        yield pa.Table.from_batches([batch])


def header_of(uri: str, delimiter: str) -> list[str]:
    """Fields of the first line of a text file. Raises InputError if it is empty or not UTF-8."""
    block = next(line_blocks(uri), (1, [b""]))[1]
    with formats.parsing(uri, "UTF-8 text"):
        fields = block[0].decode("utf-8-sig").strip("\r\n").split(delimiter)
    if not any(fields):
        raise InputError(f"{uri} has no line; download it again")
    return fields


def write_blocks(uri: str, blocks: Iterable[pa.Table], progress: ProgressPrinter, source: str) -> int:
    """Write blocks of rows into a Parquet file; the file appears when all are written.

    Args:
        blocks: tables with the ids `user_id` and `item_id`, or `item_id` alone; all of the first one's schema.
        source: the file that they come from, for errors and progress.

    Returns:
        The number of rows.

    Raises:
        InputError: no row, or an id that is null or empty.
    """
    blocks, rows = iter(blocks), 0
    first = next((table for table in blocks if table.num_rows), None)
    if first is None:
        raise InputError(f"{source} has no row; download it again, or name another folder")
    with storage.create(uri) as file:
        with pq.ParquetWriter(pa.PythonFile(file, mode="w"), first.schema, compression="zstd") as writer:
            for table in (block for part in ([first], blocks) for block in part):
                for name in {"user_id", "item_id"} & set(table.column_names):
                    bad, problem = id_columns.first_bad(pa.concat_arrays(table[name].chunks))
                    if bad is not None:
                        raise InputError(f"{source}: the {name} of row {rows + bad + 1} {problem}; repair the row")
                writer.write_table(table, row_group_size=formats.ROW_GROUP)
                rows += table.num_rows
                progress.often(f"{source}: {rows:,} rows")
    progress(f"{source}: {rows:,} rows")
    return rows


def find_vectors(folder: str, names: list[str]) -> dict[str, tuple[str, int]]:
    """Modality -> name and number of rows of the .npy files of vectors, [items, width]. Raises InputError."""
    found = {modality: name for name, modality in MODALITIES.items() if name in names}
    if not found:
        raise missing_files(folder, " or ".join(MODALITIES), names)
    return {modality: (name, _rows_of_matrix(storage.join(folder, name))) for modality, name in found.items()}


def copy_vectors(folder: str, out: str, vectors: dict[str, tuple[str, int]]) -> dict[str, str]:
    """Copy .npy files of `find_vectors`, in parts; modality -> name of the copy."""
    for modality, (name, _) in vectors.items():
        with storage.open_input(storage.join(folder, name)) as source:
            with storage.create(storage.join(out, f"{modality}.npy")) as target:
                while part := source.read(storage.PART_BYTES):
                    target.write(part)
    return {modality: f"{modality}.npy" for modality in vectors}


def _rows_of_matrix(uri: str) -> int:
    with storage.open_input(uri) as file, formats.parsing(uri, "a matrix of numbers in a .npy file"):
        shape, _, dtype = formats.read_array_header(file)
    if len(shape) != 2 or dtype.kind not in "fiu":
        raise InputError(f"{uri} holds {dtype} values of shape {shape}; expected a matrix with one row for each item")
    return shape[0]
