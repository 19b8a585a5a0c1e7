"""Functions of large tensors that have a backward pass of their own.

Autograd differentiates one operator after the other, so that each writes a tensor and the next reads it. At these sizes
a step waits for memory, not for arithmetic: the functions here touch it less often, with the same values.
"""

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

SMALLEST_NORM = 1e-12  # as in torch.nn.functional.normalize


def unit_rows(x: torch.Tensor) -> torch.Tensor:
    """x [..., D] divided by the L2 norms of its rows; rows of zeros stay zeros."""
    if torch.compiler.is_compiling():  # which fuses the operators itself, and fails on this function at varying shapes
        return F.normalize(x, dim=-1, eps=SMALLEST_NORM)
    return _UnitRows.apply(x)


def inner_products(x: torch.Tensor) -> torch.Tensor:
    """Inner products of the rows of each matrix of x [n, v, D]: float32 [n, v, v], also under autocast."""
    if torch.compiler.is_compiling():
        with torch.autocast(x.device.type, enabled=False):
            return torch.bmm(x, x.transpose(1, 2))
    return _InnerProducts.apply(x)


def mix_rows(mix: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Matrix products mix [n, w, v] with x [n, v, D]: float32 [n, w, D], also under autocast."""
    if torch.compiler.is_compiling():
        with torch.autocast(x.device.type, enabled=False):
            return torch.bmm(mix, x)
    return _MixRows.apply(mix.contiguous(), x)


def log_partition(
    users: torch.Tensor,
    items: torch.Tensor,
    bias: torch.Tensor,
    offset: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """log of the sum over items of exp(users . items + bias - offset), float32 [members, m].

    Args:
        users: [members, m, D]; items: [members, n, D]; bias: [members, n]; offset: a constant [m, n], or None.
        dtype: of the matrix products.
    """
    return _LogPartition.apply(users, items, bias, offset, dtype)


class _UnitRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min(SMALLEST_NORM)
        unit = x / norm
        ctx.save_for_backward(unit, norm)
        return unit

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        unit, norm = ctx.saved_tensors
        along = (grad * unit).sum(-1, keepdim=True)
        return torch.addcmul(grad, unit, along, value=-1).div_(norm)


# Autocast leaves operators that are told where to write alone. Products of small matrices are fast while these are
# contiguous, which gradients of permuted ones are not.
class _InnerProducts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return torch.bmm(x, x.transpose(1, 2), out=x.new_empty(len(x), x.shape[1], x.shape[1]))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        [x] = ctx.saved_tensors
        return torch.bmm((grad + grad.transpose(1, 2)).contiguous(), x)


class _MixRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, mix, x):
        ctx.save_for_backward(mix, x)
        return torch.bmm(mix, x, out=x.new_empty(len(x), mix.shape[1], x.shape[2]))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        mix, x = ctx.saved_tensors
        grad = grad.contiguous()
        return torch.bmm(grad, x.transpose(1, 2)), torch.bmm(mix.transpose(1, 2), grad)


class _LogPartition(torch.autograd.Function):
    """The gradient of a log partition function is the softmax, which the forward pass keeps in place of the scores."""

    @staticmethod
    def forward(ctx, users, items, bias, offset, dtype):
        scores = torch.bmm(users.to(dtype), items.to(dtype).transpose(1, 2)).float().add_(bias[:, None])
        if offset is not None:
            scores.sub_(offset)
        softmax = torch.softmax(scores, dim=2)
        log_sum = scores.amax(2) - softmax.amax(2).log()
        ctx.save_for_backward(users, items, softmax.to(dtype))
        return log_sum

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        users, items, softmax = ctx.saved_tensors
        dtype, column = softmax.dtype, grad[:, :, None]
        of_users = torch.bmm(softmax, items.to(dtype)).float() * column
        weighted = (users * column).to(dtype)
        of_items = torch.bmm(softmax.transpose(1, 2), weighted).float()
        of_bias = torch.bmm(grad[:, None].to(dtype), softmax).float().squeeze(1)
        return of_users, of_items, of_bias, None, None
