"""`gtc` and `python -m gtc_dist`: every command, its help, and unknown ones."""

import subprocess
import sys

import pytest
from small import ROOT

from gtc_dist.__main__ import COMMANDS


def gtc(*words: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "gtc_dist", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_commands_are_listed():
    done = gtc()
    assert done.returncode == 0
    assert all(f"  {name} " in done.stdout for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_shows_its_help(name):
    done = gtc(name, "--help")
    assert done.returncode == 0, done.stderr
    assert f"python -m gtc_dist.{name}" in done.stdout or f"gtc {name}" in done.stdout


def test_errors_are_those_of_the_command():
    done = gtc("evaluate", "--run", "nowhere")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert done.stderr.startswith("error: nowhere holds no run")
    done = gtc("trian")
    assert done.returncode == 2
    assert done.stderr.startswith("error: unknown command 'trian'")
