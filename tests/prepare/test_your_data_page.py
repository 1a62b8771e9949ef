"""The prepare commands of docs/your_data.md, run as printed on small generated files."""
import gzip
import json
import re
import shlex
from pathlib import Path

import pytest

from scripts import check_data, prepare_amazon, prepare_tables
from tests.conftest import draw_image
from tests.prepare.conftest import histories_of

PAGE = Path(__file__).parents[2] / "docs" / "your_data.md"
MAINS = {"prepare_tables": prepare_tables.main, "prepare_amazon": prepare_amazon.main, "check_data": check_data.main}
COMMANDS = [
    (match[1], shlex.split(match[2]))
    for block in re.findall(r"```\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    for match in re.finditer(r"^python3 -m scripts\.(\w+) (.*)$", block, re.MULTILINE)
]
BUYS = [(user, item, 1_600_000_000 + 10 * user + item) for user in range(1, 10) for item in range(1, 7)]


def write_csv(path, header, rows):
    path.write_text("\n".join(",".join(map(str, row)) for row in [header, *rows]) + "\n")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder with the files that the page names."""
    for name in ("images", "posters"):
        (tmp_path / name).mkdir()
    for item in range(1, 7):
        draw_image(item).save(tmp_path / "images" / f"{item}.png")
        draw_image(item).save(tmp_path / "posters" / f"{item}.jpg")
    write_csv(tmp_path / "interactions.csv", ("user", "item", "time"), BUYS)
    write_csv(tmp_path / "items.csv", ("item", "title", "image"), [(i, f"Thing {i}", f"images/{i}.png") for i in range(1, 7)])
    write_csv(tmp_path / "ratings.csv", ("userId", "movieId", "rating", "timestamp"), [(u, i, 4.5, t) for u, i, t in BUYS])
    movies = [(item, f'"President, The ({1990 + item})"', "Comedy|Drama") for item in range(1, 7)]
    write_csv(tmp_path / "movies.csv", ("movieId", "title", "genres"), movies)
    reviews = [{"user_id": f"u{u}", "parent_asin": f"B{i}", "timestamp": 1000 * t} for u, i, t in BUYS]
    image = [{"large": str(tmp_path / "images" / "1.png"), "variant": "MAIN"}]
    meta = [{"parent_asin": f"B{i}", "title": f"Thing {i}", "images": image} for i in range(1, 7)]
    for name, rows in (("Arts.jsonl.gz", reviews), ("meta_Arts.jsonl.gz", meta)):
        (tmp_path / name).write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_commands_run_as_printed(folder, run):
    assert {script for script, _ in COMMANDS} == set(MAINS)
    for script, options in COMMANDS:
        assert run(MAINS[script], *options) == 0, (script, options)
        name = options[options.index("--name" if "--name" in options else "--dataset") + 1]
        assert sorted(map(len, histories_of(folder / "dataset", name))) == [6] * 9
