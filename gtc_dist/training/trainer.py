"""The training loop of one rank: steps, validation, early stopping, checkpoints, the final test.

Nothing here knows of Ray: a rank is a `Communicator`, and `report` is called by every rank after each validation (with Ray
Train it is a barrier, so all ranks call it equally often).

A run that was cut off goes on from the state that was saved last. All randomness of a step comes from (seed, pass,
step, rank), and a state is taken where nothing is under way that is not in it, so on as many ranks as before the
weights are the same to the bit as without the cut.
"""

import math
import time
from collections.abc import Callable
from contextlib import closing, nullcontext
from dataclasses import replace

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel

from gtc_dist.checkpoint.async_writer import DONE, FAILED, AsyncCheckpointWriter, epoch_name
from gtc_dist.checkpoint.checkpoint_files import FOLDER
from gtc_dist.config import Config
from gtc_dist.data import storage
from gtc_dist.data.catalog import Catalog
from gtc_dist.distributed.collectives import Communicator
from gtc_dist.distributed.sharded_table import ShardedTable
from gtc_dist.evaluation import ranking
from gtc_dist.graph.csc import Graphs
from gtc_dist.hybrid.scorer import HybridScorer
from gtc_dist.inference.layerwise import embed_catalog
from gtc_dist.model.batch import Batch
from gtc_dist.model.build import (
    build_loader,
    build_network,
    has_history,
    load_features,
    ranking_options,
    with_communicator,
)
from gtc_dist.training.control_variate import HistoricalEmbeddings
from gtc_dist.training.gradient_guard import GradientGuard, Rows
from gtc_dist.training.run_log import RunLog, Stopwatch
from gtc_dist.training.train_state import LossMeter, TrainProgress, TrainState
from gtc_dist.training.weight_averaging import WeightAverage

# of a step; sampling and features run ahead in the prefetch thread, communication is part of the others
PARTS = ("data", "sampling", "features", "history", "lookup", "forward", "backward", "optimizer", "communication")
CHOICE_USERS = 4096  # about so many at most, that weights of the final embeddings are chosen by
PROJECTED = 1000  # item embeddings shown in TensorBoard's projector: the most popular
NOTICE_SECONDS = 2.0  # from one look to the next whether the run is asked to leave


class Trainer:
    """One rank of a run.

    Args:
        run: URI of the run folder.
        users, items: int32 [n], this rank's train interactions in any order.
        graphs: shared by the ranks of the node.
        world: all ranks. Its process group must not be the default one, which is DDP's.
        report: called on every rank with each validation's metrics.
        notice: asked on every rank now and then, all at once: "leave" to save the state and return from `fit`, "save"
            to save it now, "" to go on.
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
        notice: Callable[[], str] = lambda: "",
    ):
        self.config, self.catalog, self.run, self.graphs, self.comm = config, catalog, run, graphs, comm
        self.report, self.notice = report, notice
        self.network, self.tables = build_network(config, catalog, comm)
        self.loader_comm = comm.new_group(torch.device("cpu"))
        features = load_features(self.network.shape, catalog, self.loader_comm)
        self.features = with_communicator(features, comm)
        self.loader = build_loader(config, self.network, users, items, graphs, features, self.loader_comm)
        if sum(self.loader.rank_rows) != catalog.manifest.interactions["train"]:
            raise RuntimeError(
                f"the ranks hold {sum(self.loader.rank_rows)} train interactions, the catalog "
                f"{catalog.manifest.interactions['train']}"
            )
        self.history = None
        if has_history(config):
            every = max(1, self.loader.pass_steps // config.train.refresh)
            options = {"every": every, "layers": config.model.layers, "chunk": config.eval.chunk}
            self.history = HistoricalEmbeddings(self.network, self.tables, self.features, graphs, **options)
        self.final = HybridScorer.of(config, graphs, self.features, comm)
        share = config.train.average
        self.average = WeightAverage(self.network, self.tables, share) if share else None
        self.forward = self.network
        if comm.size > 1:
            devices = [comm.device] if comm.device.type == "cuda" else None
            self.forward = DistributedDataParallel(self.network, device_ids=devices, forward_sync_buffers=False)
        self.optimizer = torch.optim.Adam(self.network.parameters(), lr=config.train.lr)
        self.table_lr = config.train.table_lr
        self.truth = {
            split: ranking.load_ground_truth(catalog, split, self.tables.user.start, self.tables.user.stop)
            for split in ("valid", "test")
        }
        self.watch = Stopwatch()
        self.logged: dict[str, float] = {}  # seconds by part of a step, over all logged steps
        saved, train = config.train.checkpoint, config.train
        self.saver = AsyncCheckpointWriter(run, comm, 60 * saved.minutes, saved.keep)
        trained = (self.network, self.tables, self.optimizer, self.average, self.final, self.history)
        fingerprint = catalog.manifest.fingerprint
        self.state = TrainState(run, fingerprint, comm, *trained, self.saver, TrainProgress(self.loader.steps))
        skip = train.not_finite == "skip"
        self.health = GradientGuard(self.network, self.tables.all(), comm, run, skip, train.clip_norm)
        self.asked = time.monotonic()  # whether to leave
        self.wanted = False  # a state is to be saved at the next step where that can be
        self.told = ""  # by the last notice

    def fit(self) -> dict | None:
        """Train to the last epoch or to an early stop, from where the run was cut off if it was; returns what
        metrics.json holds, or None where it was asked to leave before."""
        started = time.monotonic()
        config, resumed = self.config, self.state.resume()
        self.state.clean(resumed)
        at = self.state.progress
        if resumed:
            self._say(f"going on from epoch {at.epoch}, step {at.step} of {self.loader.steps}")
        self.started, self.health.skipped = started - at.seconds, at.skipped
        active = self.comm.rank == 0
        self.monitor = RunLog(self.run, config.train.epochs, self.loader.steps, active, at.lines, at.steps)
        if not resumed:
            self.final.start(self._worth)
            self._validate(0)
            at.epoch, at.step = 1, 0
        while at.epoch <= config.train.epochs and at.waited < config.eval.patience:
            if self.wanted and self._can_save():  # it was, before a validation
                self._save_state()
            epoch_start = time.monotonic()
            self.train_epoch(at.epoch, at.step)
            if self.told == "leave":
                return self._left()
            if self.average is not None:
                self.average.update()
            at.trained += time.monotonic() - epoch_start
            if self._validates(at.epoch):
                at.waited = 0 if self._validate(at.epoch) else at.waited + 1
            at.epoch, at.step = at.epoch + 1, 0
        last = at.epoch - 1
        if at.waited >= config.eval.patience:
            self._say(f"no better {config.eval.metric} in {at.waited} validations: stopping early at epoch {last}")
        self._save_state(wait=True)
        return self._finish(last)

    def step(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Forward, backward and the optimizers on one batch; returns this rank's share of the loss parts."""
        rows = self.rows(batch)
        parts = self.gradients(batch, rows)
        self.watch.part("optimizer")
        at = self.state.progress
        if self.health.passes(parts, batch, rows, f"epoch {at.epoch}, step {at.step + 1}"):
            self.optimizer.step()
            self.network.keep_bounds()
            for table in self.tables.all():
                table.step(self.table_lr)
        else:
            parts = {name: torch.nan_to_num(value, 0, 0, 0) for name, value in parts.items()}
        self.watch.part(None)
        return parts

    def rows(self, batch: Batch) -> Rows:
        """Rows of the tables that a batch needs. A collective."""
        self.watch.part("lookup")
        return self.tables.user.lookup(batch.user_route), self.tables.item.lookup(batch.item_route)

    def gradients(self, batch: Batch, rows: Rows) -> dict[str, torch.Tensor]:
        """Forward and backward on one batch; returns this rank's share of the loss parts."""
        self.watch.part("history")
        history = None if self.history is None else self.history.rows(batch)
        self.watch.part("forward")
        loss, parts = self.forward(batch, *rows, history)
        self.watch.part("backward")
        self.optimizer.zero_grad(set_to_none=True)
        with self.comm.tracked():  # DDP sums gradients over the ranks
            loss.backward()
        self.watch.part(None)
        return parts

    def embed(self, watched: dict[str, float] | None = None) -> tuple[ShardedTable, ShardedTable]:
        """The members' embeddings of the whole catalog with the current weights."""
        if self.history is not None:
            self.history.clear()  # its memory is needed
        chunk, layers = self.config.eval.chunk, self.config.model.layers
        return embed_catalog(self.network, self.tables, self.features, self.graphs, layers, chunk, watched)

    def train_epoch(self, epoch: int, done: int = 0) -> None:
        """The steps of an epoch after the first `done` of them: a pass over this rank's interactions, or as many as
        configured. Ends early where the run is to be left."""
        self.network.train()
        self.state.meter.since = time.perf_counter()
        self.watch.part("data")
        with closing(self.loader.epoch(epoch, done)) as batches:
            for step, batch in enumerate(batches, start=done + 1):
                parts = self.step(batch.to(self.comm.device))
                self.state.meter.add(parts, sum(batch.counts))
                self.state.progress.step = step
                if step % self.config.train.log_every == 0 or step == self.loader.steps:
                    self._log(epoch, step, batch)
                    self.state.meter = LossMeter()
                if self.wanted and self._can_save():
                    self.watch.part(None)
                    self._save_state(wait=self.told != "")
                    if self.told == "leave":
                        return
                self.watch.part("data")
        self.watch.part(None)

    def _log(self, epoch: int, step: int, batch: Batch) -> None:
        steps, seen = self.state.meter.steps, self.state.meter.seen
        elapsed = time.perf_counter() - self.state.meter.since
        means = torch.stack(list(self.state.meter.sums.values())) / steps
        together = self.comm.all_reduce(torch.cat([means, self._signals()])).tolist()
        values, signals = together[: len(means)], together[len(means) :]
        self._heed(*signals)
        losses = dict(zip(self.state.meter.sums, values, strict=True))
        scalars = {f"loss/{name}": value for name, value in losses.items()}
        if "tc" in losses:
            scalars["total_correlation/bound_nats"] = math.log(max(sum(batch.correlation_counts), 1)) - losses["tc"]
        seconds = dict.fromkeys(PARTS, 0.0) | self.watch.take() | self.loader.planner.watch.take()
        seconds["communication"] = self.comm.seconds + self.loader_comm.seconds
        self.comm.seconds = self.loader_comm.seconds = 0.0
        for part, value in seconds.items():
            self.logged[part] = self.logged.get(part, 0.0) + value
        scalars |= {f"seconds_per_step/{part}": value / steps for part, value in seconds.items()}
        if self.health.skip:
            scalars["skipped_steps"] = float(self.health.skipped)
        scalars |= {"lr/dense": self.config.train.lr, "lr/tables": self.table_lr}
        scalars["interactions_per_second"] = seen / elapsed
        self.monitor.step(epoch, step, scalars, seen / elapsed)

    def _validates(self, epoch: int) -> bool:
        """Whether an epoch ends with a validation."""
        return epoch % self.config.eval.every == 0 or epoch == self.config.train.epochs

    def _validate(self, epoch: int) -> bool:
        """Rank the valid split with the averaged weights, if there are any; checkpoint them if they are the best so
        far. Every rank takes the same decision."""
        with nullcontext() if self.average is None else self.average.in_place():
            return self._validate_weights(epoch)

    def _validate_weights(self, epoch: int) -> bool:
        watched: dict[str, float] = {}
        blended = self.final.choose_blend(self.embed(watched), self._worth)
        metrics = self.rank(self.final.filled(blended), "valid")
        at = self.state.progress
        if self._value(metrics) > at.best and (epoch > 0 or self.final.blend is not None):
            metrics = self._choose_cold(blended, metrics)
        for part, weights in self.final.state().items():
            watched |= {f"{part}/{name}": weight for name, weight in weights.items()}
        temperature = self.network.correlation_temperature
        if temperature is not None:
            watched["total_correlation/temperature"] = temperature
        better = self._value(metrics) > at.best
        if better:
            self.state.save_best(epoch, metrics["overall"])
            at.best, at.best_epoch = self._value(metrics), epoch
            self.saver.prune(epoch)
        note = f"best so far ({self.config.eval.metric})" if better else f"best was epoch {at.best_epoch}"
        self.monitor.evaluation(epoch, metrics, note, watched)
        with self.comm.tracked():
            self.report({"epoch": epoch, **metrics["overall"]})
        return better

    def _choose_cold(self, blended: tuple[ShardedTable, ShardedTable], metrics: dict) -> dict:
        """Choose what cold items get, for an epoch that is the best so far with the last choice; returns the metrics
        with the new one, which decide: with the last one cold items may cost more than they may."""
        before = self.final.state()
        self.final.choose_cold(blended, self._worth)
        if self.final.state() == before:
            return metrics
        final = self.final.filled(blended)
        return metrics if final is blended else self.rank(final, "valid")

    def rank(self, embeddings: tuple[ShardedTable, ShardedTable], split: str) -> dict:
        """Metrics of a split."""
        return ranking.evaluate(*embeddings, self.graphs, self.truth[split], ranking_options(self.config))

    def _value(self, metrics: dict) -> float:
        """What selects epochs."""
        return metrics["overall"][self.config.eval.metric]

    def _worth(self, embeddings: tuple[ShardedTable, ShardedTable], counted: np.ndarray | None) -> float:
        """What weights of the final embeddings are chosen by: the geometric mean of the metric that selects epochs and
        NDCG@20, so that a hundredth more of one weighs like a hundredth more of the other.

        Args:
            counted: bool [items], what counts as a positive; None: everything.
        """
        options = ranking_options(self.config)
        options = replace(options, users=min(options.users or CHOICE_USERS, CHOICE_USERS))
        overall = ranking.evaluate_on_items(*embeddings, self.graphs, self.truth["valid"], options, counted)
        return (overall[self.config.eval.metric] * overall["ndcg@20"]) ** 0.5

    # --- checkpoints ------------------------------------------------------------------------------------------------

    def _can_save(self) -> bool:
        """Whether nothing is under way that a state does not hold. A history is not saved: a state is taken where the
        next step would compute it anew, as after a validation, unless there is no time to wait for that. Before a
        validation there is none, which would come twice."""
        at = self.state.progress
        if self.told != "":
            return True
        validates = at.step == self.loader.steps and self._validates(at.epoch)
        return not validates and (self.history is None or self.history.due())

    def _save_state(self, wait: bool = False) -> None:
        """Begin to save all that training goes on from, or save it and wait. A collective."""
        at = self.state.progress
        self._settle()
        at.lines, at.seconds, at.skipped = self.monitor.lines, time.monotonic() - self.started, self.health.skipped
        self.state.save()
        self.wanted = False
        if wait:
            self._settle()
            self.told = "leave" if self.told == "leave" else ""

    def _settle(self) -> None:
        problem = self.saver.settle(self.state.progress.best_epoch)
        if problem:
            self._say(f"warning: {problem}")

    def _signals(self) -> torch.Tensor:
        """What ranks tell each other with every logged step, float32 [4], for `_heed`."""
        first, outcome = self.comm.rank == 0, self.saver.outcome
        wanted = first and self.saver.due()
        ask = first and time.monotonic() - self.asked >= NOTICE_SECONDS
        told = [wanted, ask, outcome == DONE, outcome == FAILED]
        return torch.tensor(told, dtype=torch.float32, device=self.comm.device)

    def _heed(self, wanted: float, ask: float, done: float, failed: float) -> None:
        """Act on the number of ranks that say: a state is due, ask whether to leave, this rank's files of the pending
        state are written, or could not be. A collective."""
        if failed or done == self.comm.size:
            self._settle()
        self.wanted |= bool(wanted)
        if ask:
            self.asked = time.monotonic()
            if self.told != "leave":
                self.told = self.notice()
            self.wanted |= self.told != ""

    def _left(self) -> None:
        """Return without a result, with the state saved."""
        at = self.state.progress
        self._say(f"left at epoch {at.epoch}, step {at.step}, as asked; the same command goes on from there")
        self.monitor.close()
        self.comm.barrier()

    def _finish(self, last: int) -> dict:
        """Score the best checkpoint on valid and test, once, and write metrics.json."""
        at = self.state.progress
        self.state.load_best()
        embeddings = self.final(self.embed())
        result = {
            "best_epoch": at.best_epoch,
            "last_epoch": last,
            "checkpoint": f"{FOLDER}/{epoch_name(at.best_epoch)}",
            "valid": self.rank(embeddings, "valid"),
            "test": self.rank(embeddings, "test"),
            "popularity": self.rank(ranking.popularity(self.graphs, self.comm), "test")["overall"],
            "seconds": round(time.monotonic() - self.started, 2),
            "seconds_per_epoch": round(at.trained / max(last, 1), 3),
            "workers": self.comm.size,
            "skipped_steps": self.health.skipped,
        }
        self._project(embeddings[1])
        if self.comm.rank == 0:
            storage.write_json(storage.join(self.run, "metrics.json"), result)
        self.monitor.close()
        self.comm.barrier()
        return result

    def _project(self, items: ShardedTable) -> None:
        """Show the most popular of rank 0's items in the projector, under their original ids."""
        if self.comm.rank:
            return
        degree = self.graphs.item_degree[items.start : items.stop]
        chosen = np.argsort(-degree, kind="stable")[:PROJECTED]
        labels = [str(i) for i in self.catalog.ids("items", items.start, items.stop).take(chosen).to_pylist()]
        self.monitor.projector(
            items.weight[torch.from_numpy(chosen)].cpu().numpy(), labels, self.state.progress.best_epoch
        )

    def _say(self, text: str) -> None:
        if self.comm.rank == 0:
            print(text, flush=True)
