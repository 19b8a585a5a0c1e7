"""Typed run configuration, read by config_file.py: one YAML file plus `a.b=c` overrides; unknown keys are refused.

The same file drives prepare, train and the tools. Every field below says what it does; defaults are what a catalog of
some 10k to 100k nodes wants. Weights of the loss parts follow the paper's code (w_tc 0.4-0.5, w_diff 0.7, w_reg 1e-3).
"""

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

# hybrid/score_fusion.py has weights of these names beside the modalities
RESERVED = ("members", "length", "walked", "spectral", "cold")

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Weight = Annotated[float, Field(ge=0)]
Name = Annotated[str, Field(min_length=1)]  # of a file or folder, or a URI


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)


class InteractionsConfig(Section):
    """Where the raw interactions are and what their columns mean. Paths are relative to `data.raw` or full URIs."""

    files: list[str] = []  # names or globs; unused by split.method=given
    format: Literal["auto", "parquet", "csv", "tsv", "jsonl"] = (
        "auto"  # auto: by file name (.inter is TSV; .gz allowed)
    )
    user: str = "user_id"
    item: str = "item_id"
    rating: str | None = None  # column, needed by min_rating
    time: str | None = None  # column, needed by the splits that order by time
    min_rating: float | None = None  # rows below are dropped
    k_core: NonNegative = 0  # every user and item keeps at least this many interactions, at the fixed point; 0: off

    @model_validator(mode="after")
    def _columns(self):
        if self.user == self.item:
            raise ValueError(f"user and item are both column {self.user!r}; name two columns")
        if self.min_rating is not None and self.rating is None:
            raise ValueError("min_rating needs the name of the rating column in data.interactions.rating")
        return self


class SplitConfig(Section):
    """How interactions become train, valid and test."""

    method: Literal["given", "label", "global_time", "ratio", "leave_last_out"] = "ratio"
    train: list[str] = ["train.parquet"]  # given: files or globs of each split
    valid: list[str] = ["valid.parquet"]
    test: list[str] = ["test.parquet"]
    label: str = "x_label"  # label: the column; its values are named below (MMRec writes 0, 1, 2)
    train_label: str | int = 0
    valid_label: str | int = 1
    test_label: str | int = 2
    valid_share: Share = 0.1  # global_time, ratio: share of the interactions (of each user's, for ratio)
    test_share: Share = 0.1
    seed: NonNegative = 0

    @model_validator(mode="after")
    def _shares(self):
        if self.method in ("global_time", "ratio") and not (self.valid_share and self.test_share):
            raise ValueError(
                "valid_share and test_share must be above 0: epochs are chosen on valid, test tells the result"
            )
        if self.valid_share + self.test_share >= 1:
            raise ValueError(
                f"valid_share + test_share = {self.valid_share + self.test_share:g} leaves nothing to train on"
            )
        return self


class ModalityConfig(Section):
    """One modality's raw features: a `.npy` matrix (row = item id, or ids in a file beside it) or Parquet files."""

    path: Name  # relative to data.raw, or a URI; Parquet may be a glob
    ids: Name | None = None  # .npy only: file with one id per row (.npy, .txt or .parquet); None: row number = item id
    id_column: str = "item_id"  # Parquet only (and ids in Parquet)
    vector_column: str = "vector"  # Parquet only
    pca: Positive | None = None  # reduce to this width
    weight: Weight = 1.0  # in the item-item graph's similarity


class DataConfig(Section):
    raw: Name  # URI of the folder with raw tables and features
    catalog: Name  # URI of the folder that prepare writes and train reads
    interactions: InteractionsConfig = InteractionsConfig()
    split: SplitConfig = SplitConfig()
    features: dict[str, ModalityConfig] = {}  # modality name -> its raw files
    items: Literal["interactions", "all"] = "interactions"  # all: also items that only have features
    verify: Literal["checksum", "size"] = "checksum"  # how train checks the catalog's files against its manifest

    @field_validator("features")
    @classmethod
    def _names(cls, features: dict[str, ModalityConfig]) -> dict[str, ModalityConfig]:
        for name in features:
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
                raise ValueError(f"the modality name {name!r} may have letters, digits, '_' and '-' only")
            if name in RESERVED:
                raise ValueError(f"a modality cannot be called {name!r}: that is a part of an embedding")
        return features


class PrepareConfig(Section):
    """What prepare may use; its result does not depend on it."""

    memory_gib: Annotated[float, Field(gt=0, le=1e6)] = 2.0  # working memory of one blocked step in the driver
    scratch: str | None = None  # local folder for intermediate data; None: the system's temporary folder


class GraphConfig(Section):
    item_neighbours: Positive = 10  # k of the item-item graph (content, cosine)
    search: Literal["auto", "exact", "approximate"] = "auto"  # of item neighbours; auto: exact up to 50,000 items
    probes: Positive = 160  # approximate: lists of about 250 alike items searched for each item; more finds more
    user_neighbours: Positive = 40  # k of the user-user graph (co-interaction counts)
    hub_cap: Positive = 1000  # at most this many users of one item count as co-interacting (seeded sample beyond)


class RunConfig(Section):
    storage: Name  # URI of the folder that holds runs
    name: str  # the run lives at storage/name

    @model_validator(mode="after")
    def _plain_name(self):
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", self.name):
            raise ValueError(f"run.name is {self.name!r}; use letters, digits, '.', '_' and '-' only")
        return self


class ClusterConfig(Section):
    workers: Positive = 1  # ranks
    # elastic: as many ranks as there is room for, from so many to `workers`; whenever that changes, all start again
    # from the last checkpoint, as they do after a rank was lost; null: always `workers`
    min_workers: Positive | None = None
    retries: NonNegative = 3  # times that all ranks start again from the last checkpoint after one of them was lost
    wait_minutes: Annotated[float, Field(gt=0)] = 30.0  # a rank that keeps the others waiting longer is given up
    gpu: bool = False  # one GPU a rank and NCCL; else CPU and gloo
    cpus_per_worker: Annotated[float, Field(gt=0)] | None = None  # None: 1, less where Ray Data would have none left
    threads: Positive | None = None  # torch threads a rank; None: the rank's share of the node's cores, less one

    @model_validator(mode="after")
    def _elastic(self):
        if self.min_workers is not None and self.min_workers > self.workers:
            raise ValueError(f"min_workers {self.min_workers} is above workers {self.workers}")
        return self


class NegativesConfig(Section):
    """Negative items; never a train positive of the user that they are scored against."""

    # uniform: own ones for each pair; shared: one pool for the batch; in_batch: the items of the rank's other pairs
    mode: Literal["uniform", "shared", "in_batch"] = "uniform"
    count: Positive = 8  # for each pair, or in a rank's shared pool
    correct: bool = True  # in_batch: a negative stands for as many items as were unlikelier to be in the batch, so that
    # popular items are no negatives more often than others; false: they are
    popularity: Share = 0.0  # uniform: an item is drawn by (its train interactions)^this; 0: all alike


class CheckpointConfig(Section):
    """States that training goes on from after it was cut off."""

    minutes: Annotated[float, Field(ge=0)] = 2.0  # from one to the next; 0: whenever losses are logged
    keep: Positive = 2  # whole ones that are kept, beside the best weights


class TrainConfig(Section):
    epochs: NonNegative = 50
    batch_size: Positive = 2048  # interactions a step over all ranks
    seed: NonNegative = 0
    lr: Annotated[float, Field(gt=0)] = 1e-3
    table_lr: Annotated[float, Field(gt=0)] = 2e-3  # for the id, preference and stream-weight tables
    table_optimizer: Literal["adam", "rowwise_adam"] = "adam"  # rowwise: one second moment a row, a third less memory
    epoch_steps: Positive | None = None  # steps from one validation to the next; null: one pass over the interactions
    negatives: NegativesConfig = NegativesConfig()
    # of a positive against its negatives: pairwise, cross-entropy over all, or the sum of the two
    loss: Literal["bpr", "softmax", "bpr+softmax"] = "bpr"
    temperature: Annotated[float, Field(gt=0)] = 1.0  # of the ranking loss: scores are divided by it
    user_discount: Share = 0.0  # a user's interaction counts (number of them)^-this in the ranking loss; 1: users alike
    average: Annotated[float, Field(ge=0, lt=1)] = 0.0  # share of the past in the weights that are ranked, kept and
    # exported, an average over epochs (training/weight_averaging.py); 0: the weights of the epoch. Costs a copy
    exclude_seed_edges: bool = True  # leave the batch's own edges out of the graph that they are predicted from
    w_tc: Weight = 0.4  # weight of the total-correlation loss
    w_diff: Weight = 0.7  # weight of the diffusion loss
    w_personal: Weight = 0.1  # condition: user: weight of the ranking loss of the personal content score
    w_reg: Weight = 1e-3  # weight of the L2 term over the batch's embeddings
    clip_norm: Annotated[float, Field(gt=0)] | None = None  # largest norm of all gradients together; null: any
    not_finite: Literal["stop", "skip"] = "stop"  # a step whose loss or gradient is not finite: its batch is written
    # down and the run ends; or it is left out and counted, which costs a collective a step
    checkpoint: CheckpointConfig = CheckpointConfig()
    log_every: Positive = 10  # steps between TensorBoard points
    prefetch: Positive = 2  # batches prepared ahead
    refresh: NonNegative = 10  # sampled: times a pass that whole-catalog sums are computed, from which a step samples
    # what changed since (training/control_variate.py); 0: never, steps see sampled neighbours alone


class DiffusionConfig(Section):
    """The content filter (paper's section on user-aware conditional diffusion): it predicts the noise."""

    enabled: bool = True  # false: content streams are the plain projections
    trained: bool = True  # false: denoisers stay as they start, as in the paper's published code
    steps: Positive = 600  # T
    beta_start: Annotated[float, Field(gt=0, lt=1)] = 1e-4
    beta_end: Annotated[float, Field(gt=0, lt=1)] = 0.02
    start_step: Positive = 100  # the deterministic filter starts here ...
    ddim_steps: Positive = 1  # ... and reaches 0 in this many DDIM steps
    hidden: Positive = 128  # width of the denoiser's hidden layers
    # what the denoiser knows: the item's id embedding; plus the mean preference of the item's users; plus, of a pair
    # that is scored on its own (personal/personal_filter.py), the user. Embeddings are made without the user
    condition: Literal["item", "audience", "user"] = "audience"
    condition_dropout: Share = 0.1  # share of the denoising loss's pairs whose condition is left out, as for cold items

    @model_validator(mode="after")
    def _steps(self):
        if self.start_step > self.steps:
            raise ValueError(f"start_step {self.start_step} is beyond steps {self.steps}")
        if self.ddim_steps > self.start_step:
            raise ValueError(f"ddim_steps {self.ddim_steps} is more than start_step {self.start_step}")
        if self.beta_start > self.beta_end:
            raise ValueError(f"beta_start {self.beta_start} is above beta_end {self.beta_end}")
        return self


class CorrelationConfig(Section):
    """The total-correlation objective over all streams at once."""

    enabled: bool = True
    of: Literal["inputs", "outputs"] = "inputs"  # items' streams as they enter the graph; or streams as they leave it,
    # of users and of items
    critic: Literal["multilinear", "additive"] = "multilinear"  # product of all streams, or mean over their pairs
    temperature: Annotated[float, Field(gt=0)] = 0.2  # of the critic's scores
    learn_temperature: bool = True  # from there on; false: it stays
    rows: NonNegative = 512  # items of the global batch that enter; 0: one for each interaction


class HybridConfig(Section):
    """Parts of the embedding that are walked over co-interactions, not trained; their scores are added to those of the
    members, with weights that are chosen on the valid split (hybrid/score_fusion.py)."""

    enabled: bool | None = None  # null: with propagation: full, whose catalogs are of a size where they cost little
    spectral: NonNegative = 16  # leading modes of the co-interaction graph (hybrid/spectral.py); 0: none
    profile: NonNegative = 64  # columns of each modality's content profile (hybrid/content_profile.py); 0: none
    user_exponent: Share = 0.6  # a user's tie to an item counts (number of its interactions)^-this
    item_exponent: Share = 0.33  # the same for items; less of it ranks popular items higher


class ModelConfig(Section):
    propagation: Literal["full", "sampled"] = "full"  # whole graph as one block, or DGL mini-batches
    sampler: Literal["neighbor", "labor"] = "neighbor"
    fanout: list[int] = [10, 10]  # sampled: neighbours per user-item layer, last layer first; -1: all
    item_fanout: int = 5  # sampled: neighbours on the item-item graph; -1: all
    user_fanout: int = 5  # sampled: neighbours on the user-user graph, and users of an item's audience; -1: all
    layer_nodes: Positive | None = None  # sampled: about this many new nodes a layer or hop, over all ranks; null: all
    width: Positive = 64  # D of each stream
    members: Positive = 1  # models that are trained side by side on the same batches; their scores are added
    init_std: Annotated[float, Field(gt=0)] = 0.1  # of id and preference embeddings at the start
    layers: NonNegative = 2  # user-item convolution layers; 0: no convolution
    modalities: list[str] | None = None  # None: all of the catalog
    item_hop: bool = True  # add one hop over the item-item graph
    user_hop: bool = True  # add one hop over the user-user graph
    unit_rows: bool = True  # rows enter the graph with length one, as in the paper's code; false: with the length they
    # learn from init_std on, so that a user or an item with few interactions stays near the mean
    content: Literal["vector", "gate"] = "vector"  # a content stream is the filtered content, as in the paper; or the
    # id row under a gate that the filtered content opens, and the hop over the item-item graph gives its neighbours'
    join: Literal["concat", "sum"] = "concat"  # of the streams that leave the graph, into the embedding
    gate: bool = True  # similarity gate over the streams; false: all streams alike
    diffusion: DiffusionConfig = DiffusionConfig()
    correlation: CorrelationConfig = CorrelationConfig()
    walk: HybridConfig = HybridConfig()

    @property
    def walks(self) -> bool:
        """Whether embeddings have untrained parts."""
        wanted = self.propagation == "full" if self.walk.enabled is None else self.walk.enabled
        return wanted and bool(self.walk.spectral or self.walk.profile)

    @model_validator(mode="after")
    def _fanouts(self):
        if self.modalities is not None and (not self.modalities or len(set(self.modalities)) < len(self.modalities)):
            raise ValueError(f"modalities is {self.modalities}; name each wanted one once, or null for all")
        for name, fanouts in (
            ("fanout", self.fanout),
            ("item_fanout", [self.item_fanout]),
            ("user_fanout", [self.user_fanout]),
        ):
            if any(f == 0 or f < -1 for f in fanouts):
                raise ValueError(f"{name} {fanouts} has a value that is neither positive nor -1 (all)")
        if self.propagation == "sampled" and len(self.fanout) != self.layers:
            raise ValueError(f"fanout {self.fanout} names {len(self.fanout)} layers, model.layers is {self.layers}")
        if self.content == "gate" and self.unit_rows:
            raise ValueError("content: gate needs unit_rows: false, since a gate is about lengths")
        return self


class EvalConfig(Section):
    every: Positive = 1  # epochs between validations
    metric: str = "recall@20"  # selects the best checkpoint and stops early
    patience: Positive = 10  # validations without a better metric before training stops
    users: Positive | None = None  # rank about so many users of a split, a seeded sample; null: all
    cold_loss: Share = 0.01  # share of what a ranking of warm items is worth that cold ones in the lists may cost
    item_block: Positive = 16384  # items scored at once
    user_block: Positive = 1024  # users scored at once
    chunk: Positive = 16384  # rows of a rank that inference computes at once

    @model_validator(mode="after")
    def _metric(self):
        if not re.fullmatch(r"(recall|ndcg|precision|hitrate|mrr)@(5|10|20|50)", self.metric):
            raise ValueError(
                f"metric is {self.metric!r}; use one of recall, ndcg, precision, hitrate, mrr @ 5, 10, 20, 50"
            )
        return self


class Config(Section):
    data: DataConfig
    run: RunConfig
    dataset: dict[str, Any] = {}  # parameters of tools/make_dataset.py, which writes to data.raw; nothing else reads it
    prepare: PrepareConfig = PrepareConfig()
    graph: GraphConfig = GraphConfig()
    cluster: ClusterConfig = ClusterConfig()
    train: TrainConfig = TrainConfig()
    model: ModelConfig = ModelConfig()
    eval: EvalConfig = EvalConfig()

    @model_validator(mode="after")
    def _together(self):
        if self.train.batch_size < self.cluster.workers:
            raise ValueError(
                f"train.batch_size {self.train.batch_size} is below cluster.workers {self.cluster.workers}"
            )
        return self
