"""Tables as shops, spreadsheets and recommender tools write them become one data set, and no row is lost without a count."""
import csv
import gzip
import io
import json
import random
from datetime import datetime, timedelta, timezone

import duckdb
import pytest

from scripts import prepare_tables
from tests.conftest import draw_image
from tests.prepare.conftest import counts_of, histories_of
from tests.prepare.test_downloads import server  # noqa: F401

ITEMS = [f"A-{number}" for number in range(6)]
DRAWN = random.Random(1)
BUYS = [(f"u{u}", item, 1_600_000_000 + 50 * u + place) for u in range(7) for place, item in enumerate(DRAWN.sample(ITEMS, 4))]
GOODS = [(item, f"Thing {item}", f"img/{item}.png") for item in ITEMS]
USER, ITEM = ("user", "item", "time"), ("item", "title", "image")


def histories(buys=BUYS, items=ITEMS):
    """Each user's items by time, the users sorted; written without any code of the project."""
    users = {}
    for user, item, _ in sorted(buys, key=lambda buy: buy[2]):
        if item in items and item not in users.setdefault(user, []):
            users[user].append(item)
    return sorted(users.values())


def table(header, rows, separator=",", end="\n"):
    text = io.StringIO()
    writer = csv.writer(text, delimiter=separator, lineterminator=end)
    writer.writerows([header, *rows])
    return text.getvalue()


def when(form, hours=0):
    zone = timezone(timedelta(hours=hours))
    return table(USER, [(u, i, datetime.fromtimestamp(t, zone).strftime(form)) for u, i, t in BUYS])


@pytest.fixture
def shop(tmp_path, run, capsys):
    """Prepare two tables with `--core 1`; returns the exit code and what was printed."""
    (tmp_path / "shop" / "img").mkdir(parents=True)
    for number, item in enumerate(ITEMS):
        draw_image(number).save(tmp_path / "shop" / "img" / f"{item}.png")

    def prepare(buys, goods, *options, names=("buys.csv", "items.csv")):
        for name, content in zip(names, (buys, goods)):
            (tmp_path / "shop" / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        paths = ["--interactions", tmp_path / "shop" / names[0], "--items", tmp_path / "shop" / names[1]]
        code = run(prepare_tables.main, *paths, "--name", "mine", "--train_dir", tmp_path / "data", "--core", 1, *options)
        return code, capsys.readouterr()

    return prepare


def parquet(path, select):
    duckdb.sql(f"COPY ({select}) TO '{path}' (FORMAT parquet)")
    return path.read_bytes()


def values(rows):
    return "VALUES " + ", ".join(str(row) for row in rows)


CASES = {
    "comma": (table(USER, BUYS), table(ITEM, GOODS)),
    "semicolon of a spreadsheet": (table(USER, BUYS, ";", "\r\n"), "\ufeff" + table(ITEM, GOODS, ";", "\r\n")),
    "tab": (table(USER, BUYS, "\t"), table(ITEM, GOODS, "\t")),
    "bar": (table(USER, BUYS, "|"), table(ITEM, GOODS, "|")),
    "two colons": (table(USER, BUYS).replace(",", "::"), table(ITEM, GOODS).replace(",", "::")),
    "named separator": (table(USER, BUYS, "^"), table(ITEM, GOODS, "^"), "--separator", "^"),
    "gzip": (gzip.compress(table(USER, BUYS).encode()), gzip.compress(table(ITEM, GOODS).encode())),
    "all quoted": (
        "".join('"' + '","'.join(map(str, row)) + '"\n' for row in [USER, *BUYS]),
        "".join('"' + '";"'.join(row) + '"\n' for row in [ITEM, *GOODS]),
    ),
    "old Macintosh": (table(USER, BUYS, end="\r"), table(ITEM, GOODS, end="\r")),
    "names of a film site": (
        table(("userId", "movieId", "rating", "timestamp"), [(u, i, 4.0, t) for u, i, t in BUYS]),
        table(("movieId", "Name", "POSTER"), GOODS),
    ),
    "named columns": (
        table(("who", "what", "when"), BUYS), table(("item", "what", "t", "i"), [(0, *good) for good in GOODS]),
        "--user_column", "who", "--item_column", "what", "--time_column", "when", "--title_column", "t", "--image_column", "i",
    ),
    "recbole": (
        table(("user_id:token", "item_id:token", "timestamp:float"), BUYS, "\t"),
        table(("item_id:token", "title:token_seq", "image:token"), GOODS, "\t"),
    ),
    "blank lines": (table(USER, BUYS) + "\n\n,,\n,,,,\n", "\n" + table(ITEM, GOODS) + "\n,,\n"),
    "UTF-16": (table(USER, BUYS).encode("utf-16"), table(ITEM, GOODS).encode("utf-16-le")),
    "ISO with Z": (when("%Y-%m-%dT%H:%M:%SZ"), table(ITEM, GOODS)),
    "ISO with zone": (when("%Y-%m-%d %H:%M:%S+05:30", 5.5), table(ITEM, GOODS)),
    "ISO without zone": (when("%Y-%m-%d %H:%M:%S.000"), table(ITEM, GOODS)),
    "American times": (when("%m/%d/%Y %H:%M:%S"), table(ITEM, GOODS), "--time_format", "%m/%d/%Y %H:%M:%S"),
    "milliseconds": (table(USER, [(u, i, t * 1000) for u, i, t in BUYS]), table(ITEM, GOODS)),
    "microseconds": (table(USER, [(u, i, f"{t * 10**6:.1f}") for u, i, t in BUYS]), table(ITEM, GOODS)),
    "seconds and milliseconds": (table(USER, [(u, i, t * 1000 if t % 2 else t) for u, i, t in BUYS]), table(ITEM, GOODS)),
    "the same rows twice": (table(USER, BUYS + BUYS), table(ITEM, GOODS + GOODS[:3])),
    "rows without order": (table(USER, DRAWN.sample(BUYS, len(BUYS))), table(ITEM, GOODS[::-1])),
    "a cell of 200,000 characters": (
        table((*USER, "text"), [(*buy, "word " * 40_000) for buy in BUYS[:3]] + [(*buy, "") for buy in BUYS[3:]]),
        table(ITEM, [(item, "long " * 40_000, image) for item, _, image in GOODS]),
    ),
    "spaces around": (table(USER, BUYS).replace(",", " , "), table(ITEM, GOODS).replace(",", ",  ")),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_the_same_data_set_comes_of(case, shop, tmp_path):
    buys, goods, *options = CASES[case]
    code, printed = shop(buys, goods, *options)
    assert code == 0, printed.err
    assert histories_of(tmp_path / "data", "mine") == histories()
    counts = counts_of(printed.out)
    assert (counts["users"], counts["items"], counts["interactions"], counts["fetched"]) == (7, 6, 28, 6)


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "json", "zst"])
def test_other_formats(kind, shop, tmp_path):
    if kind == "parquet":
        contents = [
            parquet(tmp_path / "a", f"SELECT * FROM ({values(rows)}) t({', '.join(head)})")
            for head, rows in ((USER, BUYS), (ITEM, GOODS))
        ]
    elif kind == "zst":
        contents = []
        for text in (table(USER, BUYS), table(ITEM, GOODS)):
            (tmp_path / "a.csv").write_text(text)
            duckdb.sql(
                f"COPY (FROM read_csv('{tmp_path}/a.csv', all_varchar=true)) TO '{tmp_path}/a.zst' (FORMAT csv, COMPRESSION zstd)"
            )
            contents.append((tmp_path / "a.zst").read_bytes())
    else:
        rows = [[dict(zip(head, row)) for row in rows] for head, rows in ((USER, BUYS), (ITEM, GOODS))]
        contents = [json.dumps(all_rows) if kind == "json" else "\n".join(map(json.dumps, all_rows)) for all_rows in rows]
    code, printed = shop(*contents, names=(f"buys.{kind}", f"items.{kind}"))
    assert code == 0, printed.err
    assert histories_of(tmp_path / "data", "mine") == histories()
