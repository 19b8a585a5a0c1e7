"""Charts of a run: under which tag each number is shown, what it means, and the layout of the custom page.

The trainer names its numbers as `metrics.jsonl` does (`loss/bpr`, `valid/recall@20`). Viewers sort charts by tag, so
the groups have the order of the questions that a reader asks: `1_quality`, `2_loss`, `3_speed`, `4_health`, at most
twelve charts in all; every other number is in a group whose name begins with `details_`.
"""

import re
from collections.abc import Iterable

MAX_QUALITY = 3  # charts of the first group
USUAL_QUALITY = ("recall@20", "ndcg@20", "head_free/ndcg@20")
FRONT = {
    "loss/total": "2_loss/total",
    "loss/bpr": "2_loss/bpr",
    "loss/softmax": "2_loss/softmax",
    "loss/masked": "2_loss/masked",
    "interactions_per_second": "3_speed/interactions_per_second",
    "waiting_for_data": "3_speed/waiting_for_data",
    "gpu_busy": "3_speed/gpu_busy",
    "gradient_norm": "4_health/gradient_norm",
    "memory/host_gib": "4_health/host_memory_gib",
    "memory/gpu_gib": "4_health/gpu_memory_gib",
    "skipped_steps": "details_health/skipped_steps",
}
TIMED = ("3_speed/", "4_health/host_", "4_health/gpu_", "details_seconds_per_step/")  # tags that no rerun repeats

# (pattern of a name of the trainer, its meaning); the first that fits counts
MEANINGS = tuple(
    (re.compile(pattern), text)
    for pattern, text in (
        ("loss/total", "Loss that training minimises: the weighted sum of the loss terms. Mean since the last point."),
        ("loss/bpr", "Ranking loss (BPR): small if a user's items score above others. Mean since the last point."),
        ("loss/softmax", "Ranking loss: cross-entropy of a positive among its negatives. Mean since the last point."),
        ("loss/masked", "Loss of the masked diffusion, which predicts hidden interactions. Mean since the last point."),
        ("loss/diffusion", "Denoising loss of the content filter, before `train.w_diff`. Mean since the last point."),
        ("loss/tc", "Total-correlation loss, before its weight `train.w_tc`. Mean since the last point."),
        ("loss/l2", "L2 term over the rows of the batch, before its weight `train.w_reg`. Mean since the last point."),
        ("interactions_per_second", "Interactions trained on in a second, over all ranks, since the last point."),
        ("waiting_for_data", "Share of the time since the last point in which rank 0 waited for its next batch. Near "
         "0: the data loader keeps up."),
        ("gpu_busy", "Share of the last moments in which a GPU was computing, as its driver reports it; the mean over "
         "the ranks. Low: the host, the data loader or the network keeps it waiting."),
        ("gradient_norm", "Norm of all gradients together, before clipping, at this step. A jump points to a bad batch "
         "or a learning rate that is too high."),
        ("memory/host_gib", "Host memory of the rank that holds the most, GiB (resident). Steady growth is a leak."),
        ("memory/gpu_gib", "Largest GPU memory in use since the last point, of the rank that used the most, GiB."),
        ("skipped_steps", "Steps left out so far because their loss or gradient was not finite (train.not_finite)."),
        ("norms/.*", "Distribution of the lengths of the table's rows. Rows that grow without end, or a second peak "
         "near 0, show that a table does not train well."),
        ("seconds_per_step/data", "Seconds of a step in which rank 0 waited for its batch, mean since the last point."),
        ("seconds_per_step/(sampling|features)", "Seconds of a step in the prefetch thread of rank 0."),
        ("seconds_per_step/communication", "Seconds of a step in collectives on rank 0; the other parts contain them."),
        ("seconds_per_step/.*", "Seconds of a step in this part on rank 0, mean since the last point. On a GPU: the "
         "time that the host takes to queue the work."),
        ("lr/.*", "Learning rate."),
        ("valid/mean_list/.*", "The same metric of one list that is the same for everyone: the list of the mean user."),
        ("valid/personal_gain/.*", "The metric of the users' own lists less that of the list for everyone."),
        ("valid/coverage@.*", "Share of all items that are in the first 20 of at least one user."),
        ("valid/head_share@.*", "Share of the first 20 places that the most popular hundredth of the items holds."),
        ("blend/.*", "Weight in score fusion, fitted to the valid split at each validation."),
        ("cold/.*", "Weight in the prediction of items without a train interaction, tuned on the valid split."),
        ("gate/.*", "Mean attention weight of this view over all items."),
        ("kept_energy/.*", "Share of the content's energy that the content filter keeps, mean over items."),
        ("total_correlation/bound_nats", "Lower bound of the total correlation of the views, nats."),
        ("total_correlation/temperature", "Learned temperature of the total correlation's critic."),
    )
)  # fmt: skip
METRIC_MEANINGS = {
    "recall": "share of a user's held-out items that are among the first {k} of the user's list",
    "ndcg": "like recall, but a held-out item counts more the higher it is in the first {k} of the list",
    "precision": "share of the first {k} of a user's list that are held-out items",
    "hitrate": "share of users with a held-out item among the first {k} of their list",
    "mrr": "1 / place of the first held-out item among the first {k} of the list",
}
GROUP_MEANINGS = {
    "head_free": "without the four most frequent items of valid",
    "cold": "of items without a train interaction",
    "strata/head": "of the most popular items, which have a third of all train interactions",
    "strata/middle": "of the items of middling popularity, which have the second third of all train interactions",
    "strata/tail": "of the items that few users have, which have the last third of all train interactions",
}

# (chart of the custom page, pattern of its tags), by the question that the section answers
PAGE = {
    "Is it learning?": (
        ("quality on valid (and, at the end, test)", r"1_quality/.*"),
        ("total loss", r"2_loss/total"),
        ("ranking loss", r"2_loss/(bpr|softmax)"),
    ),
    "Is it healthy?": (
        ("gradient norm", r"4_health/gradient_norm"),
        ("memory, GiB", r"4_health/.*_memory_gib"),
        ("how the lists spread over the items", r"(1_quality|details_valid)/(coverage|head_share)@20"),
    ),
    "What is slow?": (
        ("interactions a second", r"3_speed/interactions_per_second"),
        ("shares of the time", r"3_speed/(waiting_for_data|gpu_busy)"),
        ("seconds of a step, by part", r"details_seconds_per_step/.*"),
    ),
}


def quality_metrics(decisive: str) -> list[str]:
    """Metrics of the first group: `eval.metric` and the usual ones."""
    usual = [name for name in USUAL_QUALITY if name != decisive]
    return list(USUAL_QUALITY) if decisive in USUAL_QUALITY else [decisive, *usual][:MAX_QUALITY]


def chart_tag(name: str, quality: Iterable[str]) -> str:
    """Tag of a number of the trainer.

    Args:
        quality: of `quality_metrics`.
    """
    if name.startswith("valid/") and (metric := name.removeprefix("valid/")) in quality:
        return f"1_quality/{metric}"
    return FRONT.get(name, f"details_{name}")


def meaning(name: str, split: str = "valid") -> str:
    """One or two sentences on a number of the trainer."""
    for pattern, text in MEANINGS:
        if pattern.fullmatch(name):
            return text
    group, _, metric = name.removeprefix("valid/").rpartition("/")
    kind, _, k = metric.partition("@")
    if kind not in METRIC_MEANINGS:
        return f"`{name}`; docs/concepts.md has the names."
    among = f", {GROUP_MEANINGS[group]}" if group in GROUP_MEANINGS else ""
    what = METRIC_MEANINGS[kind].format(k=k)
    return f"{kind}@{k} on the {split} split{among}: {what}. Mean over users; higher is better."


def number_of_tag(tag: str) -> str:
    """The trainer's name of a tag; tags of versions up to 0.7 are those names."""
    for name, shown in FRONT.items():
        if tag == shown:
            return name
    if tag.startswith("1_quality/"):
        return "valid/" + tag.removeprefix("1_quality/")
    return tag.removeprefix("details_")
