"""Groups of items that tell popularity from personalisation: metrics count only a group's items as positives.

head_free: all but the items with the most interactions in valid. A list of these few items alone scores well where they
are a large part of a split, whoever the user is.

cold: no train interaction. strata: warm items by train interactions; the head is the shortest list of the most popular
items with a third of all train interactions, the middle the same for the second third, the tail the other warm items.

Ties go to the lower index, so that groups are the same on every rank.
"""

import numpy as np
import torch

from gtc_dist.data.catalog import CSC
from gtc_dist.distributed.collectives import Communicator
from gtc_dist.graph.csc import Graphs

HEAD_ITEMS = 4  # most frequent items of valid, which head_free metrics do not count as positives
STRATA = ("head", "middle", "tail")


def most_frequent(count: np.ndarray, n: int) -> np.ndarray:
    """Mask bool [items] of the n items with the largest count; of equal ones the lower index."""
    mask = np.zeros(len(count), bool)
    mask[np.argsort(-count, kind="stable")[:n]] = True
    return mask


def valid_head(valid: CSC, items: int, n: int, comm: Communicator) -> np.ndarray:
    """Mask bool [items] of the n items with the most interactions in the valid split. Collective: every rank must call
    it.

    Args:
        valid: the valid split's items of this rank's users.
        n: size of the head; in training `HEAD_ITEMS`.
    """
    count = torch.from_numpy(np.bincount(valid.indices, minlength=items)).to(comm.device)
    return most_frequent(comm.all_reduce(count).cpu().numpy(), n)


def popularity_strata(degree: np.ndarray) -> dict[str, np.ndarray]:
    """Masks bool [items] of the strata.

    Args:
        degree: train interactions int64 [items].
    """
    order = np.argsort(-degree, kind="stable")
    before = np.cumsum(degree[order]) - degree[order]  # interactions of more popular items
    third = np.empty(len(degree), np.int64)
    third[order] = 3 * before // max(int(degree.sum()), 1)
    return {name: (third == n) & (degree > 0) for n, name in enumerate(STRATA)}


def positive_groups(graphs: Graphs, head: np.ndarray) -> dict[str, np.ndarray | None]:
    """Masks bool [items] of the items that count as positives; None: all.

    Args:
        head: bool [items], of `valid_head`.
    """
    degree = graphs.item_degree
    strata = {f"strata/{name}": mask for name, mask in popularity_strata(degree).items()}
    return {"overall": None, "cold": degree == 0, "head_free": ~head, **strata}


def tuning_positives(
    metric: str, groups: dict[str, np.ndarray | None], counted: np.ndarray | None = None
) -> tuple[str, np.ndarray | None]:
    """Metric of a list, and the items that count as positives, for weights that are tuned by `eval.metric`. Weights
    fitted by likelihood use the positives alone.

    Metrics that compare lists of several users (`coverage@20`, `head_share@20`) only select the epoch; weights are then
    tuned by NDCG@20. `personal_gain` and `mean_list` tune by the metric itself.

    Args:
        metric: `eval.metric`, e.g. "head_free/ndcg@20".
        groups: of `positive_groups`.
        counted: bool [items], items that the caller counts. Where none of them is in the group of `metric`, as with
            warm items and "cold/recall@20", they all count.

    Returns:
        name@K, and bool [items] or None: all.
    """
    group, _, name = metric.rpartition("/")
    positives = groups.get(group or "overall")
    if name in ("coverage@20", "head_share@20"):
        name = "ndcg@20"
    if counted is None or positives is None:
        return name, positives if counted is None else counted
    both = positives & counted
    return name, both if both.any() else counted
