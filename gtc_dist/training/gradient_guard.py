"""Guard before the optimizers: finite losses and gradients, clipping, and a file from which a bad step is replayed.

A loss or gradient that is not finite is found before the optimizers use it. By default the rank that finds it writes
the batch and the weights it met to `not-finite-...npz` in the run folder and ends the run; `python -m gtc_dist.train
--replay FILE` computes that step again and names the terms that are not finite. With `train.not_finite: skip` all ranks
leave the step out and count it.
"""

import io
from dataclasses import fields

import numpy as np
import torch
from torch import nn

from gtc_dist.checkpoint.run_folder import not_finite_name
from gtc_dist.config import TrainConfig
from gtc_dist.data import storage
from gtc_dist.distributed.collectives import Communicator
from gtc_dist.distributed.sharded_table import ShardedTable
from gtc_dist.errors import NotFinite
from gtc_dist.model.batch import Batch, DrawnPairs

SHOWN = 6  # names in the message
ROW_NAMES = ("user", "item", "masked_item")  # tables in the order of a batch's rows
Rows = tuple[torch.Tensor, ...]  # of the input users and input items of a batch, and of the masked diffusion's items


class GradientGuard:
    """Checks every step of one rank."""

    def __init__(
        self, train: TrainConfig, network: nn.Module, tables: tuple[ShardedTable, ...], comm: Communicator, run: str
    ):
        self.network, self.tables, self.comm, self.run = network, tables, comm, run
        self.skip, self.clip = train.not_finite == "skip", train.clip_norm
        self.skipped = 0  # steps left out so far

    def passes(self, terms: dict[str, torch.Tensor], batch: Batch, rows: Rows, place: str) -> bool:
        """Whether the optimizers may use the gradients of this step; clips them if so. A collective if steps are
        skipped or gradients are clipped.

        Args:
            terms: loss terms of this rank.
            rows: looked-up rows of the tables.
            place: of the step, for the message: "epoch 3, step 14".

        Raises:
            NotFinite: unless such steps are skipped.
        """
        bad = []
        if not self._finite(terms):
            bad = non_finite_names(terms, self.network, self.tables) or ["the sum of all"]
        if bad and not self.skip:
            uri = storage.join(self.run, not_finite_name(place, self.comm.rank))
            storage.write_bytes(uri, dump_step(batch, rows, self.network))
            shown = ", ".join(bad[:SHOWN]) + (f" and {len(bad) - SHOWN} more" if len(bad) > SHOWN else "")
            raise NotFinite(
                f"{place}: the loss is not finite, or its gradient: {shown}. The batch is in {uri}; "
                f"`python -m gtc_dist.train --replay {uri}` computes it again"
            )
        if self.skip and self.comm.all_reduce_max(int(bool(bad))):
            self.skipped += 1
            for table in self.tables:
                table.pending.clear()
            return False
        if self.clip is not None:
            self._clip()
        return True

    def _finite(self, terms: dict[str, torch.Tensor]) -> bool:
        """One reduction: the sum of all losses and gradients is finite iff (barring overflow) each of them is."""
        sums = [value.float() for value in terms.values()]
        sums += [p.grad.sum() for p in self.network.parameters() if p.grad is not None]
        sums += [values.sum() for table in self.tables for _, values in table.pending]
        return bool(torch.stack(sums).sum().isfinite())

    def _clip(self) -> None:
        """Scale all gradients so that their norm over all ranks is at most `clip`."""
        dense = [p.grad for p in self.network.parameters() if p.grad is not None]
        own = [gradient[1].square().sum() for table in self.tables if (gradient := table.gradient()) is not None]
        zero = torch.zeros((), device=self.comm.device)
        square = sum((g.square().sum() for g in dense), zero) + self.comm.all_reduce(sum(own, zero.clone()))
        scale = (self.clip / square.sqrt().clamp(min=1e-12)).clamp(max=1.0)
        for gradient in [*dense, *(values for table in self.tables for _, values in table.pending)]:
            gradient.mul_(scale)


def non_finite_names(terms: dict[str, torch.Tensor], network: nn.Module, tables: tuple[ShardedTable, ...]) -> list[str]:
    """Names of the loss terms and gradients that are not finite."""
    bad = [f"loss {name}" for name, value in terms.items() if not value.isfinite()]
    for name, parameter in network.named_parameters():
        if parameter.grad is not None and not parameter.grad.isfinite().all():
            bad.append(f"gradient of {name}")
    for table in tables:
        if any(not values.isfinite().all() for _, values in table.pending):
            bad.append(f"gradient of the {table.name} table")
    return bad


NETWORK = "network."  # prefix of a parameter or buffer in the file


def dump_step(batch: Batch, rows: Rows, network: nn.Module) -> bytes:
    """The drawn pairs of a batch, those of all ranks, and the weights that it was computed with, as .npz."""
    arrays = {field.name: np.asarray(getattr(batch.drawn, field.name)) for field in fields(DrawnPairs)}
    tensors = {f"{name}_rows": values for name, values in zip(ROW_NAMES, rows, strict=False)}
    tensors |= {NETWORK + name: tensor for name, tensor in network.state_dict().items()}
    if batch.negative_weight is not None:
        tensors["negative_weight"] = batch.negative_weight
    arrays |= {"all_pairs": batch.all_pairs}
    arrays |= {name: tensor.detach().cpu().numpy() for name, tensor in tensors.items()}
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()
