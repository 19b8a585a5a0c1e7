"""Logs of a run: progress lines, metrics.jsonl and TensorBoard.

Only rank 0 writes. TensorBoard's event files go straight into a local run folder; for a run in object storage they are
written to a temporary folder and uploaded at every `flush`.
"""

import json
import os
import tempfile
import time

import numpy as np

from gtc_dist.checkpoint.run_folder import METRICS_LOG, TENSORBOARD_FOLDER
from gtc_dist.data import storage
from gtc_dist.evaluation.metrics import flat_metrics
from gtc_dist.progress import duration


class RunLog:
    """Writes a run's logs; on ranks other than 0 every method does nothing. Methods are local.

    Args:
        run: URI of the run folder.
        epochs, steps: for the progress line.
        lines: lines of metrics.jsonl so far, of a resumed run.
        done: steps so far; TensorBoard points beyond them, of steps that are repeated, are purged.
    """

    def __init__(
        self, run: str, epochs: int, steps: int, active: bool = True, lines: list[str] | None = None, done: int = 0
    ):
        self.run, self.epochs, self.steps, self.active = run, epochs, steps, active
        self.lines, self.done = list(lines or []), done
        self.started = self.printed = time.monotonic()
        self._temporary = None
        if not active:
            return
        from torch.utils.tensorboard import SummaryWriter  # slow to import, and only rank 0 needs it

        folder = storage.absolute(storage.join(run, TENSORBOARD_FOLDER))
        if not storage.is_local(run):
            self._temporary = tempfile.TemporaryDirectory(prefix="gtc-tensorboard-")
            folder = self._temporary.name
        self.folder = folder
        self.writer = SummaryWriter(folder, purge_step=done + 1 if done else None)

    def step(self, epoch: int, step: int, scalars: dict[str, float], rate: float) -> None:
        """A point on every curve, and a progress line every ten seconds and at the end of an epoch.

        Args:
            scalars: TensorBoard tag -> value; rate: interactions a second over all ranks.
        """
        if not self.active:
            return
        done = (epoch - 1) * self.steps + step
        for tag, value in scalars.items():
            self.writer.add_scalar(tag, value, done)
        now = time.monotonic()
        if step == self.steps or now - self.printed > 10:
            self.printed = now
            elapsed = now - self.started
            left = elapsed / (done - self.done) * (self.epochs * self.steps - done)
            bar = "#" * round(20 * done / (self.epochs * self.steps))
            parts = "  ".join(f"{t.removeprefix('loss/')} {v:.4f}" for t, v in scalars.items() if t.startswith("loss/"))
            print(
                f"[{bar:<20}] epoch {epoch}/{self.epochs} step {step}/{self.steps}  {parts}  "
                f"{rate:,.0f} interactions/s  at most {duration(left)} left",
                flush=True,
            )

    def evaluation(self, epoch: int, metrics: dict, note: str, extra: dict) -> None:
        """One line of metrics.jsonl, the metric curves, and a printed line. Groups of items have curves of recall@20,
        ndcg@20 and what `extra` holds of them."""
        if not self.active:
            return
        curves = {
            f"valid/{name}": value
            for name, value in flat_metrics(metrics).items()
            if "/" not in name or name.endswith(("/recall@20", "/ndcg@20"))
        }
        for tag, value in (curves | extra).items():
            self.writer.add_scalar(tag, value, epoch * self.steps)
        self.lines.append(json.dumps({"epoch": epoch, "valid": metrics["overall"], **extra}))
        overall = metrics["overall"]
        decisive = {tag.removeprefix("valid/"): value for tag, value in extra.items() if tag.startswith("valid/")}
        named = {name: overall[name] for name in ("recall@20", "ndcg@5", "ndcg@20")} | decisive
        shown = "  ".join(f"{name} {value:.4f}" for name, value in named.items())
        print(f"epoch {epoch}: valid {shown}  {note}", flush=True)
        self.flush()

    def projector(self, vectors: np.ndarray, labels: list[str], step: int) -> None:
        """Item embeddings [n, W] for TensorBoard's projector."""
        if self.active:
            self.writer.add_embedding(vectors, metadata=labels, global_step=step, tag="items")

    def flush(self) -> None:
        if not self.active:
            return
        self.writer.flush()
        storage.write_bytes(storage.join(self.run, METRICS_LOG), ("\n".join(self.lines) + "\n").encode())
        if self._temporary is not None:
            for root, _, names in os.walk(self.folder):
                for name in names:
                    path = os.path.join(root, name)
                    relative = os.path.relpath(path, self.folder).replace(os.sep, "/")
                    storage.copy_file(path, storage.join(self.run, TENSORBOARD_FOLDER, relative))

    def close(self) -> None:
        if not self.active:
            return
        self.flush()
        self.writer.close()
        if self._temporary is not None:
            self._temporary.cleanup()
