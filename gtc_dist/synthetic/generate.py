"""Synthetic datasets with planted structure, as raw tables for `gtc_dist.prepare`.

    items  have K content factors, a popularity (Zipf, randomly ordered) and, per modality, features: a random linear
           map of some of the factors, plus nuisance factors without influence on tastes (low rank, large variance, half
           of them shared by all modalities), plus white noise
    users  belong to groups; a group has signed tastes for a few factors (its mask), a user deviates from them
    P(user u takes item i)  ~  popularity_i * exp(strength * <taste_u, factors_i>), without replacement
    time of an interaction: uniform in two years; with drift an item is taken most often around its own random peak,
           its log(popularity) falling like drift * cos, half a period in two years

So popularity is a fair baseline, collaborative filtering beats it, and a content model gains by keeping the factors in
the masks and dropping the others. The ground truth is written beside the tables, for tests and studies; prepare ignores
it:

    interactions/part-*.parquet         user_id: string, item_id: int64, rating, timestamp, x_label (0, 1, 2)
    cold/part-*.parquet                 the same columns for cold-start items, always x_label 2 (test); not for training
    features/<modality>/part-*.parquet  item_id, vector: fixed_size_list<float16>
    features/<modality>.npy             the last of several modalities, for up to 65,536 items: float32 rows; their
                                        item ids are in <modality>_ids.parquet
    items/part-*.parquet                item_id, title: a word for each of the item's two strongest factors, a number
    truth/items/part-*.parquet          item_id, popularity, cold, factors
    truth/users/part-*.parquet          user_id, group, taste
    truth/{masks,tastes}.npy            [groups, factors]
    dataset.json                        all parameters and counts, written last

Every chunk of users or items has its own random generator, seeded by (seed, kind, chunk). So parts can be generated in
any order and process, and the same parameters give the same bytes. `generate_dataset` runs the parts one by one or as
Ray Data tasks.

Memory of a process: 4 * factors + 29 bytes per item (factors, popularity, id, cold-start flag and the temporaries of
choice.py; 8 bytes more with cold-start items, 4 with drift), about 1 GB for 10 million items of 16 factors; and one
part, about 300 MB with the default chunks and vectors of width 512.
"""

import functools
import json
from collections.abc import Callable, Iterator

import numpy as np
import pyarrow as pa

from gtc_dist.data import formats, storage
from gtc_dist.data.output_folder import DATASET_FILES, OutputFolder
from gtc_dist.errors import InputError
from gtc_dist.synthetic.choice import ChoicePool
from gtc_dist.synthetic.planted_titles import planted_titles
from gtc_dist.synthetic.planted_world import PlantedWorld, chunk_slice, chunk_slices, draw_features, random_generator
from gtc_dist.synthetic.spec import Spec

DATASET = DATASET_FILES.manifest  # written last
DATASET_MARKER = DATASET_FILES.marker  # in the folder until then
START, SPAN = 1_600_000_000, 2 * 365 * 86_400  # timestamps are in [START, START + SPAN), seconds


def list_parts(spec: Spec) -> list[tuple[str, int]]:
    """All parts of a dataset, as (kind, chunk). Parts are independent of each other."""
    items = range(len(list(chunk_slices(spec.items, spec.item_chunk))))
    users = range(len(list(chunk_slices(spec.users, spec.user_chunk))))
    features = [(f"features/{m}", c) for m in spec.modalities for c in (items if m != spec.npy_modality else [0])]
    return [("truth", 0), *(("items", c) for c in items), *features, *(("users", c) for c in users)]


def write_part(world: PlantedWorld, uri: str, kind: str, chunk: int) -> dict[str, int]:
    """Generate and write one of the parts of `list_parts`; returns its counts by name."""
    spec = world.spec
    if kind == "truth":
        formats.write_array(storage.join(uri, "truth/masks.npy"), world.masks)
        formats.write_array(storage.join(uri, "truth/tastes.npy"), world.tastes)
        return {}
    if kind == "users":
        return _write_users(world, uri, chunk)
    if kind == "items":
        rows = chunk_slice(spec.items, spec.item_chunk, chunk)
        table = pa.table(
            {
                "item_id": world.item_ids[rows],
                "popularity": np.exp(world.log_popularity[rows]),
                "cold": world.cold[rows],
                "factors": _vectors(world.factors[rows]),
            }
        )
        formats.write_table(storage.join(uri, f"truth/items/part-{chunk:05d}.parquet"), table)
        names = pa.table({"item_id": world.item_ids[rows], "title": planted_titles(world.factors[rows], rows.start)})
        formats.write_table(storage.join(uri, f"items/part-{chunk:05d}.parquet"), names)
        return {}
    modality = kind.removeprefix("features/")
    if modality == spec.npy_modality:
        return _write_npy(world, uri, modality)
    vectors, present = draw_features(world, modality, chunk, np.float16)
    ids = world.item_ids[chunk_slice(spec.items, spec.item_chunk, chunk)]
    if not present.all():
        vectors, ids = vectors[present], ids[present]
    table = pa.table({"item_id": ids, "vector": _vectors(vectors)})
    formats.write_table(storage.join(uri, f"{kind}/part-{chunk:05d}.parquet"), table)
    return {f"missing_{modality}": int((~present).sum())}


def generate_dataset(
    spec: Spec,
    uri: str,
    force: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
    parallel: bool = False,
) -> dict:
    """Write a whole dataset.

    Args:
        uri: folder, local or in object storage; must be empty, except with `force`.
        force: replace an existing dataset, complete or incomplete.
        progress: called with the numbers of finished and of all parts, before the first part and after each.
        parallel: generate the parts as Ray Data tasks, as many at once as the cluster has CPUs, in no particular order.
            The bytes are the same.

    Returns:
        The content of `dataset.json`.

    Raises:
        InputError: the folder is not empty, or a part cannot be written. In the second case DATASET_MARKER stays in the
            folder and DATASET is not written.
    """
    folder = check_folder(spec, uri, force)
    folder.clear()
    folder.mark()
    parts = list_parts(spec)
    progress(0, len(parts))
    counts: dict[str, int] = {"interactions": 0}
    finished = _in_ray(spec, uri, parts) if parallel else _in_process(spec, uri, parts)
    for done, part_counts in enumerate(finished, 1):
        for name, count in part_counts.items():
            counts[name] = counts.get(name, 0) + count
        progress(done, len(parts))
    return finalize_dataset(spec, uri, counts)


def _in_process(spec: Spec, uri: str, parts: list[tuple[str, int]]) -> Iterator[dict[str, int]]:
    world = PlantedWorld(spec)
    for part in parts:
        yield _write_or_refuse(world, uri, *part)


def _in_ray(spec: Spec, uri: str, parts: list[tuple[str, int]]) -> Iterator[dict[str, int]]:
    from gtc_dist.data.ray_tasks import map_tables  # here: importing Ray takes longer than a small dataset

    task = functools.partial(_write_in_worker, parameters=json.dumps(spec.parameters), uri=storage.absolute(uri))
    for _, counts in map_tables(task, parts, first_error=True):
        yield dict(zip(counts["name"].to_pylist(), counts["count"].to_pylist(), strict=True))


def _write_in_worker(part: tuple[str, int], parameters: str, uri: str) -> Iterator[pa.Table]:
    counts = _write_or_refuse(_worker_world(parameters), uri, *part)
    yield pa.table({"name": list(counts), "count": list(counts.values())})


@functools.lru_cache(maxsize=1)
def _worker_world(parameters: str) -> PlantedWorld:
    """Each worker derives the ground truth once: it takes seconds for millions of items."""
    return PlantedWorld(Spec(**json.loads(parameters)))


def _write_or_refuse(world: PlantedWorld, uri: str, kind: str, chunk: int) -> dict[str, int]:
    try:
        return write_part(world, uri, kind, chunk)
    except OSError as error:  # such as a full disk
        raise InputError(f"part {chunk} of {kind} cannot be written: {error}") from error


def dataset_folder(spec: Spec, uri: str) -> OutputFolder:
    """The output folder of a dataset; its marker file holds the parameters."""
    return OutputFolder(
        uri,
        title="output folder",
        kind="a dataset",
        own_files="(interactions|cold|features|items|truth)/.*",
        manifest=DATASET,
        marker=DATASET_MARKER,
        marker_content=spec.parameters,
    )


def check_folder(spec: Spec, uri: str, force: bool) -> OutputFolder:
    """The output folder. Raises InputError if it is not empty, except for a dataset with `force`, or not writable."""
    folder = dataset_folder(spec, uri)
    state = folder.state()
    if state != "empty" and not force:
        raise InputError(
            f"output folder {uri} holds {'a dataset' if state == 'complete' else 'an incomplete dataset'}; "
            "use --force to replace it, or name another folder"
        )
    folder.check_writable()
    return folder


def finalize_dataset(spec: Spec, uri: str, counts: dict[str, int]) -> dict:
    """Write `dataset.json`, which marks the dataset as complete, after checking that all parts exist."""
    found = storage.listing(uri)
    folders = {"items": "truth/items", "users": "truth/users"}
    for kind, chunk in list_parts(spec):
        name = f"{folders.get(kind, kind)}/part-{chunk:05d}.parquet"
        if name not in found and kind not in ("truth", f"features/{spec.npy_modality}"):
            raise InputError(
                f"{storage.join(uri, name)} was written but does not exist; if Ray runs on several machines, "
                "name a folder shared by all of them, or s3://"
            )
    counts = dict(sorted(counts.items()))  # parts finish in any order
    dataset = {"parameters": spec.parameters, "counts": {"users": spec.users, "items": spec.items, **counts}}
    dataset_folder(spec, uri).finish(dataset)
    return dataset


def _write_users(world: PlantedWorld, uri: str, chunk: int) -> dict[str, int]:
    """Write the users of a chunk: ground truth and interactions."""
    spec = world.spec
    rows = chunk_slice(spec.users, spec.user_chunk, chunk)
    n = rows.stop - rows.start
    rng = random_generator(spec, "users", chunk)
    group = rng.integers(0, spec.groups, n).astype(np.int32)
    deviation = rng.standard_normal((n, spec.factors), np.float32) * np.float32(spec.deviation / np.sqrt(spec.kept))
    deviation *= world.masks[group]
    # A Lomax tail above the minimum. Its mean is 1 / (exponent - 1); it is scaled to the mean activity of the spec.
    tail = rng.pareto(spec.activity, n) * (spec.activity - 1) * (spec.mean - spec.minimum)
    activity = spec.minimum + np.rint(tail).astype(np.int64)
    activity = np.minimum(activity, max(spec.warm // 4, spec.minimum))
    suffix = rng.integers(0, 256, n)
    digits = max(5, len(str(spec.users - 1)))
    ids = np.array([f"u{u:0{digits}d}-{s:02x}" for u, s in zip(range(rows.start, rows.stop), suffix, strict=True)])
    truth = {"user_id": ids, "group": group, "taste": _vectors(world.tastes[group] + deviation)}
    formats.write_table(storage.join(uri, f"truth/users/part-{chunk:05d}.parquet"), pa.table(truth))

    counts = {}
    for name, pool in world.pools.items():
        count = activity if name == "interactions" else rng.binomial(activity, spec.cold_share)
        count = np.minimum(count, pool.size)
        user, item = _choose_all(world, pool, rng, group, deviation, count)
        time = _draw_times(world, rng, item)
        order = np.lexsort((item, time, user))
        user, item, time = user[order], item[order], time[order]
        taste = world.tastes[group[user]] + deviation[user]
        affinity = np.einsum("ek,ek->e", taste, world.factors[item]) + 0.5 * rng.standard_normal(len(user), np.float32)
        label = rng.choice(np.int8([0, 1, 2]), len(user), p=[0.8, 0.1, 0.1])
        table = pa.table(
            {
                "user_id": ids[user],
                "item_id": world.item_ids[item],
                "rating": np.clip(np.rint(2.5 + affinity), 1, 5).astype(np.float32),
                "timestamp": time,
                "x_label": label if name == "interactions" else np.full_like(label, 2),
            }
        )
        formats.write_table(storage.join(uri, f"{name}/part-{chunk:05d}.parquet"), table)
        counts["interactions" if name == "interactions" else "cold interactions"] = len(user)
    return counts


def _draw_times(world: PlantedWorld, rng, item: np.ndarray) -> np.ndarray:
    """Time of each interaction with an item, int64 seconds."""
    if not world.spec.drift:
        return START + rng.integers(0, SPAN, len(item))
    angle = rng.vonmises(world.peaks[item], world.spec.drift)  # in [-pi, pi], density ~ exp(drift * cos(angle - peak))
    # Folded at 0, so that the end is far from the start; over all items, times stay uniform.
    return START + np.minimum((np.abs(angle) / np.pi * SPAN).astype(np.int64), SPAN - 1)


def _choose_all(world: PlantedWorld, pool: ChoicePool, rng, group, deviation, count) -> tuple[np.ndarray, np.ndarray]:
    """Choices of all users, group by group; users are sorted by activity within a group."""
    order = np.lexsort((count, group))
    order = order[count[order] > 0]
    users, items = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for members in np.split(order, np.flatnonzero(np.diff(group[order])) + 1):
        if len(members):
            taste = world.tastes[group[members[0]]]
            user, item = pool.choose(rng, taste, deviation[members], count[members])
            users.append(members[user])
            items.append(item)
    return np.concatenate(users), np.concatenate(items)


def _write_npy(world: PlantedWorld, uri: str, modality: str) -> dict[str, int]:
    """Write a modality as one matrix with an id file, in a random order of the items."""
    spec = world.spec
    chunks = range(len(list(chunk_slices(spec.items, spec.item_chunk))))
    parts = [draw_features(world, modality, chunk) for chunk in chunks]
    present = np.concatenate([p for _, p in parts])
    order = random_generator(spec, f"order {modality}").permutation(spec.items)
    order = order[present[order]]
    vectors = np.concatenate([v for v, _ in parts])[order]
    formats.write_array(storage.join(uri, f"features/{modality}.npy"), vectors)
    ids = pa.table({"item_id": world.item_ids[order]})
    formats.write_table(storage.join(uri, f"features/{modality}_ids.parquet"), ids)
    return {f"missing_{modality}": int((~present).sum())}


def _vectors(rows: np.ndarray) -> pa.FixedSizeListArray:
    return pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(rows).reshape(-1)), rows.shape[1])
