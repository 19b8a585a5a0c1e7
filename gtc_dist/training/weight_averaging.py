"""Exponential moving average of the weights over epochs; the average is validated, kept and exported.

After each epoch average = decay * average + (1 - decay) * weights, for the tables and the dense modules. Noise of the
last few epochs (of negatives, of Adam's steps on rows with few interactions) cancels out (Polyak averaging; Izmailov et
al. 2018 for deep networks). `torch.optim.swa_utils.AveragedModel` covers modules only, not row-sharded tables. Costs
one copy of the weights.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from gtc_dist.checkpoint.checkpoint_files import Shard
from gtc_dist.model.gtc import GTC, Tables


class WeightAverage:
    """Average of one rank's rows of the tables and of the dense modules. Methods are local.

    Args:
        decay: share of the previous average, in (0, 1).
    """

    def __init__(self, network: GTC, tables: Tables, decay: float):
        self.network, self.tables, self.decay = network, tables.all(), decay
        self.live = [*network.parameters(), *(table.weight for table in self.tables)]
        self.values: list[torch.Tensor] = []
        self.loaded: list[torch.Tensor] = []  # rows into which a checkpoint's averages are loaded

    @torch.no_grad()
    def update(self) -> None:
        """Add the current weights to the average; the first time they are the average."""
        if not self.values:
            self.values = [weight.detach().clone() for weight in self.live]
            return
        for value, weight in zip(self.values, self.live, strict=True):
            value.lerp_(weight, 1 - self.decay)

    def dense(self) -> list[torch.Tensor]:
        """Averages of the dense modules' parameters; empty before any update."""
        return self.values[: len(list(self.network.parameters()))]

    def shards(self) -> list[Shard]:
        """Averages of this rank's rows, for a checkpoint; the rows themselves before any update."""
        first = len(self.live) - len(self.tables)
        if not self.values:
            self.loaded = [table.weight.clone() for table in self.tables]
        tensors = self.values[first:] if self.values else self.loaded
        return [Shard(f"{t.name}.average", own, t.start, t.rows) for t, own in zip(self.tables, tensors, strict=True)]

    @torch.no_grad()
    def restore(self, dense: list[torch.Tensor]) -> None:
        """Restore the averages that `dense` and `shards` saved; the latter were loaded into the tensors of `shards`."""
        self.values = []
        if dense:
            self.values = [value.to(p.device) for value, p in zip(dense, self.network.parameters(), strict=True)]
            self.values += self.loaded
        self.loaded = []

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Context manager: swap the averaged weights in (no-op before the first update)."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for value, weight in zip(self.values, self.live if self.values else [], strict=True):
            current = weight.detach().clone()
            weight.copy_(value)
            value.copy_(current)
