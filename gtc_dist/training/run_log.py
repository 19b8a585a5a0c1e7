"""Logs of a run: progress lines, metrics.jsonl, and the services of `run.loggers`. Only rank 0 writes."""

import json
import math
import time
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from gtc_dist.checkpoint.run_folder import METRICS_LOG
from gtc_dist.data import storage
from gtc_dist.distributed.collectives import Communicator
from gtc_dist.distributed.stopwatch import Stopwatch
from gtc_dist.evaluation.metrics import flat_metrics
from gtc_dist.progress import duration
from gtc_dist.tracking.loggers import open_loggers
from gtc_dist.tracking.metric_logger import Histogram, MetricLogger, RunDescription

# parts of a step; sampling and features run in the prefetch thread, communication is part of others
PARTS = ("data", "sampling", "features", "history", "lookup", "forward", "backward", "optimizer", "communication")


class RunLog:
    """Writes a run's logs; on ranks other than 0 every method does nothing. Methods are local.

    Args:
        run: URI of the run folder.
        epochs, steps: for the progress line.
        lines: lines of metrics.jsonl so far, of a resumed run.
        done: steps so far.
        loggers: get the curves. publish: gets the numbers of each step that is logged.
    """

    def __init__(
        self,
        run: str,
        epochs: int,
        steps: int,
        active: bool = True,
        lines: list[str] | None = None,
        done: int = 0,
        loggers: Sequence[MetricLogger] = (),
        publish: Callable[[dict[str, float]], None] = lambda scalars: None,
    ):
        self.run, self.epochs, self.steps, self.active = run, epochs, steps, active
        self.lines, self.done, self.loggers, self.publish = list(lines or []), done, loggers, publish
        self.started = self.printed = time.monotonic()

    @staticmethod
    def open(
        run: RunDescription, active: bool, lines: list[str], publish: Callable[[dict[str, float]], None]
    ) -> "RunLog":
        """The log of a run, with the services of its configuration."""
        loggers = open_loggers(run) if active else []
        return RunLog(run.uri, run.config.train.epochs, run.steps, active, lines, run.done, loggers, publish)

    def step(self, epoch: int, step: int, scalars: dict[str, float]) -> None:
        """A point on every curve, and a progress line every ten seconds and at the end of an epoch.

        Args:
            scalars: name -> value (tracking/charts.py); values that are not finite, as of a skipped step, are left out.
        """
        if not self.active:
            return
        done = (epoch - 1) * self.steps + step
        for logger in self.loggers:
            logger.scalars({name: value for name, value in scalars.items() if math.isfinite(value)}, done)
        self.publish(scalars)
        now = time.monotonic()
        if step == self.steps or now - self.printed > 10:
            self.printed = now
            elapsed = now - self.started
            left = elapsed / (done - self.done) * (self.epochs * self.steps - done)
            bar = "#" * round(20 * done / (self.epochs * self.steps))
            terms = {name.removeprefix("loss/"): v for name, v in scalars.items() if name.startswith("loss/")}
            parts = "  ".join(f"{name} {value:.4f}" for name, value in terms.items() if name != "total")
            print(
                f"[{bar:<20}] epoch {epoch}/{self.epochs} step {step}/{self.steps}  {parts}  "
                f"{scalars['interactions_per_second']:,.0f} interactions/s  at most {duration(left)} left",
                flush=True,
            )

    def evaluation(self, epoch: int, metrics: dict, note: str, extra: dict, norms: dict[str, Histogram]) -> None:
        """One line of metrics.jsonl, the metric curves, and a printed line. Groups of items have curves of recall@20,
        ndcg@20 and what `extra` holds of them; `norms` are distributions of row norms."""
        if not self.active:
            return
        curves = {
            f"valid/{name}": value
            for name, value in flat_metrics(metrics).items()
            if "/" not in name or name.endswith(("/recall@20", "/ndcg@20"))
        }
        for logger in self.loggers:
            logger.scalars(curves | extra, epoch * self.steps)
            logger.histograms(norms, epoch * self.steps)
        self.lines.append(json.dumps({"epoch": epoch, "valid": metrics["overall"], **extra}))
        overall = metrics["overall"]
        decisive = {tag.removeprefix("valid/"): value for tag, value in extra.items() if tag.startswith("valid/")}
        named = {name: overall[name] for name in ("recall@20", "ndcg@5", "ndcg@20")} | decisive
        shown = "  ".join(f"{name} {value:.4f}" for name, value in named.items())
        print(f"epoch {epoch}: valid {shown}  {note}", flush=True)
        self.flush()

    def result(self, result: dict, vectors: np.ndarray, labels: list[str]) -> None:
        """The content of metrics.json, and the embeddings [n, W] of some items with their ids."""
        for logger in self.loggers if self.active else ():
            logger.projector(vectors, labels, result["best_epoch"])
            logger.result(result, result["best_epoch"] * self.steps)

    def flush(self) -> None:
        if not self.active:
            return
        storage.write_bytes(storage.join(self.run, METRICS_LOG), ("\n".join(self.lines) + "\n").encode())
        for logger in self.loggers:
            logger.flush()

    def close(self) -> None:
        if not self.active:
            return
        self.flush()
        for logger in self.loggers:
            logger.close()


def loss_scalars(losses: dict[str, float], weights: dict[str, float], tc_rows: int) -> dict[str, float]:
    """Numbers of the loss terms, with their weighted sum.

    Args:
        weights: of the terms that have one.
        tc_rows: rows of all ranks that the total correlation looked at.
    """
    scalars = {f"loss/{name}": value for name, value in losses.items()}
    scalars["loss/total"] = sum(value * weights.get(name, 1.0) for name, value in losses.items())
    if "tc" in losses:
        scalars["total_correlation/bound_nats"] = math.log(max(tc_rows, 1)) - losses["tc"]
    return scalars


def step_speed(
    steps: int, seen: int, elapsed: float, stopwatches: Iterable[Stopwatch], comms: Iterable[Communicator]
) -> dict[str, float]:
    """Seconds of a step by part, from stopwatches and communicators that are set back; the share of the time that
    waiting for batches took; interactions a second.

    Args:
        steps, seen, elapsed: steps, interactions of all ranks, and seconds since they were set back last.
    """
    seconds = dict.fromkeys(PARTS, 0.0)
    for stopwatch in stopwatches:
        seconds |= stopwatch.take()
    for comm in comms:
        seconds["communication"] += comm.seconds
        comm.seconds = 0.0
    speed = {"waiting_for_data": seconds["data"] / elapsed, "interactions_per_second": seen / elapsed}
    return speed | {f"seconds_per_step/{part}": value / steps for part, value in seconds.items()}
