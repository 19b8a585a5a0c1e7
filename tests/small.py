"""A small catalog with structure, made without Ray, configurations for it, and commands that refuse."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import yaml

from gtc_dist.config import Config
from gtc_dist.config_file import build_config
from gtc_dist.data.catalog import SPLITS, Catalog, CatalogWriter, ModalityEntry
from gtc_dist.data.feature_transform import FeatureTransform
from gtc_dist.graph import item_knn_graph, user_cooccurrence_graph, user_item_graph

ROOT = Path(__file__).resolve().parent.parent


def small_config(catalog: str, storage: str = "runs", **sections) -> Config:
    """A configuration for a small catalog; `sections` are merged over it, e.g. model={"width": 8}."""
    tree = {
        "data": {"raw": "raw", "catalog": catalog},
        "run": {"storage": storage, "name": "small"},
        "train": {"batch_size": 32, "epochs": 2, "w_diff": 0.7, "w_tc": 0.4, "ema_decay": 0},
        "model": {
            "width": 8,
            "masked_members": 0,
            "user_hop": True,
            "diffusion": {"steps": 20, "start_step": 5},
            "hybrid": {"graph_filter": 0, "content_profile": 0},
        },
        "eval": {"every": 1, "patience": 10},
    }
    return build_config(_merge(tree, sections), "test")


# the other network, with two ensemble members
GATED = {"variant": "gated", "members": 2}


def _merge(below: dict, above: dict) -> dict:
    out = dict(below)
    for key, value in above.items():
        out[key] = _merge(out[key], value) if isinstance(value, dict) and isinstance(out.get(key), dict) else value
    return out


def small_catalog(
    uri: str | Path,
    users=60,
    items=40,
    modalities=2,
    seed=0,
    per_user=8,
    cold=3,
    weight: np.ndarray | None = None,
    final_weights: dict[str, np.ndarray] | None = None,
) -> Catalog:
    """Users and items in four groups that like each other; features encode an item's group. The last `cold` items have
    no train interaction. `weight`: recency weights of train, float32 [at least its rows]; `final_weights`: those of
    train and valid for a final fit."""
    rng = np.random.default_rng(seed)
    user_group, item_group = rng.integers(0, 4, users), rng.integers(0, 4, items)
    taste = 1.0 + 8.0 * (user_group[:, None] == item_group[None, :])
    noise = rng.gumbel(size=(users, items))
    order = np.argsort(-(np.log(taste) + noise), axis=1)[:, :per_user]
    split = {name: ([], []) for name in SPLITS}
    for user in range(users):
        for place, item in enumerate(order[user]):
            name = "test" if place == 0 else "valid" if place == 1 else "train"
            if name == "train" and item >= items - cold:
                continue
            split[name][0].append(user)
            split[name][1].append(int(item))
    split = {name: (np.array(u, np.int32), np.array(i, np.int32)) for name, (u, i) in split.items()}

    ids = {
        "users": pa.array([f"u{n:03d}" for n in range(users)]),
        "items": pa.array(np.arange(items, dtype=np.int64) * 7 + 100),
    }
    vectors = {}
    for m in range(modalities):
        centres = rng.normal(size=(4, 6 + m)) * 2
        vectors[f"m{m}"] = centres[item_group] + rng.normal(size=(items, 6 + m))
    return write_catalog(uri, split, ids, vectors, f"small-{seed}", weight, final_weights=final_weights)


def write_catalog(
    uri: str | Path,
    split: dict[str, tuple[np.ndarray, np.ndarray]],
    ids: dict[str, pa.Array],
    vectors: dict[str, np.ndarray],
    fingerprint: str,
    weight: np.ndarray | None = None,
    scale: float = 1.0,
    final_weights: dict[str, np.ndarray] | None = None,
) -> Catalog:
    """A catalog of these interactions, original ids in the order of indexes, and raw vectors by item index, whose
    features are standardised, with standard deviation 1 / scale."""
    writer = CatalogWriter(str(uri))
    users, items = len(ids["users"]), len(ids["items"])
    for name, (user, item) in split.items():
        final_weight = (final_weights or {}).get(name)
        writer.interactions(name, user, item, None if final_weight is None else final_weight[: len(user)])
    writer.ids("users", ids["users"])
    writer.ids("items", ids["items"])
    weight = None if weight is None else weight[: len(split["train"][0])]
    item_user, user_item = user_item_graph.build_user_item_graph(*split["train"], users, items, weight=weight)
    features = {}
    for name, rows in vectors.items():
        transform = FeatureTransform(rows.mean(0), rows.std(0) * scale)
        features[name] = transform.apply(rows)
        writer.features(name, 0, 0, features[name])
        transform.save(writer, name)
    graphs = {
        "item_user": item_user,
        "user_item": user_item,
        "item_item": item_knn_graph.build_item_knn_graph(features, dict.fromkeys(features, 1.0), 3, 1),
        "user_user": user_cooccurrence_graph.build_user_cooccurrence_graph(item_user, user_item, 5, 1000, 0),
    }
    for name, graph in graphs.items():
        writer.graph(name, graph)
    entries = {n: ModalityEntry(dim=f.shape[1], raw_dim=f.shape[1], missing=0) for n, f in features.items()}
    writer.finish(
        fingerprint=fingerprint,
        users=users,
        items=items,
        interactions={name: len(pair[0]) for name, pair in split.items()},
        cold_items=int((user_item.degree == 0).sum()),
        modalities=entries,
        graphs={name: len(graph.indices) for name, graph in graphs.items()},
        dropped={},
    )
    return Catalog(str(uri))


def write_config(tmp_path: Path, catalog: str, runs: str, **train_keys) -> str:
    tree = {
        "data": {"raw": "unused", "catalog": catalog},
        "run": {"storage": runs, "name": "r"},
        "train": {"epochs": 3, "batch_size": 64, "w_diff": 0.7, "w_tc": 0.4, "ema_decay": 0, **train_keys},
        "cluster": {"threads": 1},
        "model": {
            "width": 8,
            "masked_members": 0,
            "user_hop": True,
            "diffusion": {"steps": 20, "start_step": 5},
            "hybrid": {"graph_filter": 0, "content_profile": 0},
        },
        "eval": {"every": 1, "patience": 10},
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(tree))
    return str(path)


def refused(arguments: list[str], message: str) -> None:
    """The real command: status 2, one clear error, no traceback, before Ray starts."""
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
