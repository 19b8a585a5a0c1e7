"""Opens the services of `run.loggers`.

TensorBoard's files belong to the run: an error in writing them ends it, as one in writing metrics.jsonl does. Another
service that fails while the run trains is left out with a warning.
"""

import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from gtc_dist.errors import InputError
from gtc_dist.tracking.metric_logger import MetricLogger, RunDescription

TRACKING_URI = "MLFLOW_TRACKING_URI"


def check_loggers(names: list[str]) -> None:
    """Raises InputError where the package of a service is missing, or what it needs to be set."""
    for name in names:
        if name != "tensorboard" and importlib.util.find_spec(name) is None:
            raise InputError(
                f"run.loggers names {name}, which is not installed; `pip install 'gtc-dist[{name}]'` on all machines, "
                "or leave it out"
            )
    if "mlflow" in names and not os.environ.get(TRACKING_URI):
        raise InputError(f"run.loggers names mlflow; set {TRACKING_URI} to the address of the tracking server")


def open_loggers(run: RunDescription) -> list[MetricLogger]:
    """The loggers of a run, on rank 0. The packages are slow to import, and only this rank needs them.

    Raises:
        InputError: a package is missing on this machine, or a service refuses the run.
    """
    check_loggers(run.config.run.loggers)
    loggers: list[MetricLogger] = []
    for name in run.config.run.loggers:
        if name == "tensorboard":
            from gtc_dist.tracking.tensorboard_logger import TensorBoardLogger

            loggers.append(TensorBoardLogger(run))
        elif name == "mlflow":
            from gtc_dist.tracking.mlflow_logger import MlflowLogger

            loggers.append(_OptionalLogger(name, _opened(name, MlflowLogger, run)))
        else:
            from gtc_dist.tracking.wandb_logger import WandbLogger

            loggers.append(_OptionalLogger(name, _opened(name, WandbLogger, run)))
    return loggers


def _opened(name: str, make: Callable[[RunDescription], MetricLogger], run: RunDescription) -> MetricLogger:
    try:
        return make(run)
    except Exception as error:  # each package has its own
        raise InputError(f"run.loggers: {name} cannot be used: {error}") from error


@dataclass
class _OptionalLogger:
    """A `MetricLogger` that is left out from its first error on, with a warning: the training goes on."""

    name: str
    logger: MetricLogger | None

    def __getattr__(self, method: str) -> Callable[..., None]:
        def call(*args: Any) -> None:
            if self.logger is None:
                return
            try:
                getattr(self.logger, method)(*args)
            except Exception as error:  # each package has its own
                print(f"warning: nothing more is sent to {self.name}: {error}", flush=True)
                self.logger = None

        return call
