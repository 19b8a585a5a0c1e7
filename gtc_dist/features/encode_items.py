"""Make feature vectors from texts or pictures of items:

    python -m gtc_dist.features --texts raw/items.csv --columns title,description --out raw/features/text
    python -m gtc_dist.features --pictures raw/pictures --out raw/features/visual
    python -m gtc_dist.features --pictures raw/items.csv --columns picture --out raw/features/visual

Tables are CSV, TSV, JSON lines or Parquet, a file or a glob; the header line of CSV shows what separates its columns
(`,`, `;`, `|`, tab or `::`). --id names the column with the item's id (item_id).
Pictures are the files of a folder, whose names without extension are the ids, or are named by a column: URIs, paths
relative to the table, or bytes. The configuration then has

    data: {features: {text: {path: features/text/*.parquet}}}

Built-in encoders need no download: `ngrams` for texts, `descriptor` for pictures. `--encoder` takes a pretrained
network that is on the machine (`sentence-transformers:MODEL`, `open_clip:MODEL/PRETRAINED`, `torchvision:MODEL`), or
any `module:callable` (docs/quickstart.md shows them). Items that arrive later are encoded alike with `--like FOLDER`,
the output of the first time.

The options may be in a YAML file, `--config features.yaml`; a list of such mappings makes several sets in turn, and
options on the command line override the file's:

    - {texts: raw/items.csv, columns: [title, description], out: raw/features/text}
    - {pictures: raw/pictures, out: raw/features/visual}

Tasks on the Ray cluster encode parts of the items and write a file each. Rerun the same command, without --force, to
continue an interrupted one. The driver holds ids, texts and pictures given as bytes in memory; named pictures are read
by the tasks. A change of the tables, of the encoder or of its file is noticed, that of a picture that a table names is
not.
"""

import argparse
import functools
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from gtc_dist.data import formats, storage
from gtc_dist.data.output_folder import FEATURES_FILES, OutputFolder
from gtc_dist.errors import InputError
from gtc_dist.features.command_line import read_command_lines
from gtc_dist.features.encoders import (
    BUILT_IN,
    FILE,
    check_encoder,
    encode_batch,
    load_pictures,
    make_encoder,
    module_digest,
    search_path,
)
from gtc_dist.features.item_content import ItemContent, find_pictures, read_picture_column, read_texts
from gtc_dist.features.text_ngrams import NgramEncoder
from gtc_dist.launch.job_paths import refuse_relative_paths
from gtc_dist.progress import ProgressPrinter

VERSION = 1  # of the built-in encoders: another version makes other vectors
PART_ITEMS = {"text": 8192, "picture": 512}  # of a file
BATCH = {"text": 256, "picture": 32}  # items given to an encoder at once
DESCRIPTOR_SIDE = 256  # pixels that the built-in descriptor needs at most
EXAMPLES = 3


def main(argv: list[str] | None = None) -> None:
    sets = read_command_lines(argv, __doc__)
    for args in sets:
        paths = {"--texts": args.texts, "--pictures": args.pictures, "--out": args.out, "--like": args.like}
        refuse_relative_paths(paths)
        args.kind = "text" if args.texts else "picture"
        args.encoder = check_encoder(args.encoder or BUILT_IN[args.kind], args.kind)
    for args in sets:
        encode_set(args)


def encode_set(args: argparse.Namespace) -> None:
    """One set of vectors. Raises InputError."""
    kind, encoder = args.kind, args.encoder
    out, progress = storage.absolute(args.out), ProgressPrinter()
    like, fitted = fitted_like(args.like, encoder, out) if args.like else (None, None)
    content = read_content(args)
    present = len(content.ids) - content.content.null_count
    progress(f"{len(content.ids):,} items, {present:,} with a {kind}; encoder {encoder}")
    if not present:
        raise InputError(f"no item has a {kind}")
    spec = {"kind": kind, "encoder": encoder, "version": VERSION, "like": like, "fitted": fitted}
    spec["module"] = module_digest(encoder)
    if encoder == "ngrams" and like is None:
        spec["width"] = args.width
    digest = content_fingerprint(content, spec, args)
    folder = output_folder(out, digest)
    if has_result(folder, args.force, progress):
        return
    if encoder == "ngrams" and like is None and not storage.exists(storage.join(out, FILE)):
        NgramEncoder.fit(content.content.drop_null().to_pylist(), args.width).save(storage.join(out, FILE))
        progress("encoder fitted")
    task = EncodingTask(kind, encoder, like or out, search_path(encoder), digest, out, args.gpu)
    encoded = encode_parts(content, task, args.gpu, progress)
    folder.finish({**spec, "items": len(content.ids), "fingerprint": digest, **encoded})
    report(encoded, kind, out)


def read_content(args: argparse.Namespace) -> ItemContent:
    """The items' content, checked. Raises InputError."""
    columns = [name.strip() for name in (args.columns or "").split(",") if name.strip()]
    if args.texts:
        return read_texts(args.texts, args.id, columns)
    if not columns:
        return find_pictures(args.pictures)
    if len(columns) > 1:
        raise InputError(f"--columns {args.columns}: one column names an item's picture")
    return read_picture_column(args.pictures, args.id, columns[0])


def fitted_like(uri: str, encoder: str, out: str) -> tuple[str, str]:
    """URI of an earlier output whose encoder is used, and the fingerprint of what it was fitted to.

    Raises:
        InputError: it has no encoder, or another one.
    """
    uri = storage.absolute(uri)
    if uri == out:
        raise InputError(f"--like and --out are the same folder, {out}; name another one for the new items")
    path = storage.join(uri, FEATURES_FILES.manifest)
    if not storage.exists(path):
        raise InputError(f"--like {uri} is no finished output of this command (there is no {path})")
    earlier = storage.read_json(path)
    if (earlier["encoder"], earlier["version"]) != (encoder, VERSION):
        raise InputError(f"--like {uri} was made by {earlier['encoder']} {earlier['version']}, not {encoder} {VERSION}")
    return earlier["like"] or uri, earlier["fitted"] or earlier["fingerprint"]


def content_fingerprint(content: ItemContent, spec: dict, args: argparse.Namespace) -> str:
    """SHA-256 of what the vectors depend on: the encoder, and the files with size and time."""
    parts = [spec, args.id, args.columns, storage.file_signatures(content.uris)]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def output_folder(out: str, digest: str) -> OutputFolder:
    return OutputFolder(
        out,
        title="the output folder",
        kind="feature vectors",
        own_files=r"part-\d{6}\.parquet|_encoder\.npz",
        manifest=FEATURES_FILES.manifest,
        marker=FEATURES_FILES.marker,
        marker_content={"fingerprint": digest},
    )


def has_result(folder: OutputFolder, force: bool, progress: ProgressPrinter) -> bool:
    """Whether the output is up to date; otherwise the folder is made ready. Parts of the same content and encoder are
    kept.

    Raises:
        InputError: it holds something else.
    """
    state, wanted = folder.state(), folder.marker_content["fingerprint"]
    if state == "complete":
        same = storage.read_json(storage.join(folder.uri, FEATURES_FILES.manifest))["fingerprint"] == wanted
        if same and not force:
            print(f"{folder.uri} is up to date (--force makes it again)")
            return True
        if not force:
            raise InputError(
                f"the output folder {folder.uri} holds vectors of other content or of another encoder; name another "
                "folder, or replace them with --force"
            )
    if state == "incomplete" and not force:
        if folder.goes_on():
            progress("going on with what an earlier command has written")
            return False
        progress("an interrupted command had other content or another encoder: starting again")
    folder.check_writable()
    folder.clear()
    folder.mark()
    return False


@dataclass(frozen=True)
class EncodingTask:
    """What a task needs to encode parts; state: folder of the fitted encoder; search, digest, gpu: of make_encoder."""

    kind: str
    encoder: str
    state: str
    search: str | None
    digest: str
    out: str
    gpu: bool


def encode_rows(parts: pa.Table, task: EncodingTask) -> pa.Table:
    """Ray Data task: encode parts and write a file each; from rows (part, ids, content) to rows of JSON, what each part
    became, or an error."""
    found = []
    for row in range(parts.num_rows):
        number, ids, content = (parts[name][row] for name in ("part", "ids", "content"))
        try:
            found.append(encode_part(number.as_py(), ids.values, content.values.to_pylist(), task))
        except InputError as error:
            found.append({"error": str(error)})
    return pa.table({"result": [json.dumps(each) for each in found]})


def encode_part(number: int, ids: pa.Array, content: list, task: EncodingTask) -> dict:
    """Encode the items of a part and write its file; returns counts, and examples of pictures that could not be read.

    Raises:
        InputError: the encoder fails.
    """
    encoder = make_encoder(task.encoder, task.state, task.search, task.digest, task.gpu)
    given = [position for position, value in enumerate(content) if value is not None]
    vectors, kept, problems = [], [], []
    side = DESCRIPTOR_SIDE if task.encoder == BUILT_IN["picture"] else None
    for start in range(0, len(given), BATCH[task.kind]):
        positions = given[start : start + BATCH[task.kind]]
        batch = [content[position] for position in positions]
        if task.kind == "picture":
            batch, good, wrong = load_pictures(batch, side)
            positions = [positions[place] for place in good]
            problems += wrong
        if batch:
            vectors.append(encode_batch(encoder, task.encoder, batch))
            kept += positions
    width = one_width({each.shape[1] for each in vectors}, task.encoder)
    if kept:
        values = pa.FixedSizeListArray.from_arrays(pa.array(np.concatenate(vectors).ravel()), width)
        table = pa.table({"item_id": ids.take(pa.array(kept)), "vector": values})
        formats.write_table(part_uri(task.out, number), table)
    counts = {"rows": len(kept), "without": len(content) - len(kept), "unread": len(problems)}
    return {**counts, "width": width, "examples": problems[:EXAMPLES]}


def one_width(widths: set[int], encoder: str) -> int:
    """The width of all vectors, 0 without any. Raises InputError if there are several."""
    if len(widths) > 1:
        raise InputError(f"the encoder {encoder} returned vectors of width {sorted(widths)}; expected one width")
    return next(iter(widths), 0)


def part_uri(out: str, number: int) -> str:
    return storage.join(out, f"part-{number:06d}.parquet")


def encode_parts(content: ItemContent, task: EncodingTask, gpu: bool, progress: ProgressPrinter) -> dict:
    """Encode all parts that have no file yet; returns counts of all."""
    size = PART_ITEMS[task.kind]
    written = {storage.join(task.out, name) for name in storage.listing(task.out)}
    tables, totals, examples, widths = [], Counter(), [], set()
    for number, first in enumerate(range(0, len(content.ids), size)):
        ids, values = content.ids.slice(first, size), content.content.slice(first, size)
        uri = part_uri(task.out, number)
        if uri in written:
            known = formats.read_table(uri, ["vector"])
            totals.update(rows=known.num_rows, without=len(ids) - known.num_rows)
            widths.add(known.schema.field("vector").type.list_size)
        elif values.null_count < len(values):
            tables.append(pa.table({"part": [number], "ids": _one_list(ids), "content": _one_list(values)}))
        else:
            totals.update(without=len(ids))
    for result in run_tasks(tables, functools.partial(encode_rows, task=task), gpu, progress):
        if "error" in result:
            raise InputError(result["error"])
        totals.update({name: result[name] for name in ("rows", "without", "unread")})
        examples += result["examples"]
        widths |= {result["width"]} - {0}
        progress.often(f"{totals['rows']:,} of {len(content.ids):,} items encoded")
    width = one_width(widths, task.encoder)
    if not totals["rows"]:
        raise InputError(f"no {task.kind} could be read, such as: {'; '.join(examples[:EXAMPLES])}")
    counts = {name: totals[name] for name in ("rows", "without", "unread")}
    return {"width": width, **counts, "examples": sorted(examples)[:EXAMPLES]}


def run_tasks(
    tables: list[pa.Table], work: Callable[[pa.Table], pa.Table], gpu: bool, progress: ProgressPrinter
) -> Iterator[dict]:
    """Results of a task for each table, in any order."""
    if not tables:
        return
    progress("starting Ray")
    from gtc_dist.launch import ray_cluster  # slow to import: all checks are done
    from gtc_dist.preflight import node_checks

    ray_cluster.connect()
    node_checks.check_nodes({})
    if gpu and not any(node.get("GPU") for node in ray_cluster.node_resources()):
        raise InputError("--gpu is given, but no node of the cluster has a GPU")
    progress("Ray started; encoding")
    from gtc_dist.data import ray_tasks

    for row in ray_tasks.map_blocks(work, tables, gpu):
        yield json.loads(row["result"])


def _one_list(values: pa.Array) -> pa.Array:
    """The values as the one entry of a list column."""
    return pa.LargeListArray.from_arrays(pa.array([0, len(values)], pa.int64()), values)


def report(encoded: dict, kind: str, out: str) -> None:
    print(f"{encoded['rows']:,} items with a vector of width {encoded['width']} are in {out}")
    if encoded["without"]:
        print(f"{encoded['without']:,} items have no vector: without a {kind}, or with one that cannot be read")
    for example in encoded["examples"]:
        print(f"warning: {example}")
