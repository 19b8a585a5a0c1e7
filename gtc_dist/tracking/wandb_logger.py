"""Weights & Biases: curves, configuration, texts, histograms and the result, in a run of the same name.

Its own process sends everything, so that a step never waits. Project, key and mode come from its environment variables:
WANDB_PROJECT, by default `gtc-dist`; WANDB_API_KEY; WANDB_MODE=offline writes into the run folder, for `wandb sync`. A
resumed run continues its run there; of steps that are repeated the first points stay.
"""

import hashlib
import os
import tempfile

import numpy as np
import wandb

from gtc_dist.data import storage
from gtc_dist.evaluation.metrics import flat_metrics
from gtc_dist.tracking.charts import chart_tag, quality_metrics
from gtc_dist.tracking.metric_logger import Histogram, RunDescription, result_summary


class WandbLogger:
    """Sends a run to Weights & Biases; a `MetricLogger`."""

    def __init__(self, run: RunDescription):
        self.quality = quality_metrics(run.config.eval.metric)
        folder = run.uri if storage.is_local(run.uri) else tempfile.mkdtemp(prefix="gtc-wandb-")
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "gtc-dist"),
            id=hashlib.sha256(run.uri.encode()).hexdigest()[:16],
            name=run.config.run.name,
            resume="allow" if run.done else None,
            dir=os.environ.get("WANDB_DIR", storage.absolute(folder)),
            config=run.hyperparameters,
            notes=run.data_summary,
            settings=wandb.Settings(silent=True, console="off"),
        )

    def scalars(self, values: dict[str, float], step: int) -> None:
        self.run.log({chart_tag(name, self.quality): value for name, value in values.items()}, step=step)

    def histograms(self, values: dict[str, Histogram], step: int) -> None:
        drawn = {name: wandb.Histogram(np_histogram=(each.counts, each.edges)) for name, each in values.items()}
        self.run.log({chart_tag(name, self.quality): each for name, each in drawn.items()}, step=step)

    def projector(self, vectors: np.ndarray, labels: list[str], step: int) -> None:
        """Nothing: embeddings are in the export."""

    def result(self, result: dict, step: int) -> None:
        test = flat_metrics(result["test"])
        self.run.summary.update({f"test/{name}": test[name] for name in self.quality})
        self.run.summary["best_epoch"] = result["best_epoch"]
        self.run.notes = result_summary(result)

    def flush(self) -> None:
        """Nothing: the process of the package sends at once."""

    def close(self) -> None:
        self.run.finish()
