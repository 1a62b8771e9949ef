"""Small foundation models of every kind and the tiny data set, read, for all tests of this folder."""
from functools import cache

import pytest

from tests.items.families import seeded
from utils.data.dataset import read_dataset


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """Saves a family's small model, or a pair's, when it is first asked for, and returns its name."""
    return cache(lambda name: seeded(name, tmp_path_factory.mktemp("models") / name))


@pytest.fixture(scope="session")
def dataset(tiny_dataset):
    return read_dataset(tiny_dataset.train_dir, tiny_dataset.name)
