"""When the training state is saved, and when the ranks leave: one decision of all ranks, taken with the logged
losses."""

import time
from collections.abc import Callable

import torch

from gtc_dist.checkpoint.async_writer import DONE, FAILED
from gtc_dist.training.train_state import TrainState

POLL_SECONDS = 2.0  # between checks of the stop request


class Checkpointer:
    """Saves the training state when it is due or requested. Methods are collectives unless marked Local.

    Args:
        stop_request: called on all ranks together: "leave", "save" or "".
        update_progress: brings `state.progress` up to date before it is saved.
    """

    def __init__(self, state: TrainState, stop_request: Callable[[], str], update_progress: Callable[[], None]):
        self.state, self.stop_request, self.update_progress = state, stop_request, update_progress
        self.comm, self.writer = state.comm, state.writer
        self.polled = time.monotonic()
        self.wanted = False  # a state is to be saved at the next step that allows it
        self.request = ""  # "leave", "save" or "", from the last poll

    @property
    def leaving(self) -> bool:
        """Local. Whether the state was saved in order to leave."""
        return self.request == "leave" and not self.wanted

    def signals(self) -> torch.Tensor:
        """Local. This rank's flags, float32 [4], which are all-reduced with the logged losses: a state is due, poll the
        stop request, this rank's files of the pending state are written, could not be written."""
        first, outcome = self.comm.rank == 0, self.writer.outcome
        due = first and self.writer.due()
        poll = first and time.monotonic() - self.polled >= POLL_SECONDS
        flags = [due, poll, outcome == DONE, outcome == FAILED]
        return torch.tensor(flags, dtype=torch.float32, device=self.comm.device)

    def handle_signals(self, due: float, poll: float, done: float, failed: float) -> None:
        """Act on the all-reduced flags, each the number of ranks that raised it."""
        if failed or done == self.comm.size:
            self._finalize()
        self.wanted |= bool(due)
        if poll:
            self.polled = time.monotonic()
            if self.request != "leave":
                self.request = self.stop_request()
            self.wanted |= self.request != ""

    def save_if_wanted(self, before_validation: bool, wait: bool = False) -> None:
        """Save the state if one is wanted and resuming from it would be bit-exact.

        Historical embeddings are not saved: a state is saved where the next step would refresh them, as after a
        validation. Before a validation none is saved, since resuming would validate again. A request overrides both:
        there may be no time to wait.

        Args:
            wait: with a request, return only when the state is complete.
        """
        history = self.state.history
        exact = not before_validation and (history is None or history.due())
        if self.wanted and (exact or self.request != ""):
            self.save(wait=wait and self.request != "")

    def save(self, wait: bool = False) -> None:
        """Start saving the state, or save it and wait."""
        self._finalize()
        self.update_progress()
        self.state.save()
        self.wanted = False
        if wait:
            self._finalize()
            if self.request != "leave":
                self.request = ""

    def _finalize(self) -> None:
        problem = self.writer.finalize()
        if problem and self.comm.rank == 0:
            print(f"warning: {problem}", flush=True)
