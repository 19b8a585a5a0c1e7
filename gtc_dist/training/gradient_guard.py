"""What keeps a bad step out of the weights: a check of losses and gradients, clipping, and a file to replay the step.

A loss or gradient that is not finite is found before the optimizers see it. By default the rank that found it writes
its batch and the weights that met it to `not-finite-...npz` in the run folder and ends the run; `python -m
gtc_dist.train --replay FILE` computes that step once more and says what is not finite. Or the step is left out on all
ranks, and counted.
"""

import io

import numpy as np
import torch
from torch import nn

from gtc_dist.data import storage
from gtc_dist.distributed.collectives import Communicator
from gtc_dist.distributed.sharded_table import ShardedTable
from gtc_dist.errors import NotFinite
from gtc_dist.model.batch import Batch

SHOWN = 6  # of what is not finite, in the message
Rows = tuple[torch.Tensor, torch.Tensor]  # of the batch's in-users and in-items


class GradientGuard:
    """One rank's look at every step.

    Args:
        skip: leave a bad step out, on all ranks alike, instead of ending the run.
        clip: largest norm of all gradients together; None: any.
    """

    def __init__(
        self,
        network: nn.Module,
        tables: tuple[ShardedTable, ...],
        comm: Communicator,
        run: str,
        skip: bool,
        clip: float | None,
    ):
        self.network, self.tables, self.comm, self.run, self.skip, self.clip = network, tables, comm, run, skip, clip
        self.skipped = 0  # steps left out so far

    def passes(self, parts: dict[str, torch.Tensor], batch: Batch, rows: Rows, place: str) -> bool:
        """Whether the optimizers may use the gradients of this step; clips them if so. A collective if steps are left
        out or gradients clipped.

        Args:
            parts: of the loss, of this rank.
            rows: of the tables, that the batch was computed with.
            place: of the step, for the message: "epoch 3, step 14".

        Raises:
            NotFinite: unless such steps are left out.
        """
        bad = []
        if not self._finite(parts):
            bad = non_finite_names(parts, self.network, self.tables) or ["the sum of all"]
        if bad and not self.skip:
            name = f"not-finite-{place.replace(', ', '-').replace(' ', '-')}-rank-{self.comm.rank}.npz"
            uri = storage.join(self.run, name)
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

    def _finite(self, parts: dict[str, torch.Tensor]) -> bool:
        """In one number: a sum is finite if, and hardly ever only if, all of its terms are."""
        sums = [value.float() for value in parts.values()]
        sums += [p.grad.sum() for p in self.network.parameters() if p.grad is not None]
        sums += [values.sum() for table in self.tables for _, values in table.pending]
        return bool(torch.stack(sums).sum().isfinite())

    def _clip(self) -> None:
        """Scale all gradients so that their norm, over all ranks, is at most `clip`."""
        dense = [p.grad for p in self.network.parameters() if p.grad is not None]
        own = [gradient[1].square().sum() for table in self.tables if (gradient := table.gradient()) is not None]
        zero = torch.zeros((), device=self.comm.device)
        square = sum((g.square().sum() for g in dense), zero) + self.comm.all_reduce(sum(own, zero.clone()))
        scale = (self.clip / square.sqrt().clamp(min=1e-12)).clamp(max=1.0)
        for gradient in [*dense, *(values for table in self.tables for _, values in table.pending)]:
            gradient.mul_(scale)


def non_finite_names(parts: dict[str, torch.Tensor], network: nn.Module, tables: tuple[ShardedTable, ...]) -> list[str]:
    """Names of the loss parts and gradients that are not finite."""
    bad = [f"loss {name}" for name, value in parts.items() if not value.isfinite()]
    for name, parameter in network.named_parameters():
        if parameter.grad is not None and not parameter.grad.isfinite().all():
            bad.append(f"gradient of {name}")
    for table in tables:
        if any(not values.isfinite().all() for _, values in table.pending):
            bad.append(f"gradient of the {table.name} table")
    return bad


FIELDS = ("timesteps", "noise", "dropout")
NETWORK = "network."  # before the name of a parameter or buffer


def dump_step(batch: Batch, rows: Rows, network: nn.Module) -> bytes:
    """A batch's pairs and those of all ranks, by catalog index, its randomness, and the weights that it was computed
    with, as .npz."""
    users, items = batch.user_ids[batch.users], batch.item_ids
    arrays = {
        "users": users,
        "positives": items[batch.positives],
        "negatives": items[batch.negatives],
        "pairs": torch.from_numpy(batch.pairs),
        "ranks": torch.tensor(len(batch.counts)),
        **{name: getattr(batch, name) for name in FIELDS},
        "seeds": torch.tensor([batch.permutation_seed, batch.sampler_seed]),
        "user_rows": rows[0],
        "item_rows": rows[1],
        **{NETWORK + name: tensor for name, tensor in network.state_dict().items()},
    }
    if batch.negative_weight is not None:
        arrays["negative_weight"] = batch.negative_weight
    buffer = io.BytesIO()
    np.savez(buffer, **{name: tensor.detach().cpu().numpy() for name, tensor in arrays.items()})
    return buffer.getvalue()
