"""Guard before the optimizers: finite losses and gradients, clipping, and a file from which a bad step is replayed.

A loss or gradient that is not finite changes no weight: the check stays on the device, and the optimizers read its
result there. By default the rank that finds it writes the batch and the weights it met to `not-finite-...npz` in the
run folder and ends the run; `python -m gtc_dist.train --replay FILE` computes that step again and names the terms that
are not finite. The host reads the result after the next backward pass was queued, so that a GPU never waits for it; the
weights are still those that the bad step met, since neither step has changed them. With `train.not_finite: skip` all
ranks leave the step out and count it, which costs a collective, and a wait for the device, in every step.
"""

import io
import math
from dataclasses import dataclass, fields

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


@dataclass
class UnreadCheck:
    """Check of a step that the host has not read."""

    names: list[str]  # of the loss terms and gradients
    values: torch.Tensor  # float32 [names] on the host, not finite where a term or gradient is not
    copied: torch.cuda.Event | None  # when `values` have arrived; None without a GPU
    batch: Batch
    rows: Rows | None  # None: with one rank they can be looked up again, since no weight has changed
    place: str


class GradientGuard:
    """Checks every step of one rank."""

    def __init__(
        self, train: TrainConfig, network: nn.Module, tables: tuple[ShardedTable, ...], comm: Communicator, run: str
    ):
        self.network, self.tables, self.comm, self.run = network, tables, comm, run
        self.skip, self.clip = train.not_finite == "skip", train.clip_norm
        self.skipped = 0  # steps left out so far
        self.norm_share = torch.full((), math.nan, device=comm.device)  # of `measure`
        self.unread: UnreadCheck | None = None

    def check(
        self, terms: dict[str, torch.Tensor], batch: Batch, rows: Rows, place: str, measure: bool = False
    ) -> torch.Tensor | None:
        """Check the gradients of a step and clip them; settle the check of the step before.

        A collective if steps are skipped or gradients are clipped.

        Args:
            terms: loss terms of this rank.
            rows: looked-up rows of the tables.
            place: of the step, for the message: "epoch 3, step 14".
            measure: set `norm_share` to the step's: this rank's share, float32 [] on the device, of the squared norm of
                all gradients before clipping, whose sum over the ranks is that square.

        Returns:
            Whether any is not finite, bool [] on the device, for the optimizers, which then must not change the
            weights; None: the ranks leave the step out.

        Raises:
            NotFinite: if the step before was not finite, unless such steps are skipped.
        """
        self.settle()
        if measure:
            self.norm_share = self._norm_share()
        names, values = self._sums(terms)
        not_finite = (values * 0).sum().isnan()
        if self.skip:
            if self.comm.all_reduce_max(int(not_finite)):
                self.skipped += 1
                for table in self.tables:
                    table.pending.clear()
                return None
        else:
            host, copied = _copy_to_host(values)
            self.unread = UnreadCheck(names, host, copied, batch, rows if self.comm.size > 1 else None, place)
        if self.clip is not None:
            not_finite = not_finite | (self._clip() * 0).isnan()  # of another rank
        return not_finite

    def settle(self) -> None:
        """Local. Read the check of the last step.

        Raises:
            NotFinite: if it was not finite.
        """
        check, self.unread = self.unread, None
        if check is None:
            return
        if check.copied is not None:
            check.copied.synchronize()
        finite = np.isfinite(check.values.numpy())
        if finite.all():
            return
        bad = [name for name, is_finite in zip(check.names, finite, strict=True) if not is_finite]
        uri = storage.join(self.run, not_finite_name(check.place, self.comm.rank))
        rows = check.rows or self._look_up(check.batch)
        storage.write_bytes(uri, dump_step(check.batch, rows, self.network))
        shown = ", ".join(bad[:SHOWN]) + (f" and {len(bad) - SHOWN} more" if len(bad) > SHOWN else "")
        raise NotFinite(
            f"{check.place}: the loss is not finite, or its gradient: {shown}. The batch is in {uri}; "
            f"`python -m gtc_dist.train --replay {uri}` computes it again"
        )

    def _sums(self, terms: dict[str, torch.Tensor]) -> tuple[list[str], torch.Tensor]:
        """Names of the loss terms and gradients, and the sum of each, float32 [names], which is finite iff, barring
        overflow, every summand is."""
        sums = {f"loss {name}": value.float() for name, value in terms.items()}
        for name, parameter in self.network.named_parameters():
            if parameter.grad is not None:
                sums[f"gradient of {name}"] = parameter.grad.sum()
        for table in self.tables:
            if table.pending:
                first, *others = (values.sum() for _, values in table.pending)
                sums[f"gradient of the {table.name} table"] = sum(others, first)
        return list(sums), torch.stack(list(sums.values()))

    @torch.no_grad()
    def _look_up(self, batch: Batch) -> Rows:
        """Local. The rows of a batch, with one rank."""
        plans = [batch.subgraph.user_lookup, batch.subgraph.item_lookup]
        plans += [] if batch.masked is None else [batch.masked.item_lookup]
        return tuple(table.lookup(plan) for table, plan in zip(self.tables, plans, strict=True))

    def _norm_share(self) -> torch.Tensor:
        """Local. Ranks have the same gradients of dense parameters, and each those of its own rows of the tables."""
        dense = [p.grad for p in self.network.parameters() if p.grad is not None]
        own = [gradient[1] for table in self.tables if (gradient := table.gradient()) is not None]
        norms = [torch.stack(torch._foreach_norm(each)) for each in (dense, own) if each]
        of_dense, *of_tables = (each.square().sum() for each in norms)
        return sum(of_tables, of_dense / self.comm.size)

    def _clip(self) -> torch.Tensor:
        """Scale all gradients so that their norm over all ranks is at most `clip`; returns the squared norm."""
        dense = [p.grad for p in self.network.parameters() if p.grad is not None]
        own = [gradient[1].square().sum() for table in self.tables if (gradient := table.gradient()) is not None]
        zero = torch.zeros((), device=self.comm.device)
        square = sum((g.square().sum() for g in dense), zero) + self.comm.all_reduce(sum(own, zero.clone()))
        scale = (self.clip / square.sqrt().clamp(min=1e-12)).clamp(max=1.0)
        for gradient in [*dense, *(values for table in self.tables for _, values in table.pending)]:
            gradient.mul_(scale)
        return square


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


def _copy_to_host(values: torch.Tensor) -> tuple[torch.Tensor, torch.cuda.Event | None]:
    """A copy on the host, and the event of its arrival; the host does not wait."""
    if values.device.type != "cuda":
        return values, None
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    host.copy_(values, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()
    return host, copied


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
