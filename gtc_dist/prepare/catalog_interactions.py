"""Raw interactions to the interactions of a catalog: clean, split, assign indexes, shuffle.

Rows are in scratch and processed in blocks that fit `prepare.memory_gib`; the driver holds all ids and a few numbers
per user and item in memory. The result depends neither on the blocks nor on the order of files or rows.

Left out and counted, in this order: events of weight 0; rows below `min_rating`; repeats of a user-item pair within a
split (the earliest is kept, with the weights of `data.interactions.repeats` of them; since ratings are filtered first,
a pair is kept if its highest rating passes); rows outside the k-core; with `data.split.repeats: drop`, rows of valid
and test whose pair is in train.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from gtc_dist.config_data import DataConfig
from gtc_dist.data.catalog import INTERACTION_ROWS, SPLITS
from gtc_dist.data.scratch import Buckets, Scratch
from gtc_dist.errors import InputError
from gtc_dist.prepare import split
from gtc_dist.prepare.clean import CleanInteractions, RawInteractions, clean_interactions
from gtc_dist.progress import ProgressCallback, no_progress
from gtc_dist.raw import ids

MAX_HALF_LIVES = 64  # older interactions weigh as if of this age, so that no weight and no degree becomes zero
NO_SPLIT = -1  # of rows that were taken out of valid or test
MAX_SECONDS = 1e11  # of a time since 1970; milliseconds are larger


@dataclass(frozen=True)
class SplitInteractions:
    """Interactions and ids of a catalog.

    Attributes:
        users, items: original ids in index order.
        splits: name -> (user int32 [E], item int32 [E]), shuffled, in scratch.
        dropped: reason -> number of rows.
        train_weight: float32 [E], weights of train, in scratch; None: all weigh one.
        final_weights: `train` and `valid` -> float32 [E], weights if both are trained on, in scratch; empty: all weigh
            one.
        rejected: bad rows that were left out (`RawInteractions.rejected`).
    """

    users: pa.Array
    items: pa.Array
    splits: dict[str, tuple[np.ndarray, np.ndarray]]
    dropped: dict[str, int]
    train_weight: np.ndarray | None = None
    rejected: Sequence[pa.Table] = ()
    final_weights: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def counts(self) -> dict[str, int]:
        return {name: len(user) for name, (user, _) in self.splits.items()}


def build_interactions(
    raw: RawInteractions,
    data: DataConfig,
    scratch: Scratch,
    more_items: pa.Array | None = None,
    progress: ProgressCallback = no_progress,
) -> SplitInteractions:
    """Clean, split, index and shuffle the interactions. Removes the columns of `raw` from scratch.

    Args:
        more_items: ids that become items even without an interaction (`data.items: all`).

    Raises:
        InputError: no row left, an empty split, pairs of valid or test that are also in train, or times that are not
            seconds with `data.recency_half_life`.
    """
    rows, dropped = clean_interactions(raw, data, scratch, progress)
    progress("splitting interactions")
    codes = _split_codes(rows, data, scratch)
    if rows.split is not None and data.split.repeats == "drop":
        dropped["in_train"] = _drop_repeated(rows, codes, scratch)
    counts = _check_splits(raw, data, rows, codes, scratch)
    seed = data.split.seed
    users, user_index = _assign_indexes(raw.user_ids, rows.user_counts, np.random.default_rng([seed, 0]))
    items, item_index = _assign_indexes(raw.item_ids, rows.item_counts, np.random.default_rng([seed, 1]), more_items)
    weight = _train_weights(rows, codes, data, raw.time_unit, scratch)
    final_codes, final_weight = None, None
    if weight is not None:
        final_codes = _with_valid_in_train(codes, scratch)
        final_weight = _train_weights(rows, final_codes, data, raw.time_unit, scratch)
    splits, train_weight, final_weights = {}, None, {}
    for which, name in enumerate(SPLITS):
        progress(f"shuffling interactions: {name}")
        more = [] if weight is None else {"train": [final_weight, weight], "valid": [final_weight]}.get(name, [])
        columns = _split_columns(rows, codes, which, user_index, item_index, more, scratch)
        user, item, *weights = _shuffle(columns, counts[which], len(more), [seed, 4, which], [seed, 2, which], scratch)
        splits[name] = user, item
        final_weights |= {name: weights[0]} if weights else {}
        train_weight = weights[1] if len(weights) == 2 else train_weight
    unmerged = () if rows.unmerged is None else rows.unmerged[0].columns
    scratch.discard(rows.user, rows.item, rows.time, rows.weight, codes, weight, final_codes, final_weight, *unmerged)
    rejected = {"bad_rows": sum(sum(table["count"].to_pylist()) for table in raw.rejected)} if raw.rejected else {}
    return SplitInteractions(users, items, splits, rejected | dropped, train_weight, raw.rejected, final_weights)


def _with_valid_in_train(codes: np.ndarray, scratch: Scratch) -> np.ndarray:
    """Split codes in which valid is a part of train, int8 [E] in scratch."""
    merged = scratch.array(len(codes), np.int8)
    for block in scratch.blocks(len(codes), 64):
        merged[block] = np.where(codes[block] == split.VALID, split.TRAIN, codes[block])
    return merged


def _train_weights(
    rows: CleanInteractions, codes: np.ndarray, data: DataConfig, time_unit: float, scratch: Scratch
) -> np.ndarray | None:
    """Weight of each row, float32 [E] in scratch: its own times 2^(-age / half-life), by its age before the newest
    train row. Only those of train rows are meant to be used. None: all weigh one.

    Args:
        time_unit: seconds of one unit of `rows.time`.

    Raises:
        InputError: times that are numbers, but not seconds.
    """
    own = rows.weight
    if rows.unmerged is not None:
        own = _weights_until_split(rows, codes, data, scratch)
    if data.recency_half_life is None:
        return own
    blocks = scratch.blocks(len(rows), 64)
    train_times = (rows.time[block][codes[block] == split.TRAIN] for block in blocks)
    newest = max(float(times.max()) for times in train_times if len(times))
    if newest * time_unit > MAX_SECONDS:
        raise InputError(
            f"column {data.interactions.time!r} has numbers up to {newest:.0f}, which are no seconds since 1970; "
            "data.recency_half_life needs seconds or timestamps"
        )
    weights, half_life = scratch.array(len(rows), np.float32), data.recency_half_life * 86_400 / time_unit
    for block in scratch.blocks(len(rows), 64):
        weights[block] = np.exp2(-np.clip((newest - rows.time[block]) / half_life, 0, MAX_HALF_LIVES))
        if own is not None:
            weights[block] *= own[block]
    return weights


def _weights_until_split(rows: CleanInteractions, codes: np.ndarray, data: DataConfig, scratch: Scratch) -> np.ndarray:
    """Weight of each train row, float32 [E] in scratch, without what came after train: after the newest train row, or,
    with leave_last_out, after the user's. Other rows have 1."""
    oldest = -np.inf if rows.time.dtype.kind == "f" else np.iinfo(np.int64).min
    newest = np.full(len(rows.user_counts), oldest, rows.time.dtype)  # train row of each user
    for block in scratch.blocks(len(rows), 64):
        train = codes[block] == split.TRAIN
        np.maximum.at(newest, rows.user[block][train], rows.time[block][train])
    if data.split.method == "global_time":
        newest[:] = newest.max()
    weights, ends = scratch.array(len(rows), np.float32), np.cumsum(rows.user_counts)
    buckets, names = rows.unmerged
    for number in range(len(buckets)):
        columns = dict(zip(names, buckets.bucket(number), strict=True))
        user, item = columns["user"], columns["item"]
        if not len(user):
            continue
        first, last = int(user.min()), int(user.max())
        block = slice(int(ends[first] - rows.user_counts[first]), int(ends[last]))
        early = columns["time"] <= newest[user]
        weight = columns["weight"][early] if "weight" in columns else None
        merged = split.merged_weights(user[early], item[early], None, weight, data.interactions.repeats)
        pairs = np.unique(_pairs(user[early], item[early]))
        own = codes[block] == split.TRAIN
        weights[block] = 1
        of_train = _pairs(rows.user[block][own], rows.item[block][own])
        weights[block.start : block.stop][own] = merged[np.searchsorted(pairs, of_train)]
        scratch.release()
    return weights


def _pairs(user: np.ndarray, item: np.ndarray) -> np.ndarray:
    """Keys int64 that sort like (user, item)."""
    return user.astype(np.int64) << 32 | item


def _drop_repeated(rows: CleanInteractions, codes: np.ndarray, scratch: Scratch) -> int:
    """Take the rows of valid and test whose pair is in train out of their split, in place; returns their number."""
    dropped = 0
    for block in rows.user_blocks(scratch):
        user, item, code = rows.user[block], rows.item[block], codes[block]
        for which in (split.VALID, split.TEST):
            repeated = split.repeated_in_train(user, item, code, which)
            code[repeated] = NO_SPLIT
            dropped += len(repeated)
    return dropped


def _split_codes(rows: CleanInteractions, data: DataConfig, scratch: Scratch) -> np.ndarray:
    """Split of each row, int8 [E]."""
    method, shares = data.split.method, (data.split.valid_share, data.split.test_share)
    if rows.split is not None:
        return rows.split
    codes = scratch.array(len(rows), np.int8)
    if method == "global_time":
        valid, test = (round(len(rows) * share) for share in shares)
        cuts = [split.TimeCut(rows.time, len(rows) - after, scratch) for after in (test + valid, test)]
        for block in scratch.blocks(len(rows), 64):
            codes[block] = sum(cut.after(rows.time[block]).astype(np.int8) for cut in cuts)
        return codes
    generators = split.ratio_generators([data.split.seed, 3], len(rows), int(np.count_nonzero(rows.user_counts)))
    for block in rows.user_blocks(scratch):
        user = rows.user[block]
        if method == "leave_last_out":
            codes[block] = split.leave_last_out(rows.time[block], user, rows.item[block])
        else:
            codes[block] = split.ratio(user, *shares, generators)
    return codes


def _check_splits(
    raw: RawInteractions, data: DataConfig, rows: CleanInteractions, codes: np.ndarray, scratch: Scratch
) -> np.ndarray:
    """Number of rows of each split, int64 [3].

    Raises:
        InputError: an empty split, or pairs of valid or test that are also in train.
    """
    counts = np.zeros(len(SPLITS), np.int64)
    repeated: dict[int, list] = {split.VALID: [0, None], split.TEST: [0, None]}  # number of rows, and the first pair
    for block in rows.user_blocks(scratch):
        user, item, code = rows.user[block], rows.item[block], codes[block]
        counts += np.bincount(code[code != NO_SPLIT], minlength=len(counts))
        for which in repeated if rows.split is not None else ():  # computed splits are disjoint
            found = split.repeated_in_train(user, item, code, which)
            repeated[which][0] += len(found)
            if len(found) and repeated[which][1] is None:
                repeated[which][1] = (int(user[found[0]]), int(item[found[0]]))
    for which, name in enumerate(SPLITS):
        if not counts[which]:
            raise InputError(
                f"the {name} split is empty (data.split.method={data.split.method}); "
                f"interactions: {', '.join(f'{n} {c}' for n, c in zip(SPLITS, counts, strict=True))}; "
                f"{_advice_for_empty(data, which)}"
            )
        number, first = repeated.get(which, (0, None))
        if first is not None:
            files = getattr(data.split, name) if data.split.method == "given" else data.interactions.files
            raise InputError(
                f"{name} ({', '.join(files[:3])} in {data.raw}) repeats {number} interactions of train, such as "
                f"{data.interactions.user}={raw.user_ids[first[0]].as_py()!r}, "
                f"{data.interactions.item}={raw.item_ids[first[1]].as_py()!r}; remove them from one of the two, or "
                "set data.split.repeats=drop"
            )
    return counts


def _advice_for_empty(data: DataConfig, which: int) -> str:
    method, settings = data.split.method, data.split
    if method == "given":
        return f"add rows to {', '.join(getattr(settings, SPLITS[which])[:3])} in {data.raw}"
    if method == "label":
        return f"column {settings.label!r} needs rows with the label {settings.labels[which]!r} (data.split.labels)"
    return "use more interactions, a lower k_core" + ("" if method == "leave_last_out" else " or other shares")


def _assign_indexes(
    sorted_ids: pa.Array, counts: np.ndarray, rng: np.random.Generator, more_ids: pa.Array | None = None
) -> tuple[pa.Array, np.ndarray]:
    """Give ids in use a random index.

    Args:
        sorted_ids: id of each code.
        counts: number of rows of each code; an id without rows is not in use.
        more_ids: ids that are in use even without rows.

    Returns:
        Ids in index order, and the index of each code (int32, -1 if not in use).
    """
    used = np.flatnonzero(counts)
    kept = sorted_ids.take(pa.array(used))
    if more_ids is not None:
        kept = ids.sorted_unique(pa.chunked_array([kept, more_ids.cast(kept.type)]))
    index = rng.permutation(len(kept)).astype(np.int32)
    index_of_code = np.full(len(sorted_ids), -1, np.int32)
    index_of_code[used] = index[ids.positions(sorted_ids.take(pa.array(used)), kept)]
    order = np.empty(len(kept), np.int64)
    order[index] = np.arange(len(kept))
    return kept.take(pa.array(order)), index_of_code


def _split_columns(
    rows: CleanInteractions,
    codes: np.ndarray,
    which: int,
    user_index: np.ndarray,
    item_index: np.ndarray,
    more: list[np.ndarray],
    scratch: Scratch,
) -> Iterator[tuple[np.ndarray, ...]]:
    """User and item indexes of the rows of one split, and `more` columns, in blocks."""
    for block in scratch.blocks(len(rows), 64):
        chosen = codes[block] == which
        indexes = user_index[rows.user[block][chosen]], item_index[rows.item[block][chosen]]
        yield *indexes, *(column[block][chosen] for column in more)


def _shuffle(
    rows: Iterator[tuple[np.ndarray, ...]],
    count: int,
    weights: int,
    bucket_seed: list[int],
    order_seed: list[int],
    scratch: Scratch,
) -> list[np.ndarray]:
    """The `count` rows in random order: each goes to a random bucket, then each bucket is shuffled.

    The number of buckets depends on `count` alone, not on the memory.

    Args:
        rows: blocks of user int32, item int32 and this number of `weights` float32.
    """
    parts = max(-(-int(count) // INTERACTION_ROWS), 1)
    rng, sizes = np.random.default_rng(bucket_seed), np.zeros(parts, np.int64)
    for block in scratch.blocks(int(count), 32):
        sizes += np.bincount(_random_buckets(rng, block.stop - block.start, parts), minlength=parts)
    buckets = Buckets(scratch, sizes, [np.int32, np.int32] + [np.float32] * weights)
    rng = np.random.default_rng(bucket_seed)
    for columns in rows:
        buckets.add(_random_buckets(rng, len(columns[0]), parts), *columns)
    for number in range(parts):
        columns = buckets.bucket(number)
        order = np.random.default_rng([*order_seed, number]).permutation(len(columns[0]))
        for column in columns:
            column[:] = column[order]
    return buckets.columns


def _random_buckets(rng: np.random.Generator, rows: int, parts: int) -> np.ndarray:
    """A random bucket for each row, one draw per row: any division into blocks gives the same buckets."""
    return (rng.random(rows) * parts).astype(np.int32)
