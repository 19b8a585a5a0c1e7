"""Row-wise sharded embedding table: each rank owns a contiguous range of the rows.

`lookup` asks the owners for rows with one all-to-all; its backward sends row gradients back to the owners, which apply
Adam to the touched rows alone. With a plan of some rows, traffic is those rows x width, independent of the table's
size, and no rank holds a gradient of the whole table. With `plan_whole_table` (full-graph propagation) every rank gets
the whole table. Tables stay outside DDP.

A `LookupPlan` says which rows go where. It is made once and serves several tables with the same rows, forward and
backward (TorchRec calls this the input distribution).
"""

import hashlib
from dataclasses import dataclass

import torch
from torch.optim.adam import adam

from gtc_dist.distributed.collectives import Communicator

INIT_ROWS = 4096  # rows that share a random stream at initialisation, for any number of ranks


@dataclass
class LookupPlan:
    """Rows that this rank sends and receives for a list of ids.

    position: [n] position of each requested id among the received rows; None: they arrive in the requested order
    outgoing: [s] rows of this rank's range that each rank (itself included) requested, by rank; None: the whole range
    send, receive: number of rows sent to, and received from, each rank
    touched, touched_at: [r] distinct rows among `outgoing`, and [s] the position there of each of `outgoing`; None:
        `outgoing` has no row twice
    """

    position: torch.Tensor | None
    outgoing: torch.Tensor | None
    send: list[int]
    receive: list[int]
    touched: torch.Tensor | None = None
    touched_at: torch.Tensor | None = None


def plan_lookup(ids: torch.Tensor, rows: int, comm: Communicator, trained: bool = True) -> LookupPlan:
    """Plan a look-up of `ids` (int64 [n], repeats allowed) in a table with `rows` rows. Collective: every rank must
    call it.

    Args:
        trained: False: of frozen tables alone, whose rows get no gradient.
    """
    unique, position = torch.unique(ids, return_inverse=True)  # sorted, hence grouped by owner
    bounds = torch.tensor([comm.row_range(rows, r)[0] for r in range(comm.size)] + [rows], device=ids.device)
    if len(unique) and (unique[0] < 0 or unique[-1] >= rows):
        raise IndexError(f"row ids must be in [0, {rows}), found {int(unique[0])} to {int(unique[-1])}")
    receive = torch.searchsorted(unique, bounds).diff().tolist()
    if comm.size == 1:
        return LookupPlan(position, unique, receive, receive)
    asked = torch.tensor(receive, dtype=torch.int64, device=ids.device)
    one_each = [1] * comm.size
    send = comm.all_to_all(asked, one_each, one_each).tolist()
    outgoing = comm.all_to_all(unique, receive, send) - comm.row_range(rows)[0]
    touched = torch.unique(outgoing, return_inverse=True) if trained else (None, None)
    return LookupPlan(position, outgoing, send, receive, *touched)


def plan_whole_table(rows: int, comm: Communicator) -> LookupPlan:
    """Local. Plan a look-up of all rows, in order, by every rank: full-graph propagation."""
    start, stop = comm.row_range(rows)
    receive = [comm.row_range(rows, r)[1] - comm.row_range(rows, r)[0] for r in range(comm.size)]
    outgoing = None
    if comm.size > 1:
        outgoing = torch.arange(stop - start, device=comm.device).repeat(comm.size)
    return LookupPlan(None, outgoing, [stop - start] * comm.size, receive)


class ShardedTable:
    """Rows [start, stop) of a table with `rows` x `width` entries, on this rank.

    Args:
        name: seeds the random stream of the initial values and names the files of a checkpoint.
        init_std: standard deviation of the normal initial values, for all columns or for each; 0: zeros.
        seed: of the initial values, which are the same for any number of ranks.
        trainable: False: no gradient and no optimizer state.
        rowwise_second_moment: Adam's second moment is one number per row, the mean over its width, as in FBGEMM's
            `PARTIAL_ROWWISE_ADAM`: a third less memory.
        learning_rate: its own, in place of that of `adam_step`.
    """

    def __init__(
        self,
        name: str,
        rows: int,
        width: int,
        comm: Communicator,
        *,
        init_std: float | torch.Tensor = 0.0,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        trainable: bool = True,
        rowwise_second_moment: bool = False,
        learning_rate: float | None = None,
    ):
        self.name, self.rows, self.width, self.comm, self.trainable = name, rows, width, comm, trainable
        self.learning_rate = learning_rate
        self.start, self.stop = comm.row_range(rows)
        self.weight = torch.zeros(self.stop - self.start, width, dtype=dtype, device=comm.device)
        if torch.as_tensor(init_std).any():
            self._initialise(init_std, seed)
        self.pending: list[tuple[torch.Tensor | None, torch.Tensor]] = []
        self.steps = 0
        self.exp_avg = torch.zeros_like(self.weight) if trainable else None
        self.rowwise_second_moment = rowwise_second_moment
        moments = self.weight[:, :1] if rowwise_second_moment else self.weight
        self.exp_avg_sq = torch.zeros_like(moments) if trainable else None
        self._anchor = torch.zeros((), device=comm.device, requires_grad=trainable)

    def with_values(self, rows: torch.Tensor) -> "ShardedTable":
        """Local. A frozen table over the same ranks with other values for this rank's rows, [n, any width]."""
        table = ShardedTable(self.name, self.rows, 0, self.comm, dtype=rows.dtype, trainable=False)
        table.width, table.weight = rows.shape[1], rows
        return table

    def lookup(self, plan: LookupPlan) -> torch.Tensor:
        """Rows of a plan, [n, width]; differentiable if trainable. A collective, as is its backward pass."""
        return _Lookup.apply(self._anchor, self, plan)

    def gradient(self) -> tuple[torch.Tensor | None, torch.Tensor] | None:
        """Local. The pending gradient as (rows of this rank's range or None for all, values), mean over the ranks'
        losses.

        Rows are unique. None where no lookup was differentiated.
        """
        if not self.pending:
            return None
        if len(self.pending) == 1:
            rows, values = self.pending[0]
            return rows, values / self.comm.size if self.comm.size > 1 else values
        everything = torch.arange(len(self.weight), device=self.weight.device)
        ids = torch.cat([everything if rows is None else rows for rows, _ in self.pending])
        values = torch.cat([grad for _, grad in self.pending])
        unique, position = torch.unique(ids, return_inverse=True)
        summed = values.new_zeros(len(unique), self.width).index_add_(0, position, values)
        return unique, summed / self.comm.size

    @torch.no_grad()
    def adam_step(
        self,
        lr: float,
        not_finite: torch.Tensor | None = None,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        """Local. Adam on the rows with a pending gradient (torch.optim.SparseAdam's arithmetic), which is then
        cleared.

        Args:
            not_finite: bool [] on the table's device: the gradients of the step are not finite, so the weights stay as
                they are; the moments may be spoilt, the run ends (gradient_guard.py). None: False.
        """
        gradient = self.gradient()
        self.pending.clear()
        self.steps += 1  # the same on every rank, also if none of its rows was touched
        if gradient is None or len(gradient[1]) == 0:
            return
        rows, grad = gradient
        avg, avg_sq = self.exp_avg, self.exp_avg_sq
        if rows is not None:  # index_select: several times faster than indexing
            avg, avg_sq = avg.index_select(0, rows), avg_sq.index_select(0, rows)
        weight = self.weight if rows is None else self.weight.index_select(0, rows)
        lr = self.learning_rate or lr
        if self.rowwise_second_moment:
            avg.lerp_(grad, 1 - betas[0])
            avg_sq.mul_(betas[1]).add_(grad.square().mean(dim=1, keepdim=True), alpha=1 - betas[1])
            size = lr * (1 - betas[1] ** self.steps) ** 0.5 / (1 - betas[0] ** self.steps)
            update = avg / avg_sq.sqrt().add_(eps)
            if not_finite is not None:  # a branch on the host would wait for the device
                update.masked_fill_(not_finite, 0)
            weight.sub_(update, alpha=size)
        else:
            self._fused_adam(weight, grad, avg, avg_sq, lr, not_finite, betas, eps)
        if rows is not None:
            self.exp_avg.index_copy_(0, rows, avg)
            self.exp_avg_sq.index_copy_(0, rows, avg_sq)
            self.weight.index_copy_(0, rows, weight)

    def _fused_adam(self, weight, grad, avg, avg_sq, lr, not_finite, betas, eps) -> None:
        """Local. One kernel that reads and writes each tensor once; arguments as in `adam_step`. The kernel takes all
        tensors to be contiguous, which a gradient need not be."""
        # torch.optim.Adam adds eps to the corrected second moment, SparseAdam to the moment itself
        corrected_eps = eps / (1 - betas[1] ** self.steps) ** 0.5
        step = torch.full((), self.steps - 1.0, device=weight.device)  # the kernel's caller adds one
        found_inf = None if not_finite is None else not_finite.float()
        adam(
            [weight],
            [grad.contiguous()],
            [avg],
            [avg_sq],
            [],
            [step],
            fused=True,
            found_inf=found_inf,
            amsgrad=False,
            beta1=betas[0],
            beta2=betas[1],
            lr=lr,
            weight_decay=0.0,
            eps=corrected_eps,
            maximize=False,
        )

    def state(self) -> dict[str, torch.Tensor]:
        """Local. This rank's rows, and their optimizer state if they are trainable."""
        tensors = {"weight": self.weight}
        if self.trainable:
            tensors |= {"exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq}
        return tensors

    def _initialise(self, std: float | torch.Tensor, seed: int) -> None:
        for chunk in range(self.start // INIT_ROWS, -(-self.stop // INIT_ROWS)):
            digest = hashlib.sha256(f"{seed}/{self.name}/{chunk}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
            values = torch.randn(INIT_ROWS, self.width, generator=generator) * std
            first = chunk * INIT_ROWS
            low, high = max(first, self.start), min(first + INIT_ROWS, self.stop)
            self.weight[low - self.start : high - self.start] = values[low - first : high - first]


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx, anchor, table, plan):
        ctx.table, ctx.plan = table, plan
        sent = table.weight if plan.outgoing is None else table.weight.index_select(0, plan.outgoing)
        rows = table.comm.all_to_all(sent, plan.send, plan.receive)
        if plan.position is not None:
            return rows.index_select(0, plan.position)
        return rows.clone() if rows is table.weight else rows  # the optimizer changes weights in place

    @staticmethod
    def backward(ctx, grad):
        table, plan = ctx.table, ctx.plan
        if plan.position is not None:
            grad = grad.new_zeros(sum(plan.receive), table.width).index_add_(0, plan.position, grad)
        back = table.comm.all_to_all(grad, plan.receive, plan.send)
        if plan.position is None and table.comm.size > 1:  # every rank asked for the whole range: sum here
            back = back.view(table.comm.size, -1, table.width).sum(0)
            table.pending.append((None, back))
        elif plan.touched is not None:
            summed = back.new_zeros(len(plan.touched), table.width).index_add_(0, plan.touched_at, back)
            table.pending.append((plan.touched, summed))
        else:
            table.pending.append((plan.outgoing, back))
        return torch.zeros_like(ctx.table._anchor), None, None
