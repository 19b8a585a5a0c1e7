"""TensorBoard's event files: curves with descriptions, texts, hyperparameters, histograms and a page of its own.

Event files go straight into a local run folder; for a run in object storage they are written to a temporary folder and
uploaded at every `flush`. Test metrics are a run of their own, `test`, so that they appear as a point in the charts of
valid.
"""

import os
import tempfile
from collections.abc import Iterable

import numpy as np
import yaml
from tensorboard.compat.proto.summary_pb2 import DATA_CLASS_SCALAR, DATA_CLASS_TENSOR, Summary, SummaryMetadata
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.custom_scalar.metadata import CONFIG_SUMMARY_TAG
from tensorboard.plugins.custom_scalar.metadata import create_summary_metadata as layout_metadata
from tensorboard.plugins.histogram import metadata as histogram_metadata
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from tensorboard.plugins.hparams.summary_v2 import HParam, Metric, hparams_config_pb, hparams_pb
from tensorboard.plugins.scalar import metadata as scalar_metadata
from tensorboard.plugins.text import metadata as text_metadata
from tensorboard.util.tensor_util import make_tensor_proto
from torch.utils.tensorboard import SummaryWriter

from gtc_dist.checkpoint.run_folder import TENSORBOARD_FOLDER
from gtc_dist.data import storage
from gtc_dist.evaluation.metrics import flat_metrics
from gtc_dist.tracking.charts import PAGE, chart_tag, meaning, quality_metrics
from gtc_dist.tracking.metric_logger import Histogram, RunDescription, result_summary

TEST_RUN = "test"  # name of the run with the test metrics
BEFORE_TEXT = "What the curves mean: point at a chart's i, or docs/concepts.md."


class TensorBoardLogger:
    """Writes the event files of a run; a `MetricLogger`."""

    def __init__(self, run: RunDescription):
        self.run, self.quality = run.uri, quality_metrics(run.config.eval.metric)
        self.folder, self._temporary = storage.absolute(storage.join(run.uri, TENSORBOARD_FOLDER)), None
        if not storage.is_local(run.uri):
            self._temporary = tempfile.TemporaryDirectory(prefix="gtc-tensorboard-")
            self.folder = self._temporary.name
        self.writer = SummaryWriter(self.folder, purge_step=run.done + 1 if run.done else None)
        self._described: set[str] = set()
        self._begin(run)

    def _begin(self, run: RunDescription) -> None:
        """Texts, hyperparameters and the layout; a resumed run repeats them, as keys such as `train.epochs` may have
        changed."""
        config = yaml.safe_dump(run.config.model_dump(), sort_keys=False)
        self._text("configuration", "    " + config.replace("\n", "\n    "), run.done, "The resolved config.yaml.")
        self._text("data", run.data_summary, run.done, "The catalog that the run is trained on.")
        metrics = [Metric(f"1_quality/{name}", display_name=f"valid {name}") for name in self.quality]
        metrics += [Metric(f"1_quality/{name}", group=TEST_RUN, display_name=f"test {name}") for name in self.quality]
        values = run.hyperparameters
        for summary in (_hyperparameter_table(values, run.chosen, metrics), hparams_pb(values)):
            self._add(summary, run.done)
        category, chart = layout_pb2.Category, layout_pb2.Chart
        sections = [
            category(
                title=question,
                chart=[chart(title=title, multiline={"tag": [f"^{tags}$"]}) for title, tags in charts],
            )
            for question, charts in PAGE.items()
        ]
        page = make_tensor_proto(layout_pb2.Layout(category=sections).SerializeToString())
        self._add(_tensor(CONFIG_SUMMARY_TAG, page, layout_metadata()), run.done)

    def scalars(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            tag = chart_tag(name, self.quality)
            self._add(_scalar(tag, value, self._description(tag, name)), step)

    def histograms(self, values: dict[str, Histogram], step: int) -> None:
        for name, histogram in values.items():
            tag = chart_tag(name, self.quality)
            rows = np.stack([histogram.edges[:-1], histogram.edges[1:], histogram.counts], axis=1)
            metadata = histogram_metadata.create_summary_metadata(None, self._description(tag, name))
            self._add(_tensor(tag, make_tensor_proto(rows, dtype=np.float64), metadata), step)

    def projector(self, vectors: np.ndarray, labels: list[str], step: int) -> None:
        self.writer.add_embedding(vectors, metadata=labels, global_step=step, tag="items")

    def result(self, result: dict, step: int) -> None:
        self._text("result", result_summary(result), step, "Metrics of the best epoch: metrics.json.")
        values = flat_metrics(result["test"])
        with SummaryWriter(os.path.join(self.folder, TEST_RUN)) as writer:
            for name in self.quality:
                summary = _scalar(f"1_quality/{name}", values[name], meaning(f"valid/{name}", TEST_RUN))
                writer._get_file_writer().add_summary(summary, step)

    def flush(self) -> None:
        self.writer.flush()
        if self._temporary is not None:
            for root, _, names in os.walk(self.folder):
                for name in names:
                    path = os.path.join(root, name)
                    relative = os.path.relpath(path, self.folder).replace(os.sep, "/")
                    storage.copy_file(path, storage.join(self.run, TENSORBOARD_FOLDER, relative))

    def close(self) -> None:
        self.flush()
        self.writer.close()
        if self._temporary is not None:
            self._temporary.cleanup()

    def _add(self, summary: Summary, step: int) -> None:
        self.writer._get_file_writer().add_summary(summary, step)

    def _text(self, tag: str, markdown: str, step: int, description: str) -> None:
        metadata = text_metadata.create_summary_metadata(None, description)
        self._add(_tensor(tag, make_tensor_proto(markdown), metadata), step)

    def _description(self, tag: str, name: str) -> str:
        """Of a tag's first point alone, which is where TensorBoard reads it."""
        if tag in self._described:
            return ""
        self._described.add(tag)
        return meaning(name)


def _hyperparameter_table(keys: Iterable[str], first: set[str], metrics: list[Metric]) -> Summary:
    """The columns of the table of hyperparameters. TensorBoard shows only a few at once; those in `first` are among
    them, since it puts keys that differ between runs before the others."""
    summary = hparams_config_pb([HParam(key) for key in keys], metrics)
    plugin = summary.value[0].metadata.plugin_data
    content = HParamsPluginData.FromString(plugin.content)
    for info in content.experiment.hparam_infos:
        info.differs = info.name in first
    plugin.content = content.SerializeToString()
    return summary


def _scalar(tag: str, value: float, description: str) -> Summary:
    """A point; `SummaryWriter.add_scalar` takes no description."""
    if not description:
        return Summary(value=[Summary.Value(tag=tag, simple_value=value)])
    metadata = scalar_metadata.create_summary_metadata(None, description)
    metadata.data_class = DATA_CLASS_SCALAR
    return Summary(value=[Summary.Value(tag=tag, simple_value=value, metadata=metadata)])


def _tensor(tag: str, tensor, metadata: SummaryMetadata) -> Summary:
    metadata.data_class = DATA_CLASS_TENSOR
    return Summary(value=[Summary.Value(tag=tag, tensor=tensor, metadata=metadata)])
