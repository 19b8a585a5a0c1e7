"""Run `gtc import` on a folder that a test made, and read what it wrote as prepare does."""

import shlex
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from gtc_dist.config import Config
from gtc_dist.config_file import load_config
from gtc_dist.errors import InputError
from gtc_dist.features import encode_items
from gtc_dist.import_layout import import_folder
from gtc_dist.prepare.build_catalog import inspect_raw_data


def run_import(layout: str, folder: Path, out: Path) -> None:
    import_folder.main([layout, str(folder), "--out", str(out)])


def refusal(layout: str, folder: Path, out: Path) -> str:
    """The one-line error of an import; nothing that it wrote is left."""
    with pytest.raises(InputError) as caught:
        run_import(layout, folder, out)
    assert "\n" not in str(caught.value)
    assert not out.exists() or not list(out.iterdir())
    return str(caught.value)


def rows(out: Path, stem: str = "interactions") -> list[tuple]:
    return [tuple(row.values()) for row in pq.read_table(out / f"{stem}.parquet").to_pylist()]


def printed_commands(shown: str) -> list[list[str]]:
    """The words of each `gtc` command in the output of an import, as a shell reads them."""
    commands: list[list[str]] = []
    for word in shlex.split(shown.rpartition("next:\n")[2]):
        commands += [[]] if word == "gtc" else []
        commands[-1].append(word)
    return commands


def inspected(out: Path, shown: str = "") -> Config:
    """Run the `gtc features` commands that the import printed; the configuration, whose files prepare has accepted."""
    for command in printed_commands(shown):
        if command[1] == "features":
            encode_items.main(command[2:])
    config = load_config(out / "config.yaml")
    inspect_raw_data(config)
    return config
