"""Opens the services that a configuration names."""

from gtc_dist.tracking.metric_logger import MetricLogger, RunDescription


def open_loggers(run: RunDescription) -> list[MetricLogger]:
    """The loggers of a run, on rank 0."""
    from gtc_dist.tracking.tensorboard_logger import TensorBoardLogger  # slow to import, and only rank 0 needs it

    return [TensorBoardLogger(run)]
