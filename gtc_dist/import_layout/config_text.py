"""The configuration and the next commands for imported tables."""

import glob
import posixpath
import re
import shlex

from gtc_dist.data import storage
from gtc_dist.data.catalog import SPLITS
from gtc_dist.import_layout.tables import INTERACTIONS, TEXTS, ImportedTables
from gtc_dist.init.write_config import quoted

CONFIG_NAME = "config.yaml"
TEXT_VECTORS = "features/text"
SPLIT_COMMENTS = {
    "label": "x_label: 0 train, 1 valid, 2 test",
    "global_time": "valid and test are later than train; or leave_last_out",
    "ratio": "of each user's interactions, at random: no column has times",
}


def config_yaml(layout: str, folder: str, out: str, tables: ImportedTables) -> str:
    """The content of config.yaml: absolute path of the tables, catalog and runs in `work` of the working directory."""
    name = re.sub(r"[^\w.-]", "_", posixpath.basename(out)) or layout
    lines = [
        f"# Layout {layout}, imported from {quoted(folder)}",
        "data:",
        f"  raw: {quoted(out)}",
        f"  catalog: {quoted(f'work/{name}/catalog')}   # relative to the working directory",
        "  interactions:",
    ]
    lines += [f"    files: [{INTERACTIONS}.parquet]"] if INTERACTIONS in tables.rows else []
    lines += ["    user: user_id", "    item: item_id"]
    lines += ["    time: timestamp"] if "timestamp" in tables.columns else []
    if "rating" in tables.columns:
        lines += ["    rating: rating", "    # min_rating: 4   # drops lower ratings; now all count alike"]
    lines += ["    # k_core: 5   # drops users and items with fewer interactions"] if tables.split != "given" else []
    lines.append("  split:")
    if tables.split == "given":
        lines.append("    method: given   # as published")
        lines += [f"    {split}: [{split}.parquet]" for split in SPLITS]
    else:
        lines.append(f"    method: {tables.split}   # {SPLIT_COMMENTS[tables.split]}")
    lines.append("  features:" if tables.features or tables.texts else "  features: {}   # needs one modality at least")
    lines += [f"    {name}: {{path: {file}}}   # row number = item id" for name, file in tables.features.items()]
    if tables.texts:
        command = "".join(c if c.isprintable() else "?" for c in shlex.join(features_command(out, tables)))
        lines.append(f"    # made by: {command}")
        lines += [f"    text: {{path: {quoted(text_pattern(out))}}}"]
    return "\n".join([*lines, "run:", f"  storage: {quoted(f'work/{name}/runs')}", "  name: first", ""])


def text_pattern(out: str) -> str:
    """data.features.text.path: relative to the folder, unless its name has characters that a glob would interpret."""
    pattern = f"{TEXT_VECTORS}/*.parquet"
    return pattern if glob.escape(out) == out else storage.join(glob.escape(out), pattern)


def features_command(out: str, tables: ImportedTables) -> list[str]:
    """The command that makes vectors of the texts, as words."""
    texts, vectors = storage.join(out, f"{TEXTS}.parquet"), storage.join(out, TEXT_VECTORS)
    return ["gtc", "features", "--texts", texts, "--columns", ",".join(tables.texts), "--out", vectors]


def next_commands(out: str, tables: ImportedTables) -> str:
    """What was written and what to do now, for the terminal."""
    rows = ", ".join(f"{stem} {count:,}" for stem, count in tables.rows.items())
    more = [", ".join(tables.features)] if tables.features else []
    more += [f"texts of {tables.items:,} items"] if tables.texts else []
    config = storage.join(out, CONFIG_NAME)
    lines = ["; ".join([f"{config}: {rows}", *more]), "next:"]
    lines += [f"  {shlex.join(features_command(out, tables))}"] if tables.texts else []
    if not tables.features and not tables.texts:
        return (
            f"{lines[0]}\nthere are no vectors or texts of the items, and GTC needs one kind at least: put the data "
            "set's file of items beside the interactions and import again, or add vectors to data.features"
        )
    return "\n".join([*lines, *(f"  gtc {step} --config {shlex.quote(config)}" for step in ("prepare", "train"))])
