"""Tables as shops, spreadsheets and recommender tools write them become one data set, and no row is lost without a count."""
import bz2
import gzip
import json
import lzma
import random
from datetime import datetime, timedelta, timezone
from pathlib import Path

import duckdb
import pytest
import zstandard

from scripts import prepare_tables
from tests.conftest import draw_image, encoded
from tests.prepare.conftest import json_lines, table
from tests.prepare.test_downloads import server  # noqa: F401
from utils.items.data_check import check_dataset
from utils.prepare import lines

ITEMS = [f"A-{number}" for number in range(6)]
DRAWN = random.Random(1)
BUYS = [(f"u{u}", item, 1_600_000_000 + 50 * u + place) for u in range(7) for place, item in enumerate(DRAWN.sample(ITEMS, 4))]
GOODS = [(item, f"Thing {item}", f"img/{item}.png") for item in ITEMS]
TITLES = {item: f"Thing {item}" for item in ITEMS}
# each user's items by time, the users sorted
HISTORIES = sorted([item for user, item, _ in BUYS if user == f"u{number}"] for number in range(7))
USER, ITEM = ("user", "item", "time"), ("item", "title", "image")
PLAIN_BUYS, PLAIN_GOODS = table(USER, BUYS), table(ITEM, GOODS)


def buys_of(change, separator=","):
    """The interactions with the time changed."""
    return table(USER, [(user, item, change(time)) for user, item, time in BUYS], separator)


def when(form, hours=0):
    zone = timezone(timedelta(hours=hours))
    return buys_of(lambda time: datetime.fromtimestamp(time, zone).strftime(form))


def objects(header, rows):
    return [dict(zip(header, row)) for row in rows]


def lines_of(header, rows):
    return json_lines(objects(header, rows))


def with_images(cells):
    """The items with other cells of images."""
    return table(ITEM, [(*good[:2], cell) for good, cell in zip(GOODS, cells)])


@pytest.fixture
def shop(prepare):
    """Prepare two tables with `--core 1`."""
    for number, item in enumerate(ITEMS):
        draw_image(number).save(f"shop/img/{item}.png")

    def run(buys, goods, options="", more_files=(), code=0):
        files = {"buys.csv": buys, "items.csv": goods, **dict(more_files)}
        paths = "--interactions shop/buys.csv --items shop/items.csv"
        return prepare(prepare_tables.main, files, f"{paths} --core 1 {options}", code)

    return run


BUYS_ALONE = {
    "comma": PLAIN_BUYS, "spaces": table(USER, BUYS, " "), "declared for spreadsheets": "sep=^\n" + table(USER, BUYS, "^"),
    "lines of Windows and Unix": PLAIN_BUYS.replace("\n", "\r\n", 9),
    "ISO with Z": when("%Y-%m-%dT%H:%M:%SZ"), "ISO with zone": when("%Y-%m-%d %H:%M:%S+05:30", 5.5),
    "ISO without zone": when("%Y-%m-%d %H:%M:%S.000"), "a space before the zone": when("%Y-%m-%d %H:%M:%S -0500", -5),
    "ISO without separators": when("%Y%m%dT%H%M%SZ"), "microseconds": buys_of(lambda t: f"{t * 10**6:.1f}"),
    "milliseconds": buys_of(lambda t: t * 1000), "seconds and milliseconds": buys_of(lambda t: t * 1000 if t % 2 else t),
    "a counter of any size": buys_of(lambda t: (t - 1_599_999_000) * 10**9), "exponents": buys_of(lambda t: f"{t:.10e}"),
    "0 to 1": buys_of(lambda t: f"{(t - 1_599_000_000) / 1e14:.20f}"), "decimal commas": buys_of(lambda t: f"{t},5", ";"),
    "JSON in UTF-16": lines_of(USER, BUYS).encode("utf-16"), "lists by column": json.dumps(dict(zip(USER, zip(*BUYS)))),
    "columns of pandas": json.dumps({name: dict(enumerate(cells)) for name, cells in zip(USER, zip(*BUYS))}),
    "pandas' table": json.dumps({"schema": {"fields": []}, "data": objects(USER, BUYS)}),
    "pandas' split": json.dumps({"columns": USER, "index": list(range(28)), "data": BUYS}),
    "objects over several lines": "\n".join(json.dumps(row, indent=1) for row in objects(USER, BUYS)),
}  # fmt: skip
CASES = {
    **{name: (buys, PLAIN_GOODS) for name, buys in BUYS_ALONE.items()},
    "semicolon of a spreadsheet": (table(USER, BUYS, ";", "\r\n"), "\ufeff" + table(ITEM, GOODS, ";", "\r\n")),
    "tab": (table(USER, BUYS, "\t"), table(ITEM, GOODS, "\t")),
    "bar": (table(USER, BUYS, "|"), table(ITEM, GOODS, "|")),
    "two colons": (PLAIN_BUYS.replace(",", "::"), PLAIN_GOODS.replace(",", "::")),
    "named separator": (table(USER, BUYS, "^"), table(ITEM, GOODS, "^"), "--separator ^"),
    "all quoted": (
        "".join('"' + '","'.join(map(str, row)) + '"\n' for row in [USER, *BUYS]),
        "".join('"' + '";"'.join(row) + '"\n' for row in [ITEM, *GOODS]),
    ),
    "old Macintosh": (table(USER, BUYS, end="\r"), table(ITEM, GOODS, end="\r")),
    "names of a film site": (table(("userId", "movieId", "timestamp"), BUYS), table(("movieId", "Name", "POSTER"), GOODS)),
    "named columns": (
        table(("who", "what", "when"), BUYS), table(("item", "what", "t", "i"), [(0, *good) for good in GOODS]),
        "--user_column who --item_column what --time_column when --title_column t --image_column i",
    ),
    "blank lines": (PLAIN_BUYS + "\n\n,,\n,,,,\n", "\n" + PLAIN_GOODS + "\n,,\n"),
    "UTF-16": (PLAIN_BUYS.encode("utf-16"), PLAIN_GOODS.encode("utf-16-le")),
    "American times": (when("%m/%d/%Y-%H:%M:%S"), PLAIN_GOODS, "--time_format %m/%d/%Y-%H:%M:%S"),
    "the same rows twice": (table(USER, BUYS + BUYS), table(ITEM, GOODS + GOODS[:3])),
    "rows without order": (table(USER, DRAWN.sample(BUYS, len(BUYS))), table(ITEM, GOODS[::-1])),
    "a cell of 200,000 characters": (
        table((*USER, "text"), [(*buy, "word " * 40_000 * (row < 3)) for row, buy in enumerate(BUYS)]),
        table(ITEM, [(item, "long " * 40_000, image) for item, _, image in GOODS]),
    ),
    "paths of Windows": (PLAIN_BUYS, PLAIN_GOODS.replace("img/", "img\\")),
    "backslashes before quotation marks": (PLAIN_BUYS, PLAIN_GOODS.replace("Thing A-2", '"Thing \\"2\\", x"')),
    "an index without a name, as pandas writes it": [
        table(("", *names), [(number, *row) for number, row in enumerate(rows)]) for names, rows in ((USER, BUYS), (ITEM, GOODS))
    ],
    "RecBole, and a name without its type": (
        table(("user_id:token", "item_id:token", "timestamp:float"), BUYS, "\t"),
        table(("item_id:token", "film:token_seq", "image:token"), GOODS, "\t"), "--title_column Film",
    ),
    "numbers of their own for each table": (
        "".join(f"{u}::{i}::5::{t}\n" for u, i, t in BUYS), "".join("::".join(good) + "\n" for good in GOODS),
        "--user_column 1 --item_column 2 --time_column 4 --items_item_column 1 --title_column 2 --image_column 3",
    ),
    "numbers for one table": (
        "".join(f"{u}\t{i}\t3\t{t}\n" for u, i, t in BUYS), PLAIN_GOODS, "--user_column 1 --item_column 2 --time_column 4",
    ),
    "several images in a cell": (PLAIN_BUYS, with_images(f"{good[2]}, img/other.png" for good in GOODS)),
    "a list as numpy prints it": (PLAIN_BUYS, with_images(f"['{good[2]}' 'x.png']" for good in GOODS)),
    "JSON arrays": (json.dumps(objects(USER, BUYS)), json.dumps(objects(ITEM, GOODS))),
    "MongoDB": (
        lines_of(USER, [({"$oid": u}, i, {"$date": {"$numberLong": str(t * 1000)}}) for u, i, t in BUYS]),
        lines_of(ITEM, [({"$oid": item}, title, image) for item, title, image in GOODS]),
    ),
    "a key that comes late": (lines_of(USER[:2], BUYS * 40) + lines_of(USER, BUYS), lines_of(ITEM, GOODS)),
    "several files by a pattern": ("", PLAIN_GOODS, "--interactions shop/part-*.csv", {
        "part-1.csv": table(USER, BUYS[:9]),
        "part-2.csv": table(USER[::-1], [row[::-1] for row in BUYS[9:]], ";") + ";;\n",
    }),
    "a folder of parts, as Spark writes it": ("", PLAIN_GOODS, "--interactions shop/parts", {
        **{f"parts/part-{part}.csv": table(USER, BUYS[part::3]) for part in range(3)},
        "parts/_SUCCESS": "", "parts/.part-0.csv.crc": "\0\1", "parts/part-3.csv": "",
    }),
    "spaces around": (PLAIN_BUYS.replace(",", " , "), PLAIN_GOODS.replace(",", ",  ")),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_the_same_data_set_comes_of(case, shop):
    made = shop(*CASES[case])
    assert made.histories == HISTORIES
    assert made.counts.items() >= {"users": 7, "items": 6, "interactions": 28, "fetched": 6}.items()


@pytest.mark.parametrize("buys, goods, options, counts", [
    # NULL may be the id of a user, the eighth
    (PLAIN_BUYS + "\\N,A-1,5\nv,A-1,NULL\nNULL,A-1,5\nv,A-1,soon\n", PLAIN_GOODS + "A-8,NULL,img/A-1.png\n", "",
     {"user missing": 1, "time missing": 1, "time not readable": 1, "no title": 1, "users": 8}),
    (PLAIN_BUYS + "a,A-1\nb,A-1,5,6\n", PLAIN_GOODS + "A-9,a, b,img/A-1.png\n", "",
     {"fewer values than columns": 1, "more values than columns": 1, "users": 7, "interactions": 28}),
    (table((*USER, "Rating"), [(*buy, 5 if buy[1] != "A-2" else 2.5) for buy in BUYS]), PLAIN_GOODS, "--min_rating 3",
     {"rating below --min_rating": sum(buy[1] == "A-2" for buy in BUYS), "items": 5}),
])  # fmt: skip
def test_rows_that_cannot_be_used_are_counted(shop, buys, goods, options, counts):
    assert shop(buys, goods, options).counts.items() >= counts.items()


def parquet(select, columns, rows):
    """The content of a Parquet file of columns that are selected of rows."""
    path, values = Path("made.parquet"), ", ".join(map(str, rows))
    duckdb.sql(f"COPY (SELECT {select} FROM (VALUES {values}) t({columns})) TO '{path}' (FORMAT parquet)")
    return path.read_bytes()


def test_ids_that_are_numbers_of_parquet_files(shop):
    buys = [(user, ITEMS.index(item), time) for user, item, time in BUYS]
    goods = [(number, *good[1:]) for number, good in enumerate(GOODS)]
    made = shop(
        parquet("u AS user, i::DOUBLE AS item, to_timestamp(t) AS time", "u, i, t", buys),
        parquet("*", "item, title, image", goods),
    )
    assert made.histories == [[item[-1] for item in history] for history in HISTORIES]


@pytest.mark.parametrize("start", [4, 60])  # within the header of a page, and its content
def test_a_damaged_parquet_file_is_one_sentence(shop, start):
    packed = parquet("*", "user, item, time", BUYS)
    assert "is it cut off or damaged?" in shop(packed[:start] + b"\xff" * 40 + packed[start + 40 :], PLAIN_GOODS, code=2).error


@pytest.mark.parametrize("image, code", [
    ("'\\xFF\\xD8'::BLOB", 2), ("{'bytes': '\\xFF'::BLOB, 'path': NULL::VARCHAR}", 2),
    ("i::BLOB", 0), ("{'bytes': NULL::BLOB, 'path': i}", 0),
])  # fmt: skip
def test_images_within_a_parquet_file_need_a_folder_but_may_be_named_there(shop, image, code):
    made = shop(PLAIN_BUYS, parquet(f"item, title, {image} AS image", "item, title, i", GOODS), code=code)
    if code:
        assert "the column 'image' holds the images themselves; write them as files" in made.error
    else:
        assert made.counts["fetched"] == 6


MANY = [(f"u{row % 901}", ITEMS[row % 6], row) for row in range(20_000)]


@pytest.mark.parametrize("content", [lines_of(USER, MANY), table(USER, MANY)], ids=["JSON", "CSV"])
@pytest.mark.parametrize("compress", [
    gzip.compress, bz2.compress, lzma.compress, zstandard.ZstdCompressor(write_checksum=True).compress,
])  # fmt: skip
def test_damage_in_compressed_files_loses_nothing_unseen(shop, content, compress):
    packed = compress(content.encode())
    middle = len(packed) // 2
    changed = packed[:middle] + bytes(byte ^ 255 for byte in packed[middle : middle + 9]) + packed[middle + 9 :]
    first, second = compress(content[:99_999].encode()), compress(content[99_999:].encode())
    for damaged in (packed[:-1], packed[:middle], changed, packed[:-3] + b"abc", first + b"abc" + second[3:]):
        assert "buys.csv is cut off or damaged" in shop(damaged, PLAIN_GOODS, code=2).error
    assert shop(first + second + b"\0" * 512, PLAIN_GOODS).counts["read"] == 20_000


def test_what_is_no_text_because_of_damage_is_called_so(shop):
    packed = gzip.compress(table(USER, MANY).encode(), compresslevel=0)  # of many blocks, of which the last one has the checksum
    assert "buys.csv is cut off or damaged" in shop(packed[:5000] + b"\xff" + packed[5001:], PLAIN_GOODS, code=2).error


def test_zst_without_its_package(shop, monkeypatch):
    monkeypatch.setattr(lines, "zstandard", None)
    assert "needs the package zstandard" in shop(b"\x28\xb5\x2f\xfd", PLAIN_GOODS, code=2).error


@pytest.mark.parametrize("title, separator", [
    ('"Unclosed', ","), ('"Unclosed', "\t"), ('5" pipe', ","), ('a "word" inside', ";"), ('"A" and "B"', "\t"), ('ends"', ","),
])  # fmt: skip
@pytest.mark.parametrize("other, read", [('"Quoted"', "Quoted"), ('ends"', 'ends"')])
def test_a_quotation_mark_that_is_a_character_swallows_no_row(shop, title, separator, other, read):
    goods = "\n".join(separator.join(row) for row in [ITEM, *GOODS])
    made = shop(PLAIN_BUYS, goods.replace("Thing A-1", title).replace("Thing A-3", other))
    assert made.histories == HISTORIES and made.titles == TITLES | {"A-1": title, "A-3": read}


@pytest.mark.parametrize("title", ['a, "b"\nc', "Lamp, red\nbig, 12", "Lamp, red\nround, oak, 7\nnew, old", "a\n\nb"])
def test_quoted_cells_hold_separators_line_breaks_and_marks(title, shop):
    made = shop(PLAIN_BUYS, table(ITEM, [("A-0", title, GOODS[0][2]), *GOODS[1:]]) + "A-9,,\n")
    assert made.titles["A-0"] == " ".join(title.split()) and made.histories == HISTORIES
    assert made.counts["no title"] == 1 and f"line {8 + title.count(chr(10))}" in made.out  # of the file, not of its rows


def test_ids_are_text(shop):
    names = ["007", "7", "a/b", "..", "a b", "A", "ä" * 150, "x" * 300, "con.txt", "id%"]
    goods = [(name, f"Thing {number}", "img/A-0.png") for number, name in enumerate(names)]
    buys = [(user, name, time) for user in "ab" for time, name in enumerate(names)]
    assert shop(table(USER, buys), table(ITEM, goods)).histories == [names, names]
    assert check_dataset("data", "mine", 2).usable


def test_images_of_all_kinds_in_one_table(shop, server):  # noqa: F811
    web = server.url + "/a.jpg"
    cells = [
        web, str(Path("shop/img/A-1.png").absolute()), "img/A-2.png", json.dumps([web]),
        str({"hi_res": [None, "no"], "large": [web, "other"], "thumb": ["t", "t"], "variant": ["MAIN", "PT01"]}),
        json.dumps([{"variant": "PT01", "large": "x"}, {"variant": "MAIN", "large": None, "thumb": web}]),
    ]  # fmt: skip
    assert shop(PLAIN_BUYS, with_images(cells)).counts["fetched"] == 6 and server.asked == {"/a.jpg": 4}


def test_images_in_subfolders_with_any_ending_by_safe_names_ids_with_an_ending_or_decomposed_letters(shop):
    names = {
        "x.PNG": "x", "2020/y.JPEG": "y", "a/b.jpg": "a/b", "id%c%2Fd.png": "c/d", "covers/red.jpg": "e", "f.jpg": "f.jpg",
        "Gru\u0308n.png": "Gr\u00fcn", "v1.2": "v1.2", "bad.jpg": "bad", "1/z.jpg": "z", "2/z.jpg": "z",
    }  # fmt: skip
    for number, name in enumerate(names):
        path = Path("posters", name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(draw_image(number), "PNG") if name != "bad.jpg" else b"no image")
    ids = list(dict.fromkeys(names.values()))
    goods = [(item, "t", {"e": "covers/red.webp"}.get(item, "")) for item in ids]
    made = shop(table(USER, zip("u" * 10, ids, range(10))), table(ITEM, goods), "--images posters")
    assert made.histories == [ids[:-2]] and (made.counts["failed"], made.counts["no image"]) == (1, 1)  # two files are named z


def test_a_dry_run_writes_nothing(shop):
    made = shop(PLAIN_BUYS, PLAIN_GOODS, "--dry_run")
    assert not Path("data").exists()
    assert "(user = user, item = item, time = time)" in made.out and "A-0 | Thing A-0 | img/A-0.png" in made.out
    assert made.counts == {"read": 28, "users": 7, "items": 6, "interactions": 28}


def test_latin_1_needs_its_name_and_then_is_read(shop):
    goods = PLAIN_GOODS.replace("Thing A-2", "Größe").encode("latin-1")
    error = shop(PLAIN_BUYS, goods, code=2).error
    assert "items.csv, line 4: not utf-8" in error and "--encoding" in error
    assert shop(PLAIN_BUYS, goods, "--encoding latin-1").titles["A-2"] == "Größe"


@pytest.mark.parametrize("buys, goods, options, message", [
    ("user,time\na,1\n", PLAIN_GOODS, "", "has no column of the item; name it by --item_column (its columns are user, time)"),
    ("", PLAIN_GOODS, "", "buys.csv is empty"),
    ("user,item,time\n", PLAIN_GOODS, "", "no interaction can be used (it has no rows)"),
    (PLAIN_BUYS, "item,title,image\n", "", "has no item with an id, a title and an image (it has no rows)"),
    ("user,item,time,time\na,A-1,1,2\n", PLAIN_GOODS, "", "line 1: the columns 'time', 'time' could be the time"),
    ("user_id,userId,item,time\n", PLAIN_GOODS, "", "rename or remove all but one, or choose one by --user_column"),
    (PLAIN_BUYS, PLAIN_GOODS, "--time_column when", "buys.csv has no column 'when' (--time_column)"),
    (PLAIN_BUYS, PLAIN_GOODS + "A-2,Other,img/A-2.png\n", "", "two rows of item 'A-2' differ: line 4 ('Thing A-2', "),
    (PLAIN_BUYS + "a,A-1,2024-01-01\nb,A-1,5\n", PLAIN_GOODS, "", "the time is a date in line 30 and a number in line 31"),
    (PLAIN_BUYS, PLAIN_GOODS.replace("img/A", "/A"), "", "(image file not found: 6 (line 2, line 3, line 4, ...))"),
    (PLAIN_BUYS, with_images(["{{}}"] * 6), "", "(image file not found: 6 (line 2, "),
    (PLAIN_BUYS + "a,A-1,soon\n", PLAIN_GOODS, "--strict", "(--strict): time not readable: 1 (line 30)"),
    (PLAIN_BUYS, PLAIN_GOODS + "A-9,No image\n", "--strict", "(--strict): fewer values than columns: 1 (line 8)"),
    (PLAIN_BUYS, PLAIN_GOODS + 'A-9,"a b\n', "", "items.csv, line 8: a quotation mark opens a value and none ends it"),
    ("user,item,time\na,1.0,3\n", "item,title,image\n1,t,img/A-1.png\n", "", "write '1.0' and '1' alike"),
    ("user,item,time\na,b,3\n", PLAIN_GOODS, "", "['b'], those of items.csv ['A-0', 'A-1', 'A-2']; do both files fit"),
    ("user,item,time\na,A-1,13/09/20\n", PLAIN_GOODS, "", "write the form of times such as '13/09/20' as --time_format"),
    (b"PK\x03\x04", PLAIN_GOODS, "", "is a zip or Excel file"),
    (PLAIN_BUYS, gzip.compress(PLAIN_GOODS.encode(), mtime=0)[:-9], "", "items.csv is cut off or damaged after line"),
    ('[{"user": 1}', PLAIN_GOODS, "", "neither a JSON array nor JSON lines (Expecting"),
    (b"PAR1 and no more", PLAIN_GOODS, "", "is cut off or damaged, or no Parquet file"),
    (PLAIN_BUYS, PLAIN_GOODS + "x" * (2**24 + 1), "", "items.csv, line 8: longer than 16,777,216 bytes"),
    (b"\0\0\0b" * 9, PLAIN_GOODS, "", "buys.csv is not a text file"),
    (PLAIN_BUYS, PLAIN_GOODS, "--encoding klingon", "--encoding klingon: no such encoding"),
    (PLAIN_BUYS, PLAIN_GOODS, "--encoding base64", "--encoding base64: no such encoding"),
    (PLAIN_BUYS, PLAIN_GOODS, "--time_format %Q", "--time_format '%Q': "),
    (PLAIN_BUYS, PLAIN_GOODS, "--user_column item", "the column 'item' cannot be the user and the item; choose two"),
    (PLAIN_BUYS, PLAIN_GOODS, "--item_column prodct", "--item_column prodct: there is no such column"),
    ("user,item,date,time\na,A-1,2020-01-02,1300\n", PLAIN_GOODS, "", "columns 'date', 'time' could be the time"),
    ("user,id,time\na,1,2\n", PLAIN_GOODS, "", "has no column of the item"),
    ("user,item,time\na,A-1,5\na,A-2,x\n", PLAIN_GOODS, "", "left out: time not readable: 1 (line 3))"),
    ("user,item,time\na,01,3\n", "item,title,image\n1,t,img/A-1.png\n", "", "write '01' and '1' alike"),
])  # fmt: skip
def test_errors_are_one_sentence_and_leave_nothing(shop, buys, goods, options, message):
    assert message in shop(buys, goods, options, code=2).error
    assert not [path for path in Path("data").glob("*mine*") if path.suffix != ".lock"]
    assert not list(Path("data").glob(".prepare_*"))
