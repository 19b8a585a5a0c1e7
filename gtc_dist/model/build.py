"""From a configuration and a catalog to the model's pieces on one rank."""

import torch

from gtc_dist.config import Config
from gtc_dist.data.catalog import FEATURE_ROWS, Catalog
from gtc_dist.distributed.collectives import Communicator
from gtc_dist.distributed.sharded_table import ShardedTable
from gtc_dist.evaluation.ranking import RankingOptions
from gtc_dist.graph.csc import Graphs
from gtc_dist.hybrid.cold_start import WarmNeighbours
from gtc_dist.hybrid.content_profile import content_profile_scores
from gtc_dist.hybrid.graph_filter import CooccurrenceOperator, WalkOptions
from gtc_dist.hybrid.score_fusion import ScoreFusion
from gtc_dist.hybrid.spectral import graph_filter_scores
from gtc_dist.model.gtc import GTC, Shape, Tables
from gtc_dist.training.data_loader import DataLoader, LoaderOptions
from gtc_dist.training.subgraph import FullGraphBuilder, PlannerOptions, SampledGraphBuilder


def network_shape(config: Config, catalog: Catalog) -> Shape:
    """Sizes and switches of the network. Raises InputError for a modality that the catalog lacks."""
    model, diffusion = config.model, config.model.diffusion
    return Shape(
        modalities=catalog.modalities(model.modalities),
        members=model.members,
        width=model.width,
        unit_rows=model.unit_rows,
        content=model.content,
        join=model.join,
        gate=model.gate,
        diffusion=diffusion.enabled,
        diffusion_trained=diffusion.trained,
        condition=diffusion.condition,
        condition_dropout=diffusion.condition_dropout,
        diffusion_steps=diffusion.steps,
        beta_start=diffusion.beta_start,
        beta_end=diffusion.beta_end,
        start_step=diffusion.start_step,
        ddim_steps=diffusion.ddim_steps,
        hidden=diffusion.hidden,
        item_hop=model.item_hop,
        correlation=model.correlation.enabled,
        correlation_of=model.correlation.of,
        critic=model.correlation.critic,
        temperature=model.correlation.temperature,
        learn_temperature=model.correlation.learn_temperature,
        loss=config.train.loss,
        loss_temperature=config.train.temperature,
        w_tc=config.train.w_tc,
        w_diff=config.train.w_diff,
        w_personal=config.train.w_personal,
        w_reg=config.train.w_reg,
    )


def build_network(config: Config, catalog: Catalog, comm: Communicator, trainable: bool = True) -> tuple[GTC, Tables]:
    """The dense network and the tables, with the same initial values for any world size.

    Args:
        trainable: False where weights are only read: no optimizer state is held then.
    """
    shape = network_shape(config, catalog)
    torch.manual_seed(config.train.seed)
    network = GTC(shape, comm).to(comm.device)
    sizes = (catalog.users, catalog.items)
    options = {"trainable": trainable, "rowwise": config.train.table_optimizer == "rowwise_adam"}
    return network, Tables.build(network, *sizes, config.model.init_std, comm, config.train.seed, **options)


def build_blend(
    config: Config,
    graphs: Graphs,
    features: dict[str, ShardedTable],
    comm: Communicator,
    neighbours: WarmNeighbours | None,
) -> ScoreFusion | None:
    """The untrained parts of the embedding, None where there are none. A collective.

    Args:
        features: of the modalities, over `comm`.
        neighbours: of cold items, None where there is no item-item graph.
    """
    walks = config.model.walk
    if not config.model.walks:
        return None
    walk = CooccurrenceOperator(graphs, comm, WalkOptions(walks.user_exponent, walks.item_exponent, config.eval.chunk))
    parts = {}
    if walks.spectral:
        parts["spectral"] = graph_filter_scores(walk, walks.spectral, config.train.seed)
    for name, table in features.items() if walks.profile else ():
        parts[name] = content_profile_scores(walk, table, walks.profile)
    profiles = list(features) if walks.profile else []
    return ScoreFusion(parts, profiles, neighbours, walk)


def load_features(shape: Shape, catalog: Catalog, comm: Communicator) -> dict[str, ShardedTable]:
    """Frozen float16 tables of the modalities' features; each rank reads just its own rows, a block at a time."""
    tables = {}
    for name, width in shape.modalities.items():
        table = ShardedTable(name, catalog.items, width, comm, dtype=torch.float16, trainable=False)
        for first in range(table.start, table.stop, FEATURE_ROWS):
            rows = catalog.features(name, first, min(first + FEATURE_ROWS, table.stop))
            at = first - table.start
            table.weight[at : at + len(rows)] = torch.from_numpy(rows)
        tables[name] = table
    return tables


def with_communicator(tables: dict[str, ShardedTable], comm: Communicator) -> dict[str, ShardedTable]:
    """The same rows (shared, not copied) looked up through another process group, or copied to its device."""
    moved = {}
    for name, table in tables.items():
        moved[name] = ShardedTable(name, 0, table.width, Communicator(), dtype=table.weight.dtype, trainable=False)
        moved[name].rows, moved[name].comm = table.rows, comm
        moved[name].start, moved[name].stop = table.start, table.stop
        moved[name].weight = table.weight.to(comm.device)
    return moved


def ranking_options(config: Config) -> RankingOptions:
    return RankingOptions(config.eval.item_block, config.eval.user_block, config.eval.users, config.train.seed)


def has_history(config: Config) -> bool:
    return config.model.propagation == "sampled" and config.train.refresh > 0


def load_graphs(config: Config, catalog: Catalog) -> Graphs:
    return Graphs.load(catalog, item_item=config.model.item_hop, user_user=config.model.user_hop)


def build_loader(
    config: Config, network: GTC, users, items, graphs: Graphs, features: dict[str, ShardedTable], comm: Communicator
) -> DataLoader:
    """The loader of one rank; `comm` and the features' tables belong to the prefetch thread."""
    model, train = config.model, config.train
    shape, audience = network.shape, network.needs_audience
    plan = PlannerOptions(
        layers=model.layers,
        audience=audience,
        exclude_seed_edges=train.exclude_seed_edges,
        fanout=tuple(model.fanout),
        item_fanout=model.item_fanout,
        user_fanout=model.user_fanout,
        layer_nodes=None if model.layer_nodes is None else -(-model.layer_nodes // comm.size),
        sampler=model.sampler,
        threads=1,
        history=has_history(config),
        hops_first=network.hops_first,
    )
    if model.propagation == "full":
        planner = FullGraphBuilder(graphs, features, plan, network.comm.device)
    else:
        planner = SampledGraphBuilder(graphs, features, plan)
    options = LoaderOptions(
        batch_size=train.batch_size,
        seed=train.seed,
        negatives=train.negatives.mode,
        negative_count=train.negatives.count * (model.members if train.negatives.mode == "uniform" else 1),
        correlation_rows=model.correlation.rows,
        diffusion_steps=model.diffusion.steps,
        modalities=len(shape.modalities),
        width=shape.width,
        prefetch=train.prefetch,
        epoch_steps=train.epoch_steps,
        user_discount=train.user_discount,
        negative_popularity=train.negatives.popularity,
        negatives_correct=train.negatives.correct,
    )
    return DataLoader(users, items, graphs, planner, options, comm)
