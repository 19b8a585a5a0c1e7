"""What a training step asks of a device: few operators, none that the host waits for.

The step runs on torch's `meta` device, which has shapes but no values. There, an operator whose result the host must
know (`item`, `nonzero`, `unique`) fails, and a tensor that comes from the host in the middle of a step is a copy
between two devices, as on a GPU.
"""

from collections import Counter

import pytest
import torch
from small import small_catalog
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from trainings import trainer_of

from gtc_dist.config_file import build_config
from gtc_dist.distributed.collectives import Communicator
from gtc_dist.distributed.device_transfer import to_device
from gtc_dist.training import gradient_guard
from gtc_dist.training.trainer import Trainer

META = torch.device("meta")
NO_LAUNCH = {"_unsafe_view", "_reshape_alias", "detach", "empty", "empty_like", "new_empty"}


@pytest.fixture(scope="module")
def catalog(tmp_path_factory):
    return small_catalog(tmp_path_factory.mktemp("catalog") / "c", users=300, items=200)


class CountedOperators(TorchDispatchMode):
    """Counts operators that launch work on the device, and lists copies between host and device."""

    def __init__(self):
        super().__init__()
        self.launches, self.copies = Counter(), []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        tensors = [value for value in tree_leaves((args, kwargs, out)) if isinstance(value, torch.Tensor)]
        devices = {tensor.device.type for tensor in tensors if tensor.device.type == "meta" or tensor.dim()}
        if "copy" in function.name() and len({tensor.device.type for tensor in tensors}) > 1:
            self.copies.append(function.name())
        elif devices == {"meta"} and not function.is_view and function.name().split("::")[1] not in NO_LAUNCH:
            self.launches[function.name()] += 1
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


def operators_of_a_step(catalog, run: str, model: dict, train: dict, monkeypatch) -> CountedOperators:
    tree = {"data": {"raw": "raw", "catalog": catalog.uri}, "run": {"storage": run, "name": "run"}}
    config = build_config(tree | {"model": model, "train": {"batch_size": 256, **train}}, "test")
    trainer = trainer_of(Communicator(), config, f"{run}/run")
    loader = trainer.loader
    batch = loader.assemble(loader.draw(1, 0, loader._order(1)[loader._rows(0)]))
    trainer.network.train()
    trainer.train_step(batch)  # makes the optimizers' state
    trainer.guard.settle()
    on_meta(trainer)
    batch = to_device(batch, META)
    # the copy of the check is the one thing that goes to the host; it is read after the next step was queued
    checks = []
    monkeypatch.setattr(gradient_guard, "_copy_to_host", lambda values: (checks.append(values), (values, None))[1])
    with CountedOperators() as counted:
        trainer.train_step(batch)
    assert len(checks) == 1
    return counted


MASKED, SAMPLED = {"masked_members": 4}, {"masked_members": 4, "propagation": "sampled"}
GATED = {"variant": "gated", "members": 4, "masked_members": 0}


@pytest.mark.parametrize(
    ("model", "train", "most"),
    [
        (MASKED, {}, 360),
        ({"masked_members": 0}, {}, 250),
        (GATED, {"w_tc": 0.02}, 650),
        (SAMPLED, {}, 410),
        (SAMPLED, {"negatives": {"mode": "shared", "count": 64}, "loss": "softmax", "clip_norm": 1.0}, 450),
    ],
    ids=["default", "network alone", "four members and total correlation", "sampled", "sampled softmax"],
)
def test_a_step_launches_few_operators_and_never_waits(catalog, tmp_path, monkeypatch, model, train, most):
    counted = operators_of_a_step(catalog, str(tmp_path), model, train, monkeypatch)
    assert counted.copies == []
    assert counted.launches.total() <= most


def test_the_filter_and_the_network_of_the_paper_never_wait(catalog, tmp_path, monkeypatch):
    train = {"w_tc": 0.4, "w_diff": 0.7}
    for name, propagation in (("a", "full"), ("b", "sampled")):
        counted = operators_of_a_step(catalog, str(tmp_path / name), {"propagation": propagation}, train, monkeypatch)
        assert counted.copies == []
