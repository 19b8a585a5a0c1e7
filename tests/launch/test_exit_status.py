"""Exit status of the commands (docs/faults.md, Exit status), each of a real process.

Those of a training: 143 after SIGTERM in test_faults.py, 137 for a start of Ray that hangs in test_ray_start.py.
"""

import os
import re
import signal
import subprocess
import sys

import pytest
from small import ROOT, small_catalog, write_config

RUN = "from gtc_dist.errors import *\n\ndef main():\n    {}\n\nrun_command(main)"


@pytest.mark.parametrize(
    ("body", "status", "shown"),
    [
        ("return None", 0, ""),
        ("raise InputError('no file a')", 2, "error: no file a\n"),
        ("raise Unreachable('no answer')", 2, "error: no answer\n"),
        ("raise NotFinite('step 3')", 3, "error: step 3\n"),
        ("raise KeyboardInterrupt", 130, ""),
        ("return 143", 143, ""),
    ],
)
def test_exit_status(body, status, shown):
    done = subprocess.run([sys.executable, "-c", RUN.format(body)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (status, shown)


def test_an_unexpected_error_keeps_its_traceback():
    done = subprocess.run([sys.executable, "-c", RUN.format("raise KeyError('x')")], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("Traceback")


@pytest.mark.parametrize("words", [["train"], ["evaluate", "--run"], ["no-such-command"], ["export", "--run=/nowhere"]])
def test_wrong_words_end_with_2(words):
    done = subprocess.run([sys.executable, "-m", "gtc_dist", *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr


def test_the_documented_table_is_complete():
    text = (ROOT / "docs/faults.md").read_text().partition("## Exit status")[2].partition("\n## ")[0]
    documented = {int(found) for found in re.findall(r"^\| (\d+) \|", text, re.M)}
    assert documented == {0, 1, 2, 3, 130, 137, 143}


@pytest.mark.long
def test_ctrl_c_ends_a_training_with_130(tmp_path):
    catalog = small_catalog(tmp_path / "catalog")
    words = [
        "--config",
        write_config(tmp_path, catalog.uri, str(tmp_path / "runs")),
        "train.epochs=10000",
        "eval.patience=10000",
    ]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-m", "gtc_dist.train", *words], start_new_session=True, **pipes) as command:
        for line in command.stdout:
            if "epoch 2/" in line:
                os.killpg(command.pid, signal.SIGINT)  # as a terminal does: to Ray's processes, too
                break
        out, err = command.communicate(timeout=120)
        assert command.returncode == 130, out[-2000:] + err
    assert "SIGINT received: saving the training state" in out
    assert re.search(r"^stopped at epoch \d+, step \d+, state saved; rerun the same command to resume$", out, re.M)
    assert list((tmp_path / "runs/r/checkpoints").glob("step-*/manifest.json"))
    assert "Traceback" not in err
