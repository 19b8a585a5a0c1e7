"""The interface of the services that show a run's numbers: TensorBoard, MLflow, Weights & Biases (`run.loggers`).

Only rank 0 has loggers, and only while it trains. They get all numbers under the trainer's names; each maps these to
the tags of charts.py.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from gtc_dist.config import Config
from gtc_dist.config_upgrade import flatten_keys
from gtc_dist.data.catalog import Manifest


@dataclass(frozen=True)
class RunDescription:
    """What a run is, for the texts and the table of hyperparameters."""

    uri: str
    config: Config
    data: Manifest
    steps: int  # of an epoch
    done: int  # steps before this start; points beyond them, of steps that are repeated, are dropped

    @property
    def hyperparameters(self) -> dict[str, bool | float | str]:
        """Keys of the configuration that decide on the result, with their values."""
        sections = {name: getattr(self.config, name).model_dump() for name in ("train", "model", "eval")}
        found = {"cluster.workers": self.config.cluster.workers} | flatten_keys(sections)
        return {key: value for key, value in found.items() if isinstance(value, bool | int | float | str)}

    @property
    def chosen(self) -> set[str]:
        """Keys of `hyperparameters` that are not at their default."""
        fields = Config.model_fields
        defaults = flatten_keys({name: fields[name].default.model_dump() for name in ("train", "model", "eval")})
        return {key for key, value in self.hyperparameters.items() if value != defaults.get(key, value)}

    @property
    def data_summary(self) -> str:
        """The catalog as a table in Markdown."""
        data = self.data
        rows = [
            ("catalog", f"`{self.config.data.catalog}`"),
            ("users", f"{data.users:,}"),
            ("items", f"{data.items:,}"),
        ]
        rows.append(("items without a train interaction", f"{data.cold_items:,}"))
        rows += [(f"{split} interactions", f"{count:,}") for split, count in data.interactions.items()]
        rows.append(("steps of an epoch", f"{self.steps:,} of {self.config.train.batch_size:,} interactions"))
        rows += [(f"content: {name}", f"{each.dim} values an item") for name, each in data.modalities.items()]
        rows += [(f"graph: {name}", f"{edges:,} edges") for name, edges in data.graphs.items()]
        rows += [(f"dropped rows: {reason}", f"{count:,}") for reason, count in data.dropped.items() if count]
        return markdown_table(("", ""), rows)


@dataclass(frozen=True)
class Histogram:
    """edges float64 [n + 1], ascending; counts float64 [n]."""

    edges: np.ndarray
    counts: np.ndarray


class MetricLogger(Protocol):
    """One service. No method waits for a network or a device longer than the writing of a small file."""

    def scalars(self, values: dict[str, float], step: int) -> None:
        """A point on the curve of each number; step: steps since the start of training."""

    def histograms(self, values: dict[str, Histogram], step: int) -> None:
        """Distributions at a step."""

    def projector(self, vectors: np.ndarray, labels: list[str], step: int) -> None:
        """Item embeddings in their principal directions, [n, W], with the items' ids."""

    def result(self, result: dict, step: int) -> None:
        """Content of metrics.json, at the step of the best epoch."""

    def flush(self) -> None:
        """Everything so far can be read by others afterwards."""

    def close(self) -> None:
        """Close the service's files and connections. If the run resumes, a new logger appends to the same curves."""


def result_summary(result: dict) -> str:
    """Content of metrics.json as a table in Markdown."""
    shown = ("recall@10", "recall@20", "ndcg@10", "ndcg@20")
    parts = {"valid": result["valid"]["overall"], "test": result["test"]["overall"]}
    parts |= {"test, popularity": result["popularity"], "test, one list for everyone": result["test"]["mean_list"]}
    rows = [(name, *(f"{values[metric]:.4f}" for metric in shown)) for name, values in parts.items()]
    return f"Best epoch {result['best_epoch']} of {result['last_epoch']}.\n\n" + markdown_table(("", *shown), rows)


def markdown_table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
