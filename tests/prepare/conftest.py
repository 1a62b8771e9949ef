"""Running the prepare scripts in this process, on files written for them, and reading what they made."""
import csv
import io
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.conftest import exit_code
from utils.data.dataset import read_dataset


def table(header, rows, separator=",", end="\n"):
    """Rows as CSV."""
    text = io.StringIO()
    csv.writer(text, delimiter=separator, lineterminator=end).writerows([header, *rows])
    return text.getvalue()


def json_lines(objects):
    """Objects as JSON lines; what is text stays as it is."""
    return "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in objects)


def histories_of(folder, name):
    """Raw ids of every user's items in order, the users sorted."""
    dataset = read_dataset(folder, name)
    return sorted([dataset.raw_ids[item - 1] for item in dataset.histories[user]] for user in range(dataset.num_users))


def counts_of(report):
    """The report's counts by their names."""
    return {line[2:66].strip(): int(line[66:80].replace(",", "")) for line in report.splitlines() if line.startswith("  ")}


@pytest.fixture
def prepare(tmp_path, monkeypatch, capsys):
    """Make the data set `mine` in `data` of files in `shop`, the working folder being another: what was printed and made."""
    monkeypatch.chdir(tmp_path)
    Path("shop/img").mkdir(parents=True)

    def prepared(main, files, options, code=0):
        for name, content in files.items():
            (path := Path("shop", name)).parent.mkdir(exist_ok=True)
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
        found = exit_code(f"--name mine --train_dir data {options}".split(), main)
        out, error = capsys.readouterr()
        assert found == code, (out, error)
        assert code != 2 or (error.startswith("error: ") and error.count("\n") == 1), error
        made = SimpleNamespace(out=out, error=error, counts=counts_of(out))
        if Path("data/mine_final.txt").exists():
            dataset = read_dataset("data", "mine")
            made.histories, made.titles = histories_of("data", "mine"), dict(zip(dataset.raw_ids, dataset.titles))
        return made

    return prepared
