"""Shared by the tests of finished runs."""
import pytest

from tests.conftest import run_on_folder


@pytest.fixture(scope="session")
def analyse(tiny_dataset):
    """Run a script on the folder of a run of the tiny data set."""

    def run(script, folder, *arguments):
        run_on_folder(script, folder, "--train_dir", tiny_dataset.train_dir, *arguments)

    return run
