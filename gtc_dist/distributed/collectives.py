"""Collectives of a process group, with a single process as a special case that communicates nothing.

The rule for the whole package: methods of objects that hold a communicator are collectives unless marked Local. Every
rank must call a collective, in the same order and equally often, also with empty rows.
"""

import itertools
import json
import time
from dataclasses import dataclass, field

import torch
import torch.distributed as dist


@dataclass
class CollectiveProgress:
    """Counters of a process group on one rank, for the watchdog: collectives begun, and whether one is running. A
    context manager around each collective."""

    begun: int = 0
    inside: int = 0  # nesting depth: a backward pass contains others

    def __enter__(self) -> None:
        self.begun += 1
        self.inside += 1

    def __exit__(self, *_) -> None:
        self.inside -= 1


@dataclass
class Communicator:
    """This rank in its process group.

    `seconds` and `bytes_sent` add up the cost of its collectives; `progress_counters` are those of this group and of
    all groups created from the same one.
    """

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    group: dist.ProcessGroup | None = None
    seconds: float = field(default=0.0, compare=False)
    bytes_sent: int = field(default=0, compare=False)
    progress_counters: list[CollectiveProgress] = field(default_factory=list, compare=False)

    def __post_init__(self):
        self.progress = CollectiveProgress()
        self.progress_counters.append(self.progress)

    def new_group(self, device: torch.device | None = None) -> "Communicator":
        """The same ranks over another process group, for a thread that runs beside the main one."""
        device = device or self.device
        group = dist.new_group(backend="gloo" if device.type == "cpu" else None) if self.size > 1 else None
        return Communicator(self.rank, self.size, device, group, progress_counters=self.progress_counters)

    def row_range(self, rows: int, rank: int | None = None) -> tuple[int, int]:
        """Local. The contiguous rows [start, stop) of `rows` that a rank (default: this one) owns."""
        rank = self.rank if rank is None else rank
        return rows * rank // self.size, rows * (rank + 1) // self.size

    def all_reduce(self, values: torch.Tensor) -> torch.Tensor:
        """Sum over ranks, in place."""
        if self.size > 1:
            with self._counted(values.numel() * values.element_size()):
                dist.all_reduce(values, group=self.group)
        return values

    def all_reduce_max(self, value: int) -> int:
        """Largest value over ranks."""
        if self.size == 1:
            return value
        return max(self.all_gather_int(value))

    def all_gather_int(self, value: int) -> list[int]:
        """One integer from each rank."""
        if self.size == 1:
            return [value]
        mine = torch.tensor([value], dtype=torch.int64, device=self.device)
        out = [torch.empty_like(mine) for _ in range(self.size)]
        with self._counted(8 * self.size):
            dist.all_gather(out, mine, group=self.group)
        return [int(t) for t in out]

    def all_gather(self, rows: torch.Tensor, counts: list[int]) -> torch.Tensor:
        """Rows of all ranks in rank order, [sum(counts), ...], without gradient."""
        if self.size == 1:
            return rows
        most = max(counts)
        padded = rows.new_zeros((most, *rows.shape[1:]))
        padded[: len(rows)] = rows
        out = [torch.empty_like(padded) for _ in range(self.size)]
        with self._counted(padded.numel() * padded.element_size() * (self.size - 1)):
            dist.all_gather(out, padded, group=self.group)
        return torch.cat([part[:n] for part, n in zip(out, counts, strict=True)])

    def all_gather_json(self, value) -> list:
        """One JSON value from each rank."""
        data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(self.device)
        counts = self.all_gather_int(len(data))
        everything = self.all_gather(data, counts).cpu().numpy().tobytes()
        ends = itertools.accumulate(counts)
        return [json.loads(everything[end - n : end]) for end, n in zip(ends, counts, strict=True)]

    def all_to_all(self, rows: torch.Tensor, send: list[int], receive: list[int]) -> torch.Tensor:
        """The first send[0] rows go to rank 0, and so on. Returns [sum(receive), ...], ordered by source rank."""
        if self.size == 1:
            return rows
        out = rows.new_empty((sum(receive), *rows.shape[1:]))
        row_bytes = rows.element_size() * rows[:1].numel() if len(rows) else 0
        with self._counted(row_bytes * (sum(send) - send[self.rank])):
            dist.all_to_all_single(out, rows.contiguous(), receive, send, group=self.group)
        return out

    def barrier(self) -> None:
        """Wait for all ranks; on a GPU the host waits, too."""
        self.all_reduce(torch.zeros(1, device=self.device)).item()

    def tracked(self) -> CollectiveProgress:
        """Local. Context manager for code outside this class that waits for the other ranks."""
        return self.progress

    def _counted(self, sent: int) -> "_Counted":
        self.bytes_sent += sent
        return _Counted(self)


class _Counted:
    def __init__(self, comm: Communicator):
        self.comm = comm

    def __enter__(self):
        self.comm.progress.__enter__()
        self.start = time.perf_counter()

    def __exit__(self, *_):
        self.comm.progress.__exit__()
        self.comm.seconds += time.perf_counter() - self.start


class _GatherWithGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, comm, counts):
        ctx.comm, ctx.counts = comm, counts
        return comm.all_gather(rows, counts)

    @staticmethod
    def backward(ctx, grad):
        start = sum(ctx.counts[: ctx.comm.rank])
        total = ctx.comm.all_reduce(grad.contiguous().clone())
        return total[start : start + ctx.counts[ctx.comm.rank]], None, None


def all_gather_with_gradient(rows: torch.Tensor, comm: Communicator, counts: list[int]) -> torch.Tensor:
    """Rows of all ranks in rank order; the gradient of a row is the sum over the ranks that used it. Collective, also
    in the backward pass.

    Args:
        rows: [counts[rank], ...] of this rank.
        counts: rows of each rank, known to all.
    """
    return rows if comm.size == 1 else _GatherWithGradient.apply(rows, comm, counts)
