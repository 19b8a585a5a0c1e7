"""What a training takes: memory of a rank, traffic and work of a step (docs/scaling.md, The cost model).

The model is made for `model.propagation: sampled` with `model.layer_nodes`; for `full` every rank has all rows in each
step. It counts what grows with the catalog, not activations.
"""

import math
from dataclasses import dataclass

from gtc_dist.config import Config
from gtc_dist.data.catalog import Manifest
from gtc_dist.distributed.collectives import Communicator
from gtc_dist.hybrid.pair_features import POPULARITY
from gtc_dist.model.gtc import GTC
from gtc_dist.model.user_masks import FULL_SOFTMAX, MAX_ITEMS, NEGATIVES

PROCESS_BYTES = 0.6e9  # interpreter and libraries
PASSING_BYTES = 384  # of a node: 32 columns of float32, three times, which pass through the graph at once
MULTIPLY_ADDS = 29e9  # a second, of one core: what a sampled step at a million items reached
VALUES = 2.5e9  # a second of one core, in element-wise passes and message passing: the same step, and `full` at 100k
ELEMENTWISE_PASSES = 40


@dataclass(frozen=True)
class TrainingCost:
    """Bytes, rows and multiply-adds, each of one rank."""

    steps: int  # of an epoch
    memory: dict[str, float]  # bytes by part
    graph: float  # bytes, once a node
    sent: float  # bytes a step
    multiply_adds: float  # of a step
    values: float  # of a step, in element-wise passes and message passing

    def seconds_per_step(self, threads: int) -> float:
        """On a CPU; no measurement behind it covers a GPU."""
        return (self.multiply_adds / MULTIPLY_ADDS + self.values / VALUES) / threads


def training_cost(config: Config, manifest: Manifest, modalities: dict[str, int]) -> TrainingCost:
    """Cost of a training of the catalog with this manifest.

    Args:
        modalities: name -> width of those that the network uses.
    """
    model, train, ranks = config.model, config.train, config.cluster.workers
    network = GTC(modalities, model, train, Communicator())  # the dense part alone, for its widths
    users, items, edges = manifest.users, manifest.items, manifest.interactions["train"]
    nodes, features = users + items, sum(modalities.values())
    node_width = network.n_node_views * network.dim
    masked_width = 0 if network.masked is None else network.masked.columns + network.masked.members
    content = 0 if network.masked is None else sum(network.masked.content_widths.values())
    user_width, item_width = sum(network.user_widths), network.n_members * network.dim
    table_values = user_width * users + (item_width + masked_width) * items
    full = model.propagation == "full"

    value_bytes = (8 if train.table_optimizer == "rowwise_adam" else 12) + (4 if train.ema_decay else 0)
    out_width = network.out_width + (0 if network.masked is None else network.masked.columns + 1)
    untrained = untrained_width(config, modalities)
    fused = out_width + untrained + len(POPULARITY)
    is_fused = untrained > 0 or network.masked is not None
    # with score fusion the trained models' rows, their scaled copies and the fused rows are in memory together
    inference = 4 * nodes * (2 * out_width + fused if is_fused else out_width)
    history = 2 * node_width * (3 * users + 2 * items) if config.has_historical_embeddings else 0
    hops = sum(manifest.graphs.get(name, 0) for name in network_graphs(config))
    graph = 8 * (2 * edges + hops) + 16 * nodes
    memory = {
        "tables": value_bytes * table_values / ranks,
        "features": 2 * features * items / ranks + (4 * features * items if full else 0),
        "masked content": 2 * content * items / ranks,
        "untrained scorers": 4 * untrained * nodes / ranks,
        "embeddings": max(inference, history) / ranks + PASSING_BYTES * nodes / ranks,
        "whole graph": 2 * graph if full else 0,  # by destination and by source
        "interactions": 16 * edges / ranks,
        "process": PROCESS_BYTES,
    }

    step_users, step_items = (users, items) if full else rows_of_sampled_step(config, manifest)
    share = 1 if full else 1 / ranks  # of the step's rows, that one rank computes
    away = (ranks - 1) / ranks
    masked_users, masked_items = rows_of_masked_step(config, manifest) if masked_width else (0, 0)
    dense = sum(parameter.numel() for parameter in network.parameters())
    sent = away * share * 8 * (user_width * step_users + item_width * step_items)
    sent += away * (8 * masked_width + 2 * content + 8) * masked_items
    if not full:
        sent += away / ranks * (8 * (step_users + step_items) + 2 * features * step_items)
    if config.has_historical_embeddings:
        sent += away / ranks * 2 * node_width * (step_users + step_items + 4 * train.batch_size)
    if ranks > 1:
        sent += 4 * dense + 4 * network.n_views * network.dim * network.has_total_correlation * train.tc_rows / ranks

    dim, pairs = network.dim, train.batch_size / ranks
    filters = len(modalities) * network.has_filter * network.n_members
    hidden = 2 * dim
    multiply_adds = 3 * step_items * share * dim * (features * network.n_members)
    multiply_adds += filters * (3 * step_items * share + 3 * pairs) * hidden * (5 * dim + hidden)
    multiply_adds += 3 * pairs * negatives_per_pair(config) * node_width
    if network.has_total_correlation:
        multiply_adds += 3 * network.n_views * network.n_members * (train.tc_rows or pairs) ** 2 * dim / ranks
    multiply_adds += 3 * masked_width * masked_items * (content + masked_users)
    messages = 3 * node_width * (2 * model.layers * edges + hops) if full else 0
    values = ELEMENTWISE_PASSES * node_width * (step_users + step_items) * share + messages
    values += 4 * model.masked_members * masked_items * masked_users  # the softmax over all items
    steps = train.epoch_steps or max(1, math.ceil(edges / train.batch_size))
    return TrainingCost(steps, memory, graph, sent, multiply_adds, values)


def untrained_width(config: Config, modalities: dict[str, int]) -> int:
    """Columns of the untrained scorers."""
    hybrid = config.model.hybrid
    return hybrid.graph_filter + sum(min(hybrid.content_profile, width) for width in modalities.values())


def network_graphs(config: Config) -> list[str]:
    """The smoothing graphs that the network uses."""
    wanted = {"item_item": config.model.item_hop, "user_user": config.model.user_hop}
    return [name for name, used in wanted.items() if used]


def negatives_per_pair(config: Config) -> float:
    """Scores of a pair beside its own."""
    negatives = config.train.negatives
    return config.train.batch_size / config.cluster.workers if negatives.mode == "in_batch" else negatives.count


def rows_of_sampled_step(config: Config, manifest: Manifest) -> tuple[float, float]:
    """Users and items in a sampled step over all ranks, at most."""
    model, train, negatives = config.model, config.train, config.train.negatives
    drawn = {
        "uniform": train.batch_size * negatives.count * model.members,
        "shared": negatives.count * config.cluster.workers,
        "in_batch": 0,
    }[negatives.mode]
    audience = train.w_diff > 0
    if model.layer_nodes is not None:
        new = model.layer_nodes
        items = train.batch_size + drawn + (model.item_hop + model.layers / 2) * new
        users = train.batch_size + (model.user_hop + model.layers / 2 + audience) * new
    else:
        reached = math.prod(1 + (fanout if fanout > 0 else math.inf) for fanout in model.fanout)
        items = users = (train.batch_size + drawn) * reached * (1 + max(model.item_fanout, 1))
    return min(users, manifest.users), min(items, manifest.items)


def rows_of_masked_step(config: Config, manifest: Manifest) -> tuple[float, float]:
    """Users and items in a rank's step of the masked diffusion."""
    edges = manifest.interactions["train"]
    users = manifest.users / max(1, math.ceil(edges / config.train.batch_size)) / config.cluster.workers
    if manifest.items <= FULL_SOFTMAX:
        return users, manifest.items
    each = min(edges / manifest.users, MAX_ITEMS)
    return users, min(users * each + NEGATIVES, manifest.items)
