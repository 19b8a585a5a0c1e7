"""The dataset that the tests of the generator share."""

from pathlib import Path

import pytest
from planted_dataset import SPEC, Dataset

from gtc_dist.synthetic.generate import generate_dataset


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("synthetic") / "raw"
    generate_dataset(SPEC, str(path))
    return path


@pytest.fixture(scope="session")
def data(folder) -> Dataset:
    return Dataset(folder, SPEC)
