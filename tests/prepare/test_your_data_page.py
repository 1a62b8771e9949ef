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


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder with the files that the page names."""
    for name in ("images", "posters"):
        (tmp_path / name).mkdir()
    for item in range(1, 7):
        draw_image(item).save(tmp_path / "images" / f"{item}.png")
        draw_image(item).save(tmp_path / "posters" / f"{item}.jpg")
    tables = {
        "interactions.csv": ["user,item,time", *(f"{user},{item},{time}" for user, item, time in BUYS)],
        "items.csv": ["item,title,image", *(f"{item},Thing {item},images/{item}.png" for item in range(1, 7))],
        "ratings.csv": ["userId,movieId,rating,timestamp", *(f"{user},{item},4.5,{time}" for user, item, time in BUYS)],
        "movies.csv": ["movieId,title,genres", *(f'{item},"President, The ({item})",Comedy|Drama' for item in range(1, 7))],
    }
    for name, lines in tables.items():
        (tmp_path / name).write_text("\n".join(lines))
    image = [{"large": str(tmp_path / "images" / "1.png"), "variant": "MAIN"}]
    rows = {
        "Arts.jsonl.gz": [{"user_id": f"u{u}", "parent_asin": f"B{i}", "timestamp": 1000 * t} for u, i, t in BUYS],
        "meta_Arts.jsonl.gz": [{"parent_asin": f"B{i}", "title": f"Thing {i}", "images": image} for i in range(1, 7)],
    }
    for name, objects in rows.items():
        (tmp_path / name).write_bytes(gzip.compress("\n".join(map(json.dumps, objects)).encode()))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_commands_run_as_printed(folder, run):
    assert {script for script, _ in COMMANDS} == set(MAINS)
    for script, options in COMMANDS:
        assert run(MAINS[script], *options) == 0, (script, options)
        name = options[options.index("--name" if "--name" in options else "--dataset") + 1]
        assert sorted(map(len, histories_of(folder / "dataset", name))) == [6] * 9
