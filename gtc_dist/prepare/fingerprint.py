"""What a catalog was made from: the settings and raw files whose hash says whether it is up to date."""

import hashlib
import json
from collections.abc import Iterator
from typing import Any

from gtc_dist.config import Config
from gtc_dist.data import storage
from gtc_dist.data.catalog import SCHEMA_VERSION, SPLITS
from gtc_dist.graph import item_knn_graph
from gtc_dist.prepare.feature_files import FeatureSource
from gtc_dist.raw.interaction_file import InteractionFile

SEARCH = "auto"  # of item neighbours: exact for small catalogs, approximate for large ones (graph/item_knn_graph.py)
PROBES = 160  # approximate search: inverted lists (of about 250 items) searched per item; more gives higher recall
USER_NEIGHBOURS = 40  # k of the user-user graph
HUB_CAP = 1000  # user-user graph: an item with more users counts only for a sample of this size
LATER_KEYS = {  # section of data -> keys that are not hashed at their default, so that older catalogs stay up to date
    "split": ("repeats",),
    "interactions": ("columns", "separator", "weight", "event", "event_weights", "repeats", "on_bad_rows"),
}
NAMED_CHANGES = 4  # in a message


def raw_uris(files: list[InteractionFile], sources: dict[str, FeatureSource]) -> list[str]:
    return [file.uri for file in files] + [uri for source in sources.values() for uri in source.files]


def catalog_inputs(config: Config, files: list[InteractionFile], sources: dict[str, FeatureSource]) -> dict[str, Any]:
    """Everything that a catalog depends on: settings, and size and time of the raw files.

    The keys are those of version 0.1, so that catalogs of that version are still up to date. The user-user graph is not
    included: prepare checks for it.
    """
    data = config.data.model_dump(mode="json", exclude={"catalog", "verify"})
    if data["recency_half_life"] is None:
        del data["recency_half_life"]
    if data["ids"] == "auto":
        del data["ids"]
    for section, keys in LATER_KEYS.items():
        for key in keys:
            if data[section][key] == type(getattr(config.data, section)).model_fields[key].default:
                del data[section][key]
    for split, label in zip(SPLITS, data["split"].pop("labels"), strict=True):
        data["split"][f"{split}_label"] = label
    graph = {
        "item_neighbours": item_knn_graph.ITEM_NEIGHBOURS,
        "search": SEARCH,
        "probes": PROBES,
        "user_neighbours": USER_NEIGHBOURS,
        "hub_cap": HUB_CAP,
    }
    return {"data": data, "graph": graph, "files": storage.file_signatures(raw_uris(files, sources))}


def fingerprint(inputs: dict[str, Any]) -> str:
    """SHA-256 of the inputs and of the catalog's schema version."""
    parts = [SCHEMA_VERSION, {"data": inputs["data"], "graph": inputs["graph"]}, inputs["files"]]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def changes(before: dict[str, Any], now: dict[str, Any]) -> str:
    """The settings and files that differ, in words; empty if `before` is, as in catalogs before 0.7.0."""
    if not before:
        return ""
    old, new = (dict(_leaves({"data": inputs["data"]})) for inputs in (before, now))
    found = [
        f"{key} is {_value(new, key)}, was {_value(old, key)}" for key in sorted({*old, *new}) if _differ(old, new, key)
    ]
    files = [{uri: rest for uri, *rest in inputs["files"]} for inputs in (before, now)]
    for uri in sorted({*files[0], *files[1]}):
        if uri not in files[0] or uri not in files[1]:
            found.append(f"{uri} is {'new' if uri in files[1] else 'gone'}")
        elif files[0][uri] != files[1][uri]:
            found.append(f"{uri} has changed")
    more = len(found) - NAMED_CHANGES
    return "; ".join(found[:NAMED_CHANGES]) + (f"; and {more} more" if more > 0 else "")


def _leaves(tree: dict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _differ(old: dict, new: dict, key: str) -> bool:
    return old.get(key, _differ) != new.get(key, _differ)


def _value(leaves: dict, key: str) -> str:
    return repr(leaves[key]) if key in leaves else "not set"
