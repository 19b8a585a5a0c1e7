"""Reference of all configuration keys, from their descriptions in config.py: docs/configuration.md and `--help`.

python -m gtc_dist.config_reference > docs/configuration.md
"""

import json
import textwrap
import types
import typing
from typing import Annotated, Any, Literal

from pydantic_core import PydanticUndefined

from gtc_dist.config import Config
from gtc_dist.config_data import ModalityConfig, Section

HEAD = """# Configuration

One YAML file drives `prepare`, `train` and the tools; `a.b=c` on the command line overrides a key. Unknown keys are
refused with the nearest known one. Required: `data.raw`, `data.catalog`, `run.storage`, `run.name`, and the `path` of
each modality. This page is generated from `gtc_dist/config.py` by `make docs`.
"""


# For `--help`: examples, and by task the keys that a first run or a larger catalog needs.
HELP_EXAMPLES = {
    "prepare": (
        "gtc init FOLDER --out mine.yaml                  # writes the configuration for a folder of files",
        "gtc prepare --config mine.yaml --dry-run         # checks everything and says what it will take",
        "gtc prepare --config mine.yaml",
        "gtc prepare --config mine.yaml data.interactions.user=customer data.interactions.item=product --force",
    ),
    "train": (
        "gtc train --config mine.yaml --dry-run           # checks everything and says what it will take",
        "gtc train --config mine.yaml train.epochs=30     # the same command again resumes an interrupted run",
        "gtc train --config mine.yaml run.name=second cluster.workers=2",
        "gtc train --config mine.yaml data.catalog=work/today run.name=today train.init_from=work/mine/runs/first",
    ),
}
PREPARE_KEYS = {
    "your data": (
        "data.raw",
        "data.catalog",
        "data.interactions.files",
        "data.interactions.user",
        "data.interactions.item",
        "data.interactions.time",
        "data.split.method",
        "data.features.NAME.path",
        "data.features.NAME.ids",
        "data.ids",
        "data.items",
    ),
    "files as they are": (
        "data.interactions.columns",
        "data.interactions.separator",
        "data.interactions.on_bad_rows",
        "data.split.repeats",
    ),
    "what counts, and how much": (
        "data.interactions.event",
        "data.interactions.event_weights",
        "data.interactions.weight",
        "data.interactions.repeats",
        "data.interactions.rating",
        "data.interactions.min_rating",
        "data.interactions.k_core",
        "data.recency_half_life",
    ),
    "size and speed": ("prepare.memory_gib", "prepare.scratch", "data.features.NAME.pca", "model.user_hop"),
}
TRAIN_KEYS = {
    "your data": ("data.catalog", "data.verify", "model.modalities"),
    "size and speed": (
        "cluster.workers",
        "cluster.gpu",
        "cluster.threads",
        "train.batch_size",
        "train.epoch_steps",
        "train.precision",
        "train.table_optimizer",
        "model.propagation",
        "model.layer_nodes",
        "eval.users",
    ),
    "quality": (
        "train.epochs",
        "train.lr",
        "train.table_lr",
        "train.loss",
        "model.variant",
        "model.width",
        "model.masked_members",
        "eval.metric",
        "eval.every",
        "eval.patience",
    ),
    "the next day": ("train.init_from", "train.final_fit"),
    "resuming": (
        "run.storage",
        "run.name",
        "train.checkpoint_minutes",
        "train.seed",
        "cluster.retries",
        "cluster.min_workers",
    ),
}
HELP_KEYS = {"prepare": PREPARE_KEYS, "train": TRAIN_KEYS}
HELP_COLUMN, HELP_WIDTH = 40, 118  # of the descriptions


def sections(section: type[Section] = Config, prefix: str = "") -> list[tuple[str, type[Section]]]:
    """(dotted prefix, section class) of every section that has keys of its own, in order."""
    found = [(prefix, section)] if _own_keys(section) else []
    for name, field in section.model_fields.items():
        if _is_section(field.annotation):
            found += sections(field.annotation, f"{prefix}{name}.")
        elif field.annotation == dict[str, ModalityConfig]:
            found += sections(ModalityConfig, f"{prefix}{name}.NAME.")
    return found


def keys(section: type[Section], prefix: str) -> list[tuple[str, str, str, str]]:
    """(key, type, default, description) of a section's own keys."""
    rows = []
    for name in _own_keys(section):
        field = section.model_fields[name]
        default = "required" if field.default is PydanticUndefined else json.dumps(field.default)
        rows.append((f"{prefix}{name}", _type_name(field.annotation), default, field.description or ""))
    return rows


def markdown() -> str:
    """The content of docs/configuration.md."""
    parts = [HEAD]
    for prefix, section in sections():
        parts.append(f"## {prefix.rstrip('.')}\n\n{' '.join((section.__doc__ or '').split())}\n")
        parts.append("| key | type | default | meaning |\n| --- | --- | --- | --- |")
        for key, kind, default, description in keys(section, prefix):
            cells = (f"`{key}`", _cell(kind), default if default == "required" else f"`{default}`", _cell(description))
            parts.append("| " + " | ".join(cells) + " |")
        parts.append("")
    return "\n".join(parts)


def help_text(command: Literal["prepare", "train"]) -> str:
    """Examples, and the keys that a user most likely sets, for `--help`."""
    rows = {row[0]: row for prefix, section in sections() for row in keys(section, prefix)}
    lines = ["examples:", *(f"  {example}" for example in HELP_EXAMPLES[command])]
    for task, names in HELP_KEYS[command].items():
        lines += ["", f"{task}:"]
        for key, kind, default, description in (rows[name] for name in names):
            start = f"  {key}={default}" if default != "required" else f"  {key}  (required)"
            first = description.partition(". ")[0].partition("; ")[0].rstrip(".")
            choices = kind.split(", ")
            if any(first.startswith(f"{choice}: ") for choice in choices[1:] and choices):
                first = f"one of {kind}"
            text = f"{start:<{HELP_COLUMN - 1}} {first}"
            lines += textwrap.wrap(text, HELP_WIDTH, subsequent_indent=" " * HELP_COLUMN)
    return "\n".join([*lines, "", "All keys, with types and details: docs/configuration.md"])


def _own_keys(section: type[Section]) -> list[str]:
    fields = section.model_fields.items()
    return [n for n, f in fields if not _is_section(f.annotation) and f.annotation != dict[str, ModalityConfig]]


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, Section)


def _type_name(annotation: Any) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        return _type_name(arguments[0])
    if origin is Literal:
        return ", ".join(str(argument) for argument in arguments)
    if origin in (types.UnionType, typing.Union):
        return " or ".join("null" if a is type(None) else _type_name(a) for a in arguments)
    if origin is dict:
        return f"{_type_name(arguments[0])}: {_type_name(arguments[1])}"
    if origin is list:
        return f"list of {_type_name(arguments[0])}"
    return {int: "integer", float: "number", str: "text", bool: "true, false"}[annotation]


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    print(markdown(), end="")
