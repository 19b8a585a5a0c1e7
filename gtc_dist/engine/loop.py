"""The training loop of one rank: steps, validation, early stopping, the best checkpoint, the final test.

Nothing here knows of Ray: a rank is a `World`, and `report` is called by every rank after each validation (with Ray
Train it is a barrier, so all ranks call it equally often).
"""

import math
import time
from collections.abc import Callable
from contextlib import nullcontext

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel

from gtc_dist.config import Config
from gtc_dist.data import storage
from gtc_dist.data.catalog import Catalog
from gtc_dist.engine import checkpoint, ranking
from gtc_dist.engine.average import Average
from gtc_dist.engine.build import (
    build_blend,
    build_loader,
    build_network,
    has_history,
    load_features,
    over_world,
    ranking_options,
)
from gtc_dist.engine.history import History
from gtc_dist.engine.inference import embed_catalog
from gtc_dist.engine.monitor import Monitor, Stopwatch
from gtc_dist.graph.csc import Graphs
from gtc_dist.model.batch import Batch
from gtc_dist.model.collectives import World
from gtc_dist.model.table import RowTable

# of a step; sampling and features run ahead in the prefetch thread, communication is part of the others
PARTS = ("data", "sampling", "features", "history", "lookup", "forward", "backward", "optimizer", "communication")
PROJECTED = 1000  # item embeddings shown in TensorBoard's projector: the most popular


class Trainer:
    """One rank of a run.

    Args:
        run: URI of the run folder.
        users, items: int32 [n], this rank's train interactions in any order.
        graphs: shared by the ranks of the node.
        world: all ranks. Its process group must not be the default one, which is DDP's.
        report: called on every rank with each validation's metrics.
    """

    def __init__(
        self,
        config: Config,
        catalog: Catalog,
        run: str,
        users: np.ndarray,
        items: np.ndarray,
        graphs: Graphs,
        world: World,
        report: Callable[[dict], None] = lambda metrics: None,
    ):
        self.config, self.catalog, self.run, self.graphs, self.world, self.report = (
            config,
            catalog,
            run,
            graphs,
            world,
            report,
        )
        self.network, self.tables = build_network(config, catalog, world)
        self.loader_world = world.split(torch.device("cpu"))
        features = load_features(self.network.shape, catalog, self.loader_world)
        self.features = over_world(features, world)
        self.loader = build_loader(config, self.network, users, items, graphs, features, self.loader_world)
        if sum(self.loader.rank_rows) != catalog.manifest.interactions["train"]:
            raise RuntimeError(
                f"the ranks hold {sum(self.loader.rank_rows)} train interactions, the catalog "
                f"{catalog.manifest.interactions['train']}"
            )
        self.history = None
        if has_history(config):
            every = max(1, self.loader.pass_steps // config.train.refresh)
            options = {"every": every, "layers": config.model.layers, "chunk": config.eval.chunk}
            self.history = History(self.network, self.tables, self.features, graphs, **options)
        self.blend = build_blend(config, graphs, self.features, world)
        share = config.train.average
        self.average = Average(self.network, self.tables, share) if share else None
        self.forward = self.network
        if world.size > 1:
            devices = [world.device] if world.device.type == "cuda" else None
            self.forward = DistributedDataParallel(self.network, device_ids=devices, forward_sync_buffers=False)
        self.optimizer = torch.optim.Adam(self.network.parameters(), lr=config.train.lr)
        self.table_lr = config.train.table_lr
        self.truth = {
            split: ranking.split_truth(catalog, split, self.tables.user.start, self.tables.user.stop)
            for split in ("valid", "test")
        }
        self.monitor = Monitor(run, config.train.epochs, self.loader.steps, active=world.rank == 0)
        self.watch = Stopwatch()
        self.logged: dict[str, float] = {}  # seconds by part of a step, over all logged steps
        self.best: tuple[float, int] = (-math.inf, 0)  # metric, epoch

    def fit(self) -> dict:
        """Train to the last epoch or to an early stop; returns what metrics.json holds."""
        started = time.monotonic()
        config, waited = self.config, 0
        if self.blend is not None:
            self.blend.choose(self._worth)
        self._validate(0)
        trained = 0.0
        for epoch in range(1, config.train.epochs + 1):
            epoch_start = time.monotonic()
            self.train_epoch(epoch)
            if self.average is not None:
                self.average.update()
            trained += time.monotonic() - epoch_start
            if epoch % config.eval.every and epoch != config.train.epochs:
                continue
            waited = 0 if self._validate(epoch) else waited + 1
            if waited >= config.eval.patience:
                self._say(f"no better {config.eval.metric} in {waited} validations: stopping early at epoch {epoch}")
                break
        return self._finish(epoch if config.train.epochs else 0, trained, time.monotonic() - started)

    def step(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Forward, backward and the optimizers on one batch; returns this rank's share of the loss parts."""
        self.watch.part("history")
        history = None if self.history is None else self.history.rows(batch)
        self.watch.part("lookup")
        user_rows = self.tables.user.lookup(batch.user_route)
        item_rows = self.tables.item.lookup(batch.item_route)
        self.watch.part("forward")
        loss, parts = self.forward(batch, user_rows, item_rows, history)
        self.watch.part("backward")
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.watch.part("optimizer")
        self.optimizer.step()
        for table in self.tables.all():
            table.step(self.table_lr)
        self.watch.part(None)
        return parts

    def embed(self, watched: dict[str, float] | None = None) -> tuple[RowTable, RowTable]:
        """The members' embeddings of the whole catalog with the current weights."""
        if self.history is not None:
            self.history.clear()  # its memory is needed
        chunk, layers = self.config.eval.chunk, self.config.model.layers
        return embed_catalog(self.network, self.tables, self.features, self.graphs, layers, chunk, watched)

    def train_epoch(self, epoch: int) -> None:
        """The steps of an epoch: a pass over this rank's interactions, or as many as configured."""
        self.network.train()
        sums: dict[str, torch.Tensor] = {}
        since, seen, steps = time.perf_counter(), 0, 0
        self.watch.part("data")
        for step, batch in enumerate(self.loader.epoch(epoch), start=1):
            parts = self.step(batch.to(self.world.device))
            for name, value in parts.items():
                sums[name] = sums.get(name, 0) + value
            seen, steps = seen + sum(batch.counts), steps + 1
            if step % self.config.train.log_every == 0 or step == self.loader.steps:
                self._log(epoch, step, batch, sums, steps, seen, time.perf_counter() - since)
                sums, since, seen, steps = {}, time.perf_counter(), 0, 0
            self.watch.part("data")
        self.watch.part(None)

    def _log(self, epoch: int, step: int, batch: Batch, sums: dict, steps: int, seen: int, elapsed: float) -> None:
        values = self.world.sum(torch.stack(list(sums.values())) / steps).tolist()
        losses = dict(zip(sums, values, strict=True))
        if not all(math.isfinite(v) for v in values):
            raise FloatingPointError(f"epoch {epoch}, step {step}: the loss is not finite: {losses}")
        scalars = {f"loss/{name}": value for name, value in losses.items()}
        if "tc" in losses:
            scalars["total_correlation/bound_nats"] = math.log(max(sum(batch.correlation_counts), 1)) - losses["tc"]
        seconds = dict.fromkeys(PARTS, 0.0) | self.watch.take() | self.loader.planner.watch.take()
        seconds["communication"] = self.world.seconds + self.loader_world.seconds
        self.world.seconds = self.loader_world.seconds = 0.0
        for part, value in seconds.items():
            self.logged[part] = self.logged.get(part, 0.0) + value
        scalars |= {f"seconds_per_step/{part}": value / steps for part, value in seconds.items()}
        scalars |= {"lr/dense": self.config.train.lr, "lr/tables": self.table_lr}
        scalars["interactions_per_second"] = seen / elapsed
        self.monitor.step(epoch, step, scalars, seen / elapsed)

    def _validate(self, epoch: int) -> bool:
        """Rank the valid split with the averaged weights, if there are any; checkpoint them if they are the best so
        far. Every rank takes the same decision."""
        with nullcontext() if self.average is None else self.average.in_place():
            return self._validate_weights(epoch)

    def _validate_weights(self, epoch: int) -> bool:
        watched: dict[str, float] = {}
        embeddings = self.embed(watched)
        if self.blend is not None:
            self.blend.choose_members(embeddings, self._worth)
            watched |= {f"blend/{name}": weight for name, weight in self.blend.weights.items()}
            embeddings = self.blend.joined(embeddings)
        metrics = self.rank(embeddings, "valid")
        temperature = self.network.correlation_temperature
        if temperature is not None:
            watched["total_correlation/temperature"] = temperature
        value = metrics["overall"][self.config.eval.metric]
        better = value > self.best[0]
        if better:
            previous, self.best = self.best, (value, epoch)
            self._save(epoch, metrics["overall"])
            if previous[0] > -math.inf:
                self._remove(previous[1])
        note = f"best so far ({self.config.eval.metric})" if better else f"best was epoch {self.best[1]}"
        self.monitor.evaluation(epoch, metrics, note, watched)
        self.report({"epoch": epoch, **metrics["overall"]})
        return better

    def rank(self, embeddings: tuple[RowTable, RowTable], split: str) -> dict:
        """Metrics of a split."""
        return ranking.evaluate(*embeddings, self.graphs, self.truth[split], ranking_options(self.config))

    def _worth(self, embeddings: tuple[RowTable, RowTable]) -> float:
        """What weights of a blend are chosen by: the geometric mean of the metric that selects epochs and NDCG@20, so
        that a hundredth more of one weighs like a hundredth more of the other."""
        overall = self.rank(embeddings, "valid")["overall"]
        return (overall[self.config.eval.metric] * overall["ndcg@20"]) ** 0.5

    def _checkpoint(self, epoch: int) -> str:
        return storage.join(self.run, "checkpoints", f"epoch-{epoch:05d}")

    def _save(self, epoch: int, metrics: dict[str, float]) -> None:
        dense = {"network": self.network.state_dict(), "optimizer": self.optimizer.state_dict()}
        if self.blend is not None:
            dense["blend"] = self.blend.weights
        checkpoint.save(
            self._checkpoint(epoch),
            epoch,
            dense,
            list(self.tables.all()),
            self.world,
            metrics,
            self.catalog.manifest.fingerprint,
        )

    def _remove(self, epoch: int) -> None:
        if self.world.rank == 0:
            storage.remove_tree(self._checkpoint(epoch))

    def _finish(self, last: int, trained: float, seconds: float) -> dict:
        """Score the best checkpoint on valid and test, once, and write metrics.json."""
        best = self._checkpoint(self.best[1])
        dense = checkpoint.load(best, list(self.tables.all()))
        self.network.load_state_dict(dense["network"])
        embeddings = self.embed()
        if self.blend is not None:
            self.blend.weights = dense["blend"]
            embeddings = self.blend.joined(embeddings)
        result = {
            "best_epoch": self.best[1],
            "last_epoch": last,
            "checkpoint": f"checkpoints/epoch-{self.best[1]:05d}",
            "valid": self.rank(embeddings, "valid"),
            "test": self.rank(embeddings, "test"),
            "popularity": self.rank(ranking.popularity(self.graphs, self.world), "test")["overall"],
            "seconds": round(seconds, 2),
            "seconds_per_epoch": round(trained / max(last, 1), 3),
            "workers": self.world.size,
        }
        self._project(embeddings[1])
        if self.world.rank == 0:
            storage.write_json(storage.join(self.run, "metrics.json"), result)
        self.monitor.close()
        self.world.barrier()
        return result

    def _project(self, items: RowTable) -> None:
        """Show the most popular of rank 0's items in the projector, under their original ids."""
        if self.world.rank:
            return
        degree = self.graphs.item_degree[items.start : items.stop]
        chosen = np.argsort(-degree, kind="stable")[:PROJECTED]
        labels = [str(i) for i in self.catalog.ids("items", items.start, items.stop).take(chosen).to_pylist()]
        self.monitor.projector(items.weight[torch.from_numpy(chosen)].cpu().numpy(), labels, self.best[1])

    def _say(self, text: str) -> None:
        if self.world.rank == 0:
            print(text, flush=True)
