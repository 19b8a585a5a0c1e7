"""Build a catalog from raw tables:  python -m gtc_dist.prepare --config configs/X.yaml [a.b=c ...] [--force]

prepare checks file headers, columns and types before it starts Ray, and reads and validates all raw data before it
writes the first file. building.json marks a catalog that is being written; manifest.json is written last. The manifest
has a fingerprint of the configuration and the raw files: if it is unchanged, the catalog is up to date.

Memory: `prepare.memory_gib`, plus all ids and a few numbers per user and item. Everything else is in memory-mapped
arrays on local disk (`prepare.scratch`).
"""

import argparse
import posixpath

import numpy as np
import pyarrow as pa
from pydantic import ValidationError

from gtc_dist.config import Config
from gtc_dist.config_file import parse_command_line
from gtc_dist.config_reference import help_text
from gtc_dist.data import storage
from gtc_dist.data.catalog import (
    CSC,
    GRAPHS,
    MANIFEST,
    SPLITS,
    CatalogWriter,
    Manifest,
    catalog_folder,
)
from gtc_dist.data.output_folder import OutputFolder, refuse_unfinished
from gtc_dist.data.scratch import Scratch
from gtc_dist.errors import InputError
from gtc_dist.graph import item_knn_graph, user_cooccurrence_graph, user_item_graph
from gtc_dist.launch.job_paths import refuse_relative_paths
from gtc_dist.prepare import catalog_interactions, feature_files, features, interactions
from gtc_dist.prepare.catalog_interactions import SplitInteractions
from gtc_dist.prepare.feature_files import FeatureSource
from gtc_dist.prepare.fingerprint import (
    HUB_CAP,
    PROBES,
    SEARCH,
    USER_NEIGHBOURS,
    catalog_inputs,
    changes,
    fingerprint,
    raw_uris,
)
from gtc_dist.progress import ProgressCallback, ProgressPrinter, no_progress
from gtc_dist.raw.interaction_file import InteractionFile

REJECTED_FILE = "interactions/rejected.parquet"
DROPPED = {  # reasons in the manifest, in words
    "bad_rows": f"rows that cannot be read ({REJECTED_FILE} of the catalog lists them)",
    "event": "events of weight 0",
    "min_rating": "rows below data.interactions.min_rating",
    "duplicate": "repeats of a user and an item (data.interactions.repeats says how many count)",
    "k_core": "rows of users and items with fewer than data.interactions.k_core",
    "in_train": "rows of valid and test that are in train",
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="gtc prepare",
        description="Build a catalog from raw tables.",
        epilog=help_text("prepare"),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--force", action="store_true", help="rebuild an existing catalog")
    parser.add_argument("--dry-run", action="store_true", help="check all, print sizes and time, write nothing")
    config, args = parse_command_line(parser, argv)
    refuse_relative_paths({"data.raw": config.data.raw, "data.catalog": config.data.catalog})
    if args.dry_run:
        print(describe(config, args.force))
        return 0
    manifest, built = prepare_catalog(config, args.force)
    uri = storage.absolute(config.data.catalog)
    print(f"catalog {uri}" if built else f"{uri} is up to date (--force rebuilds it)")
    print(catalog_summary(manifest))
    return 0


def prepare_catalog(config: Config, force: bool = False) -> tuple[Manifest, bool]:
    """Build the catalog of a configuration, unless it is up to date.

    Returns:
        The manifest, and whether the catalog was built by this call.

    Raises:
        InputError: bad input, or data.catalog is a folder that must not be overwritten. Nothing was written.
    """
    files, sources = inspect_raw_data(config)
    inputs = catalog_inputs(config, files, sources)
    folder = catalog_folder(config.data.catalog)
    current = current_manifest(folder, config, inputs, force)
    if current is not None:
        return current, False
    folder.check_writable()
    progress = ProgressPrinter()
    progress(f"checked {len(files)} interaction files and {len(sources)} modalities; starting Ray")

    from gtc_dist.launch import ray_cluster  # here: the checks above take less time than importing Ray
    from gtc_dist.preflight import node_checks

    with Scratch(config.prepare.scratch, int(config.prepare.memory_gib * 2**30)) as scratch:
        ray_cluster.connect()
        first_files = {f"data.features.{name}": source.files[0] for name, source in sources.items()}
        node_checks.check_nodes({"data.interactions": files[0].uri} | first_files)
        progress("Ray started; reading interactions")
        manifest = write_catalog(config, inputs, files, sources, scratch, ray_cluster.cores(), progress)
    return manifest, True


def describe(config: Config, force: bool) -> str:
    """Check what `prepare_catalog` checks before it starts Ray, and say what it would take. Raises InputError."""
    from gtc_dist.launch import dry_run  # imports torch

    files, sources = inspect_raw_data(config)
    folder = catalog_folder(config.data.catalog)
    current = current_manifest(folder, config, catalog_inputs(config, files, sources), force)
    if current is None:
        folder.check_writable()
    uris = ([file.uri for file in files if file.is_text == text] for text in (False, True))
    sizes = {name: (source.rows, source.width) for name, source in sources.items()}
    return dry_run.describe_preparation(config, *uris, sizes, current is not None)


def inspect_raw_data(config: Config) -> tuple[list[InteractionFile], dict[str, FeatureSource]]:
    """Find and check all raw files, without Ray. Raises InputError."""
    modalities = config.data.features
    if not modalities:
        raise InputError("data.features is empty; name at least one modality")
    if not any(modality.weight for modality in modalities.values()):
        raise InputError("data.features: every modality has weight 0; the item-item graph needs a positive one")
    files = interactions.inspect_interactions(config.data)
    sources = {
        name: feature_files.inspect_features(name, modality, config.data.raw) for name, modality in modalities.items()
    }
    refuse_unfinished({config.data.raw, *(posixpath.dirname(uri) for each in sources.values() for uri in each.files)})
    text = [name for name, source in sources.items() if features.has_text_ids({name: source})]
    if text and config.data.ids == "integer":
        raise InputError(
            f"data.ids is integer, but the item ids of data.features.{text[0]} are text; set data.ids=text"
        )
    folder = posixpath.normpath(storage.absolute(config.data.catalog))
    inside = [uri for uri in raw_uris(files, sources) if posixpath.normpath(uri).startswith(f"{folder}/")]
    if inside:
        raise InputError(f"raw files, such as {inside[0]}, are inside data.catalog {folder}; name another folder")
    return files, sources


def current_manifest(folder: OutputFolder, config: Config, inputs: dict, force: bool) -> Manifest | None:
    """The manifest of an up-to-date catalog, or None if the catalog must be built.

    Args:
        inputs: `catalog_inputs` of the configuration and the raw files.
        force: rebuild any catalog.

    Raises:
        InputError: the folder has files that are not part of a catalog; or, without `force`, a catalog of another
            configuration, one that lacks the user-user graph, or a damaged manifest.
    """
    if folder.state() != "complete":
        return None
    stored, uri = storage.read_json(storage.join(folder.uri, MANIFEST)), folder.uri
    if not isinstance(stored, dict) or not {"schema_version", "fingerprint"} <= stored.keys():
        raise InputError(f"data.catalog {uri} has a manifest.json that is not of a catalog; name another folder")
    if force:
        return None
    if stored["fingerprint"] != fingerprint(inputs):
        what = changes(stored.get("inputs", {}), inputs)
        raise InputError(
            f"data.catalog {uri} was built from another configuration or other raw files"
            f"{f' ({what})' if what else ''}; --force rebuilds it, or name another folder"
        )
    try:
        manifest = Manifest.model_validate(stored)
    except ValidationError as error:
        raise InputError(f"data.catalog {uri} has a damaged manifest.json; --force rebuilds it: {error}") from None
    if config.model.user_hop and "user_user" not in manifest.graphs:
        raise InputError(
            f"data.catalog {uri} has no user-user graph, which model.user_hop needs; --force rebuilds it with the graph"
        )
    return manifest


def write_catalog(
    config: Config,
    inputs: dict,
    files: list[InteractionFile],
    sources: dict[str, FeatureSource],
    scratch: Scratch,
    threads: int,
    progress: ProgressPrinter,
) -> Manifest:
    """Read and validate all raw data, then write the catalog; `inputs`: `catalog_inputs`."""
    data, uri = config.data, config.data.catalog
    raw = interactions.read_interactions(files, scratch, progress.often, features.has_text_ids(sources), data.ids)
    progress(f"interactions read: {len(raw.user):,}")
    more_items = features.item_ids(sources, raw.item_ids.type) if data.items == "all" else None
    split = catalog_interactions.build_interactions(raw, data, scratch, more_items, progress.often)
    counts = ", ".join(f"{name} {rows:,}" for name, rows in split.counts.items())
    progress(f"interactions: {len(split.users):,} users, {len(split.items):,} items, {counts}")
    gathered = features.gather_features(sources, split.items, scratch, progress.often)
    progress("features read and checked: " + ", ".join(f"{name} {g.vectors.shape[1]}" for name, g in gathered.items()))
    catalog_folder(uri).clear()
    writer = CatalogWriter(uri)
    entries, item_features = write_modalities(writer, config, gathered, scratch, progress.often)
    progress(f"features written to {uri}")
    graphs, quality = write_graphs(writer, config, split, item_features, scratch, threads, progress.often)
    progress("graphs: " + ", ".join(f"{name} {edges:,} edges" for name, edges in graphs.items()))
    writer.ids("users", split.users)
    writer.ids("items", split.items)
    for name in SPLITS:
        writer.interactions(name, *split.splits[name], split.final_weights.get(name))
    if split.rejected:
        writer.table(REJECTED_FILE, pa.concat_tables(split.rejected).drop_columns("count"))
    manifest = writer.finish(
        fingerprint=fingerprint(inputs),
        inputs=inputs,
        users=len(split.users),
        items=len(split.items),
        interactions=split.counts,
        cold_items=count_cold_items(split, scratch),
        modalities=entries,
        graphs=graphs,
        graph_quality=quality,
        dropped=split.dropped | {f"features/{name}": g.unknown for name, g in gathered.items()},
    )
    progress("manifest written")
    return manifest


def write_modalities(
    writer: CatalogWriter,
    config: Config,
    gathered: dict[str, features.GatheredFeatures],
    scratch: Scratch,
    progress: ProgressCallback,
) -> tuple[dict, dict[str, np.ndarray]]:
    """Fit the transform of each modality and write its features.

    Returns:
        Manifest entries, and features float16 [items, width] in scratch, both by modality.
    """
    entries, item_features = {}, {}
    for name, raw in gathered.items():
        transform, explained_variance = features.fit_feature_transform(raw, config.data.features[name].pca)
        entries[name], item_features[name] = features.write_features(
            writer, name, raw, transform, explained_variance, scratch, progress
        )
        scratch.discard(raw.vectors)
    return entries, item_features


def count_cold_items(split: SplitInteractions, scratch: Scratch) -> int:
    """Number of items without a train interaction."""
    _, item = split.splits["train"]
    cold = np.ones(len(split.items), bool)
    for block in scratch.blocks(len(item), 16):
        cold[item[block]] = False
    return int(cold.sum())


def write_graphs(
    writer: CatalogWriter,
    config: Config,
    split: SplitInteractions,
    item_features: dict[str, np.ndarray],
    scratch: Scratch,
    threads: int,
    progress: ProgressCallback = no_progress,
) -> tuple[dict[str, int], dict[str, float]]:
    """Build and write the graphs one after the other; the user-user graph only for `model.user_hop`.

    Returns:
        Numbers of edges by graph, and quality measures of approximate graphs by name.
    """
    edges, quality = {}, {}

    def write(name: str, graph: CSC) -> None:
        writer.graph(name, graph)
        edges[name] = len(graph.indices)
        progress(f"graph {name}: {edges[name]:,} edges")

    def report(name: str):
        return lambda done, total: progress(f"graph {name}: {done:,} of {total:,}")

    weights = {name: modality.weight for name, modality in config.data.features.items()}
    items, k = len(split.items), item_knn_graph.ITEM_NEIGHBOURS
    item_item = item_knn_graph.build_item_knn_graph(
        item_features, weights, k, threads, search=SEARCH, probes=PROBES, scratch=scratch, progress=report("item_item")
    )
    write("item_item", item_item)
    if item_knn_graph.is_approximate(SEARCH, items):
        recall = item_knn_graph.graph_recall(item_item, item_features, weights, threads, scratch=scratch)
        quality["item_item_recall"] = recall
    scratch.discard(item_item.indices, item_item.weight)

    train, users = split.splits["train"], len(split.users)
    both = user_item_graph.build_user_item_graph(*train, users, items, scratch, split.train_weight)
    for name, graph in zip(("item_user", "user_item"), both, strict=True):
        write(name, graph)
    built = list(both)
    if config.model.user_hop:
        seed = config.data.split.seed
        user_user = user_cooccurrence_graph.build_user_cooccurrence_graph(
            *both, USER_NEIGHBOURS, HUB_CAP, seed, threads, scratch=scratch, progress=report("user_user")
        )
        write("user_user", user_user)
        built.append(user_user)
    scratch.discard(*(array for graph in built for array in (graph.indices, graph.weight)))
    return {name: edges[name] for name in GRAPHS if name in edges}, quality


def catalog_summary(manifest: Manifest) -> str:
    """Counts of a catalog, as printed by the command."""
    lines = [
        f"users {manifest.users:,}  items {manifest.items:,} ({manifest.cold_items:,} without a train interaction)",
        "interactions  " + "  ".join(f"{name} {rows:,}" for name, rows in manifest.interactions.items()),
        "edges  " + "  ".join(f"{name} {edges:,}" for name, edges in manifest.graphs.items()),
    ]
    lines += [f"{name}  {value:.3f}" for name, value in manifest.graph_quality.items()]
    for name, entry in manifest.modalities.items():
        pca = f" by PCA, {entry.explained_variance:.1%} of the variance" if entry.dim != entry.raw_dim else ""
        lines.append(
            f"{name}  {entry.raw_dim} -> {entry.dim} dimensions{pca}; {entry.missing:,} items without a vector"
        )
    for reason, rows in manifest.dropped.items():
        if rows:
            modality = reason.removeprefix("features/")
            words = (
                f"vectors of {modality} for items that are not in the catalog"
                if modality != reason
                else DROPPED[reason]
            )
            lines.append(f"left out  {rows:,} {words}")
    return "\n".join(lines)
