"""All that training goes on from after it was cut off, and how it is saved and taken up again."""

import math
import time
from dataclasses import asdict, dataclass, field

import torch

from gtc_dist.checkpoint import checkpoint_files
from gtc_dist.checkpoint.async_writer import AsyncCheckpointWriter, epoch_name
from gtc_dist.data import storage
from gtc_dist.distributed.collectives import Communicator
from gtc_dist.errors import InputError, Unreachable
from gtc_dist.hybrid.scorer import HybridScorer
from gtc_dist.model.gtc import GTC, Tables
from gtc_dist.training.control_variate import HistoricalEmbeddings
from gtc_dist.training.weight_averaging import WeightAverage


@dataclass
class TrainProgress:
    """How far a run is; alike on every rank."""

    epoch_steps: int  # steps of an epoch
    epoch: int = 0  # under way, or validated last
    step: int = 0  # of the epoch, done
    best: float = -math.inf  # metric
    best_epoch: int = 0
    waited: int = 0  # validations since
    trained: float = 0.0  # seconds in epochs
    seconds: float = 0.0  # in all, before this process
    skipped: int = 0  # steps left out
    lines: list[str] = field(default_factory=list)  # of metrics.jsonl

    @property
    def steps(self) -> int:
        """Done since the start of training."""
        return max(self.epoch - 1, 0) * self.epoch_steps + self.step


@dataclass
class LossMeter:
    """Losses since the last logged step, of this rank."""

    sums: dict[str, torch.Tensor] = field(default_factory=dict)
    steps: int = 0
    seen: int = 0  # interactions of all ranks
    since: float = field(default_factory=time.perf_counter)

    def add(self, parts: dict[str, torch.Tensor], seen: int) -> None:
        for name, value in parts.items():
            self.sums[name] = self.sums.get(name, 0) + value
        self.steps, self.seen = self.steps + 1, self.seen + seen

    def over(self, comm: Communicator) -> dict:
        """What a state keeps of it. A collective."""
        own = {name: float(value) for name, value in self.sums.items()}
        return {"sums": comm.all_gather_json(own), "steps": self.steps, "seen": self.seen}

    @staticmethod
    def of_rank(kept: dict, comm: Communicator) -> "LossMeter":
        """This rank's part of it; on another number of ranks the first one takes the sums of all."""
        sums = kept["sums"]
        if len(sums) != comm.size:
            total = {name: sum(one[name] for one in sums) for name in sums[0]}
            sums = [total] + [dict.fromkeys(total, 0.0)] * (comm.size - 1)
        own = {name: torch.tensor(value, device=comm.device) for name, value in sums[comm.rank].items()}
        return LossMeter(own, kept["steps"], kept["seen"])


@dataclass
class TrainState:
    """What one rank trains; `saver` writes it."""

    run: str
    catalog: str  # fingerprint
    comm: Communicator
    network: GTC
    tables: Tables
    optimizer: torch.optim.Optimizer
    average: WeightAverage | None
    final: HybridScorer
    history: HistoricalEmbeddings | None
    saver: AsyncCheckpointWriter
    progress: TrainProgress
    meter: LossMeter = field(default_factory=LossMeter)

    def uri(self, name: str) -> str:
        return storage.join(self.run, checkpoint_files.FOLDER, name)

    def save_best(self, epoch: int, metrics: dict[str, float]) -> None:
        """Keep the weights that were ranked: those that stand in the tables and the network now. A collective."""
        dense = {"network": self.network.state_dict()} | self.final.state()
        head = {"epoch": epoch, "catalog": self.catalog, "metrics": metrics}
        checkpoint_files.save(self.uri(epoch_name(epoch)), head, dense, self._weights(), self.comm)

    def load_best(self) -> None:
        """The weights of the best epoch, in place of those in training."""
        dense = checkpoint_files.load(self.uri(epoch_name(self.progress.best_epoch)), self._weights())
        self.network.load_state_dict(dense["network"])
        self.final.load(dense)

    def save(self) -> None:
        """Begin to save all of it. A collective."""
        at = self.progress
        dense = {
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "table_steps": {table.name: table.steps for table in self.tables.all()},
            "average": None if self.average is None else self.average.dense(),
            "history_steps": 0 if self.history is None else self.history.steps,
            "progress": asdict(at),
            "meter": self.meter.over(self.comm),
        } | self.final.state()
        head = {"epoch": at.epoch, "step": at.step, "best_epoch": at.best_epoch, "catalog": self.catalog}
        self.saver.start(at.steps, head, dense, self._shards())

    def resume(self) -> TrainProgress | None:
        """Take up the newest whole state, and forget what came after it; None where there is none, and everything is as
        it starts. A collective.

        Raises:
            OSError: on all ranks, where one could not read a state. It may be whole, so it must not be passed over, and
                then removed.
        """
        comm, found = self.comm, None
        whole = comm.all_gather_json(checkpoint_files.list_checkpoints(self.run, "step-")[0] if comm.rank == 0 else [])[
            0
        ]
        start = [table.weight.clone() for table in self.tables.all()] if whole else []
        while whole and found is None:
            name, problem, unread = whole.pop(), "", ""
            try:
                loaded = checkpoint_files.load(self.uri(name), self._shards())
                checkpoint_files.read_manifest(self.uri(epoch_name(loaded["progress"]["best_epoch"])))
            except InputError as error:
                problem = str(error)
            except OSError as error:
                unread = str(error)
            problems, unreads = ([text for text in comm.all_gather_json(said) if text] for said in (problem, unread))
            if unreads:
                raise Unreachable(f"checkpoint {name} could not be read: {unreads[0]}")
            if not problems:
                found = self._take(loaded)
            elif comm.rank == 0:
                print(f"warning: checkpoint {name} is not used: {problems[0]}", flush=True)
        if found is None:
            for table, weight in zip(self.tables.all() if start else [], start, strict=True):
                table.weight.copy_(weight)
                table.exp_avg.zero_(), table.exp_avg_sq.zero_()
            if self.average is not None:
                self.average.restore([])
        return found

    def clean(self, found: TrainProgress | None) -> None:
        """Remove what came after the state that was taken up, or all of an earlier start. A collective."""
        if self.comm.rank == 0:
            self.saver.forget(found.steps if found else 0)
            for name in () if found else ("tensorboard", "metrics.jsonl"):
                storage.remove_tree(storage.join(self.run, name))
        self.comm.barrier()
        if found:
            for name in checkpoint_files.list_checkpoints(self.run, "step-")[0]:
                self.saver.states[name] = checkpoint_files.read_manifest(self.uri(name))["best_epoch"]
            self.saver.prune(found.best_epoch)

    def _take(self, loaded: dict) -> TrainProgress:
        """What is not in the tables of a state that was loaded."""
        self.network.load_state_dict(loaded["network"])
        self.network.keep_bounds()
        self.optimizer.load_state_dict(loaded["optimizer"])
        for table in self.tables.all():
            table.steps = loaded["table_steps"][table.name]
        if self.average is not None:
            self.average.restore(loaded["average"])
        self.final.load(loaded)
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
