"""Typed run configuration: every key with its type, default and description.

`config_file.py` reads it from one YAML file plus `a.b=c` overrides and refuses unknown keys; `config_reference.py`
makes docs/configuration.md and `--help` from the descriptions below. The same file drives prepare, train and the tools.
The paper's code (arXiv 2604.03014) weighs the loss terms by w_tc 0.4 to 0.5, w_diff 0.7, w_reg 1e-3.
"""

import re
from typing import Annotated, Literal

from pydantic import Field, model_validator

from gtc_dist.config_data import (
    DataConfig,
    Name,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Section,
    Share,
    Weight,
)


class PrepareConfig(Section):
    """Resources of prepare. The catalog does not depend on them."""

    memory_gib: Annotated[float, Field(gt=0, le=1e6)] = Field(
        2.0, description="Working memory of one blocked computation in the driver, GiB."
    )
    scratch: str | None = Field(
        None, description="Local folder for intermediate data. null: the system's temporary folder."
    )


class RunConfig(Section):
    """Place of the run."""

    storage: Name = Field(description="Folder or URI that holds runs.")
    name: str = Field(description="The run lives at storage/name.")
    loggers: list[Literal["tensorboard", "mlflow", "wandb"]] = Field(
        ["tensorboard"],
        description="Services that show the curves: TensorBoard's files in the run folder; MLflow and Weights & Biases "
        "need the extras [mlflow] and [wandb] and their environment variables (docs/quickstart.md).",
    )

    @model_validator(mode="after")
    def _plain_name(self):
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", self.name):
            raise ValueError(f"run.name is {self.name!r}; use letters, digits, '.', '_' and '-' only")
        return self


class ClusterConfig(Section):
    """Ranks and their resources."""

    workers: PositiveInt = Field(1, description="Number of ranks.")
    min_workers: PositiveInt | None = Field(
        None,
        description="Elastic training: use as many ranks as the cluster has room for, from this number to `workers`; "
        "all ranks restart from the last checkpoint whenever the number changes. null: always `workers`.",
    )
    retries: NonNegativeInt = Field(
        3, description="Restarts of all ranks from the last checkpoint after a rank was lost."
    )
    wait_minutes: PositiveFloat = Field(
        30.0, description="Watchdog: a rank that keeps the others waiting longer is taken for dead."
    )
    gpu: bool = Field(False, description="One GPU per rank and NCCL; otherwise CPU and gloo.")
    cpus_per_worker: PositiveFloat | None = Field(
        None, description="CPUs that a rank reserves in Ray. null: 1, or less if Ray Data would have none left."
    )
    threads: PositiveInt | None = Field(
        None, description="Torch threads of a rank. null: the rank's share of the node's cores, less one."
    )

    @model_validator(mode="after")
    def _elastic(self):
        if self.min_workers is not None and self.min_workers > self.workers:
            raise ValueError(f"min_workers {self.min_workers} is above workers {self.workers}")
        return self


class NegativesConfig(Section):
    """Negative items. A train positive of the user is never its negative."""

    mode: Literal["uniform", "shared", "in_batch"] = Field(
        "uniform",
        description="uniform: own negatives for each pair. shared: one pool for the batch. in_batch: the items of the "
        "rank's other pairs, importance-weighted by 1 / P(item in batch).",
    )
    count: PositiveInt = Field(
        8,
        description="uniform: negatives of each pair and ensemble member. shared: size of a rank's pool, which all "
        "members use. in_batch: not used.",
    )


class TrainConfig(Section):
    """Optimisation, losses and checkpoints."""

    epochs: NonNegativeInt = Field(120, description="Largest number of epochs.")
    batch_size: PositiveInt = Field(2048, description="Interactions of a step, over all ranks.")
    seed: NonNegativeInt = Field(0, description="Seed of initial values, negatives, sampling and permutations.")
    init_from: Name | None = Field(
        None,
        description="Start from the best weights of an earlier run, on a catalog of the grown data: rows by original "
        "ids, new users from those who share items with them, new items from similar ones; half of each row is random, "
        "which ends better. A run that resumes goes on from its own state. null: random values.",
    )
    final_fit: Name | None = Field(
        None,
        description="For what is deployed: train on train and valid together, for as many epochs and with the weights "
        "of the scorers that the finished run named here selected. Metrics stay those of that run. null: train on "
        "train, select on valid.",
    )
    lr: PositiveFloat = Field(1e-3, description="Learning rate (Adam) of the dense network.")
    table_lr: PositiveFloat = Field(2e-3, description="Learning rate of the user and item tables.")
    table_optimizer: Literal["adam", "rowwise_adam"] = Field(
        "adam", description="rowwise_adam: one second moment per row, which saves a third of the tables' memory."
    )
    epoch_steps: PositiveInt | None = Field(
        None, description="Steps of an epoch. null: one pass over the interactions."
    )
    negatives: NegativesConfig = NegativesConfig()
    loss: Literal["bpr", "softmax"] = Field(
        "bpr", description="Ranking loss: pairwise (BPR), or cross-entropy of the positive among its negatives."
    )
    temperature: PositiveFloat = Field(1.0, description="Scores are divided by it in the ranking loss.")
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.7,
        description="Decay of an average of the weights over epochs; the averaged weights are validated, kept and "
        "exported. 0: the weights themselves. Costs one more copy of the weights.",
    )
    exclude_seed_edges: bool = Field(
        True, description="Leave the batch's own interactions out of the graph from which they are predicted."
    )
    w_tc: Weight = Field(
        0.0, description="Weight of the total-correlation loss; the paper has 0.4. 0: the network has none."
    )
    tc_rows: NonNegativeInt = Field(
        512, description="Pairs of the global batch that enter the total-correlation loss. 0: all."
    )
    w_diff: Weight = Field(
        0.0, description="Weight of the content filter's denoising loss; the paper has 0.7. 0: no content filter."
    )
    precision: Literal["float32", "bf16"] = Field(
        "float32",
        description="bf16: matrix products of a step in bfloat16 (autocast); weights, sums and losses stay float32.",
    )
    compile: bool = Field(
        False,
        description="Compile forward and backward with torch.compile: up to a minute at the start; it needs a C++ "
        "compiler, and Triton on a GPU.",
    )
    w_reg: Weight = Field(1e-3, description="Weight of the L2 term over the batch's rows.")
    clip_norm: PositiveFloat | None = Field(None, description="Largest norm of all gradients together. null: any.")
    not_finite: Literal["stop", "skip"] = Field(
        "stop",
        description="Step whose loss or gradient is not finite: stop writes the batch to a file and ends the run; skip "
        "leaves the step out and counts it, at the cost of one collective per step.",
    )
    checkpoint_minutes: Annotated[float, Field(ge=0)] = Field(
        2.0, description="Minutes between saved training states. 0: whenever losses are logged."
    )
    log_every: PositiveInt = Field(
        10, description="Steps between points in TensorBoard. SIGTERM and a due training state are handled then, too."
    )
    refresh: NonNegativeInt = Field(
        10,
        description="sampled: full-graph refreshes of the historical embeddings per pass over the interactions "
        "(control variates). 0: none, steps see sampled neighbours alone.",
    )


class DiffusionConfig(Section):
    """Content filter: a diffusion model that predicts the noise, conditioned on an item's id embedding and the mean
    preference of its users."""

    steps: PositiveInt = Field(600, description="Diffusion steps T.")
    start_step: PositiveInt = Field(100, description="Step at which the deterministic filter starts.")

    @model_validator(mode="after")
    def _steps(self):
        if self.start_step > self.steps:
            raise ValueError(f"start_step {self.start_step} is beyond steps {self.steps}")
        return self


class HybridConfig(Section):
    """Untrained scorers, made of the train graph and the content, whose scores are added to those of the network. Their
    weights are tuned on the valid split (hybrid/score_fusion.py)."""

    graph_filter: NonNegativeInt = Field(
        16, description="Leading eigenvectors of the ideal low-pass graph filter. 0: no graph filter."
    )
    content_profile: NonNegativeInt = Field(
        64, description="Principal components of each modality's content profile. 0: no content profiles."
    )


class ModelConfig(Section):
    """Network and graph propagation."""

    variant: Literal["paper", "gated"] = Field(
        "paper",
        description="paper: content views are the filtered content, rows are L2-normalised, views are concatenated. "
        "gated: content views are the id embedding gated by the filtered content, norms are free, views are summed "
        "(docs/model.md has the whole list).",
    )
    propagation: Literal["full", "sampled"] = Field(
        "full", description="Whole graph in every step, or sampled mini-batches."
    )
    sampler_device: Literal["auto", "cpu", "gpu"] = Field(
        "auto",
        description="sampled: where neighbours are sampled: by DGL on the CPU, or in plain torch on the rank's GPU, "
        "whose memory then holds the graph. auto: on the GPU if there is one and the graph takes at most a quarter of "
        "its memory.",
    )
    fanout: list[int] = Field(
        [10, 10], description="sampled: neighbours per user-item layer, last layer first. -1: all."
    )
    item_fanout: int = Field(
        5,
        description="sampled: neighbours on the item-item graph and on the user-user graph; users of an item whose "
        "mean preference conditions the filter. -1: all.",
    )
    layer_nodes: PositiveInt | None = Field(
        None,
        description="sampled: expected number of new nodes per layer over all ranks (layer-wise importance sampling). "
        "null: all that the fanouts draw.",
    )
    width: PositiveInt = Field(64, description="Embedding width D of a view.")
    members: PositiveInt = Field(1, description="Ensemble size: networks trained side by side, whose scores are added.")
    masked_members: NonNegativeInt = Field(
        4,
        description="Members of the masked diffusion of interactions, a second model of the ensemble, conditioned on "
        "content (model/masked_diffusion.py); an item has 128 columns of each. 0: none.",
    )
    layers: NonNegativeInt = Field(2, description="User-item graph convolution layers.")
    modalities: list[str] | None = Field(None, description="Modalities to use. null: all of the catalog.")
    item_hop: bool = Field(True, description="Smooth items over the item-item graph.")
    user_hop: bool = Field(
        False, description="Smooth users over the user-user graph, which prepare builds only if this is true."
    )
    diffusion: DiffusionConfig = DiffusionConfig()
    hybrid: HybridConfig = HybridConfig()

    @property
    def has_hybrid(self) -> bool:
        """Whether untrained scorers are added to the network's scores."""
        return bool(self.hybrid.graph_filter or self.hybrid.content_profile)

    @model_validator(mode="after")
    def _fanouts(self):
        if self.modalities is not None and (not self.modalities or len(set(self.modalities)) < len(self.modalities)):
            raise ValueError(f"modalities is {self.modalities}; name each wanted one once, or null for all")
        for name, fanouts in (("fanout", self.fanout), ("item_fanout", [self.item_fanout])):
            if any(f == 0 or f < -1 for f in fanouts):
                raise ValueError(f"{name} {fanouts} has a value that is neither positive nor -1 (all)")
        if self.propagation == "sampled" and len(self.fanout) != self.layers:
            raise ValueError(f"fanout {self.fanout} names {len(self.fanout)} layers, model.layers is {self.layers}")
        return self


class EvalConfig(Section):
    """Validation and ranking."""

    every: PositiveInt = Field(
        5, description="Epochs between validations, each of which ranks a sample of valid up to 50 times."
    )
    metric: str = Field(
        "recall@20",
        description="Metric whose highest value on valid selects the best epoch, and which stops early; also of some "
        "items: head_free/ndcg@20, cold/recall@20, strata/tail/recall@20 and others (docs/concepts.md).",
    )
    patience: PositiveInt = Field(5, description="Validations without a better metric before training stops.")
    users: PositiveInt | None = Field(
        None, description="Rank about this many users of a split, a seeded sample. null: all."
    )
    cold_loss: Share = Field(
        0.01, description="Largest relative drop of warm items' ranking quality accepted for recommending cold items."
    )
    block_rows: PositiveInt = Field(
        16384, description="Rows computed at once in inference, and items scored at once in ranking: bounds memory."
    )

    @model_validator(mode="after")
    def _metric(self):
        ranking = "(recall|ndcg|precision|hitrate|mrr)@(5|10|20|50)"
        groups = "(head_free|cold|mean_list|strata/(head|middle|tail))"
        others = r"personal_gain/(recall|ndcg)@20|(coverage|head_share)@20"
        if not re.fullmatch(f"({groups}/)?{ranking}|{others}", self.metric):
            raise ValueError(
                f"metric is {self.metric!r}; use one of recall, ndcg, precision, hitrate, mrr @ 5, 10, 20, 50, alone "
                "or behind head_free/, cold/, mean_list/, strata/head/, strata/middle/ or strata/tail/; or "
                "personal_gain/recall@20, personal_gain/ndcg@20, coverage@20, head_share@20"
            )
        return self


class Config(Section):
    """A whole configuration."""

    data: DataConfig
    run: RunConfig
    prepare: PrepareConfig = PrepareConfig()
    cluster: ClusterConfig = ClusterConfig()
    train: TrainConfig = TrainConfig()
    model: ModelConfig = ModelConfig()
    eval: EvalConfig = EvalConfig()

    @property
    def train_splits(self) -> tuple[str, ...]:
        """Splits whose interactions are trained on."""
        return ("train",) if self.train.final_fit is None else ("train", "valid")

    @property
    def has_historical_embeddings(self) -> bool:
        """Whether sampled steps use control variates (training/control_variate.py)."""
        return self.model.propagation == "sampled" and self.train.refresh > 0

    @model_validator(mode="after")
    def _together(self):
        if self.train.batch_size < self.cluster.workers:
            raise ValueError(
                f"train.batch_size {self.train.batch_size} is below cluster.workers {self.cluster.workers}"
            )
        if self.model.sampler_device == "gpu" and not self.cluster.gpu:
            raise ValueError("model.sampler_device is gpu, but cluster.gpu is false; set it to true, or take auto")
        return self
