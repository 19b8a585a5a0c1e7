"""Reads run configurations: strict YAML, overrides, and errors that say which key is meant.

YAML is read with the safe loader, which makes nothing but plain values.
"""

import re
from pathlib import Path

import yaml
from pydantic import ValidationError

from gtc_dist.config import Config
from gtc_dist.config_data import ModalityConfig, Section
from gtc_dist.config_upgrade import old_keys, upgrade
from gtc_dist.errors import InputError, hint_at_known


class _UniqueKeyLoader(yaml.SafeLoader):
    """Safe YAML that refuses a key given twice and a value that holds itself, and reads 1e-3 as a number. Anchors,
    aliases and merge keys (<<) work as in YAML 1.1."""

    def compose_mapping_node(self, anchor):
        node, seen = super().compose_mapping_node(anchor), set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:timestamp":
                found = {"sequence": "list", "mapping": "dict", "scalar": "date"}[key.id]
                raise InputError(f"{_line(key)}: a key must be a plain word, found a {found}")
            if key.value in seen:
                raise InputError(f"{_line(key)}: key {key.value!r} is given twice")
            seen.add(key.value)
        return node

    def compose_node(self, parent, index):
        node = super().compose_node(parent, index)
        if isinstance(node, yaml.CollectionNode) and node.end_mark is None:  # an alias to what is being read
            raise InputError(f"{_line(node)}: this value holds itself by an alias")
        return node

    def construct_object(self, node, deep=False):
        try:
            value = super().construct_object(node, deep)
            if isinstance(value, str):
                value.encode()  # fails for half of a surrogate pair
            return value
        except InputError:
            raise
        except (ValueError, LookupError, AttributeError) as error:  # such as for 2024-13-45 or !!int abc
            raise InputError(
                f"{_line(node)}: {str(node.value)[:40]!a} is no {node.tag.rpartition(':')[2]} ({error}); quote text"
            ) from None


def _line(node: yaml.Node) -> str:
    return f"{node.start_mark.name}:{node.start_mark.line + 1}"


# YAML 1.1 wants a dot and a sign in floats; people write 1e-3 (the usual widening of PyYAML's resolver).
_UniqueKeyLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d+)$"), list("-+0123456789.")
)


def load_config(path: str | Path, overrides: list[str] | None = None) -> Config:
    """Read a YAML config and apply overrides.

    Args:
        path: YAML file.
        overrides: `a.b=c`, the value read as YAML (`train.lr=1e-3`, `model.fanout=[10,10]`, `cluster.threads=null`).

    Raises:
        InputError: missing file, bad YAML, unknown key (with the nearest known one), wrong type or value.
    """
    path = Path(path)
    if path.is_dir():
        raise InputError(f"config file {path} is a folder; name a YAML file")
    if not path.is_file():
        raise InputError(f"config file {path} does not exist")
    return read_config(path.read_bytes(), str(path), overrides)


def read_config(data: bytes, origin: str, overrides: list[str] | None = None) -> Config:
    """The same from the bytes of a file; `origin` names it in errors."""
    tree = _read_tree(data, origin)
    for override in overrides or []:
        _apply(tree, override)
    return build_config(tree, origin)


def read_run_config(data: bytes, origin: str) -> Config:
    """The config.yaml of a run folder, which an older version may have written."""
    return build_config(upgrade(_read_tree(data, origin), origin), origin)


def _read_tree(data: bytes, origin: str) -> dict:
    try:
        tree = parse_yaml(data.decode(), origin)
    except UnicodeDecodeError as error:
        raise InputError(f"config file {origin} is not UTF-8 text: {error}") from error
    if tree is None:
        tree = {}
    if not isinstance(tree, dict):
        raise InputError(
            f"config file {origin} holds a {type(tree).__name__}; expected sections such as data: and run:"
        )
    return tree


def build_config(tree: dict, origin: str) -> Config:
    """Validate a nested dictionary (as read from YAML or JSON); `origin` names it in errors."""
    if old := old_keys(tree):
        raise InputError("\n".join(f"{origin}: key {key!r} {what}" for key, what in old.items()))
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise InputError("\n".join(_explain(e, origin) for e in error.errors())) from None


def parse_command_line(parser, argv: list[str] | None = None):
    """Add `--config` and `a.b=c` overrides to an argparse parser; returns (config, args)."""
    parser.add_argument("--config", required=True, help="YAML file, see configs/")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="override of a configuration key")
    args = parser.parse_intermixed_args(argv)
    return load_config(args.config, args.overrides), args


def parse_yaml(text: str, name: str):
    try:
        loader = _UniqueKeyLoader(text)
        loader.name = name
        return loader.get_single_data()
    except yaml.YAMLError as error:
        raise InputError(f"{name} is not valid YAML: {error}") from None
    except RecursionError:
        raise InputError(f"{name} is not valid YAML: its lists or sections lie too deep in each other") from None


def _apply(tree: dict, override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise InputError(f"override {override!r} is not of the form a.b=c")
    node = tree
    *parents, last = key.split(".")
    for part in parents:
        if not isinstance(node.get(part), dict):
            node[part] = {}
        node = node[part]
    node[last] = parse_yaml(text, f"override {key}") if text else ""


def _explain(error: dict, origin: str) -> str:
    location = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        section = _section_at(error["loc"][:-1])
        known = list(section.model_fields) if section else []
        hint = hint_at_known(error["loc"][-1], known, "known keys here")
        return f"{origin}: unknown key {location!r}; {hint}"
    if error["type"] == "missing":
        return f"{origin}: key {location!r} is missing"
    if error["type"] == "value_error":
        return f"{origin}: {location + ': ' if location else ''}{error['ctx']['error']}"
    return f"{origin}: key {location!r}: {error['msg']}; found {error['input']!r}"


def _section_at(location: tuple) -> type[Section] | None:
    """The section class that a validation error's location lies in."""
    section: type[Section] | None = Config
    for part in location:
        if section is None:
            return None
        field = section.model_fields.get(str(part))
        if field is None:
            continue  # the name of a modality: data.features.NAME
        annotation = field.annotation
        if annotation == dict[str, ModalityConfig]:
            section = ModalityConfig
        else:
            section = annotation if isinstance(annotation, type) and issubclass(annotation, Section) else None
    return section
