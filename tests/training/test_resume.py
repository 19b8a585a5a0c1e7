"""Resume of an interrupted run: bit-exact on the same number of ranks, with every interaction on another number."""

import json
import re
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from small import GATED, small_catalog, small_config
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from trainings import trainer_of

from gtc_dist.checkpoint import checkpoint_files
from gtc_dist.checkpoint.run_folder import step_name
from gtc_dist.data import formats, storage
from gtc_dist.distributed.collectives import Communicator
from gtc_dist.errors import Unreachable
from gtc_dist.tracking.charts import TIMED
from gtc_dist.training import checkpointing

SAMPLED = {"propagation": "sampled", "fanout": [3, 3]}
MODES = {
    "full": {},
    "masked diffusion": {"model": {"masked_members": 2}, "train": {"ema_decay": 0.5}},
    "hybrid, averaged, four steps an epoch": {
        "model": {**GATED, "hybrid": {"graph_filter": 3, "content_profile": 3}},
        "train": {"ema_decay": 0.5, "epoch_steps": 4, "epochs": 6},
        "eval": {"every": 2},
    },
    "sampled with a history": {"model": SAMPLED, "train": {"refresh": 4, "negatives": {"mode": "shared", "count": 9}}},
    "rowwise, no history": {"model": SAMPLED, "train": {"refresh": 0, "table_optimizer": "rowwise_adam"}},
}


class Cut(Exception):
    """Interrupts a training, like the end of its process."""


@pytest.fixture(scope="module")
def catalog(tmp_path_factory):
    return small_catalog(tmp_path_factory.mktemp("catalog") / "c")


def config_of(catalog, mode: dict, **train):
    always = {"epochs": 3, "log_every": 3, "checkpoint_minutes": 0.0}
    mode = {**mode, "train": {**always, **mode.get("train", {}), **train}}
    return small_config(catalog.uri, **mode)


def cut_after(comm: Communicator, config, run: str, steps: int) -> dict:
    """Train until an interruption in a step, the same one on every rank."""
    trainer = trainer_of(comm, config, run)
    done = 0
    whole_step = trainer.train_step

    def step(batch):
        nonlocal done
        done += 1
        for pending in (trainer.writer.pending_best, trainer.writer.pending):
            if pending is not None:
                pending.thread.join()  # on a slow machine too, the state before the last one is whole
        if done > steps:
            raise Cut
        return whole_step(batch)

    trainer.train_step = step
    try:
        trainer.fit()
    except Cut:
        time.sleep(1.01 - time.time() % 1)  # names of TensorBoard's files order them by the second
    return {"states": list(trainer.writer.states)}


def train(comm: Communicator, config, run: str) -> dict:
    trainer = trainer_of(comm, config, run)
    trainer.fit()
    return {
        "user": trainer.tables.user.weight,
        "item": trainer.tables.item.weight,
        "network": dict(trainer.network.state_dict()),
        "rows": trainer.loader.interactions_per_rank,
    }


def ranks(function, size: int, *args) -> list:
    return run_ranks(function, size, *args)


def metrics(run) -> dict:
    found = json.loads(Path(run, "metrics.json").read_text())
    return {name: value for name, value in found.items() if not name.startswith("seconds")}


def curves(run) -> dict[str, list]:
    """TensorBoard's curves, without those that measure time or memory."""
    events = EventAccumulator(str(Path(run, "tensorboard")), size_guidance={"scalars": 0}).Reload()
    tags = [t for t in events.Tags()["scalars"] if not t.startswith(TIMED)]
    assert {"1_quality/recall@20", "2_loss/total", "4_health/gradient_norm"} <= set(tags)
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in tags}


def assert_same(one: list, other: list) -> None:
    for a, b in zip(one, other, strict=True):
        assert torch.equal(a["user"], b["user"])
        assert torch.equal(a["item"], b["item"])
        assert all(torch.equal(a["network"][name], b["network"][name]) for name in a["network"])


@pytest.mark.parametrize("mode", MODES)
def test_an_interrupted_run_ends_with_the_result_of_an_undisturbed_one(catalog, tmp_path, mode):
    config = config_of(catalog, MODES[mode])
    whole = [train(Communicator(), config, str(tmp_path / "whole"))]
    for steps in (1, 5, 7, 9):
        cut_after(Communicator(), config, str(tmp_path / "cut"), steps)  # resumes from the interruption before
    assert not Path(tmp_path, "cut/metrics.json").exists()
    continued = [train(Communicator(), config, str(tmp_path / "cut"))]
    assert_same(continued, whole)
    assert metrics(tmp_path / "cut") == metrics(tmp_path / "whole")
    lines = [Path(tmp_path, name, "metrics.jsonl").read_text() for name in ("cut", "whole")]
    assert lines[0] == lines[1]
    assert curves(tmp_path / "cut") == curves(tmp_path / "whole")


def test_states_are_saved_where_every_validation_comes_before_a_refresh_is_due(catalog, tmp_path):
    config = config_of(catalog, {"model": SAMPLED}, refresh=1, epoch_steps=3, epochs=6)
    whole = [train(Communicator(), config, str(tmp_path / "whole"))]
    assert trainer_of(Communicator(), config, str(tmp_path / "new")).history.every > 6
    cut = cut_after(Communicator(), config, str(tmp_path / "cut"), 16)
    assert cut["states"][-1] == step_name(9)
    assert_same([train(Communicator(), config, str(tmp_path / "cut"))], whole)
    assert metrics(tmp_path / "cut") == metrics(tmp_path / "whole")
    assert curves(tmp_path / "cut") == curves(tmp_path / "whole")


def test_states_of_runs_without_a_history_come_after_validations_too(catalog, tmp_path):
    config = config_of(catalog, {}, epoch_steps=3, epochs=4)
    whole = [train(Communicator(), config, str(tmp_path / "whole"))]
    cut = cut_after(Communicator(), config, str(tmp_path / "cut"), 8)
    assert cut["states"] == [step_name(3)]
    assert_same([train(Communicator(), config, str(tmp_path / "cut"))], whole)
    assert curves(tmp_path / "cut") == curves(tmp_path / "whole")


def test_a_state_that_cannot_be_read_at_the_moment_is_not_removed(catalog, tmp_path, monkeypatch):
    config = config_of(catalog, MODES["full"])
    cut_after(Communicator(), config, str(tmp_path / "cut"), 9)
    before = storage.listing(str(tmp_path / "cut"))

    def away(*args):
        raise Unreachable("cannot reach the object store")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_files, "load", away)
        with pytest.raises(Unreachable, match=r"checkpoint step-0+\d+ could not be read: cannot reach"):
            train(Communicator(), config, str(tmp_path / "cut"))
    assert storage.listing(str(tmp_path / "cut")) == before


def test_an_interrupted_run_of_two_ranks_has_the_same_result(catalog, tmp_path):
    config = config_of(catalog, MODES["sampled with a history"])
    whole = ranks(train, 2, config, str(tmp_path / "whole"))
    cut = ranks(cut_after, 2, config, str(tmp_path / "cut"), 8)
    assert cut[0]["states"]
    assert cut[0] == cut[1]
    assert_same(ranks(train, 2, config, str(tmp_path / "cut")), whole)
    assert metrics(tmp_path / "cut") == metrics(tmp_path / "whole")


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2), (4, 3)])
def test_resume_on_another_number_of_ranks(catalog, tmp_path, before, after, capfd):
    config = config_of(catalog, {"train": {"ema_decay": 0.5}})
    run = str(tmp_path / "run")
    cut = ranks(cut_after, before, config, run, 7)
    state = checkpoint_files.read_manifest(f"{run}/checkpoints/{cut[0]['states'][-1]}")
    capfd.readouterr()
    results = ranks(train, after, config, run)
    assert f"resuming at epoch {state['epoch']}, step {state['step']}" in capfd.readouterr().out
    assert all(sum(result["rows"]) == catalog.manifest.interactions["train"] for result in results)
    for name in ("network",):  # dense modules stay the same on every rank
        for result in results[1:]:
            assert all(torch.equal(result[name][k], results[0][name][k]) for k in result[name])
    assert metrics(run)["last_epoch"] == 3
    steps = [step for step, _ in curves(run)["2_loss/bpr"]]
    assert steps == sorted(set(steps))  # none lost, none twice
    assert len(steps) == len(curves_of_an_undisturbed_run(config, tmp_path))


def curves_of_an_undisturbed_run(config, tmp_path) -> list:
    train(Communicator(), config, str(tmp_path / "undisturbed"))
    return curves(tmp_path / "undisturbed")["2_loss/bpr"]


def test_a_stop_request_saves_the_state_and_ends_the_training(catalog, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpointing, "POLL_SECONDS", 0.0)
    config = config_of(catalog, {}, checkpoint_minutes=60.0)
    whole = [train(Communicator(), config, str(tmp_path / "whole"))]
    answers = iter(["", "", "leave"])
    trainer = trainer_of(Communicator(), config, str(tmp_path / "stopped"), stop_request=lambda: next(answers))
    assert trainer.fit() is None
    states, incomplete = checkpoint_files.list_checkpoints(str(tmp_path / "stopped"), "step-")
    assert (len(states), incomplete) == (1, [])
    assert_same([train(Communicator(), config, str(tmp_path / "stopped"))], whole)


def test_a_preemption_notice_saves_the_state_and_training_continues(catalog, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpointing, "POLL_SECONDS", 0.0)
    config = config_of(catalog, MODES["sampled with a history"], checkpoint_minutes=60.0)
    answers, saved = iter(["", "save"]), []
    trainer = trainer_of(Communicator(), config, str(tmp_path / "r"), stop_request=lambda: next(answers, ""))
    finalize = trainer.writer.finalize
    trainer.writer.finalize = lambda: (
        trainer.writer.pending and saved.append(trainer.state.progress.step),
        finalize(),
    )[1]
    assert trainer.fit() is not None
    assert saved[0] == 6  # the second logging of losses, whether or not a refresh is due
    assert len(saved) == 2  # and at the end


def test_more_epochs_continue_a_finished_run(catalog, tmp_path):
    train(Communicator(), config_of(catalog, {}, epochs=2), str(tmp_path / "run"))
    longer = config_of(catalog, {}, epochs=4)
    whole = [train(Communicator(), longer, str(tmp_path / "whole"))]
    assert_same([train(Communicator(), longer, str(tmp_path / "run"))], whole)


def test_an_incomplete_or_changed_state_is_skipped_with_a_warning(catalog, tmp_path, capsys):
    config = config_of(catalog, {})
    whole = [train(Communicator(), config, str(tmp_path / "whole"))]
    run = tmp_path / "run"
    cut_after(Communicator(), config, str(run), 11)
    first, last = checkpoint_files.list_checkpoints(str(run), "step-")[0]
    data = bytearray((run / "checkpoints" / last / "item.exp_avg.000000000000-000000000040.npy").read_bytes())
    data[-1] ^= 1
    (run / "checkpoints" / last / "item.exp_avg.000000000000-000000000040.npy").write_bytes(data)
    incomplete = run / "checkpoints/step-000000000099"
    incomplete.mkdir()
    (incomplete / "dense.pt").write_bytes(b"half of it")
    capsys.readouterr()
    continued = [train(Communicator(), config, str(run))]
    printed = capsys.readouterr().out
    assert f"warning: checkpoint {last} is not used: " in printed
    assert "item.exp_avg.000000000000-000000000040.npy was changed" in printed
    assert_same(continued, whole)
    assert not incomplete.exists()
    assert first  # training resumed from this state


def test_training_starts_from_scratch_if_no_state_is_usable(catalog, tmp_path, capsys):
    config = config_of(catalog, {"train": {"ema_decay": 0.5}})
    whole = [train(Communicator(), config, str(tmp_path / "whole"))]
    run = tmp_path / "run"
    cut_after(Communicator(), config, str(run), 11)
    for name in checkpoint_files.list_checkpoints(str(run), "step-")[0]:
        (run / "checkpoints" / name / "dense.pt").write_bytes(b"other")
    assert_same([train(Communicator(), config, str(run))], whole)
    assert capsys.readouterr().out.count("is not used") == 2


def test_only_the_last_states_and_the_best_checkpoints_they_refer_to_are_kept(catalog, tmp_path):
    config = config_of(catalog, {}, epochs=6)
    run = str(tmp_path / "run")
    train(Communicator(), config, run)
    states, incomplete = checkpoint_files.list_checkpoints(run, "step-")
    assert (len(states), incomplete) == (2, [])
    known = {checkpoint_files.read_manifest(f"{run}/checkpoints/{name}")["best_epoch"] for name in states}
    best = metrics(run)["best_epoch"]
    assert set(checkpoint_files.list_checkpoints(run, "epoch-")[0]) == {
        f"epoch-{epoch:05d}" for epoch in known | {best}
    }


def train_on_a_full_disk(comm: Communicator, config, run: str, full: str) -> list:
    """Train with a full disk when rank 0 writes a file whose name contains `full` for the second time. Returns the
    result of the training, and whether this rank met the full disk."""
    calls = []

    def of(write):
        def writes(uri, *args):
            if comm.rank == 0 and "/step-" in uri and full in uri:
                calls.append(uri)
                if len(calls) == 2:
                    raise OSError(28, "No space left on device")
            return write(uri, *args)

        return writes

    with pytest.MonkeyPatch.context() as patch:
        for module, name in ((formats, "write_array"), (storage, "write_json"), (storage, "write_bytes")):
            patch.setattr(module, name, of(getattr(module, name)))
        return [train(comm, config, run), len(calls) >= 2]


@pytest.mark.parametrize("full", [pytest.param("user.exp_avg.", marks=pytest.mark.long), "manifest.json"])
def test_a_state_that_cannot_be_written_is_skipped_and_training_continues(catalog, tmp_path, capfd, full):
    config, run = config_of(catalog, {}), str(tmp_path / "run")
    whole = run_ranks(train, 2, config, str(tmp_path / "whole"))
    ranks = run_ranks(train_on_a_full_disk, 2, config, run, full)
    assert [met for _, met in ranks] == [True, False]
    assert_same([result for result, _ in ranks], whole)
    printed = capfd.readouterr().out
    assert printed.count("could not be written and is skipped: [Errno 28] No space left on device") == 1
    assert checkpoint_files.list_checkpoints(run, "step-")[1] == []
    assert len(checkpoint_files.list_checkpoints(run, "step-")[0]) == 2


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a file system of its own that holds 2 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "none", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"mounting a small file system takes rights that are missing here: {mounted.stderr.decode()}")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's writer
def test_a_disk_that_is_really_full(catalog, small_disk, capfd):
    """Full from the middle of the second epoch: states are skipped, until the run ends at a file that it needs. With
    free space the run resumes."""
    config, run = config_of(catalog, {}), str(small_disk / "run")
    whole = [train(Communicator(), config, str(small_disk.parent / "whole"))]
    trainer, ballast, steps = trainer_of(Communicator(), config, run), small_disk / "ballast", []
    step = trainer.train_step

    def step_on_a_full_disk(batch):
        steps.append(batch)
        if len(steps) == trainer.loader.steps + 3:
            with open(ballast, "wb", buffering=0) as file, suppress(OSError):
                while True:
                    file.write(bytes(4096))
        return step(batch)

    trainer.train_step = step_on_a_full_disk
    with pytest.raises(OSError, match="No space left"):
        trainer.fit()
    assert re.search(r"step-0+14 could not be written and is skipped: .*No space left", capfd.readouterr().out)
    assert checkpoint_files.list_checkpoints(run, "step-")[1] == []
    ballast.unlink()
    assert_same([train(Communicator(), config, run)], whole)
    assert metrics(run) == metrics(small_disk.parent / "whole")
