"""Validation: embed the catalog, tune the hybrid weights (score fusion, cold start), rank, and score the final test."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch

from gtc_dist.config import Config
from gtc_dist.data.catalog import Catalog
from gtc_dist.distributed.sharded_table import ShardedTable
from gtc_dist.evaluation import ranking
from gtc_dist.evaluation.item_groups import HEAD_ITEMS, positive_groups, tuning_positives, valid_head
from gtc_dist.evaluation.metrics import metric_value
from gtc_dist.evaluation.ranking import RankingOptions
from gtc_dist.evaluation.scaled_items import ScaledItems
from gtc_dist.evaluation.shortlist import Shortlist
from gtc_dist.graph.csc import Graphs
from gtc_dist.hybrid.embeddings import Embeddings
from gtc_dist.hybrid.scorer import HybridScorer
from gtc_dist.inference.layerwise import embed_catalog
from gtc_dist.inference.masked_embeddings import embed_masked
from gtc_dist.model.gtc import GTC, Tables
from gtc_dist.tracking.metric_logger import Histogram
from gtc_dist.training.control_variate import HistoricalEmbeddings

TUNING_USERS = 4096  # valid users, about, that the hybrid weights are tuned on
NORM_OCTAVES = (-10, 7)  # powers of two between which row norms are counted in quarter octaves
PROJECTED = 1000  # most popular items whose embeddings TensorBoard's projector shows
PROJECTED_WIDTH = 50  # their principal directions that it gets: it takes numbers as text


class Validator:
    """Ranks the splits with the weights that are in the network and the tables. Methods are collectives unless marked
    Local."""

    def __init__(
        self,
        config: Config,
        catalog: Catalog,
        graphs: Graphs,
        network: GTC,
        tables: Tables,
        features: dict[str, ShardedTable],
        content: ShardedTable | None,
        scorer: HybridScorer,
        history: HistoricalEmbeddings | None,
    ):
        self.config, self.catalog, self.graphs = config, catalog, graphs
        self.network, self.tables, self.features, self.content = network, tables, features, content
        self.scorer, self.history = scorer, history
        self.truth = {
            split: ranking.load_ground_truth(catalog, split, tables.user.start, tables.user.stop)
            for split in ("valid", "test")
        }
        self.head = valid_head(self.truth["valid"], graphs.items, HEAD_ITEMS, tables.user.comm)
        self.groups = positive_groups(graphs, self.head)

    def embed(self, diagnostics: dict[str, float] | None = None) -> tuple[Embeddings, Embeddings | None]:
        """Embeddings of the whole catalog before score fusion: of the network, and of the masked diffusion if there is
        one.

        Args:
            diagnostics: filled with means over all items.
        """
        if self.history is not None:
            self.history.clear()  # frees its memory; the next step refreshes
        models, chunk = (self.network, self.tables), self.config.eval.block_rows
        network = embed_catalog(*models, self.features, self.graphs, chunk, diagnostics)
        return network, embed_masked(*models, self.content, self.graphs, chunk)

    def validate(self, epoch: int, best: float) -> tuple[dict, dict[str, float]]:
        """Tune the hybrid weights and rank the valid split.

        The cold-start weights are tuned only for epochs better than `best`, since that ranks the split several times;
        the metrics after it decide, because with the previous weights cold items may cost more than they are allowed
        to.

        Returns:
            Metrics of valid, and diagnostics for TensorBoard.
        """
        metric = self.config.eval.metric
        diagnostics: dict[str, float] = {}
        fused = self.scorer.tune_fusion(*self.embed(diagnostics), self.shortlist)
        metrics = self.rank(self.scorer.impute_cold(fused), "valid")
        is_better = metric_value(metrics, metric) > best
        if is_better and (epoch > 0 or self.scorer.has_untrained):
            metrics = self._tune_cold_start(fused, metrics)
        for part, weights in self.scorer.state().items():  # names with a slash are in checkpoints alone
            diagnostics |= {f"{part}/{name}": weight for name, weight in weights.items() if "/" not in name}
        if metric not in metrics["overall"]:
            diagnostics[f"valid/{metric}"] = metric_value(metrics, metric)  # metrics.jsonl shows what decided
        if self.network.tc_temperature is not None:
            diagnostics["total_correlation/temperature"] = self.network.tc_temperature
        return metrics, diagnostics

    def _tune_cold_start(self, fused: Embeddings, metrics: dict) -> dict:
        before = self.scorer.state()
        self.scorer.tune_cold_start(fused, self.shortlist, self.objective_by_adjustment)
        if self.scorer.state() == before:
            return metrics
        final = self.scorer.impute_cold(fused)
        return metrics if final is fused else self.rank(final, "valid")

    def rank(self, embeddings: Embeddings, split: str) -> dict:
        """Metrics of a split."""
        options = RankingOptions.of(self.config)
        return ranking.evaluate_split(*embeddings, self.graphs, self.truth[split], options, self.head)

    def objective_by_adjustment(
        self, embeddings: Embeddings, predicted: ShardedTable, which: np.ndarray
    ) -> Callable[[float, float], float]:
        """Objective for tuning how many of the items `which`, bool [items], are listed, as a function of a factor and
        an offset of the scores by their `predicted` rows: geometric mean of `eval.metric` and NDCG@20 on a sample of
        the valid users, so that a relative gain of one counts as much as the same gain of the other. Both count those
        of the other items that `eval.metric` counts, such as "head_free" (`tuning_positives`).
        """
        metric, positives = tuning_positives(self.config.eval.metric, self.groups, ~which)
        options, truth = self._tuning_options(), self.truth["valid"]
        lists = ScaledItems(*embeddings, predicted, which, self.graphs, truth, options, positives)

        def objective(factor: float, offset: float) -> float:
            values = lists.metrics(factor, offset)
            return (values[metric] * values["ndcg@20"]) ** 0.5

        return objective

    def shortlist(self, scorers: dict[str, Embeddings]) -> Shortlist:
        """Shortlists that the fusion weights are fitted to: of a sample of the valid users, with the positives of
        `eval.metric`."""
        _, positives = tuning_positives(self.config.eval.metric, self.groups)
        return Shortlist.of(scorers, self.graphs, self.truth["valid"], self._tuning_options(), positives)

    def _tuning_options(self) -> RankingOptions:
        """Local. Options of the rankings that tune weights."""
        options = RankingOptions.of(self.config)
        return replace(options, users=min(options.users or TUNING_USERS, TUNING_USERS))

    def final_metrics(self) -> tuple[dict, ShardedTable]:
        """Metrics of valid and test, those of popularity on test, and the final item embeddings."""
        embeddings = self.scorer(*self.embed())
        popularity = ranking.popularity(self.graphs, self.tables.user.comm)
        scores = {split: self.rank(embeddings, split) for split in ("valid", "test")}
        options = RankingOptions.of(self.config)
        baseline = ranking.evaluate_on_items(*popularity, self.graphs, self.truth["test"], options, None)
        return scores | {"popularity": baseline}, embeddings[1]

    def row_norms(self) -> dict[str, Histogram]:
        """Distributions of the norms of each table's rows, over all ranks."""
        edges = torch.cat([torch.zeros(1), 2.0 ** torch.arange(*NORM_OCTAVES, 1 / 4)])  # the last is far above any norm
        found = {}
        for table in self.tables.all():
            place = torch.bucketize(table.weight.norm(dim=1), edges.to(table.weight.device)[1:-1], right=True)
            counts = table.comm.all_reduce(torch.bincount(place, minlength=len(edges) - 1))
            found[f"norms/{table.name}"] = Histogram(edges.double().numpy(), counts.double().cpu().numpy())
        return found

    def projector_points(self, items: ShardedTable) -> tuple[np.ndarray, list[str]]:
        """Local. Embeddings of the most popular of this rank's items, in their leading principal directions, and their
        original ids."""
        degree = self.graphs.item_degree[items.start : items.stop]
        chosen = np.argsort(-degree, kind="stable")[:PROJECTED]
        labels = [str(i) for i in self.catalog.ids("items", items.start, items.stop).take(chosen).to_pylist()]
        rows = items.weight[torch.from_numpy(chosen)].cpu().numpy()
        left, size, _ = np.linalg.svd(rows - rows.mean(axis=0, keepdims=True), full_matrices=False)
        return (left * size)[:, :PROJECTED_WIDTH], labels
