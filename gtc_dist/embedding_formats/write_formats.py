"""The formats of an export beside Parquet, which are made from its Parquet files."""

from typing import Any, Literal

from gtc_dist.data import storage
from gtc_dist.embedding_formats.exported_rows import KINDS_OF_ROWS, RowsDone, part_names
from gtc_dist.embedding_formats.faiss_index import INDEX, IndexKind, write_index
from gtc_dist.embedding_formats.json_lines import write_json_lines
from gtc_dist.embedding_formats.numpy_files import ids_are_texts, write_numpy
from gtc_dist.progress import ProgressPrinter

Format = Literal["parquet", "numpy", "faiss", "jsonl"]
EXPORT_FORMATS = ("parquet", "numpy", "faiss", "jsonl")
OWN_FILES = r"(users|items)(\.npy|\.jsonl|_ids\.npy|_ids\.jsonl)|items\.faiss"  # but for the Parquet files


def write_formats(
    out: str, export: dict[str, Any], chosen: set[Format], dtype: str, index: IndexKind | None = None
) -> dict[str, Any]:
    """Write the chosen formats, then remove the Parquet files where they are not chosen.

    Args:
        export: the manifest's entries with `dim` and `files`, those of all Parquet files.
        index: kind of the FAISS index; None: by the number of items.

    Returns:
        the entries with `files` as they are now, the `formats`, the `id_types` (integer or text) and, with
        faiss, `index` (`write_index`).
    """
    parts, dim, files = {kind: part_names(export["files"], kind) for kind in KINDS_OF_ROWS}, export["dim"], {}
    rows = {kind: sum(export["files"][name]["rows"] for name in names) for kind, names in parts.items()}
    id_types = {kind: "text" if ids_are_texts(out, names) else "integer" for kind, names in parts.items()}
    about = {"formats": [name for name in EXPORT_FORMATS if name in chosen], "id_types": id_types}
    printer = ProgressPrinter()
    for kind, names in parts.items():
        if "numpy" in chosen:
            files |= write_numpy(
                out, kind, names, rows[kind], dim, dtype, rows_done(printer, f"{kind}.npy", rows[kind])
            )
        if "jsonl" in chosen:
            progress = rows_done(printer, f"{kind}.jsonl", rows[kind])
            files |= write_json_lines(out, kind, names, rows[kind], progress)
    if "faiss" in chosen:
        progress = rows_done(printer, INDEX, rows["items"])
        written, about["index"] = write_index(out, parts["items"], parts["users"], rows["items"], dim, index, progress)
        files |= written
    if "parquet" in chosen:
        return export | about | {"files": export["files"] | files}
    for kind in KINDS_OF_ROWS:
        storage.remove_tree(storage.join(out, kind))
    return export | about | {"files": files}


def rows_done(printer: ProgressPrinter, name: str, rows: int) -> RowsDone:
    """Progress of a file with so many rows: a line every ten seconds."""
    return lambda done: printer.often(f"{name}: {done:,} of {rows:,} rows")
