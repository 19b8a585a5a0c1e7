"""Training of one rank: epochs, steps, early stopping, the final test.

An interaction becomes a gradient here: `train_step` looks up the rows of a batch, runs forward and backward, and
applies the optimizers. Nothing here knows of Ray: a rank is a `Communicator`, and `report` is called on every rank
after each validation (with Ray Train it is a barrier, so all ranks call it equally often).

A run that was interrupted resumes from its newest training state. All randomness of a step comes from (seed, pass,
step, rank), and a state is saved only where it is complete, so that on the same number of ranks the weights are
bit-identical to those of an uninterrupted run. The exception is a state saved on request with historical embeddings.
"""

import math
import time
from collections.abc import Callable
from contextlib import closing, nullcontext

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel

from gtc_dist.checkpoint.async_writer import AsyncCheckpointWriter
from gtc_dist.checkpoint.run_folder import METRICS_FILE
from gtc_dist.config import Config
from gtc_dist.data import storage
from gtc_dist.data.catalog import Catalog
from gtc_dist.distributed.collectives import Communicator
from gtc_dist.distributed.sharded_table import ShardedTable
from gtc_dist.distributed.stopwatch import Stopwatch
from gtc_dist.errors import InputError
from gtc_dist.evaluation.metrics import metric_value
from gtc_dist.graph.csc import Graphs
from gtc_dist.hybrid.scorer import HybridScorer
from gtc_dist.inference.masked_content import fit_projection, masked_content
from gtc_dist.model.batch import Batch
from gtc_dist.model.build import build_network, compile_step, load_features, with_communicator
from gtc_dist.tracking.machine import MachineMonitor, over_ranks
from gtc_dist.tracking.metric_logger import RunDescription
from gtc_dist.training.checkpointing import Checkpointer
from gtc_dist.training.control_variate import HistoricalEmbeddings
from gtc_dist.training.data_loader import build_loader
from gtc_dist.training.gradient_guard import GradientGuard, Rows
from gtc_dist.training.run_log import RunLog, loss_scalars, step_speed
from gtc_dist.training.train_state import LossMeter, TrainProgress, TrainState
from gtc_dist.training.validation import Validator
from gtc_dist.training.weight_averaging import WeightAverage
from gtc_dist.warm_start.carry_over import initial_weights

ANNOUNCED_SECONDS = 5.0  # a validation is announced if the one before took longer
KEEP_STATES = 2  # complete training states that are retained beside the best checkpoint


class Trainer:
    """One rank of a run. Methods are collectives unless marked Local.

    Args:
        run: URI of the run folder.
        users, items: int32 [n], this rank's train interactions in any order.
        graphs: shared by the ranks of the node.
        comm: all ranks. Its process group must not be the default one, which DDP uses.
        report: called on every rank with each validation's metrics.
        stop_request: called on all ranks together, at most every few seconds and only where losses are logged: "leave"
            to save the state and return from `fit`, "save" to save it now, "" to continue.
        publish: called on rank 0 with the numbers of each point of the logs.
    """

    def __init__(
        self,
        config: Config,
        catalog: Catalog,
        run: str,
        users: np.ndarray,
        items: np.ndarray,
        graphs: Graphs,
        comm: Communicator,
        report: Callable[[dict], None] = lambda metrics: None,
        stop_request: Callable[[], str] = lambda: "",
        publish: Callable[[dict[str, float]], None] = lambda scalars: None,
    ):
        self.config, self.run, self.comm, self.report, self.publish = config, run, comm, report, publish
        self.network, self.tables = build_network(config, catalog, comm)
        self.loader_comm = comm.new_group(torch.device("cpu"))
        features = load_features(self.network.modalities, catalog, self.loader_comm)
        self.features, self.graphs = with_communicator(features, comm), graphs
        if self.network.masked is not None:
            fit_projection(self.network.masked, self.features)
        content, of_loader = self._content()
        self.loader = build_loader(config, self.network, users, items, graphs, features, of_loader, self.loader_comm)
        expected = sum(catalog.manifest.interactions[split] for split in config.train_splits)
        if (found := sum(self.loader.interactions_per_rank)) != expected:
            raise InputError(
                f"the ranks read {found} train interactions, the manifest of {catalog.uri} says {expected}; "
                "check its files with data.verify=checksum, or run prepare --force"
            )
        self.history = None
        if config.has_historical_embeddings:
            every = max(1, self.loader.pass_steps // config.train.refresh)
            self.history = HistoricalEmbeddings(
                self.network, self.tables, self.features, graphs, every=every, chunk=config.eval.block_rows
            )
        scorer = HybridScorer.build(config, graphs, self.features, comm)
        decay = config.train.ema_decay
        self.average = WeightAverage(self.network, self.tables, decay) if decay else None
        if config.train.compile:
            compile_step(self.network)
        self.ddp_network = self.network
        if comm.size > 1:
            devices = [comm.device] if comm.device.type == "cuda" else None
            self.ddp_network = DistributedDataParallel(self.network, device_ids=devices, forward_sync_buffers=False)
        self.optimizer = torch.optim.Adam(self.network.parameter_groups(), lr=config.train.lr, fused=True)
        self.validator = Validator(
            config, catalog, graphs, self.network, self.tables, self.features, content, scorer, self.history
        )
        self.stopwatch = Stopwatch()
        self.writer = AsyncCheckpointWriter(run, comm, 60 * config.train.checkpoint_minutes, KEEP_STATES)
        trained = (self.network, self.tables, self.optimizer, self.average, scorer, self.history)
        progress = TrainProgress(self.loader.steps)
        self.state = TrainState(run, catalog.manifest.fingerprint, comm, *trained, self.writer, progress)
        self.checkpointer = Checkpointer(self.state, stop_request, self._update_progress)
        self.guard = GradientGuard(config.train, self.network, self.tables.all(), comm, run)
        self.machine = MachineMonitor(comm.device)

    # --- the run ----------------------------------------------------------------------------------------------------

    def fit(self) -> dict | None:
        """Train to the last epoch or to an early stop, from the newest training state if there is one.

        Returns:
            The content of metrics.json, or None after a request to leave.
        """
        config, started = self.config, time.monotonic()
        resumed = self.resume()
        self.state.clean(resumed)
        progress = self.state.progress
        if resumed:
            self._print(f"resuming at epoch {progress.epoch}, step {progress.step} of {self.loader.steps}")
        self.started, self.guard.skipped = started - progress.seconds, progress.skipped
        manifest, steps = self.validator.catalog.manifest, self.loader.steps
        description = RunDescription(self.run, config, manifest, steps, progress.steps)
        self.log = RunLog.open(description, self.comm.rank == 0, progress.lines, self.publish)
        self.validation_seconds = math.inf  # of the last validation; a long one is announced
        if not resumed:
            self.start()
            progress.epoch, progress.step = 1, 0
        while progress.epoch <= config.train.epochs and progress.waited < config.eval.patience:
            self.checkpointer.save_if_wanted(before_validation=False)
            epoch_start = time.monotonic()
            self.train_epoch(progress.epoch, progress.step)
            if self.checkpointer.leaving:
                return self._leave()
            if self.average is not None:
                self.average.update()
            progress.trained += time.monotonic() - epoch_start
            if self._validates(progress.epoch):
                progress.waited = 0 if self._validate(progress.epoch) else progress.waited + 1
            progress.epoch, progress.step = progress.epoch + 1, 0
        last = progress.epoch - 1
        if progress.waited >= config.eval.patience:
            self._print(f"no better {config.eval.metric} in {progress.waited} validations: stopping at epoch {last}")
        self.checkpointer.save(wait=True)
        return self._finish(last)

    def resume(self) -> TrainProgress | None:
        """Load the newest training state; None if there is none."""
        found = self.state.resume()
        if found:
            self.use_content()
        return found

    def start(self) -> None:
        """Before the first epoch: fit and validate the scorers with the initial weights."""
        self.start_from_earlier_run()
        if self.validator.scorer.has_untrained:
            self._print("fitting the untrained scorers to the valid split")
        self.validator.scorer.tune_untrained(self.validator.shortlist)
        self._validate(0)

    def start_from_earlier_run(self) -> None:
        """Take the weights of `train.init_from`, if it is set."""
        at, catalog = self.state.progress, self.validator.catalog
        at.init_from = initial_weights(self.config, catalog, self.graphs, self.network, self.tables)
        if at.init_from:
            self.use_content()

    def use_content(self) -> None:
        """Make the masked diffusion's content again, with the projection that was loaded into the network."""
        self.validator.content, of_loader = self._content()
        if of_loader is not None:
            self.loader.masks.use_content(of_loader)

    def _content(self) -> tuple[ShardedTable | None, ShardedTable | None]:
        """Content of the masked diffusion, for this thread and for the loader's; None without one."""
        content = masked_content(self.network.masked, self.features, self.graphs, self.config.eval.block_rows)
        if content is None:
            return None, None
        return content, with_communicator({"content": content}, self.loader_comm)["content"]

    def train_epoch(self, epoch: int, done: int = 0) -> None:
        """The steps of an epoch after the first `done`. Returns early after a request to leave."""
        self.network.train()
        self.state.meter.since = time.perf_counter()
        self.stopwatch.part("data")
        with closing(self.loader.epoch(epoch, done)) as batches:
            for step, batch in enumerate(batches, start=done + 1):
                terms = self.train_step(batch)
                self.state.meter.add(terms, sum(batch.counts))
                self.state.progress.step = step
                if self._logs(step):
                    self._log_and_poll(epoch, step, batch)
                    self.state.meter = LossMeter()
                if self.checkpointer.wanted:
                    self.guard.settle()
                    self.stopwatch.part(None)
                    before_validation = step == self.loader.steps and self._validates(epoch)
                    self.checkpointer.save_if_wanted(before_validation, wait=True)
                    if self.checkpointer.leaving:
                        return
                self.stopwatch.part("data")
        self.stopwatch.part(None)

    # --- one step ---------------------------------------------------------------------------------------------------

    def train_step(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Look-up, forward, backward and optimizers on one batch; returns this rank's share of the loss terms."""
        rows = self.look_up(batch)
        terms = self.forward_backward(batch, rows)
        self.stopwatch.part("optimizer")
        at = self.state.progress
        place, logs = f"epoch {at.epoch}, step {at.step + 1}", self._logs(at.step + 1)
        not_finite = self.guard.check(terms, batch, rows, place, measure=logs)
        if not_finite is not None:
            self.optimizer.found_inf = not_finite.float()  # the fused optimizer then changes nothing
            self.optimizer.step()
            self.network.clamp_parameters()
            for table in self.tables.all():
                table.adam_step(self.config.train.table_lr, not_finite)
        else:
            terms = {name: torch.nan_to_num(value, 0, 0, 0) for name, value in terms.items()}
        self.stopwatch.part(None)
        return terms

    def look_up(self, batch: Batch) -> Rows:
        """Rows of the tables that a batch needs, in their order."""
        self.stopwatch.part("lookup")
        graph = batch.subgraph
        rows = self.tables.user.lookup(graph.user_lookup), self.tables.item.lookup(graph.item_lookup)
        return rows if batch.masked is None else (*rows, self.tables.masked_item.lookup(batch.masked.item_lookup))

    def forward_backward(self, batch: Batch, rows: Rows) -> dict[str, torch.Tensor]:
        """Forward and backward on one batch; returns this rank's share of the loss terms."""
        self.stopwatch.part("history")
        history = None if self.history is None else self.history.rows(batch.subgraph)
        self.stopwatch.part("forward")
        with torch.autocast(self.comm.device.type, torch.bfloat16, enabled=self.config.train.precision == "bf16"):
            loss, terms = self.ddp_network(batch, *rows, history=history)
        self.stopwatch.part("backward")
        self.optimizer.zero_grad(set_to_none=True)
        with self.comm.tracked():  # waits for other ranks: DDP averages gradients, look-ups send rows back to owners
            loss.backward()
        self.stopwatch.part(None)
        return terms

    # --- validation, logs and the end -------------------------------------------------------------------------------

    def _logs(self, step: int) -> bool:
        """Local. Whether a step of an epoch ends with a point in the logs."""
        return step % self.config.train.log_every == 0 or step == self.loader.steps

    def _validates(self, epoch: int) -> bool:
        """Local. Whether an epoch ends with a validation."""
        return epoch % self.config.eval.every == 0 or epoch == self.config.train.epochs

    def _validate(self, epoch: int) -> bool:
        """Validate the averaged weights, if there are any, and save them if they are the best so far. Every rank takes
        the same decision."""
        at, metric, started = self.state.progress, self.config.eval.metric, time.monotonic()
        if self.validation_seconds > ANNOUNCED_SECONDS:
            self._print(f"epoch {epoch}: ranking the valid split")
        with nullcontext() if self.average is None else self.average.in_place():
            metrics, diagnostics = self.validator.validate(epoch, at.best)
            value = metric_value(metrics, metric)
            better = value > at.best
            if better:
                self.state.save_best(epoch, metrics["overall"])
                at.best, at.best_epoch = value, epoch
            note = f"best so far ({metric})" if better else f"best was epoch {at.best_epoch}"
            self.log.evaluation(epoch, metrics, note, diagnostics, self.validator.row_norms())
            with self.comm.tracked():
                self.report({"epoch": epoch, "best": at.best, **metrics["overall"]})
        self.validation_seconds = time.monotonic() - started
        return better

    def _log_and_poll(self, epoch: int, step: int, batch: Batch) -> None:
        """Log the losses since the last point, and act on what the ranks signal with them (checkpointing.py)."""
        self.guard.settle()
        meter, config = self.state.meter, self.config.train
        elapsed = time.perf_counter() - meter.since
        means = torch.stack(list(meter.sums.values())) / meter.steps
        own = [means, self.guard.norm_share[None], self.machine.readings(self.comm), self.checkpointer.signals()]
        together = self.comm.all_reduce(torch.cat(own)).cpu()
        means, square, machine, signals = together.split([len(each) for each in own])
        self.checkpointer.handle_signals(*signals.tolist())
        losses = dict(zip(meter.sums, means.tolist(), strict=True))
        scalars = loss_scalars(losses, self.network.term_weights, sum(batch.tc_counts))
        stopwatches = self.stopwatch, self.loader.subgraph_builder.stopwatch
        scalars |= step_speed(meter.steps, meter.seen, elapsed, stopwatches, (self.comm, self.loader_comm))
        scalars |= over_ranks(machine) | {"gradient_norm": square.sqrt().item()}
        if self.guard.skip:
            scalars["skipped_steps"] = float(self.guard.skipped)
        self.log.step(epoch, step, scalars | {"lr/dense": config.lr, "lr/tables": config.table_lr})

    def _update_progress(self) -> None:
        """Local. Copy into the progress what a training state keeps of the log, the clock and the guard."""
        at = self.state.progress
        at.lines, at.seconds, at.skipped = self.log.lines, time.monotonic() - self.started, self.guard.skipped

    def _leave(self) -> None:
        """Return without a result after the state was saved."""
        at = self.state.progress
        self._print(f"stopped at epoch {at.epoch}, step {at.step}, state saved; rerun the same command to resume")
        self.log.close()
        self.comm.barrier()

    def _finish(self, last: int) -> dict:
        """Score the best checkpoint on valid and test, once, and write metrics.json."""
        at = self.state.progress
        self._print(f"ranking valid and test with epoch {at.best_epoch}")
        self.state.load_best()
        scores, items = self.validator.final_metrics()
        self._update_progress()
        result = at.record(last, self.comm.size) | scores
        if self.comm.rank == 0:
            self.log.result(result, *self.validator.projector_points(items))
            storage.write_json(storage.join(self.run, METRICS_FILE), result)
        self.log.close()
        self.comm.barrier()
        return result

    def _print(self, text: str) -> None:
        """Local. Print on rank 0."""
        if self.comm.rank == 0:
            print(text, flush=True)
