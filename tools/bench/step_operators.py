"""Operators that a training step asks of a device.

A step runs on torch's `meta` device, which has shapes but no values. There, an operator whose result the host must know
(`item`, `nonzero`, `unique`) fails, and a tensor that comes from the host in the middle of a step is a copy between two
devices, as on a GPU. So the counts hold for a GPU although none is there.
"""

from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from gtc_dist.distributed.device_transfer import to_device
from gtc_dist.training import gradient_guard
from gtc_dist.training.trainer import Trainer

META = torch.device("meta")
NO_LAUNCH = {"_unsafe_view", "_reshape_alias", "detach", "empty", "empty_like", "new_empty"}


class CountedOperators(TorchDispatchMode):
    """Counts operators that launch work on the device, and lists copies between host and device.

    launches: operator -> count; a fused or foreach optimizer is one.
    copies: operators that copied between host and device.
    bytes: of all tensors that the launched operators read or wrote.
    """

    def __init__(self):
        super().__init__()
        self.launches, self.copies, self.bytes, self.flops = Counter(), [], 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        tensors = [value for value in tree_leaves((args, kwargs, out)) if isinstance(value, torch.Tensor)]
        devices = {tensor.device.type for tensor in tensors if tensor.device.type == "meta" or tensor.dim()}
        if "copy" in function.name() and len({tensor.device.type for tensor in tensors}) > 1:
            self.copies.append(function.name())
        elif devices == {"meta"} and not function.is_view and function.name().split("::")[1] not in NO_LAUNCH:
            self.launches[function.name()] += 1
            self.bytes += sum(tensor.nbytes for tensor in tensors)
        return out


def on_meta(trainer: Trainer) -> None:
    """Move all that a step of the trainer reads and writes to the meta device."""
    replaced = {}
    for module in trainer.network.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                replaced[parameter] = module._parameters[name] = torch.nn.Parameter(parameter.detach().to(META))
        for name, buffer in module._buffers.items():
            module._buffers[name] = buffer.to(META)
    optimizer = trainer.optimizer
    for group in optimizer.param_groups:
        group["params"] = [replaced[parameter] for parameter in group["params"]]
    optimizer.state = {replaced[p]: {k: v.to(META) for k, v in state.items()} for p, state in optimizer.state.items()}
    tables = list(trainer.tables.all())
    if (history := trainer.history) is not None:
        history.every = history.steps = 10**9  # no refresh in this step
        kept = (history.user_inputs, history.item_inputs, history.item_nodes, history.users, history.user_hop)
        tables += {id(table): table for table in (*kept, history.items) if table is not None}.values()
    for table in tables:
        table.weight = table.weight.to(META)
        if table.trainable:
            table.exp_avg, table.exp_avg_sq = table.exp_avg.to(META), table.exp_avg_sq.to(META)
            table._anchor = torch.zeros((), device=META, requires_grad=True)


def operators_of_a_step(trainer: Trainer) -> CountedOperators:
    """Operators of one training step, and its floating-point operations in matrix products, `flops`. The trainer is of
    no use afterwards: its tensors have lost their values.

    Raises:
        RuntimeError: an operator of the step needs a value on the host.
    """
    loader = trainer.loader
    batch = loader.assemble(loader.draw(1, 0, loader._order(1)[loader._rows(0)]))
    trainer.network.train()
    trainer.train_step(batch)  # makes the optimizers' state
    trainer.guard.settle()
    on_meta(trainer)
    batch = to_device(batch, META)
    copy_to_host = gradient_guard._copy_to_host
    # the check of the gradients goes to the host, which reads it after the next step was queued
    gradient_guard._copy_to_host = lambda values: (values, None)
    try:
        with FlopCounterMode(display=False) as flops, CountedOperators() as counted:
            trainer.train_step(batch)
    finally:
        gradient_guard._copy_to_host = copy_to_host
    counted.flops = flops.get_total_flops()
    return counted
