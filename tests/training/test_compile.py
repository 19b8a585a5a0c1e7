"""`train.compile` and `train.precision`: one graph, the same step."""

import json

import pytest
import torch
import torch._dynamo
from ranks import run_ranks
from small import small_catalog, small_config
from trainings import fit, trainer_of

from gtc_dist.data import storage
from gtc_dist.distributed.collectives import Communicator
from gtc_dist.errors import InputError
from gtc_dist.model import build
from gtc_dist.training import trainer

SAMPLED = {"propagation": "sampled", "fanout": [4, 4]}
SHARED = {"negatives": {"mode": "shared", "count": 16}, "loss": "softmax"}


@pytest.fixture(scope="module")
def catalog(tmp_path_factory):
    return small_catalog(tmp_path_factory.mktemp("catalog") / "c")


@pytest.fixture(autouse=True)
def forget_graphs():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def gradients(trainer, forward, batch) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and all gradients of a batch."""
    trainer.ddp_network = forward
    rows = trainer.look_up(batch)
    terms = trainer.forward_backward(batch, rows)
    found = {name: p.grad.clone() for name, p in trainer.network.named_parameters() if p.grad is not None}
    for table in trainer.tables.all():
        found[table.name] = table.gradient()[1].clone()
        table.pending.clear()
    return float(sum(terms.values())), found


def batches_of(trainer, count: int) -> list:
    loader = trainer.loader
    order = loader._order(1)
    return [loader.assemble(loader.draw(1, step, order[loader._rows(step)])) for step in range(count)]


@pytest.mark.parametrize(
    ("model", "train"),
    [
        ({"masked_members": 2}, {"w_tc": 0, "w_diff": 0}),
        ({}, {}),  # the filter and total correlation
        ({"variant": "gated", "members": 2, "user_hop": True}, {"w_diff": 0}),
        # with sizes as symbols: a minute
        pytest.param({**SAMPLED, "masked_members": 2}, SHARED, marks=pytest.mark.long),
    ],
    ids=["default", "filter", "gated", "sampled"],
)
def test_forward_and_backward_are_one_graph(catalog, tmp_path, model, train):
    config = small_config(catalog.uri, str(tmp_path), model=model, train=train)
    trainer = trainer_of(Communicator(), config, f"{tmp_path}/small")
    if trainer.history is not None:
        trainer.history.every = trainer.history.steps = 10**9
    dynamic = True if "propagation" in model else None
    compiled = torch.compile(trainer.network, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for batch in batches_of(trainer, 3):  # other shapes
        loss, found = gradients(trainer, compiled, batch)
        want_loss, want = gradients(trainer, trainer.network, batch)
        assert loss == pytest.approx(want_loss, rel=1e-5)
        assert found.keys() == want.keys()
        for name in want:
            torch.testing.assert_close(found[name], want[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("model", [{"masked_members": 2}, {**SAMPLED, "masked_members": 2}], ids=["full", "sampled"])
def test_bfloat16_changes_a_step_little(catalog, tmp_path, model):
    trainers = {}
    for precision in ("float32", "bf16"):
        config = small_config(catalog.uri, str(tmp_path), model=model, train={"precision": precision})
        trainers[precision] = trainer_of(Communicator(), config, f"{tmp_path}/small")
    [batch] = batches_of(trainers["float32"], 1)
    want_loss, want = gradients(trainers["float32"], trainers["float32"].network, batch)
    loss, found = gradients(trainers["bf16"], trainers["bf16"].network, batch)
    assert loss != want_loss
    assert loss == pytest.approx(want_loss, rel=0.01)
    for name, gradient in want.items():
        assert found[name].dtype == torch.float32
        if gradient.norm() > 1e-6:
            assert float(torch.cosine_similarity(found[name].flatten(), gradient.flatten(), dim=0)) > 0.98, name


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.long)])
def test_a_compiled_training_in_bfloat16_runs_to_its_end(catalog, tmp_path, monkeypatch, backend):
    """Without generated code, which `g++` needs a minute for, and with it."""
    monkeypatch.setattr(trainer, "compile_step", lambda network: build.compile_step(network, backend))
    train = {"epochs": 2, "precision": "bf16", "w_tc": 0, "w_diff": 0}
    valid = {}
    for compile in (False, True):
        train["compile"] = compile
        config = small_config(catalog.uri, str(tmp_path), model={"masked_members": 1}, train=train)
        run = f"{tmp_path}/{compile}"
        fit(Communicator(), run, config)
        lines = storage.read_bytes(f"{run}/metrics.jsonl").decode().splitlines()
        valid[compile] = json.loads(lines[-1])["valid"]["ndcg@20"]
    assert valid[True] == pytest.approx(valid[False], rel=0.05)


def compiled_and_plain(comm: Communicator, config, run: str) -> dict:
    """Gradients of three steps of a rank, from both kinds of step."""
    one, found = trainer_of(comm, config, run), []
    for network in ("plain", "compiled"):
        if network == "compiled":
            build.compile_step(one.network, "aot_eager")
        for batch in batches_of(one, 3):
            found.append(gradients(one, one.ddp_network, batch)[1])
    return {str(number): each for number, each in enumerate(found)}


def test_ranks_compile_the_same_step(catalog, tmp_path):
    """Total correlation over the ranks, and averaged gradients."""
    config = small_config(catalog.uri, str(tmp_path), model={"masked_members": 1}, train={"w_diff": 0})
    for result in run_ranks(compiled_and_plain, 2, config, f"{tmp_path}/small"):
        for step in range(3):
            for name, want in result[str(step)].items():
                torch.testing.assert_close(result[str(step + 3)][name], want, rtol=1e-4, atol=1e-6)


def test_a_machine_without_a_compiler_is_named(catalog, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None)
    config = small_config(catalog.uri, str(tmp_path), train={"compile": True})
    with pytest.raises(InputError, match=r"train.compile is true, but a C\+\+ compiler is missing"):
        trainer_of(Communicator(), config, f"{tmp_path}/small")
