"""Asynchronous checkpoints of the training state: a thread per rank writes them while training continues.

`start` copies the state and returns; a thread of each rank writes that rank's files. `finalize`, called by all ranks
once every thread is done, writes the manifest, which makes the checkpoint complete, and prunes older checkpoints. A
checkpoint that cannot be written (disk full, object store unreachable) is dropped with a warning and training
continues: the earlier ones still exist.

Best checkpoints have folders of their own (`epoch-...`), which training states (`step-...`) refer to. A best
checkpoint is kept while any retained training state refers to it.
"""

import threading
import time
from dataclasses import replace

import torch

from gtc_dist.checkpoint import checkpoint_files
from gtc_dist.checkpoint.checkpoint_files import Shard
from gtc_dist.checkpoint.run_folder import CHECKPOINT_FOLDER, EPOCH_PREFIX, STEP_PREFIX, epoch_name, step_name
from gtc_dist.data import storage
from gtc_dist.distributed.collectives import Communicator
from gtc_dist.errors import InputError

IDLE, BUSY, DONE, FAILED = range(4)


class AsyncCheckpointWriter:
    """One rank's part of writing training states. Methods are local; only `finalize` is a collective.

    Args:
        seconds: interval between checkpoints.
        keep: number of complete training states to retain.
    """

    def __init__(self, run: str, comm: Communicator, seconds: float, keep: int):
        self.run, self.comm, self.seconds, self.keep = run, comm, seconds, keep
        self.since = time.monotonic()
        self.states: dict[str, int] = {}  # complete states, oldest first -> best epoch recorded in each
        self.thread: threading.Thread | None = None
        self.pending: tuple[str, dict, list[Shard]] | None = None
        self.files: dict[str, dict] = {}
        self.error: Exception | None = None

    def due(self) -> bool:
        """Whether the interval has passed by this rank's clock and no checkpoint is pending."""
        return self.pending is None and time.monotonic() - self.since >= self.seconds

    @property
    def outcome(self) -> int:
        """IDLE, BUSY, DONE or FAILED: progress of this rank's pending checkpoint."""
        if self.pending is None:
            return IDLE
        if self.thread.is_alive():
            return BUSY
        return DONE if self.error is None else FAILED

    def start(self, step: int, head: dict, dense: dict, shards: list[Shard]) -> None:
        """Copy the state after `step` steps and start writing it. Every rank calls it; no rank waits for another.

        Args:
            head: entries of the manifest; the best checkpoint named by its `best_epoch` is kept as long as the state.
            dense: tensors and plain values, copied; only rank 0's are written.
        """
        copies = [replace(shard, tensor=shard.tensor.detach().to("cpu", copy=True)) for shard in shards]
        dense = _copied(dense) if self.comm.rank == 0 else None
        self.pending, self.error, self.files = (step_name(step), head, copies), None, {}
        uri = storage.join(self.run, CHECKPOINT_FOLDER, step_name(step))

        def write() -> None:
            try:
                self.files = checkpoint_files.write_files(uri, dense, copies)
            except Exception as error:
                self.error = error

        self.thread = threading.Thread(target=write, name="checkpoint", daemon=True)
        self.thread.start()

    def finalize(self, best_epoch: int) -> str:
        """Wait for the pending checkpoint and complete it, or remove it if any rank failed to write. Collective.

        Returns a warning, the same on every rank, or "".

        Args:
            best_epoch: current best epoch.
        """
        if self.pending is None:
            return ""
        self.thread.join()
        name, head, shards = self.pending
        errors = [text for text in self.comm.all_gather_json(str(self.error or "")) if text]
        if not errors:
            try:
                uri = storage.join(self.run, CHECKPOINT_FOLDER, name)
                checkpoint_files.commit(uri, head, shards, self.files, self.comm)
                self.states[name] = head["best_epoch"]
            except OSError as error:
                errors = [str(error)]
        self.pending, self.thread, self.since = None, None, time.monotonic()
        if errors:
            self._remove(name)
            return f"checkpoint {name} could not be written and is skipped: {errors[0]}"
        self.prune(best_epoch)
        return ""

    def prune(self, best_epoch: int) -> None:
        """Remove all but the newest `keep` states, and best checkpoints that no retained state refers to."""
        for name in list(self.states)[: -self.keep]:
            self.states.pop(name)
            self._remove(name)
        referred = {best_epoch, *self.states.values()} | ({self.pending[1]["best_epoch"]} if self.pending else set())
        if self.comm.rank == 0:
            try:
                complete, incomplete = checkpoint_files.list_checkpoints(self.run, EPOCH_PREFIX)
            except (OSError, InputError) as error:  # the next prune removes them
                print(f"warning: older checkpoints could not be listed: {error}", flush=True)
                return
            for name in set(complete + incomplete) - {epoch_name(epoch) for epoch in referred}:
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
