"""Checkpoints of the state of training, written by a thread while training goes on.

`start` copies what is to be saved and returns; a thread of each rank writes the rank's files. `settle`, called by all
ranks when all are done, writes the manifest, which makes the checkpoint whole, and removes what is older than the last
few. A checkpoint that cannot be written (a full disk, an object store that is gone) is left out with a warning, and
training goes on: the ones before it are still there.

The best weights so far have folders of their own (`epoch-...`), which the states refer to: they are kept as long as a
state that knows no better is.
"""

import threading
import time
from dataclasses import replace

import torch

from gtc_dist.checkpoint import checkpoint_files
from gtc_dist.checkpoint.checkpoint_files import FOLDER, Shard
from gtc_dist.data import storage
from gtc_dist.distributed.collectives import Communicator
from gtc_dist.errors import InputError

IDLE, BUSY, DONE, FAILED = range(4)


def state_name(step: int) -> str:
    return f"step-{step:012d}"


def epoch_name(epoch: int) -> str:
    return f"epoch-{epoch:05d}"


class AsyncCheckpointWriter:
    """One rank's part.

    Args:
        seconds: from one checkpoint to the next.
        keep: whole states that are kept.
    """

    def __init__(self, run: str, comm: Communicator, seconds: float, keep: int):
        self.run, self.comm, self.seconds, self.keep = run, comm, seconds, keep
        self.since = time.monotonic()
        self.states: dict[str, int] = {}  # whole ones, oldest first -> the best epoch that they know
        self.thread: threading.Thread | None = None
        self.pending: tuple[str, dict, list[Shard]] | None = None
        self.files: dict[str, dict] = {}
        self.error: Exception | None = None

    def due(self) -> bool:
        """Whether it is time, by this rank's clock."""
        return self.pending is None and time.monotonic() - self.since >= self.seconds

    @property
    def outcome(self) -> int:
        """IDLE, BUSY, DONE or FAILED: where the pending checkpoint of this rank is."""
        if self.pending is None:
            return IDLE
        if self.thread.is_alive():
            return BUSY
        return DONE if self.error is None else FAILED

    def start(self, step: int, head: dict, dense: dict, shards: list[Shard]) -> None:
        """Copy the state after `step` steps and begin to write it. Every rank calls it, none waits for another.

        Args:
            head: for the manifest; `best_epoch` in it is kept as long as the state is.
            dense: of rank 0; copied here.
        """
        copies = [replace(shard, tensor=shard.tensor.detach().to("cpu", copy=True)) for shard in shards]
        dense = _copied(dense) if self.comm.rank == 0 else None
        self.pending, self.error, self.files = (state_name(step), head, copies), None, {}
        uri = storage.join(self.run, FOLDER, state_name(step))

        def write() -> None:
            try:
                self.files = checkpoint_files.write_files(uri, dense, copies)
            except Exception as error:
                self.error = error

        self.thread = threading.Thread(target=write, name="checkpoint", daemon=True)
        self.thread.start()

    def settle(self, best_epoch: int) -> str:
        """End the pending checkpoint, waiting for its files: whole, or removed where a rank could not write. Returns
        what to say of it, on every rank alike; empty if all is well. A collective.

        Args:
            best_epoch: the best one now.
        """
        if self.pending is None:
            return ""
        self.thread.join()
        name, head, shards = self.pending
        errors = [text for text in self.comm.all_gather_json(str(self.error or "")) if text]
        if not errors:
            try:
                checkpoint_files.commit(storage.join(self.run, FOLDER, name), head, shards, self.files, self.comm)
                self.states[name] = head["best_epoch"]
            except OSError as error:
                errors = [str(error)]
        self.pending, self.thread, self.since = None, None, time.monotonic()
        if errors:
            self._remove(name)
            return f"checkpoint {name} could not be written and is left out: {errors[0]}"
        self.prune(best_epoch)
        return ""

    def prune(self, best_epoch: int) -> None:
        """Remove older states, and weights that no state and no one else refers to."""
        for name in list(self.states)[: -self.keep]:
            self.states.pop(name)
            self._remove(name)
        referred = {best_epoch, *self.states.values()} | ({self.pending[1]["best_epoch"]} if self.pending else set())
        if self.comm.rank == 0:
            try:
                whole, torn = checkpoint_files.list_checkpoints(self.run, "epoch-")
            except (OSError, InputError) as error:  # the next one removes them
                print(f"warning: older checkpoints could not be listed: {error}", flush=True)
                return
            for name in set(whole + torn) - {epoch_name(epoch) for epoch in referred}:
                self._remove(name)

    def forget(self, step: int) -> None:
        """Remove states beyond `step`, and unfinished ones: training goes on from there. Rank 0 alone does it."""
        whole, torn = checkpoint_files.list_checkpoints(self.run, "step-")
        for name in torn + [name for name in whole if name > state_name(step)]:
            self._remove(name)

    def _remove(self, name: str) -> None:
        if self.comm.rank:
            return
        try:
            checkpoint_files.remove(self.run, name)
        except (OSError, InputError) as error:  # what is left is no checkpoint, and tried again when training goes on
            print(f"warning: {name} could not be removed: {error}", flush=True)


def _copied(value):
    """Tensors copied to the CPU, in whatever they are in."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _copied(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_copied(one) for one in value]
    return value
