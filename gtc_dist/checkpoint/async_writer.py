"""Asynchronous checkpoints: a thread per rank writes them while training continues.

`start` copies a training state and returns; a thread of each rank writes that rank's files. `finalize`, called by all
ranks once every thread is done, writes the manifest, which makes the checkpoint complete, and prunes older checkpoints.
A training state that cannot be written (disk full, object store unreachable) is dropped with a warning and training
continues: the earlier ones still exist.

The best weights are written in the same way (`start_best`), into folders of their own (`epoch-...`), which training
states (`step-...`) refer to: a state becomes complete after the best weights that it refers to, and these are kept as
long as it is. Best weights that cannot be written end the run.
"""

import threading
import time
from dataclasses import dataclass, field, replace

import torch

from gtc_dist.checkpoint import checkpoint_files
from gtc_dist.checkpoint.checkpoint_files import Shard
from gtc_dist.checkpoint.run_folder import CHECKPOINT_FOLDER, EPOCH_PREFIX, STEP_PREFIX, epoch_name, step_name
from gtc_dist.data import storage
from gtc_dist.distributed.collectives import Communicator
from gtc_dist.errors import InputError

IDLE, BUSY, DONE, FAILED = range(4)


@dataclass
class PendingCheckpoint:
    """A checkpoint that a thread writes: this rank's copies and, when the thread is done, the files or an error."""

    name: str
    head: dict
    shards: list[Shard]
    files: dict[str, dict] = field(default_factory=dict)
    error: Exception | None = None
    thread: threading.Thread | None = None

    @staticmethod
    def start(run: str, name: str, head: dict, dense: dict | None, shards: list[Shard]) -> "PendingCheckpoint":
        """Copy the tensors and start writing them; `dense` None: of another rank."""
        copies = [replace(shard, tensor=shard.tensor.detach().to("cpu", copy=True)) for shard in shards]
        dense, pending = _copied(dense), PendingCheckpoint(name, head, copies)
        uri = storage.join(run, CHECKPOINT_FOLDER, name)

        def write() -> None:
            try:
                pending.files = checkpoint_files.write_files(uri, dense, copies)
            except Exception as error:
                pending.error = error

        pending.thread = threading.Thread(target=write, name="checkpoint", daemon=True)
        pending.thread.start()
        return pending

    def finish(self, run: str, comm: Communicator) -> str:
        """Wait for the threads and complete the checkpoint; returns what failed, the same on every rank, or "".
        Collective."""
        self.thread.join()
        own = "" if self.error is None else str(self.error) or type(self.error).__name__
        errors = [text for text in comm.all_gather_json(own) if text]
        if not errors:
            try:
                uri = storage.join(run, CHECKPOINT_FOLDER, self.name)
                checkpoint_files.commit(uri, self.head, self.shards, self.files, comm)
            except OSError as error:
                errors = [str(error)]
        return errors[0] if errors else ""


class AsyncCheckpointWriter:
    """One rank's part of writing checkpoints. Methods are local; `start_best`, `finalize_best` and `finalize` are
    collectives.

    Args:
        seconds: interval between checkpoints.
        keep: number of complete training states to retain.
    """

    def __init__(self, run: str, comm: Communicator, seconds: float, keep: int):
        self.run, self.comm, self.seconds, self.keep = run, comm, seconds, keep
        self.since = time.monotonic()
        self.states: dict[str, int] = {}  # complete states, oldest first -> best epoch recorded in each
        self.pending: PendingCheckpoint | None = None  # training state
        self.pending_best: PendingCheckpoint | None = None
        self.complete_best: int | None = None  # epoch of the newest complete best weights

    def due(self) -> bool:
        """Whether the interval has passed by this rank's clock and no thread is writing."""
        is_free = self.pending is None and self.outcome != BUSY
        return is_free and time.monotonic() - self.since >= self.seconds

    @property
    def outcome(self) -> int:
        """IDLE, BUSY, DONE or FAILED: progress of this rank's pending checkpoints."""
        pending = [each for each in (self.pending_best, self.pending) if each is not None]
        if any(each.error is not None for each in pending):
            return FAILED
        if any(each.thread.is_alive() for each in pending):
            return BUSY
        return DONE if pending else IDLE

    def start(self, step: int, head: dict, dense: dict, shards: list[Shard]) -> None:
        """Copy the state after `step` steps and start writing it. Every rank calls it; no rank waits for another.

        Args:
            head: entries of the manifest; the best checkpoint named by its `best_epoch` is kept as long as the state.
            dense: tensors and plain values, copied; only rank 0's are written.
        """
        own = dense if self.comm.rank == 0 else None
        self.pending = PendingCheckpoint.start(self.run, step_name(step), head, own, shards)

    def start_best(self, epoch: int, head: dict, dense: dict, shards: list[Shard]) -> None:
        """Copy the weights of the best epoch so far and start writing them, after earlier ones are complete.
        Collective.

        Args:
            head, dense: as in `start`.

        Raises:
            OSError: on every rank, if the earlier ones could not be written.
        """
        self.finalize_best()
        own = dense if self.comm.rank == 0 else None
        self.pending_best = PendingCheckpoint.start(self.run, epoch_name(epoch), {**head, "epoch": epoch}, own, shards)

    def finalize_best(self) -> None:
        """Wait for the pending best weights and complete them; older ones are then pruned. Collective.

        Raises:
            OSError: on every rank, if one of them could not write its part.
        """
        best, self.pending_best = self.pending_best, None
        if best is None:
            return
        if problem := best.finish(self.run, self.comm):
            self._remove(best.name)
            raise OSError(f"the weights of the best epoch could not be written ({best.name}): {problem}")
        self.prune(best.head["epoch"])

    def finalize(self) -> str:
        """Wait for the pending checkpoints and complete them; a state is removed if any rank failed to write it.
        Collective.

        Returns a warning, the same on every rank, or "".

        Raises:
            OSError: on every rank, if the best weights could not be written.
        """
        self.finalize_best()
        state, self.pending = self.pending, None
        if state is None:
            return ""
        problem = state.finish(self.run, self.comm)
        self.since = time.monotonic()
        if problem:
            self._remove(state.name)
            return f"checkpoint {state.name} could not be written and is skipped: {problem}"
        self.states[state.name] = state.head["best_epoch"]
        self.prune(self.complete_best)
        return ""

    def prune(self, best_epoch: int | None) -> None:
        """Remove all but the newest `keep` states, and the best weights that no retained state refers to.

        Args:
            best_epoch: of the newest complete best weights, which stay.
        """
        self.complete_best = best_epoch
        for name in list(self.states)[: -self.keep]:
            self.states.pop(name)
            self._remove(name)
        referred = {best_epoch, *self.states.values()} | ({self.pending.head["best_epoch"]} if self.pending else set())
        kept = {epoch_name(epoch) for epoch in referred if epoch is not None}
        kept |= {self.pending_best.name} if self.pending_best else set()
        if self.comm.rank == 0:
            try:
                complete, incomplete = checkpoint_files.list_checkpoints(self.run, EPOCH_PREFIX)
            except (OSError, InputError) as error:  # the next prune removes them
                print(f"warning: older checkpoints could not be listed: {error}", flush=True)
                return
            for name in set(complete + incomplete) - kept:
                self._remove(name)

    def remove_after(self, step: int) -> None:
        """Remove states beyond `step`, from which training resumes, and incomplete ones. Only rank 0 calls it."""
        complete, incomplete = checkpoint_files.list_checkpoints(self.run, STEP_PREFIX)
        for name in incomplete + [name for name in complete if name > step_name(step)]:
            self._remove(name)

    def _remove(self, name: str) -> None:
        if self.comm.rank:
            return
        try:
            checkpoint_files.remove(self.run, name)
        except (OSError, InputError) as error:  # it is incomplete now; the next resume tries again
            print(f"warning: {name} could not be removed: {error}", flush=True)


def _copied(value):
    """Copy tensors to the CPU, in nested dictionaries and lists."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _copied(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_copied(entry) for entry in value]
    return value
