"""Steps whose loss or gradient is not finite: they end the run and can be replayed, or are skipped; clipping."""

import json

import numpy as np
import pytest
import torch
from ranks import run_ranks
from small import small_catalog, small_config
from trainings import trainer_of

from gtc_dist import train
from gtc_dist.data import storage
from gtc_dist.distributed.collectives import Communicator
from gtc_dist.errors import InputError, NotFinite, run_command
from gtc_dist.training.gradient_guard import dump_step
from gtc_dist.training.step_replay import read_dumped_step, replay_step


@pytest.fixture(scope="module")
def catalog(tmp_path_factory):
    return small_catalog(tmp_path_factory.mktemp("catalog") / "c")


def poisoned(trainer, at: int, part: str = "loss", ranks: tuple[int, ...] = (0,)):
    """The trainer, with a loss or a gradient of one step that is not finite, on some ranks."""
    gradients, done = trainer.forward_backward, 0

    def bad(batch, rows):
        nonlocal done
        parts = gradients(batch, rows)
        done += 1
        if done == at and trainer.comm.rank in ranks:
            if part == "loss":
                parts["tc"] = parts["tc"] * float("nan")
            elif part == "table":
                trainer.tables.item.pending[0][1][3, 2] = float("inf")
            else:
                trainer.network.members[0].project[0].weight.grad[0, 0] = float("nan")
        return parts

    trainer.forward_backward = bad
    return trainer


def config_of(catalog, run, **keys):
    config = small_config(catalog.uri, str(run), train={"epochs": 2, "log_every": 3, **keys})
    storage.write_bytes(f"{run}/small/config.yaml", config.model_dump_json().encode())
    return config


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("loss", "loss tc"),
        ("table", "gradient of the item table"),
        ("dense", r"gradient of members\.0\.project\.0\.weight"),
    ],
)
def test_a_step_that_is_not_finite_ends_the_run_and_changes_no_weight(catalog, tmp_path, part, message):
    config = config_of(catalog, tmp_path)
    trainer = poisoned(trainer_of(Communicator(), config, f"{tmp_path}/small"), 5, part)
    with pytest.raises(
        NotFinite, match=rf"epoch 1, step 5: .*{message}\. The batch is in .*/not-finite-epoch-1-step-5"
    ):
        trainer.fit()
    assert all(table.weight.isfinite().all() for table in trainer.tables.all())
    assert all(p.isfinite().all() for p in trainer.network.parameters())


@pytest.mark.parametrize("part", ["loss", "table", "dense"])
def test_the_host_learns_of_a_bad_step_after_the_next_backward_pass(catalog, tmp_path, part):
    """Until then nothing has changed: the file holds the weights that the bad step met."""
    trainer = poisoned(
        trainer_of(Communicator(), config_of(catalog, tmp_path, log_every=100), f"{tmp_path}/small"), 5, part
    )
    step, met = trainer.train_step, []

    def kept(batch):
        dense = {name: value.clone() for name, value in trainer.network.state_dict().items()}
        met.append((dense, [table.weight.clone() for table in trainer.tables.all()]))
        return step(batch)

    trainer.train_step = kept
    with pytest.raises(NotFinite, match="epoch 1, step 5"):
        trainer.fit()
    assert len(met) == 6
    for (dense, tables), found in zip(met[4:], ("the bad step", "the next one"), strict=True):
        assert all(torch.equal(dense[name], value) for name, value in trainer.network.state_dict().items()), found
        for table, weight in zip(trainer.tables.all(), tables, strict=True):
            assert torch.equal(table.weight, weight), found
    assert not torch.equal(met[3][1][0], met[4][1][0])
    [name] = [name for name in storage.listing(f"{tmp_path}/small") if name.startswith("not-finite")]
    dumped = read_dumped_step(f"{tmp_path}/small/{name}")
    assert all(torch.equal(dumped.network[name], value) for name, value in met[4][0].items())


def test_the_check_of_an_epochs_last_step_is_read_before_its_validation(catalog, tmp_path):
    config = config_of(catalog, tmp_path)
    trainer = trainer_of(Communicator(), config, f"{tmp_path}/small")
    steps = trainer.loader.steps
    validate, epochs = trainer._validate, []
    trainer._validate = lambda epoch: (epochs.append(epoch), validate(epoch))[1]
    with pytest.raises(NotFinite, match=f"epoch 1, step {steps}"):
        poisoned(trainer, steps).fit()
    assert epochs == [0]


def replayed(folder, capsys) -> dict:
    """Report that --replay prints on the file in the run folder."""
    [name] = [name for name in storage.listing(str(folder)) if name.startswith("not-finite")]
    capsys.readouterr()
    assert train.main(["--replay", f"{folder}/{name}"]) == 0
    return json.loads(capsys.readouterr().out)


def test_replay_computes_the_step_again(catalog, tmp_path, capsys):
    config = config_of(catalog, tmp_path, checkpoint_minutes=0.0)
    trainer = poisoned(trainer_of(Communicator(), config, f"{tmp_path}/small"), 9)
    with pytest.raises(NotFinite):
        trainer.fit()
    before = storage.listing(f"{tmp_path}/small")
    report = replayed(tmp_path / "small", capsys)
    assert (report["pairs"], report["newest_checkpoint"]) == (30, "after 3 steps")
    assert report["not_finite"] == []  # the bad value was injected after the gradients
    assert set(report["loss"]) == {"bpr", "tc", "diffusion", "l2"}
    assert all(np.isfinite(norm) for norm in report["gradient_norms"].values())
    assert storage.listing(f"{tmp_path}/small") == before


def test_replay_uses_the_weights_of_the_step(catalog, tmp_path, capsys):
    """They were finite at the last checkpoint; the bad ones are only in the file."""
    trainer = trainer_of(Communicator(), config_of(catalog, tmp_path), f"{tmp_path}/small")
    step, done = trainer.train_step, 0

    def broken(batch):
        nonlocal done
        done += 1
        if done == 5:
            with torch.no_grad():
                trainer.tables.item.weight[:] = float("inf")
                trainer.network.members[0].project[0].weight[0, 0] = float("nan")
        return step(batch)

    trainer.train_step = broken
    with pytest.raises(NotFinite, match="loss bpr"):
        trainer.fit()
    report = replayed(tmp_path / "small", capsys)
    assert {"loss bpr", "loss l2", "gradient of the item table"} <= set(report["not_finite"])
    assert not np.isfinite(report["loss"]["bpr"])


def ended_by(comm: Communicator, config, run: str) -> None:
    with pytest.raises(NotFinite):
        poisoned(trainer_of(comm, config, run), 3, ranks=(0, 1)).fit()


SAMPLED = {"propagation": "sampled", "fanout": [3, 3]}


@pytest.mark.parametrize("model", [{"masked_members": 1}, SAMPLED, {**SAMPLED, "layer_nodes": 24}])
def test_one_process_replays_the_step_of_a_rank_among_others(catalog, tmp_path, model):
    config = small_config(catalog.uri, str(tmp_path), train={"epochs": 1}, model=model)
    storage.write_bytes(f"{tmp_path}/small/config.yaml", config.model_dump_json().encode())
    run_ranks(ended_by, 2, config, f"{tmp_path}/small")
    for rank in range(2):
        report = replay_step(f"{tmp_path}/small/not-finite-epoch-1-step-3-rank-{rank}.npz")
        assert 0 < report["pairs"] < config.train.batch_size
        assert report["not_finite"] == []
        assert all(np.isfinite(value) for value in report["loss"].values())


def test_a_step_that_version_0_2_wrote_is_replayed(catalog, tmp_path):
    """It has nothing of the masked diffusion, which its network lacks."""
    config = config_of(catalog, tmp_path)
    with pytest.raises(NotFinite):
        poisoned(trainer_of(Communicator(), config, f"{tmp_path}/small"), 2).fit()
    storage.write_bytes(f"{tmp_path}/small/config.yaml", config.model_dump_json().encode())
    path = f"{tmp_path}/small/not-finite-epoch-1-step-2-rank-0.npz"
    want = replay_step(path)
    with np.load(path) as file:
        older = {name: file[name] for name in file.files if not name.startswith("mask")}
        assert len(older) == len(file.files) - 3
    np.savez(path, **older)
    assert str(replay_step(path)) == str(want)


def test_replay_refuses_another_network(catalog, tmp_path):
    config = config_of(catalog, tmp_path)
    trainer = poisoned(trainer_of(Communicator(), config, f"{tmp_path}/small"), 2)
    with pytest.raises(NotFinite):
        trainer.fit()
    wider = config.model_copy(update={"model": config.model.model_copy(update={"width": 2 * config.model.width})})
    storage.write_bytes(f"{tmp_path}/small/config.yaml", wider.model_dump_json().encode())
    for name in [name for name in storage.listing(f"{tmp_path}/small") if name.startswith("checkpoints")]:
        storage.remove_tree(f"{tmp_path}/small/{name}")
    with pytest.raises(InputError, match="another network"):
        replay_step(f"{tmp_path}/small/not-finite-epoch-1-step-2-rank-0.npz")


def test_a_command_prints_one_line_and_exits_with_status_3(capsys):
    def main():
        try:
            raise NotFinite("epoch 1, step 2: the loss is not finite")
        except NotFinite as error:
            raise RuntimeError("a rank failed") from error

    with pytest.raises(SystemExit) as ended:
        run_command(main)
    assert ended.value.code == 3
    assert capsys.readouterr().err == "error: epoch 1, step 2: the loss is not finite\n"


def test_the_file_holds_the_batch(catalog, tmp_path):
    config = config_of(catalog, tmp_path)
    trainer = trainer_of(Communicator(), config, f"{tmp_path}/small")
    order = trainer.loader._order(1)
    draws = trainer.loader.draw(1, 0, order[trainer.loader._rows(0)])
    batch = trainer.loader.assemble(draws)
    rows = trainer.look_up(batch)
    storage.write_bytes(f"{tmp_path}/small/b.npz", dump_step(batch, rows, trainer.network))
    dumped = read_dumped_step(f"{tmp_path}/small/b.npz")
    again = dumped.drawn
    for name in ("users", "positives", "negatives", "timesteps", "noise", "dropout"):
        assert np.array_equal(getattr(again, name), getattr(draws, name)), name
    assert np.array_equal(dumped.all_pairs, np.stack([draws.users, draws.positives], axis=1))
    assert dumped.ranks == 1
    assert (again.permutation_seed, again.sampler_seed, again.counts) == (
        draws.permutation_seed,
        draws.sampler_seed,
        draws.counts,
    )
    assert all(torch.equal(a, b) for a, b in zip(dumped.rows.values(), rows, strict=True))
    assert all(torch.equal(dumped.network[name], value) for name, value in trainer.network.state_dict().items())


def test_other_files_are_refused(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        replay_step(f"{tmp_path}/none.npz")
    (tmp_path / "x.npz").write_bytes(b"no archive")
    with pytest.raises(InputError, match="is not a step"):
        replay_step(f"{tmp_path}/x.npz")
    np.savez(tmp_path / "p.npz", users=np.array([{}], dtype=object))
    with pytest.raises(InputError, match="is not a step"):
        replay_step(f"{tmp_path}/p.npz")


def skipping(comm: Communicator, config, run: str, ranks: tuple[int, ...]) -> dict:
    trainer = poisoned(trainer_of(comm, config, run), 4, "table", ranks)
    weights = []
    step = trainer.train_step

    def kept(batch):
        parts = step(batch)
        weights.append(trainer.tables.item.weight.clone())
        return parts

    trainer.train_step = kept
    result = trainer.fit()
    shown = train.summary(run, result).splitlines()[-1]
    return {"weights": weights[:5], "skipped": result["skipped_steps"], "shown": shown}


@pytest.mark.parametrize("size", [1, 2])
def test_a_step_is_skipped_on_all_ranks_and_counted(catalog, tmp_path, size):
    config = config_of(catalog, tmp_path, not_finite="skip")
    for result in run_ranks(skipping, size, config, f"{tmp_path}/small", (size - 1,)):
        w = result["weights"]
        assert result["skipped"] == 1
        assert result["shown"] == "warning: 1 step(s) skipped, because their loss or gradient was not finite"
        assert torch.equal(w[3], w[2])
        assert not torch.equal(w[4], w[3])
        assert all(x.isfinite().all() for x in w)


def clipped(comm: Communicator, config, run: str, clip: float | None) -> dict:
    trainer = trainer_of(comm, config, run)
    trainer.guard.clip = clip
    batch = trainer.loader.assemble(trainer.loader.draw(1, 0, trainer.loader._order(1)[trainer.loader._rows(0)]))
    rows = trainer.look_up(batch)
    trainer.guard.check(trainer.forward_backward(batch, rows), batch, rows, "here", measure=True)
    measured = float(comm.all_reduce(trainer.guard.norm_share).sqrt())
    dense = sum(p.grad.square().sum() for p in trainer.network.parameters() if p.grad is not None)
    own = sum(table.gradient()[1].square().sum() for table in trainer.tables.all())
    norm, row = float((dense + comm.all_reduce(own)).sqrt()), trainer.tables.user.gradient()[1][0].clone()
    return {"norm": norm, "measured": measured, "row": row}


@pytest.mark.parametrize("size", [1, 2])
def test_gradients_of_all_ranks_are_clipped_by_their_common_norm(catalog, tmp_path, size):
    config = config_of(catalog, tmp_path)
    free = run_ranks(clipped, size, config, f"{tmp_path}/small", None)
    norm = free[0]["norm"]
    cut = run_ranks(clipped, size, config, f"{tmp_path}/small", norm / 4)
    wide = run_ranks(clipped, size, config, f"{tmp_path}/small", norm * 4)
    for rank in range(size):
        # measured before clipping
        assert [each[rank]["measured"] for each in (free, cut, wide)] == pytest.approx([norm] * 3, rel=1e-5)
        assert cut[rank]["norm"] == pytest.approx(norm / 4, rel=1e-4)
        torch.testing.assert_close(cut[rank]["row"], free[rank]["row"] / 4)
        assert torch.equal(wide[rank]["row"], free[rank]["row"])
