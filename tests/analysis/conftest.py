"""Shared by the tests of finished runs."""
import pytest

from tests.conftest import NUM_ITEMS, run_on_folder, write_dataset
from tests.run_files import change_json
from utils.data.dataset import read_dataset
from utils.run.finished import finished_options
from utils.run.folder import FINGERPRINTS, run_settings


@pytest.fixture(scope="session")
def analyse(tiny_dataset):
    return lambda script, folder, *more: run_on_folder(script, folder, "--train_dir", tiny_dataset.train_dir, *more)


@pytest.fixture
def relabelled(copied_run, tiny_dataset, tmp_path):
    """Make the copied run one of the same data set with other first titles and raw ids; returns where this lies."""

    def relabel(titles=(), raw_ids=()):
        titles = [*titles, *tiny_dataset.titles[len(titles) :]]
        raw_ids = [*raw_ids, *(f"B{item:03d}" for item in range(len(raw_ids) + 1, NUM_ITEMS + 1))]
        folder = write_dataset(tmp_path / "dataset", "tiny", tiny_dataset.histories, titles, raw_ids)
        settings = run_settings(finished_options(copied_run.folder, folder, "cpu")[0], read_dataset(folder, "tiny"))
        own = {name: settings[name] for name in FINGERPRINTS}
        change_json(copied_run.folder / "summary.json", lambda summary: summary.update(own))
        return folder

    return relabel
