"""Raw interactions to the interactions of a catalog: clean, split, assign indexes, shuffle.

Rows are in scratch and processed in blocks that fit `prepare.memory_gib`; the driver holds all ids and a few numbers
per user and item in memory. The result depends neither on the blocks nor on the order of files or rows.

Dropped and counted, in this order: rows below `min_rating`; duplicates of a user-item pair within a split (the earliest
is kept; since ratings are filtered first, a pair is kept if its highest rating passes); rows outside the k-core.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from gtc_dist.config_data import DataConfig
from gtc_dist.data.catalog import INTERACTION_ROWS, SPLITS
from gtc_dist.data.scratch import Buckets, Scratch
from gtc_dist.errors import InputError
from gtc_dist.prepare import ids, split
from gtc_dist.prepare.clean import CleanInteractions, RawInteractions, clean_interactions
from gtc_dist.progress import ProgressCallback, no_progress


@dataclass(frozen=True)
class SplitInteractions:
    """Interactions and ids of a catalog.

    Attributes:
        users, items: original ids in index order.
        splits: name -> (user int32 [E], item int32 [E]), shuffled, in scratch.
        dropped: reason -> number of rows.
    """

    users: pa.Array
    items: pa.Array
    splits: dict[str, tuple[np.ndarray, np.ndarray]]
    dropped: dict[str, int]

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
        InputError: no row left, an empty split, or pairs of valid or test that are also in train.
    """
    rows, dropped = clean_interactions(raw, data, scratch, progress)
    progress("splitting interactions")
    codes = _split_codes(rows, data, scratch)
    counts = _check_splits(raw, data, rows, codes, scratch)
    seed = data.split.seed
    users, user_index = _assign_indexes(raw.user_ids, rows.user_counts, np.random.default_rng([seed, 0]))
    items, item_index = _assign_indexes(raw.item_ids, rows.item_counts, np.random.default_rng([seed, 1]), more_items)
    splits = {}
    for which, name in enumerate(SPLITS):
        progress(f"shuffling interactions: {name}")
        pairs = _indexed_pairs(rows, codes, which, user_index, item_index, scratch)
        splits[name] = _shuffle(pairs, counts[which], [seed, 4, which], [seed, 2, which], scratch)
    scratch.discard(rows.user, rows.item, rows.time, codes)
    return SplitInteractions(users, items, splits, dropped)


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
        counts += np.bincount(code, minlength=len(counts))
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
                f"{data.interactions.item}={raw.item_ids[first[1]].as_py()!r}; remove them from one of the two"
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


def _indexed_pairs(
    rows: CleanInteractions,
    codes: np.ndarray,
    which: int,
    user_index: np.ndarray,
    item_index: np.ndarray,
    scratch: Scratch,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """User and item indexes of the rows of one split, in blocks."""
    for block in scratch.blocks(len(rows), 64):
        chosen = codes[block] == which
        yield user_index[rows.user[block][chosen]], item_index[rows.item[block][chosen]]


def _shuffle(
    pairs: Iterator[tuple[np.ndarray, np.ndarray]],
    count: int,
    bucket_seed: list[int],
    order_seed: list[int],
    scratch: Scratch,
) -> tuple[np.ndarray, np.ndarray]:
    """The `count` pairs in random order: each goes to a random bucket, then each bucket is shuffled.

    The number of buckets depends on `count` alone, not on the memory.
    """
    parts = max(-(-int(count) // INTERACTION_ROWS), 1)
    rng, sizes = np.random.default_rng(bucket_seed), np.zeros(parts, np.int64)
    for block in scratch.blocks(int(count), 32):
        sizes += np.bincount(_random_buckets(rng, block.stop - block.start, parts), minlength=parts)
    buckets, rng = Buckets(scratch, sizes, [np.int32, np.int32]), np.random.default_rng(bucket_seed)
    for user, item in pairs:
        buckets.add(_random_buckets(rng, len(user), parts), user, item)
    for number in range(parts):
        user, item = buckets.bucket(number)
        order = np.random.default_rng([*order_seed, number]).permutation(len(user))
        user[:], item[:] = user[order], item[order]
    return tuple(buckets.columns)


def _random_buckets(rng: np.random.Generator, rows: int, parts: int) -> np.ndarray:
    """A random bucket for each row, one draw per row: any division into blocks gives the same buckets."""
    return (rng.random(rows) * parts).astype(np.int32)
