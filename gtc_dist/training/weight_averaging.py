"""Weights averaged over epochs: what is ranked, kept and exported is steadier than the weights of one epoch.

After each epoch average = share * average + (1 - share) * weights, for the tables and the dense modules. The last few
epochs' noise (of negatives, of Adam's steps on rows with few interactions) cancels out (Polyak averaging; Izmailov et
al. 2018 for deep networks). It costs a copy of the weights.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from gtc_dist.checkpoint.checkpoint_files import Shard
from gtc_dist.model.gtc import GTC, Tables


class WeightAverage:
    """Average of the weights of one rank: its rows of the tables, and the dense modules.

    Args:
        share: of the past, in (0, 1).
    """

    def __init__(self, network: GTC, tables: Tables, share: float):
        self.network, self.tables, self.share = network, tables.all(), share
        self.live = [*network.parameters(), *(table.weight for table in self.tables)]
        self.values: list[torch.Tensor] = []
        self.kept: list[torch.Tensor] = []  # where a checkpoint's averages are loaded to

    @torch.no_grad()
    def update(self) -> None:
        """Take the weights of now in; the first time they are the average."""
        if not self.values:
            self.values = [weight.detach().clone() for weight in self.live]
            return
        for value, weight in zip(self.values, self.live, strict=True):
            value.lerp_(weight, 1 - self.share)

    def dense(self) -> list[torch.Tensor]:
        """Averages of the dense modules' parameters; empty before any update."""
        return self.values[: len(list(self.network.parameters()))]

    def shards(self) -> list[Shard]:
        """Averages of this rank's rows, for a checkpoint; the rows themselves before any update."""
        first = len(self.live) - len(self.tables)
        if not self.values:
            self.kept = [table.weight.clone() for table in self.tables]
        tensors = self.values[first:] if self.values else self.kept
        return [Shard(f"{t.name}.average", own, t.start, t.rows) for t, own in zip(self.tables, tensors, strict=True)]

    @torch.no_grad()
    def restore(self, dense: list[torch.Tensor]) -> None:
        """Take over the averages that `dense` and `shards` gave, the latter loaded into what `shards` returned."""
        self.values = []
        if dense:
            self.values = [value.to(p.device) for value, p in zip(dense, self.network.parameters(), strict=True)]
            self.values += self.kept
        self.kept = []

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The average stands where the weights are, until the end of the block; the weights do before any update."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for value, weight in zip(self.values, self.live if self.values else [], strict=True):
            kept = weight.detach().clone()
            weight.copy_(value)
            value.copy_(kept)
