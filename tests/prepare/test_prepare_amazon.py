"""Amazon's review files become a data set: by hand, from all releases, against damage, interruptions and failing images."""
import csv
import gzip
import json
import signal
from pathlib import Path

import pytest
from filelock import FileLock

from scripts import prepare_amazon
from tests.conftest import draw_image
from tests.prepare.conftest import json_lines
from tests.prepare.test_downloads import JPEG, answer, server  # noqa: F401
from utils.common import files
from utils.data.dataset import read_dataset
from utils.data.histories import leave_last_out
from utils.items.data_check import check_dataset
from utils.prepare import writer
from utils.prepare.downloads import Downloader

LOCAL = "--images shop/img "
FINAL = Path("data/mine_final.txt")


def review(user, item, time):
    return {"user_id": user, "parent_asin": item, "asin": item, "timestamp": time, "rating": 5.0, "text": "good"}


def meta(item, title="a lamp", url="http://127.0.0.1/a.jpg"):
    return {"parent_asin": item, "title": title, "images": [{"large": url, "hi_res": None, "variant": "MAIN"}]}


def many(users=12, items=6, url="http://127.0.0.1"):
    """Reviews in which everyone buys everything, and the items."""
    reviews = [review(f"u{u}", f"B{i}", 100 * i + u) for i in range(items) for u in range(users)]
    return reviews, [meta(f"B{i}", f"lamp {i}", f"{url}/B{i}") for i in range(items)]


@pytest.fixture
def category(prepare):
    """Prepare reviews and items, of which eight have images in shop/img."""
    for item in range(8):
        draw_image(item).save(f"shop/img/B{item}.jpg")

    def run(reviews, items, options=LOCAL, code=0):
        contents = {"Lamps.jsonl.gz": reviews, "meta_Lamps.jsonl.gz": items}
        packed = {name: gzip.compress(json_lines(lines).encode()) for name, lines in contents.items()}
        paths = "--reviews shop/Lamps.jsonl.gz --meta shop/meta_Lamps.jsonl.gz"
        return prepare(prepare_amazon.main, packed, f"{paths} {options}", code)

    return run


def test_by_hand(category):
    bought = [
        ("ann", "B2", 50), ("ann", "B1", 20), ("ann", "B2", 10), ("ann", "B3", 20),  # B2 first, then a tie: the file's order
        ("bob", "B3", 1), ("bob", "B1", 2), ("bob", "B4", 3), ("bob", "B2", 4),
        ("cid", "B1", 1), ("cid", "B2", 2), ("cid", "B3", 3), ("cid", "B5", 4), ("cid", "B6", 5),
        ("dan", "B1", 1), ("dan", "B4", 1),  # two purchases: outside the core, and with dan B4
    ]  # fmt: skip
    items = [
        meta("B1", "one &amp; only"), meta("B2", "two"), meta("B3", "<i>three</i>"), meta("B4", "four"), meta("B5", " <b> "),
        meta("B1", "the second line of B1"), "broken", meta("a\nb"), meta("\u2028"),
    ]  # fmt: skip
    made = category([*(review(*row) for row in bought), "{broken"], items, LOCAL + "--core 3")
    assert made.histories == [["B1", "B2", "B3"], ["B2", "B1", "B3"], ["B3", "B1", "B2"]]  # of cid, ann and bob
    assert list(made.titles.items()) == [("B1", "one & only"), ("B2", "two"), ("B3", "three")]
    assert len(leave_last_out(read_dataset("data", "mine").histories).evaluated_users) == 3
    assert check_dataset("data", "mine", 3).usable
    assert made.counts == {
        "read": 16,
        "no title": 1, "item with a line break": 2, "listed again": 1, "not a JSON object with these fields": 1,
        "item unknown or left out": 2,
        "not the user's first of the item": 1, "outside the 3-core": 3, "fetched": 3, "already there": 0, "failed": 0,
        "users": 3, "items": 3, "interactions": 9,
    }  # fmt: skip
    assert made.out.endswith("Next: python3 -m scripts.check_data --dataset mine --train_dir data --C 3\n")
    assert {path.name for path in Path("data").iterdir() if not path.name.startswith(".")} == {
        "mine_final.txt", "mine_item2id_final.pickle", "mine_texts_final.pickle", "mine_images"
    }  # fmt: skip


def test_images_from_the_web_and_what_fails(category, server):  # noqa: F811
    reviews, items = many(9, 7, server.url)
    # bea's five purchases count only as long as B6, whose image fails, does
    reviews += [review("bea", f"B{item}", item) for item in range(2, 7)]
    server.answers["/B6"] = answer(404, b"")
    made = category(reviews, items, "")
    assert made.histories == [[f"B{item}" for item in range(6)]] * 9
    assert check_dataset("data", "mine", 8).usable
    failures = Path("data/mine_failed_images.csv")
    assert list(csv.reader(failures.open(newline=""))) == [["raw_id", "source", "reason"], ["B6", f"{server.url}/B6", "HTTP 404"]]
    assert "mine_failed_images.csv lists the failed images" in made.out
    assert made.counts["of items whose image failed, and outside the core without them"] == 9 + 5
    assert Path("data/mine_images/B0.jpg").read_bytes() == JPEG
    server.answers.clear()  # next time all goes well, and the old report goes
    assert len(category(reviews, items, "--restart").histories) == 10 and not failures.exists()
    assert server.asked == {**{f"/B{item}": 1 for item in range(6)}, "/B6": 2}


def test_without_any_image_there_is_no_data_set(category, server):  # noqa: F811
    server.answers.update({f"/B{item}": answer(403, b"") for item in range(6)})
    assert "all 6 images failed (the first: HTTP 403)" in category(*many(url=server.url), "", code=2).error
    assert not FINAL.exists() and len(Path("data/mine_failed_images.csv").read_text().splitlines()) == 7


def test_interrupted_the_same_command_goes_on(category, monkeypatch, server):  # noqa: F811
    shop = many(items=12, url=server.url)
    get = Downloader.get

    def interrupted(self, url):
        if url.endswith("B7"):
            signal.raise_signal(signal.SIGINT)
        return get(self, url)

    with monkeypatch.context() as patch:
        patch.setattr(Downloader, "get", interrupted)
        error = category(*shop, "--workers 1", code=130).error
    assert "the images so far are in" in error and "the same command continues from there" in error and not FINAL.exists()
    category(*shop, "--workers 1")
    assert check_dataset("data", "mine", 8).usable
    assert max(server.asked.values()) <= 2 and sum(server.asked.values()) <= 14  # at most those under way come twice


@pytest.mark.parametrize("ending", ["_item2id_final.pickle", "_texts_final.pickle", "_final.txt"])
def test_a_writing_that_fails_leaves_no_data_set(category, monkeypatch, ending):
    category(*many())
    write = writer.write_atomically

    def failing(path, fill):
        if path.name.endswith(ending):
            raise OSError(28, "No space left on device")
        write(path, fill)

    with monkeypatch.context() as patch:
        for module in (writer, files):
            patch.setattr(module, "write_atomically", failing)
        category(*many(), LOCAL + "--restart", code=1)
    assert not FINAL.exists()
    category(*many())


def test_what_is_there_is_not_replaced_unasked_and_made_by_one_process_at_a_time(category):
    shop = many()
    category(*shop)
    before = FINAL.read_text()
    assert "exists already" in category(*shop, LOCAL + "--core 1", code=2).error
    error = category(*shop, LOCAL + "--core 13 --restart", code=2).error  # nothing to make: the old one stays
    assert "no users and items with 13 interactions each are left; lower --core" in error and FINAL.read_text() == before
    assert len(category(*shop, LOCAL + "--max_users 9 --restart").histories) == 9
    with FileLock("data/.mine_prepare.lock"):
        assert "another process is making data set 'mine'" in category(*shop, LOCAL + "--restart", code=2).error


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "../a", "demo", "x" * 201])
def test_names_that_cannot_be(category, name):
    category(*many(), f"{LOCAL} --name={name}", code=2)
    assert not Path("data").exists()


REVIEWS, ITEMS = many()


@pytest.mark.parametrize("reviews, items, options, message", [
    (REVIEWS, [{"a": 1}] * 72, "", "image (not a JSON object with these fields: 72"),
    (ITEMS, ITEMS, "", "no interaction can be used (user missing: 6 (line 1, line 2, line 3, ...))"),
    ([{"a": 1}], ITEMS, LOCAL, "scripts.prepare_tables reads other tables than Amazon's"),
    (REVIEWS, [meta(f"B{i}", "") for i in range(6)], LOCAL, "(no title: 6 ("),
    (REVIEWS, [meta(f"B{i}", "t", None) for i in range(6)], "", "(no image: 6 ("),
    (REVIEWS[:24], ITEMS, LOCAL + "--core 1", "no user has the 3 interactions"),
    (REVIEWS[:24], ITEMS, LOCAL, "with 5 interactions each are left; lower --core\n"),
    (REVIEWS, ITEMS, LOCAL + "--core 6 --max_users 5", "with 6 interactions each are left; lower --core or raise --max_users\n"),
    (REVIEWS, ITEMS, LOCAL + "--reviews none", "none: no such file"),
    (REVIEWS, ITEMS, LOCAL + "--meta none", "none: no such file"),
    (REVIEWS, ITEMS, "--images none", "cannot be read (No such file or directory)"),
])  # fmt: skip
def test_files_of_no_use_are_one_sentence(category, reviews, items, options, message):
    assert message in category(reviews, items, options, code=2).error
    assert not list(Path("data").glob("mine_*"))


@pytest.mark.parametrize("write", [json.dumps, repr])  # Python's literals are those of 2014
def test_the_fields_of_all_releases_and_half_surrogate_pairs(category, server, write):  # noqa: F811
    urls = [f"{server.url}/B{i}" for i in range(5)]
    images = [
        {"images": {"hi_res": [None, "x"], "large": [urls[0], "y"], "thumb": ["z", "z"], "variant": ["MAIN", "PT01"]}},
        {"images": [{"thumb": urls[1], "large": None, "variant": "MAIN"}, {"large": "x", "variant": "PT01"}]},
        {"images": None, "imageURLHighRes": [urls[2], "x"]},
        {"images": [], "imageURL": [], "imUrl": urls[3]},
    ]
    lines = [write({"asin": f"B{i}", "title": f"it's {i}", **image}) for i, image in enumerate(images)]
    lines.append(f'{{"asin": "B4", "title": "half \\ud83d pair", "imUrl": "{urls[4]}"}}')
    bought = [(f"u{u}", f"B{i}", 1_400_000_000 + i) for u in range(5) for i in (2, 0, 4, 1, 3)]
    reviews = [write(dict(zip(("reviewerID", "asin", "unixReviewTime"), row))) for row in bought]
    made = category(reviews, lines, "")
    assert list(made.titles.values()) == ["it's 0", "it's 1", "it's 2", "it's 3", "half \ufffd pair"]
    assert made.histories == [[f"B{i}" for i in range(5)]] * 5 and server.asked == {f"/B{i}": 1 for i in range(5)}
