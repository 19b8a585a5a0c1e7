"""Synthetic catalogs with planted truth, as raw tables that `gtc_dist.prepare` reads.

    items  have K content factors, a popularity (Zipf in a random order) and, per modality, features: a random linear
           map of some of the factors, plus nuisance factors that no user cares about (low rank, large variance, half of
           them shared by all modalities), plus white noise
    users  belong to groups; a group cares about a few factors (its mask) with signed tastes, a user deviates from them
    P(user u takes item i)  ~  popularity_i * exp(strength * <taste_u, factors_i>), without replacement

So popularity is a fair baseline, collaborative filtering beats it, and a content model gains by keeping what the masks
keep and dropping the rest. What was planted is written beside the tables, for tests and studies; prepare ignores it:

    interactions/part-*.parquet         user_id: string, item_id: int64, rating, timestamp, x_label (0, 1, 2)
    cold/part-*.parquet                 the same columns for cold items, always x_label 2 (test); not for training
    features/<modality>/part-*.parquet  item_id, vector: fixed_size_list<float16>
    features/<modality>.npy             the last of several modalities, up to 65,536 items: float32 rows, ids in
                                        <modality>_ids.parquet
    truth/items/part-*.parquet          item_id, popularity, cold, factors
    truth/users/part-*.parquet          user_id, group, taste
    truth/{masks,tastes}.npy            by group and factor
    dataset.json                        all parameters and counts, written last

Every chunk of users or items draws from a generator seeded by (seed, kind, chunk), so chunks can be made in any order
and place, and the same parameters give the same bytes. `generate` makes them one by one or as Ray Data tasks.

Memory of a process: 4 * factors + 29 bytes an item (factors, popularity, id, where it is cold, and what choice.py needs
of them; 8 more if some are cold), about 1 GB for 10 million items of 16 factors; and one part, some 300 MB with the
default chunks and vectors of 512.
"""

import functools
import json
import zlib
from collections.abc import Iterator
from dataclasses import asdict
from functools import cached_property

import numpy as np
import pyarrow as pa

from gtc_dist.data import formats, storage
from gtc_dist.errors import InputError
from gtc_dist.synthetic.choice import Pool, dot_rows
from gtc_dist.synthetic.spec import Spec

DATASET = "dataset.json"  # written last
BUILDING = "dataset.building.json"  # stands in the folder before that
OWN_FILES = ("interactions/", "cold/", "features/", "truth/", DATASET, BUILDING)
START, SPAN = 1_600_000_000, 2 * 365 * 86_400  # timestamps: seconds from START
SLAB = 1 << 13  # items whose features are computed at once


class PlantedWorld:
    """The planted truth that all chunks share.

    factors float32 [items, K]; log_popularity float32 [items]; cold bool [items]; item_ids int64 [items];
    masks bool [G, K]; tastes float32 [G, K], zero outside the mask.
    """

    def __init__(self, spec: Spec):
        self.spec = spec
        n, k = spec.items, spec.factors
        rng = _rng(spec, "world")
        rank = rng.permutation(n) + 1
        self.log_popularity = (-spec.zipf * np.log(rank)).astype(np.float32)
        self.cold = np.zeros(n, bool)
        self.cold[rng.permutation(n)[spec.warm :]] = True
        self.masks = rng.random((spec.groups, k)).argsort(1).argsort(1) < spec.kept
        signs = rng.choice(np.float32([-1, 1]), (spec.groups, k))
        size = rng.uniform(0.7, 1.3, (spec.groups, k)).astype(np.float32)
        self.tastes = self.masks * signs * size / np.float32(np.sqrt(spec.kept))
        self.factors = np.empty((n, k), np.float32)
        self.item_ids = np.empty(n, np.int64)
        for chunk, rows in enumerate(_chunks(n, spec.item_chunk)):
            rng = _rng(spec, "items", chunk)
            self.factors[rows] = rng.standard_normal((rows.stop - rows.start, k), np.float32)
            gaps = rng.integers(0, 997, rows.stop - rows.start)
            self.item_ids[rows] = 1_000_000_007 + 997 * np.arange(rows.start, rows.stop) + gaps  # sparse, distinct

    @cached_property
    def pools(self) -> dict[str, Pool]:
        """What users choose from: `interactions` (items that are not cold) and `cold`."""
        if not self.cold.any():
            return {"interactions": Pool(None, self.factors, self.log_popularity, self.spec.strength)}
        members = {"interactions": np.flatnonzero(~self.cold), "cold": np.flatnonzero(self.cold)}
        return {name: Pool(m, self.factors, self.log_popularity, self.spec.strength) for name, m in members.items()}


def tasks(spec: Spec) -> list[tuple[str, int]]:
    """All parts of a dataset, as (kind, chunk). They are independent: any order, any process."""
    items = range(len(list(_chunks(spec.items, spec.item_chunk))))
    users = range(len(list(_chunks(spec.users, spec.user_chunk))))
    features = [(f"features/{m}", c) for m in spec.modalities for c in (items if m != spec.npy_modality else [0])]
    return [("truth", 0), *(("items", c) for c in items), *features, *(("users", c) for c in users)]


def write_part(world: PlantedWorld, uri: str, kind: str, chunk: int) -> dict[str, int]:
    """Make and write one part that `tasks` names; returns what it counted."""
    spec = world.spec
    if kind == "truth":
        formats.write_array(storage.join(uri, "truth/masks.npy"), world.masks)
        formats.write_array(storage.join(uri, "truth/tastes.npy"), world.tastes)
        return {}
    if kind == "users":
        return _write_users(world, uri, chunk)
    if kind == "items":
        rows = _slice(spec.items, spec.item_chunk, chunk)
        table = pa.table(
            {
                "item_id": world.item_ids[rows],
                "popularity": np.exp(world.log_popularity[rows]),
                "cold": world.cold[rows],
                "factors": _vectors(world.factors[rows]),
            }
        )
        formats.write_table(storage.join(uri, f"truth/items/part-{chunk:05d}.parquet"), table)
        return {}
    modality = kind.removeprefix("features/")
    if modality == spec.npy_modality:
        return _write_npy(world, uri, modality)
    vectors, present = features(world, modality, chunk, np.float16)
    ids = world.item_ids[_slice(spec.items, spec.item_chunk, chunk)]
    if not present.all():
        vectors, ids = vectors[present], ids[present]
    table = pa.table({"item_id": ids, "vector": _vectors(vectors)})
    formats.write_table(storage.join(uri, f"{kind}/part-{chunk:05d}.parquet"), table)
    return {f"missing_{modality}": int((~present).sum())}


def generate(spec: Spec, uri: str, force: bool = False, progress=None, parallel: bool = False) -> dict:
    """Write a whole dataset.

    Args:
        uri: folder, local or in object storage; must be empty.
        force: replace a dataset (or an unfinished one) that is there.
        progress: wraps the iterator over finished parts for display, as tqdm does; called with `total`.
        parallel: make the parts as Ray Data tasks, as many at once as the cluster has CPUs, in no particular order. The
            bytes are the same.

    Returns:
        What `dataset.json` holds.

    Raises:
        InputError: the folder is not empty, or a part cannot be written. Then BUILDING stays in the folder, and
            DATASET is not written.
    """
    prepare_folder(uri, force)
    storage.write_json(storage.join(uri, BUILDING), asdict(spec))
    parts = tasks(spec)
    made = _in_ray(spec, uri, parts) if parallel else _in_process(spec, uri, parts)
    counts: dict[str, int] = {"interactions": 0}
    for counted in progress(made, total=len(parts)) if progress else made:
        for name, count in counted.items():
            counts[name] = counts.get(name, 0) + count
    return finish(spec, uri, counts)


def _in_process(spec: Spec, uri: str, parts: list[tuple[str, int]]) -> Iterator[dict[str, int]]:
    world = PlantedWorld(spec)
    for part in parts:
        yield _make(world, uri, *part)


def _in_ray(spec: Spec, uri: str, parts: list[tuple[str, int]]) -> Iterator[dict[str, int]]:
    from gtc_dist.data.ray_tasks import map_tables  # here, since Ray's import takes longer than a small dataset

    make = functools.partial(_make_in_worker, parameters=json.dumps(asdict(spec)), uri=storage.absolute(uri))
    for _, counted in map_tables(make, parts, first_error=True):
        yield dict(zip(counted["name"].to_pylist(), counted["count"].to_pylist(), strict=True))


def _make_in_worker(part: tuple[str, int], parameters: str, uri: str) -> Iterator[pa.Table]:
    counts = _make(_worker_world(parameters), uri, *part)
    yield pa.table({"name": list(counts), "count": list(counts.values())})


@functools.lru_cache(maxsize=1)
def _worker_world(parameters: str) -> PlantedWorld:
    """Every worker derives the world for itself, once: seconds for millions of items."""
    return PlantedWorld(Spec(**json.loads(parameters)))


def _make(world: PlantedWorld, uri: str, kind: str, chunk: int) -> dict[str, int]:
    try:
        return write_part(world, uri, kind, chunk)
    except OSError as error:  # such as a full disk
        raise InputError(f"part {chunk} of {kind} cannot be made: {error}") from error


def prepare_folder(uri: str, force: bool) -> None:
    """Make sure that `uri` is empty; with `force` remove a dataset, whole or unfinished, but nothing else."""
    found = storage.listing(uri)
    if not found:
        return
    ours = DATASET in found or BUILDING in found
    foreign = sorted(name for name in found if not name.startswith(OWN_FILES))
    if ours and foreign:
        raise InputError(
            f"output folder {uri} holds a dataset and {len(foreign)} other files (such as {foreign[0]}); "
            "move them away, or name another folder"
        )
    if not (force and ours):
        what = "holds a dataset" if DATASET in found else "holds an unfinished dataset" if ours else "is not empty"
        advice = "use --force to replace it, or another folder" if ours else "name an empty or new folder"
        raise InputError(f"output folder {uri} {what} ({len(found)} files, such as {min(found)}); {advice}")
    storage.remove_tree(uri)


def finish(spec: Spec, uri: str, counts: dict[str, int]) -> dict:
    """Write `dataset.json`, which makes the dataset whole, if all parts are there."""
    found = storage.listing(uri)
    folders = {"items": "truth/items", "users": "truth/users"}
    for kind, chunk in tasks(spec):
        name = f"{folders.get(kind, kind)}/part-{chunk:05d}.parquet"
        if name not in found and kind not in ("truth", f"features/{spec.npy_modality}"):
            raise InputError(
                f"{storage.join(uri, name)} was written, but is not there; if Ray runs on several machines, "
                "name a folder that all of them share, or s3://"
            )
    counts = dict(sorted(counts.items()))  # parts come in any order
    dataset = {"parameters": asdict(spec), "counts": {"users": spec.users, "items": spec.items, **counts}}
    storage.write_json(storage.join(uri, DATASET), dataset)
    storage.remove_tree(storage.join(uri, BUILDING))
    return dataset


def features(world: PlantedWorld, modality: str, chunk: int, dtype=np.float32) -> tuple[np.ndarray, np.ndarray]:
    """Raw features of a chunk of items: `dtype` [n, d], and which items have one: bool [n].

    Signal and nuisance are scaled to variance 1 and `noise` per dimension, white noise has a tenth of the signal's.
    """
    spec = world.spec
    rows = _slice(spec.items, spec.item_chunk, chunk)
    width = spec.modalities[modality]
    seen = visible(spec)[modality]
    maps = _rng(spec, f"map {modality}")
    signal = maps.standard_normal((len(seen), width), np.float32) / np.float32(np.sqrt(len(seen)))
    offset = maps.standard_normal(width, np.float32)
    n = rows.stop - rows.start
    rng = _rng(spec, f"features {modality}", chunk)
    half = spec.nuisance // 2
    nuisance = None
    if spec.nuisance and spec.noise:
        shared = _rng(spec, "nuisance", chunk).standard_normal((n, half), np.float32)
        nuisance = np.concatenate([shared, rng.standard_normal((n, spec.nuisance - half), np.float32)], 1)
        spread = maps.standard_normal((spec.nuisance, width), np.float32) * np.sqrt(spec.noise / spec.nuisance)
        spread = spread.T.astype(np.float32)
    out = np.empty((n, width), dtype)
    for slab in _chunks(n, SLAB):
        vectors = dot_rows(world.factors[rows][slab][:, seen], signal.T) + offset
        if nuisance is not None:
            vectors += dot_rows(nuisance[slab], spread)
        out[slab] = vectors + np.float32(np.sqrt(0.1)) * rng.standard_normal(vectors.shape, np.float32)
    return out, rng.random(n) >= spec.missing_share


def visible(spec: Spec) -> dict[str, np.ndarray]:
    """The factors that each modality shows: each about two thirds of them, and each factor shows somewhere."""
    rng = _rng(spec, "visible")
    shown = rng.random((len(spec.modalities), spec.factors)) < 2 / 3
    shown[rng.integers(0, len(spec.modalities), spec.factors), np.arange(spec.factors)] = True
    shown[~shown.any(1)] = True  # a modality that shows nothing shows all
    return {modality: np.flatnonzero(row) for modality, row in zip(spec.modalities, shown, strict=True)}


def _write_users(world: PlantedWorld, uri: str, chunk: int) -> dict[str, int]:
    """Users of a chunk: their truth and their interactions."""
    spec = world.spec
    rows = _slice(spec.users, spec.user_chunk, chunk)
    n = rows.stop - rows.start
    rng = _rng(spec, "users", chunk)
    group = rng.integers(0, spec.groups, n).astype(np.int32)
    deviation = rng.standard_normal((n, spec.factors), np.float32) * np.float32(spec.deviation / np.sqrt(spec.kept))
    deviation *= world.masks[group]
    # A Lomax tail above the minimum: mean 1 / (exponent - 1), scaled to the wanted mean.
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
        wanted = activity if name == "interactions" else rng.binomial(activity, spec.cold_share)
        wanted = np.minimum(wanted, pool.size)
        user, item = _choose_all(world, pool, rng, group, deviation, wanted)
        time = START + rng.integers(0, SPAN, len(user))
        order = np.lexsort((item, time, user))
        user, item, time = user[order], item[order], time[order]
        taste = world.tastes[group[user]] + deviation[user]
        liking = np.einsum("ek,ek->e", taste, world.factors[item]) + 0.5 * rng.standard_normal(len(user), np.float32)
        label = rng.choice(np.int8([0, 1, 2]), len(user), p=[0.8, 0.1, 0.1])
        table = pa.table(
            {
                "user_id": ids[user],
                "item_id": world.item_ids[item],
                "rating": np.clip(np.rint(2.5 + liking), 1, 5).astype(np.float32),
                "timestamp": time,
                "x_label": label if name == "interactions" else np.full_like(label, 2),
            }
        )
        formats.write_table(storage.join(uri, f"{name}/part-{chunk:05d}.parquet"), table)
        counts["interactions" if name == "interactions" else "cold interactions"] = len(user)
    return counts


def _choose_all(world: PlantedWorld, pool: Pool, rng, group, deviation, wanted) -> tuple[np.ndarray, np.ndarray]:
    """Choices of all users: group by group, users of like activity side by side."""
    order = np.lexsort((wanted, group))
    order = order[wanted[order] > 0]
    users, items = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for members in np.split(order, np.flatnonzero(np.diff(group[order])) + 1):
        if len(members):
            taste = world.tastes[group[members[0]]]
            user, item = pool.choose(rng, taste, deviation[members], wanted[members])
            users.append(members[user])
            items.append(item)
    return np.concatenate(users), np.concatenate(items)


def _write_npy(world: PlantedWorld, uri: str, modality: str) -> dict[str, int]:
    """A modality as one matrix with an id file, in an order of its own."""
    spec = world.spec
    parts = [features(world, modality, chunk) for chunk in range(len(list(_chunks(spec.items, spec.item_chunk))))]
    present = np.concatenate([p for _, p in parts])
    order = _rng(spec, f"order {modality}").permutation(spec.items)
    order = order[present[order]]
    vectors = np.concatenate([v for v, _ in parts])[order]
    formats.write_array(storage.join(uri, f"features/{modality}.npy"), vectors)
    ids = pa.table({"item_id": world.item_ids[order]})
    formats.write_table(storage.join(uri, f"features/{modality}_ids.parquet"), ids)
    return {f"missing_{modality}": int((~present).sum())}


def _rng(spec: Spec, kind: str, chunk: int = 0) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([spec.seed, zlib.crc32(kind.encode()), chunk])))


def _chunks(total: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, total)) for start in range(0, total, size))


def _slice(total: int, size: int, chunk: int) -> slice:
    return slice(chunk * size, min((chunk + 1) * size, total))


def _vectors(rows: np.ndarray) -> pa.FixedSizeListArray:
    return pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(rows).reshape(-1)), rows.shape[1])
