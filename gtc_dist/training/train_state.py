"""Training state of one rank: everything that a bit-exact resume needs, its saving and its loading."""

import math
import time
from dataclasses import asdict, dataclass, field

import torch

from gtc_dist.checkpoint import checkpoint_files
from gtc_dist.checkpoint.async_writer import AsyncCheckpointWriter
from gtc_dist.checkpoint.run_folder import CHECKPOINT_FOLDER, METRICS_LOG, STEP_PREFIX, TENSORBOARD_FOLDER, epoch_name
from gtc_dist.data import storage
from gtc_dist.distributed.collectives import Communicator
from gtc_dist.errors import InputError, Unreachable
from gtc_dist.hybrid.scorer import HybridScorer
from gtc_dist.model.gtc import GTC, Tables
from gtc_dist.training.control_variate import HistoricalEmbeddings
from gtc_dist.training.weight_averaging import WeightAverage


@dataclass
class TrainProgress:
    """Progress of a run, the same on every rank. Field names are keys of checkpoints."""

    epoch_steps: int  # steps of an epoch
    epoch: int = 0  # current epoch, or the one validated last
    step: int = 0  # steps of it that are done
    best: float = -math.inf  # best value of `eval.metric`
    best_epoch: int = 0
    waited: int = 0  # validations since the best one
    trained: float = 0.0  # seconds in epochs
    seconds: float = 0.0  # seconds in all, before this process
    skipped: int = 0  # steps left out because they were not finite
    lines: list[str] = field(default_factory=list)  # of metrics.jsonl
    init_from: dict = field(default_factory=dict)  # the earlier run whose weights were the initial ones, if any

    @property
    def steps(self) -> int:
        """Steps since the start of training."""
        return max(self.epoch - 1, 0) * self.epoch_steps + self.step

    def record(self, last: int, workers: int) -> dict:
        """What metrics.json says of a training that ended.

        Args:
            last: the last epoch; workers: number of ranks.
        """
        return {
            "best_epoch": self.best_epoch,
            "last_epoch": last,
            "checkpoint": f"{CHECKPOINT_FOLDER}/{epoch_name(self.best_epoch)}",
            "seconds": round(self.seconds, 2),
            "seconds_per_epoch": round(self.trained / max(last, 1), 3),
            "workers": workers,
            "skipped_steps": self.skipped,
        } | ({"init_from": self.init_from} if self.init_from else {})


@dataclass
class LossMeter:
    """Sums of this rank's loss terms since the last logged step."""

    sums: dict[str, torch.Tensor] = field(default_factory=dict)
    steps: int = 0
    seen: int = 0  # interactions of all ranks
    since: float = field(default_factory=time.perf_counter)

    def add(self, terms: dict[str, torch.Tensor], seen: int) -> None:
        for name, value in terms.items():
            self.sums[name] = self.sums.get(name, 0) + value
        self.steps, self.seen = self.steps + 1, self.seen + seen

    def gather(self, comm: Communicator) -> dict:
        """Sums of all ranks, for a training state. A collective."""
        own = {name: float(value) for name, value in self.sums.items()}
        return {"sums": comm.all_gather_json(own), "steps": self.steps, "seen": self.seen}

    @staticmethod
    def of_rank(saved: dict, comm: Communicator) -> "LossMeter":
        """Local. This rank's sums; if the number of ranks changed, rank 0 takes the sums of all."""
        sums = saved["sums"]
        if len(sums) != comm.size:
            total = {name: sum(one[name] for one in sums) for name in sums[0]}
            sums = [total] + [dict.fromkeys(total, 0.0)] * (comm.size - 1)
        own = {name: torch.tensor(value, device=comm.device) for name, value in sums[comm.rank].items()}
        return LossMeter(own, saved["steps"], saved["seen"])


@dataclass
class TrainState:
    """All that one rank trains. Methods are collectives unless marked Local."""

    run: str
    catalog: str  # fingerprint
    comm: Communicator
    network: GTC
    tables: Tables
    optimizer: torch.optim.Optimizer
    average: WeightAverage | None
    scorer: HybridScorer
    history: HistoricalEmbeddings | None
    writer: AsyncCheckpointWriter
    progress: TrainProgress
    meter: LossMeter = field(default_factory=LossMeter)

    def uri(self, name: str) -> str:
        """Local. Place of a checkpoint."""
        return storage.join(self.run, CHECKPOINT_FOLDER, name)

    def save_best(self, epoch: int, metrics: dict[str, float]) -> None:
        """Start saving the weights that are in the tables and the network now, which were validated."""
        dense = {"network": self.network.state_dict()} | self.scorer.state()
        self.writer.start_best(epoch, {"catalog": self.catalog, "metrics": metrics}, dense, self._weights())

    def load_best(self) -> None:
        """Load the weights of the best epoch in place of those in training."""
        self.writer.finalize_best()
        dense = checkpoint_files.load(self.uri(epoch_name(self.progress.best_epoch)), self._weights())
        self.network.load(dense["network"])
        self.scorer.load(dense)

    def save(self) -> None:
        """Start saving the whole state; the writer's threads do the rest."""
        at = self.progress
        dense = {
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "table_steps": {table.name: table.steps for table in self.tables.all()},
            "average": None if self.average is None else self.average.dense(),
            "history_steps": 0 if self.history is None else self.history.steps,
            "progress": asdict(at),
            "meter": self.meter.gather(self.comm),
        } | self.scorer.state()
        head = {"epoch": at.epoch, "step": at.step, "best_epoch": at.best_epoch, "catalog": self.catalog}
        self.writer.start(at.steps, head, dense, self._shards())

    def resume(self) -> TrainProgress | None:
        """Load the newest complete state. Returns None, with initial values everywhere, if there is none.

        Raises:
            OSError: on all ranks, if one of them could not read a state. It may be complete, so it must not be skipped
                and then removed.
        """
        comm, found = self.comm, None
        names = checkpoint_files.list_checkpoints(self.run, STEP_PREFIX)[0] if comm.rank == 0 else []
        complete = comm.all_gather_json(names)[0]
        initial = [table.weight.clone() for table in self.tables.all()] if complete else []
        while complete and found is None:
            name, problem, unread = complete.pop(), "", ""
            try:
                loaded = checkpoint_files.load(self.uri(name), self._shards())
                checkpoint_files.read_manifest(self.uri(epoch_name(loaded["progress"]["best_epoch"])))
            except InputError as error:
                problem = str(error)
            except OSError as error:
                unread = str(error)
            problems, unreads = ([text for text in comm.all_gather_json(own) if text] for own in (problem, unread))
            if unreads:
                raise Unreachable(f"checkpoint {name} could not be read: {unreads[0]}")
            if not problems:
                found = self._restore(loaded)
            elif comm.rank == 0:
                print(f"warning: checkpoint {name} is not used: {problems[0]}", flush=True)
        if found is None:
            for table, weight in zip(self.tables.all() if initial else [], initial, strict=True):
                table.weight.copy_(weight)
                table.exp_avg.zero_(), table.exp_avg_sq.zero_()
            if self.average is not None:
                self.average.restore([])
        return found

    def clean(self, found: TrainProgress | None) -> None:
        """Remove what the run folder holds beyond the state that was resumed, or everything of an earlier start."""
        if self.comm.rank == 0:
            self.writer.remove_after(found.steps if found else 0)
            for name in () if found else (TENSORBOARD_FOLDER, METRICS_LOG):
                storage.remove_tree(storage.join(self.run, name))
        self.comm.barrier()
        if found:
            for name in checkpoint_files.list_checkpoints(self.run, STEP_PREFIX)[0]:
                self.writer.states[name] = checkpoint_files.read_manifest(self.uri(name))["best_epoch"]
            self.writer.prune(found.best_epoch)

    def _restore(self, loaded: dict) -> TrainProgress:
        """Local. Restore from a loaded state everything but the tables' rows."""
        self.network.load(loaded["network"])
        self.network.clamp_parameters()
        for group in loaded["optimizer"]["param_groups"]:
            group["fused"] = True  # versions before 0.6.0 have another implementation
        self.optimizer.load_state_dict(loaded["optimizer"])
        for table in self.tables.all():
            table.steps = loaded["table_steps"][table.name]
        if self.average is not None:
            self.average.restore(loaded["average"])
        self.scorer.load(loaded)
        if self.history is not None:
            self.history.steps = loaded["history_steps"]
        self.meter = LossMeter.of_rank(loaded["meter"], self.comm)
        self.progress = TrainProgress(**loaded["progress"])
        return self.progress

    def _weights(self) -> list[checkpoint_files.Shard]:
        return checkpoint_files.weight_shards(list(self.tables.all()))

    def _shards(self) -> list[checkpoint_files.Shard]:
        shards = checkpoint_files.state_shards(list(self.tables.all()))
        return shards if self.average is None else shards + self.average.shards()
