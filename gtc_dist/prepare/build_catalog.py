"""Raw tables and features to a catalog:  python -m gtc_dist.prepare --config configs/X.yaml [a.b=c ...] [--force]

Everything that can be checked is checked before Ray starts, and all raw data is read and checked before the first file
is written. A folder that is being written holds building.json; the manifest comes last. The manifest carries a
fingerprint of the configuration and the raw files: the same again means there is nothing to do.

Memory is bounded by prepare.memory_gib, the ids and a few numbers for each user and item; everything else passes
through arrays on local disk (prepare.scratch).
"""

import argparse
import hashlib
import json
import posixpath
from pathlib import Path

import numpy as np
from pydantic import ValidationError

from gtc_dist.config import Config
from gtc_dist.config_file import parse_command_line
from gtc_dist.data import storage
from gtc_dist.data.catalog import BUILDING, CSC, GRAPHS, MANIFEST, SCHEMA_VERSION, SPLITS, CatalogWriter, Manifest
from gtc_dist.data.scratch import Scratch
from gtc_dist.errors import InputError, run_command
from gtc_dist.graph import item_knn_graph, user_cooccurrence_graph, user_item_graph
from gtc_dist.prepare import feature_files, features, interactions
from gtc_dist.progress import ProgressCallback, ProgressPrinter, no_progress

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
    uri, say = config.data.catalog, ProgressPrinter()
    files, sources = inspect_raw_data(config)
    mark = fingerprint(config, files, sources)
    current = existing(uri, mark, force)
    if current is not None:
        return current, False
    check_folder(uri)
    say(f"checked {len(files)} interaction files and {len(sources)} modalities; starting Ray")

    from gtc_dist.launch import ray_cluster  # here, so that errors above and a catalog that is up to date show at once

    with Scratch(config.prepare.scratch, int(config.prepare.memory_gib * 2**30)) as scratch:
        ray_cluster.connect()
        manifest = build_catalog(config, mark, files, sources, scratch, say)
    return manifest, True


def build_catalog(
    config: Config, mark: str, files: list, sources: dict, scratch: Scratch, say: ProgressPrinter
) -> Manifest:
    """Read, check and write everything; `mark` is the catalog's fingerprint."""
    from gtc_dist.launch import ray_cluster

    data, uri = config.data, config.data.catalog
    raw = interactions.read_interactions(files, scratch, say.often)
    say(f"interactions read: {len(raw.user):,}")
    more = features.item_ids(sources, raw.item_ids.type) if data.items == "all" else None
    found = interactions.build(raw, data, scratch, more, say.often)
    counts = ", ".join(f"{split} {rows:,}" for split, rows in found.counts.items())
    say(f"interactions: {len(found.users):,} users, {len(found.items):,} items, {counts}")
    gathered = features.gather_features(sources, found.items, scratch, say.often)
    say("features read and checked: " + ", ".join(f"{name} {g.vectors.shape[1]}" for name, g in gathered.items()))
    clear(uri)
    writer = CatalogWriter(uri)
    entries, content = write_features(writer, config, gathered, scratch, say.often)
    say(f"features written to {uri}")
    graphs, quality = write_graphs(writer, config, found, content, scratch, ray_cluster.cores(), say.often)
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
        cold_items=cold_items(found, scratch),
        modalities=entries,
        graphs=graphs,
        graph_quality=quality,
        dropped=found.dropped | {f"features/{name}": g.unknown for name, g in gathered.items()},
    )
    say("manifest written")
    return manifest


def inspect_raw_data(config: Config) -> tuple[list, dict[str, feature_files.Source]]:
    """Check all raw files, without Ray."""
    modalities = config.data.features
    if not modalities:
        raise InputError("data.features is empty; name at least one modality")
    if "id" in modalities:
        raise InputError("data.features: 'id' is the name of the id stream; choose another name")
    if not any(modality.weight for modality in modalities.values()):
        raise InputError("data.features: every modality has weight 0; the item-item graph needs one above")
    files = interactions.inspect_interactions(config.data)
    sources = {
        name: feature_files.inspect_features(name, modality, config.data.raw) for name, modality in modalities.items()
    }
    folder = posixpath.normpath(storage.absolute(config.data.catalog))
    inside = [uri for uri in raw_uris(files, sources) if posixpath.normpath(uri).startswith(f"{folder}/")]
    if inside:
        raise InputError(f"raw files, such as {inside[0]}, lie inside data.catalog {folder}; name another folder")
    return files, sources


def raw_uris(files: list, sources: dict[str, feature_files.Source]) -> list[str]:
    return [file.uri for file in files] + [uri for source in sources.values() for uri in source.files]


def fingerprint(config: Config, files: list, sources: dict[str, feature_files.Source]) -> str:
    """What the catalog depends on: data and graph configuration, raw files (size and time or ETag), schema."""
    wanted = config.model_dump(mode="json", include={"data": True, "graph": True})
    for key in ("catalog", "verify"):
        del wanted["data"][key]
    parts = [SCHEMA_VERSION, wanted, storage.signature(raw_uris(files, sources))]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def existing(uri: str, mark: str, force: bool) -> Manifest | None:
    """The manifest of an up-to-date catalog at `uri`, or None if one is to be written there.

    Raises:
        InputError: the folder holds another catalog or a damaged manifest and `force` is off, or files that are no
            catalog's.
    """
    names = [name for name in storage.listing(uri) if not name.startswith(storage.PROBE)]
    foreign = [name for name in names if not name.startswith(OWN_FILES)]
    if foreign or (names and MANIFEST not in names and BUILDING not in names):
        raise InputError(
            f"data.catalog {uri} is not empty and holds files that are not a catalog's, such as "
            f"{(foreign or names)[0]}; name another folder"
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
    try:
        return Manifest.model_validate(stored)
    except ValidationError as error:
        raise InputError(f"data.catalog {uri} has a damaged manifest.json; --force rebuilds it: {error}") from None


def check_folder(uri: str) -> None:
    """Raises InputError where the folder cannot be written to, such as where a file stands in its way."""
    if storage.is_local(uri):
        path = Path(storage.absolute(uri))
        nearest = next(above for above in (path, *path.parents) if above.exists())
        if not nearest.is_dir():
            raise InputError(f"data.catalog {uri} cannot be a folder, since {nearest} is a file; name another folder")
    storage.check_writable(uri)


def clear(uri: str) -> None:
    """Empty a catalog's folder, after `existing` let it pass. At no moment does it look whole or foreign: building.json
    comes first and stays, and the manifest goes before any other file."""
    names = sorted(storage.listing(uri), key=lambda name: name != MANIFEST)
    if names:
        storage.write_json(storage.join(uri, BUILDING), {"schema_version": SCHEMA_VERSION})
    for name in names:
        if name != BUILDING:
            storage.remove_tree(storage.join(uri, name))


def write_features(
    writer: CatalogWriter,
    config: Config,
    gathered: dict[str, features.Gathered],
    scratch: Scratch,
    tell: ProgressCallback,
) -> tuple[dict, dict[str, np.ndarray]]:
    """Write all modalities; returns their manifest entries and their features in scratch."""
    entries, content = {}, {}
    for name, raw in gathered.items():
        transform = features.fit_feature_transform(raw, config.data.features[name].pca)
        entries[name], content[name] = features.write_features(writer, name, raw, transform, scratch, tell)
        scratch.discard(raw.vectors)
    return entries, content


def cold_items(found: interactions.SplitInteractions, scratch: Scratch) -> int:
    """Items without a train interaction."""
    _, item = found.splits["train"]
    cold = np.ones(len(found.items), bool)
    for block in scratch.blocks(len(item), 16):
        cold[item[block]] = False
    return int(cold.sum())


def write_graphs(
    writer: CatalogWriter,
    config: Config,
    found: interactions.SplitInteractions,
    content: dict[str, np.ndarray],
    scratch: Scratch,
    threads: int,
    tell: ProgressCallback = no_progress,
) -> tuple[dict[str, int], dict[str, float]]:
    """Build and write the graphs, one after the other; returns their numbers of edges and measures of their quality."""
    settings, edges, quality = config.graph, {}, {}

    def write(name: str, graph: CSC) -> None:
        writer.graph(name, graph)
        edges[name] = len(graph.indices)
        tell(f"graph {name}: {edges[name]:,} edges")

    def progress(name: str):
        return lambda done, total: tell(f"graph {name}: {done:,} of {total:,}")

    weights = {name: modality.weight for name, modality in config.data.features.items()}
    items, search = len(found.items), {"search": settings.search, "probes": settings.probes}
    graph = item_knn_graph.build_item_knn_graph(
        content, weights, settings.item_neighbours, threads, **search, scratch=scratch, progress=progress("item_item")
    )
    write("item_item", graph)
    if item_knn_graph.approximates(settings.search, items):
        quality["item_item_recall"] = item_knn_graph.graph_recall(graph, content, weights, threads, scratch=scratch)
    scratch.discard(graph.indices, graph.weight)

    both = user_item_graph.build_user_item_graph(*found.splits["train"], len(found.users), items, scratch)
    for name, graph in zip(GRAPHS[:2], both, strict=True):
        write(name, graph)
    seed, report = config.data.split.seed, progress("user_user")
    graph = user_cooccurrence_graph.build_user_cooccurrence_graph(
        *both, settings.user_neighbours, settings.hub_cap, seed, threads, scratch=scratch, progress=report
    )
    write("user_user", graph)
    scratch.discard(*(array for made in (*both, graph) for array in (made.indices, made.weight)))
    return {name: edges[name] for name in GRAPHS}, quality


def summary(manifest: Manifest) -> str:
    """What a person wants to know of a catalog."""
    lines = [
        f"users {manifest.users:,}  items {manifest.items:,} ({manifest.cold_items:,} without a train interaction)",
        "interactions  " + "  ".join(f"{name} {rows:,}" for name, rows in manifest.interactions.items()),
        "edges  " + "  ".join(f"{name} {edges:,}" for name, edges in manifest.graphs.items()),
    ]
    lines += [f"{name}  {value:.3f}" for name, value in manifest.graph_quality.items()]
    for name, entry in manifest.modalities.items():
        pca = f" by PCA, {entry.explained_variance:.1%} of the variance" if entry.dim != entry.raw_dim else ""
        lines.append(f"{name}  {entry.raw_dim} -> {entry.dim} values{pca}; {entry.missing:,} items without a vector")
    dropped = {reason: rows for reason, rows in manifest.dropped.items() if rows}
    lines.append("dropped  " + ("  ".join(f"{reason} {rows:,}" for reason, rows in dropped.items()) or "nothing"))
    return "\n".join(lines)


if __name__ == "__main__":
    run_command(main)
