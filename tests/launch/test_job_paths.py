"""Relative paths in a Ray job: refused in one line, before any work."""

import subprocess
import sys
from pathlib import Path

import pytest

from gtc_dist.errors import InputError
from gtc_dist.launch.job_paths import JOB_VARIABLE, refuse_relative_paths

ROOT = Path(__file__).resolve().parents[2]
ABSOLUTE = {"a": "s3://bucket/x", "b": "/shared/x", "c": None, "d": "file:///shared/x"}


def test_relative_paths_are_refused_in_a_job_alone(monkeypatch):
    monkeypatch.delenv(JOB_VARIABLE, raising=False)
    refuse_relative_paths({"data.catalog": "work/catalog"})
    monkeypatch.setenv(JOB_VARIABLE, "{}")
    refuse_relative_paths(ABSOLUTE)
    with pytest.raises(InputError, match=r"data.catalog 'work/c', run.storage 'runs': a relative path in a Ray job"):
        refuse_relative_paths({"data.catalog": "work/c", "run.storage": "runs", **ABSOLUTE})


@pytest.mark.parametrize(
    "words",
    [
        ["prepare", "--config", "configs/demo.yaml"],
        ["train", "--config", "configs/demo.yaml", "data.catalog=s3://bucket/catalog"],
        ["evaluate", "--run", "runs/demo"],
        ["export", "--run", "/shared/run", "--out", "embeddings"],
        ["export", "--run", "/shared/run", "--out", "/shared/out", "--new-items", "text=new/text"],
    ],
    ids=lambda words: words[0],
)
def test_every_command_refuses_them_first(words, monkeypatch):
    monkeypatch.setenv(JOB_VARIABLE, "{}")
    command = [sys.executable, "-m", f"gtc_dist.{words[0]}", *words[1:]]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    [line] = done.stderr.splitlines()
    assert "a relative path in a Ray job" in line
