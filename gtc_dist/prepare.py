"""Raw tables and features to a catalog:  python -m gtc_dist.prepare --config configs/X.yaml [a.b=c ...] [--force]

Everything that can be checked is checked before Ray starts, and all raw data is read and checked before the first file
is written. A folder that is being written holds building.json; the manifest comes last. The manifest carries a
fingerprint of the configuration and the raw files: the same again means there is nothing to do.
"""

import argparse
import hashlib
import json
import posixpath
import sys
import time

import numpy as np

from gtc_dist.config import Config, parse_command_line
from gtc_dist.data import features, ingest, storage, vectors
from gtc_dist.data.catalog import BUILDING, GRAPHS, MANIFEST, SCHEMA_VERSION, SPLITS, CatalogWriter, Manifest
from gtc_dist.errors import InputError, run_command
from gtc_dist.graph import build

OWN_FILES = ("users/", "items/", "interactions/", "features/", "graph/", MANIFEST, BUILDING)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m gtc_dist.prepare", description=__doc__.splitlines()[0])
    parser.add_argument("--force", action="store_true", help="rebuild a catalog that is already there")
    config, args = parse_command_line(parser, argv)
    manifest, built = prepare(config, args.force)
    if not built:
        print(f"{config.data.catalog} is up to date (--force rebuilds it)")
    print(summary(manifest))
    return 0


def prepare(config: Config, force: bool = False) -> tuple[Manifest, bool]:
    """Build the catalog of a configuration, unless it is there already.

    Returns:
        The manifest, and whether it was built now.

    Raises:
        InputError: bad input, or a folder at data.catalog that this must not overwrite; nothing is written then.
    """
    data, uri = config.data, config.data.catalog
    say = _Progress()
    files, sources = inspect(config)
    mark = fingerprint(config, files, sources)
    current = existing(uri, mark, force)
    if current is not None:
        return current, False
    say(f"checked {len(files)} interaction files and {len(sources)} modalities; starting Ray")

    from gtc_dist import cluster  # here, so that errors above and a catalog that is up to date show at once

    cluster.connect()
    raw = ingest.read(files)
    more = features.item_ids(sources, raw.item_ids.type) if data.items == "all" else None
    found = ingest.build(raw, data, more)
    counts = ", ".join(f"{split} {rows:,}" for split, rows in found.counts.items())
    say(f"interactions: {len(found.users):,} users, {len(found.items):,} items, {counts}")
    with features.gather(sources, found.items) as gathered:
        say("features read and checked: " + ", ".join(f"{name} {g.vectors.shape[1]}" for name, g in gathered.items()))
        clear(uri)
        writer = CatalogWriter(uri)
        entries, content = write_features(writer, config, gathered)
        say(f"features written to {uri}")
    graphs = write_graphs(writer, config, found, content, cluster.cores())
    say("graphs: " + ", ".join(f"{name} {edges:,}" for name, edges in graphs.items()))
    writer.ids("users", found.users)
    writer.ids("items", found.items)
    for split in SPLITS:
        writer.interactions(split, *found.splits[split])
    manifest = writer.finish(
        fingerprint=mark,
        users=len(found.users),
        items=len(found.items),
        interactions=found.counts,
        cold_items=len(found.items) - len(np.unique(found.splits["train"][1])),
        modalities=entries,
        graphs=graphs,
        dropped=found.dropped | {f"features/{name}": g.unknown for name, g in gathered.items()},
    )
    say("manifest written")
    return manifest, True


def inspect(config: Config) -> tuple[list, dict[str, vectors.Source]]:
    """Check all raw files, without Ray."""
    modalities = config.data.features
    if not modalities:
        raise InputError("data.features is empty; name at least one modality")
    for name in modalities:
        if not name.replace("_", "").replace("-", "").isalnum():
            raise InputError(f"data.features: {name!r} names a folder; use letters, digits, '_' and '-' only")
    if "id" in modalities:
        raise InputError("data.features: 'id' is the name of the id stream; choose another name")
    if not any(modality.weight for modality in modalities.values()):
        raise InputError("data.features: every modality has weight 0; the item-item graph needs one above")
    files = ingest.inspect(config.data)
    sources = {name: vectors.inspect(name, modality, config.data.raw) for name, modality in modalities.items()}
    folder = posixpath.normpath(storage.absolute(config.data.catalog))
    inside = [uri for uri in raw_uris(files, sources) if posixpath.normpath(uri).startswith(f"{folder}/")]
    if inside:
        raise InputError(f"raw files, such as {inside[0]}, lie inside data.catalog {folder}; name another folder")
    return files, sources


def raw_uris(files: list, sources: dict[str, vectors.Source]) -> list[str]:
    return [file.uri for file in files] + [uri for source in sources.values() for uri in source.files]


def fingerprint(config: Config, files: list, sources: dict[str, vectors.Source]) -> str:
    """What the catalog depends on: data and graph configuration, raw files (size and time or ETag), schema."""
    wanted = config.model_dump(mode="json", include={"data": True, "graph": True})
    for key in ("catalog", "verify"):
        del wanted["data"][key]
    parts = [SCHEMA_VERSION, wanted, storage.signature(raw_uris(files, sources))]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def existing(uri: str, mark: str, force: bool) -> Manifest | None:
    """The manifest of an up-to-date catalog at `uri`, or None if one is to be written there.

    Raises:
        InputError: the folder holds another catalog and `force` is off, or files that are no catalog's.
    """
    names = storage.listing(uri)
    foreign = [name for name in names if not name.startswith(OWN_FILES)]
    if foreign or (names and MANIFEST not in names and BUILDING not in names):
        raise InputError(
            f"data.catalog {uri} is not empty and holds files that are not a catalog's, such as "
            f"{(foreign or list(names))[0]}; name another folder"
        )
    if MANIFEST not in names:
        return None
    stored = storage.read_json(storage.join(uri, MANIFEST))
    if not isinstance(stored, dict) or not {"schema_version", "fingerprint"} <= stored.keys():
        raise InputError(f"data.catalog {uri} holds a manifest.json that is not a catalog's; name another folder")
    if force:
        return None
    if stored["fingerprint"] != mark:
        raise InputError(
            f"data.catalog {uri} holds a catalog of another configuration or other raw files; "
            "--force rebuilds it, or name another folder"
        )
    return Manifest.model_validate(stored)


def clear(uri: str) -> None:
    """Empty a catalog's folder, after `existing` let it pass. At no moment does it look whole or foreign: building.json
    comes first and stays, and the manifest goes before any other file."""
    names = sorted(storage.listing(uri), key=lambda name: name != MANIFEST)
    if names:
        storage.write_json(storage.join(uri, BUILDING), {"schema_version": SCHEMA_VERSION})
    for name in names:
        if name != BUILDING:
            storage.remove_tree(storage.join(uri, name))


def write_features(writer: CatalogWriter, config: Config, gathered: dict) -> tuple[dict, dict[str, np.ndarray]]:
    entries, content = {}, {}
    for name, raw in gathered.items():
        transform = features.fit(raw, config.data.features[name].pca)
        entries[name], content[name] = features.write(writer, name, raw, transform)
    return entries, content


def write_graphs(
    writer: CatalogWriter, config: Config, found: ingest.Interactions, content: dict, threads: int
) -> dict[str, int]:
    """Build and write the graphs; returns their numbers of edges."""
    users, items, settings = len(found.users), len(found.items), config.graph
    weights = {name: modality.weight for name, modality in config.data.features.items()}
    graphs = dict(zip(GRAPHS[:2], build.user_item(*found.splits["train"], users, items), strict=True))
    graphs["item_item"] = build.item_item(content, weights, settings.item_neighbours, threads)
    graphs["user_user"] = build.user_user(
        graphs["item_user"], items, settings.user_neighbours, settings.hub_cap, config.data.split.seed
    )
    for name in GRAPHS:
        writer.graph(name, graphs[name])
    return {name: len(graphs[name].indices) for name in GRAPHS}


def summary(manifest: Manifest) -> str:
    """What a person wants to know of a catalog."""
    lines = [
        f"users {manifest.users:,}  items {manifest.items:,} ({manifest.cold_items:,} without a train interaction)",
        "interactions  " + "  ".join(f"{name} {rows:,}" for name, rows in manifest.interactions.items()),
        "edges  " + "  ".join(f"{name} {edges:,}" for name, edges in manifest.graphs.items()),
    ]
    for name, entry in manifest.modalities.items():
        pca = f" by PCA, {entry.explained_variance:.1%} of the variance" if entry.dim != entry.raw_dim else ""
        lines.append(f"{name}  {entry.raw_dim} -> {entry.dim} values{pca}; {entry.missing:,} items without a vector")
    dropped = {reason: rows for reason, rows in manifest.dropped.items() if rows}
    lines.append("dropped  " + ("  ".join(f"{reason} {rows:,}" for reason, rows in dropped.items()) or "nothing"))
    return "\n".join(lines)


class _Progress:
    """Prints a line for each finished stage, with the seconds since the start."""

    def __init__(self):
        self.start = time.monotonic()

    def __call__(self, message: str) -> None:
        print(f"[{time.monotonic() - self.start:6.1f} s] {message}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    run_command(main)
