"""The prepare commands of docs/your_data.md, run as printed on small generated files."""
import gzip
import re
import shlex
from pathlib import Path

from scripts import check_data, prepare_amazon, prepare_tables
from tests.conftest import draw_image, exit_code
from tests.prepare.conftest import histories_of, json_lines, table

PAGE = Path(__file__).parents[2] / "docs" / "your_data.md"
MAINS = {"prepare_tables": prepare_tables.main, "prepare_amazon": prepare_amazon.main, "check_data": check_data.main}
COMMANDS = [
    (match[1], shlex.split(match[2]))
    for block in re.findall(r"```\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    for match in re.finditer(r"^python3 -m scripts\.(\w+) (.*)$", block, re.MULTILINE)
]
ITEMS = range(1, 7)
BUYS = [(user, item, 1_600_000_000 + 10 * user + item) for user in range(1, 10) for item in ITEMS]


def test_the_commands_run_as_printed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for item in ITEMS:
        for path in (Path(f"images/{item}.png"), Path(f"posters/{item}.jpg")):
            path.parent.mkdir(exist_ok=True)
            draw_image(item).save(path)
    image = [{"large": str(tmp_path / "images" / "1.png"), "variant": "MAIN"}]
    films = [(item, f"President, The ({item})", "Comedy|Drama") for item in ITEMS]
    files = {
        "interactions.csv": table(("user", "item", "time"), BUYS),
        "items.csv": table(("item", "title", "image"), [(item, f"Thing {item}", f"images/{item}.png") for item in ITEMS]),
        "ratings.csv": table(("userId", "movieId", "rating", "timestamp"), [(u, i, 4.5, t) for u, i, t in BUYS]),
        "movies.csv": table(("movieId", "title", "genres"), films),
        "Arts.jsonl.gz": json_lines({"user_id": f"u{u}", "parent_asin": f"B{i}", "timestamp": 1000 * t} for u, i, t in BUYS),
        "meta_Arts.jsonl.gz": json_lines({"parent_asin": f"B{i}", "title": f"Thing {i}", "images": image} for i in ITEMS),
    }
    for name, text in files.items():
        Path(name).write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    assert {script for script, _ in COMMANDS} == set(MAINS)
    for script, options in COMMANDS:
        assert exit_code(options, MAINS[script]) == 0, (script, options)
        name = options[options.index("--name" if "--name" in options else "--dataset") + 1]
        assert sorted(map(len, histories_of("dataset", name))) == [6] * 9
