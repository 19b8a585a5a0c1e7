"""Training of one rank of a final fit: nothing is validated, and the weights of the last epoch are kept."""

from contextlib import nullcontext

from gtc_dist.checkpoint import checkpoint_files
from gtc_dist.checkpoint.run_folder import METRICS_FILE
from gtc_dist.data import storage
from gtc_dist.final_fit.selection import find_selection
from gtc_dist.training.trainer import Trainer


class FinalTrainer(Trainer):
    """A `Trainer` whose number of epochs and weights of the scorers come from the run `train.final_fit`. Methods are
    collectives unless marked Local."""

    def start(self) -> None:
        """Take the weights of the scorers, and keep the initial weights: a state refers to a best checkpoint."""
        selection = find_selection(self.config.train.final_fit, verify="none")
        self._print(f"fitting train and valid for {selection.epoch} epochs, as selected by {selection.uri}")
        self.state.scorer.load(checkpoint_files.load(storage.join(selection.uri, selection.checkpoint), []))
        self.start_from_earlier_run()
        self.state.save_best(0, {})

    def _validates(self, epoch: int) -> bool:
        """Local."""
        return False

    def _finish(self, last: int) -> dict:
        """Keep the weights of the last epoch, and write metrics.json with the metrics of the selection."""
        selection, at = find_selection(self.config.train.final_fit, verify="none"), self.state.progress
        with nullcontext() if self.average is None else self.average.in_place():
            self.state.save_best(last, {})
        at.best_epoch = last
        self.writer.finalize_best()
        selected = storage.read_json(storage.join(selection.uri, METRICS_FILE))
        self._update_progress()
        final_fit = {"selection": selection.uri, "checkpoint": selection.checkpoint}
        result = selected | at.record(last, self.comm.size) | {"final_fit": final_fit}
        if self.comm.rank == 0:
            storage.write_json(storage.join(self.run, METRICS_FILE), result)
        self.log.close()
        self.comm.barrier()
        return result
