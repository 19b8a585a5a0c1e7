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


def help_text() -> str:
    """The keys for `--help`."""
    lines = ["configuration keys (docs/configuration.md):"]
    for prefix, section in sections():
        lines.append("")
        for key, kind, default, description in keys(section, prefix):
            lines.append(f"  {key} = {default}   ({kind})")
            lines += textwrap.wrap(description, 100, initial_indent="      ", subsequent_indent="      ")
    return "\n".join(lines)


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
