"""Running the prepare scripts in this process, and reading what they wrote."""
import pytest

from tests.conftest import exit_code
from utils.data.dataset import read_dataset


@pytest.fixture
def run():
    """Run a script's `main` with options; the exit code."""
    return lambda main, *options: exit_code(options, main)


def histories_of(folder, name):
    """Raw ids of every user's items in order, the users sorted."""
    dataset = read_dataset(folder, name)
    return sorted([dataset.raw_ids[item - 1] for item in dataset.histories[user]] for user in range(dataset.num_users))


def counts_of(report):
    """The report's counts by their names."""
    return {line[2:66].strip(): int(line[66:80].replace(",", "")) for line in report.splitlines() if line.startswith("  ")}
