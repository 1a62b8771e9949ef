"""Amazon's review files become a data set: by hand, from all releases, against damage, interruptions and failing images."""
import csv
import gzip
import json
import os
import signal

import pytest
from filelock import FileLock

from scripts import prepare_amazon
from tests.conftest import draw_image
from tests.prepare.conftest import counts_of, histories_of
from tests.prepare.test_downloads import JPEG, answer, server  # noqa: F401
from utils.common import files
from utils.data.dataset import read_dataset
from utils.data.histories import leave_last_out
from utils.items.data_check import check_dataset
from utils.prepare import writer
from utils.prepare.downloads import Downloader


def review(user, item, time):
    return {"user_id": user, "parent_asin": item, "asin": item, "timestamp": time, "rating": 5.0, "text": "good"}


def meta(item, title="a lamp", url="http://127.0.0.1/a.jpg"):
    return {"parent_asin": item, "title": title, "images": [{"large": url, "hi_res": None, "variant": "MAIN"}]}


@pytest.fixture
def data(tmp_path):
    return tmp_path / "data"


@pytest.fixture
def category(tmp_path, data):
    """The options of the script for some lines; with `images`, a folder holds one an item."""

    def make(reviews, items, images=True):
        paths = tmp_path / "Lamps.jsonl.gz", tmp_path / "meta_Lamps.jsonl.gz"
        for path, lines in zip(paths, (reviews, items)):
            texts = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
            path.write_bytes(gzip.compress(b"\n".join(texts)))
        (tmp_path / "images").mkdir(exist_ok=True)
        for line in items:
            if isinstance(line, dict) and line.get("parent_asin", "\n").isalnum():
                draw_image(1).save(tmp_path / "images" / f"{line['parent_asin']}.jpg")
        options = ["--reviews", paths[0], "--meta", paths[1], "--name", "lamps", "--train_dir", data]
        return options + (["--images", tmp_path / "images"] if images else [])

    return make


def many(users=12, items=6, url="http://127.0.0.1"):
    """Reviews in which everyone buys everything, and the items."""
    reviews = [review(f"u{u}", f"B{i}", 100 * i + u) for i in range(items) for u in range(users)]
    return reviews, [meta(f"B{i}", f"lamp {i}", f"{url}/B{i}") for i in range(items)]


def test_by_hand(category, run, data, capsys):
    reviews = [
        review("ann", "B2", 50),
        review("ann", "B1", 20), review("ann", "B2", 10),  # B2 was first bought at 10
        review("ann", "B3", 20),  # a tie with B1: the file's order
        review("bob", "B3", 1), review("bob", "B1", 2), review("bob", "B4", 3), review("bob", "B2", 4),
        review("cid", "B1", 1), review("cid", "B2", 2), review("cid", "B3", 3), review("cid", "B5", 4), review("cid", "B6", 5),
        review("dan", "B1", 1), review("dan", "B4", 1),  # two purchases: outside the core, and with dan B4
        b"{broken",
    ]  # fmt: skip
    items = [
        meta("B1", "one &amp; only"), meta("B2", "two"), meta("B3", "<i>three</i>"), meta("B4", "four"), meta("B5", " <b> "),
        meta("B1", "the second line of B1"), b"broken", meta("a\nb"), meta("\u2028"),
    ]  # fmt: skip
    assert run(prepare_amazon.main, *category(reviews, items), "--core", 3) == 0
    printed = capsys.readouterr().out
    dataset = read_dataset(data, "lamps")
    assert histories_of(data, "lamps") == [["B1", "B2", "B3"], ["B2", "B1", "B3"], ["B3", "B1", "B2"]]  # of cid, ann and bob
    assert dataset.raw_ids == ["B1", "B2", "B3"]
    assert dataset.titles == ["one & only", "two", "three"]
    assert len(leave_last_out(dataset.histories).evaluated_users) == 3
    assert check_dataset(data, "lamps", 3).usable
    assert counts_of(printed) == {
        "read": 16,
        "no title": 1, "item with a line break": 2, "listed again": 1, "not a JSON object with these fields": 1,
        "item unknown or left out": 2,
        "not the user's first of the item": 1, "outside the 3-core": 3, "fetched": 3, "already there": 0, "failed": 0,
        "users": 3, "items": 3, "interactions": 9,
    }  # fmt: skip
    assert printed.endswith(f"Next: python3 -m scripts.check_data --dataset lamps --train_dir {data} --C 3\n")
    assert {path.name for path in data.iterdir() if not path.name.startswith(".")} == {
        "lamps_final.txt", "lamps_item2id_final.pickle", "lamps_texts_final.pickle", "lamps_images"
    }  # fmt: skip


def test_images_from_the_web_and_what_fails(category, run, data, server, capsys):  # noqa: F811
    reviews, items = many(9, 7, server.url)
    # bea's five purchases count only as long as B6, whose image fails, does
    reviews += [review("bea", f"B{item}", item) for item in range(2, 7)]
    server.answers["/B6"] = answer(404, b"")
    options = category(reviews, items, images=False)
    assert run(prepare_amazon.main, *options) == 0
    printed = capsys.readouterr().out
    assert histories_of(data, "lamps") == [[f"B{item}" for item in range(6)]] * 9
    assert check_dataset(data, "lamps", 8).usable
    with (data / "lamps_failed_images.csv").open(newline="") as file:
        assert list(csv.reader(file)) == [["raw_id", "source", "reason"], ["B6", f"{server.url}/B6", "HTTP 404"]]
    assert "lamps_failed_images.csv lists the failed images" in printed
    assert counts_of(printed)["of items whose image failed, and outside the core without them"] == 9 + 5
    assert (data / "lamps_images" / "B0.jpg").read_bytes() == JPEG
    server.answers.clear()  # next time all goes well, and the old report goes
    assert run(prepare_amazon.main, *options, "--restart") == 0
    assert len(histories_of(data, "lamps")) == 10
    assert not (data / "lamps_failed_images.csv").exists()
    assert server.asked == {**{f"/B{item}": 1 for item in range(6)}, "/B6": 2}


def test_without_any_image_there_is_no_data_set(category, run, data, server, capsys):  # noqa: F811
    server.answers.update({f"/B{item}": answer(403, b"") for item in range(6)})
    assert run(prepare_amazon.main, *category(*many(url=server.url), images=False)) == 2
    assert "all 6 images failed (the first: HTTP 403)" in capsys.readouterr().err
    assert not (data / "lamps_final.txt").exists()
    assert len((data / "lamps_failed_images.csv").read_text().splitlines()) == 7


def test_interrupted_the_same_command_goes_on(category, run, monkeypatch, data, server, capsys):  # noqa: F811
    options = [*category(*many(items=12, url=server.url), images=False), "--workers", "1"]
    get = Downloader.get

    def interrupted(self, url):
        if url.endswith("B7"):
            signal.raise_signal(signal.SIGINT)
        return get(self, url)

    with monkeypatch.context() as patch:
        patch.setattr(Downloader, "get", interrupted)
        assert run(prepare_amazon.main, *options) == 130
    printed = capsys.readouterr().err
    assert "the images so far are in" in printed and "the same command continues from there" in printed
    assert not (data / "lamps_final.txt").exists()
    assert run(prepare_amazon.main, *options) == 0
    assert check_dataset(data, "lamps", 8).usable
    assert max(server.asked.values()) <= 2 and sum(server.asked.values()) <= 14  # at most those under way come twice


@pytest.mark.parametrize("ending", ["_item2id_final.pickle", "_texts_final.pickle", "_final.txt"])
def test_a_writing_that_fails_leaves_no_data_set(category, run, monkeypatch, data, ending):
    options = category(*many())
    assert run(prepare_amazon.main, *options) == 0
    write = writer.write_atomically

    def failing(path, fill):
        if path.name.endswith(ending):
            raise OSError(28, "No space left on device")
        write(path, fill)

    with monkeypatch.context() as patch:
        for module in (writer, files):
            patch.setattr(module, "write_atomically", failing)
        assert run(prepare_amazon.main, *options, "--restart") == 1
    assert not (data / "lamps_final.txt").exists()
    assert run(prepare_amazon.main, *options) == 0


def test_what_is_there_is_not_replaced_unasked(category, run, data, capsys):
    options = category(*many())
    assert run(prepare_amazon.main, *options) == 0
    before = (data / "lamps_final.txt").read_text()
    assert run(prepare_amazon.main, *options, "--core", 1) == 2
    assert "exists already" in capsys.readouterr().err
    assert run(prepare_amazon.main, *options, "--core", 13, "--restart") == 2  # nothing to make: the old one stays
    assert "no users and items with 13 interactions each are left; lower --core" in capsys.readouterr().err
    assert (data / "lamps_final.txt").read_text() == before
    assert run(prepare_amazon.main, *options, "--max_users", 9, "--restart") == 0
    assert len(histories_of(data, "lamps")) == 9


def test_one_process_at_a_time(category, run, data, capsys):
    options = category(*many())
    data.mkdir()
    with FileLock(data / ".lamps_prepare.lock"):
        assert run(prepare_amazon.main, *options) == 2
    assert "another process is making data set 'lamps'" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "../a", "demo", "x" * 201])
def test_names_that_cannot_be(category, run, data, name):
    assert run(prepare_amazon.main, *category(*many()), "--name", name) == 2
    assert not data.exists()


def test_files_of_no_use_are_one_sentence(category, run, data, capsys):
    reviews, items = many()

    def printed(*more, reviews=reviews, items=items, images=True):
        assert run(prepare_amazon.main, *category(reviews, items, images), *more) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1
        return error

    assert "image (not a JSON object with these fields: 72" in printed(items=[{"a": 1}] * 72, images=False)
    assert "no interaction can be used (user missing: 6 (line 1, line 2, line 3, ...))" in printed(reviews=items, images=False)
    assert "scripts.prepare_tables reads other tables than Amazon's" in printed(reviews=[{"a": 1}])
    assert "no interaction can be used (it has no rows)" in printed(reviews=[])
    assert "(no title: 6 (" in printed(items=[meta(f"B{i}", "") for i in range(6)])
    assert "(no image: 6 (" in printed(items=[meta(f"B{i}", "t", None) for i in range(6)], images=False)
    assert "do both files fit together?" in printed(reviews=[review("u", "C1", 1)])
    assert "no user has the 3 interactions" in printed("--core", 1, reviews=reviews[:24])
    assert "with 5 interactions each are left; lower --core\n" in printed(reviews=reviews[:24])
    assert "with 6 interactions each are left; lower --core or raise --max_users\n" in printed("--core", 6, "--max_users", 5)
    for option in ("--reviews", "--meta"):
        assert "none: no such file" in printed(option, data / "none")
    assert "cannot be read (No such file or directory)" in printed("--images", data / "none")
    assert not list(data.glob("lamps_*"))


def test_own_images_of_any_kind(category, run, data, capsys):
    options = category(*many(items=8))
    folder = options[-1]
    os.remove(folder / "B0.jpg")  # no image: left out before the core
    os.remove(folder / "B1.jpg")
    draw_image(2).save(folder / "B1.png")
    (folder / "B2.jpg").write_bytes(b"no image")
    assert run(prepare_amazon.main, *options) == 0
    assert histories_of(data, "lamps") == [["B1", "B3", "B4", "B5", "B6", "B7"]] * 12
    assert counts_of(capsys.readouterr().out)["no image"] == 1


@pytest.mark.parametrize("image", [
    lambda url: {"images": {"hi_res": [None, "x"], "large": [url, "y"], "thumb": ["z", "z"], "variant": ["MAIN", "PT01"]}},
    lambda url: {"images": [{"thumb": url, "large": None, "variant": "MAIN"}, {"large": "x", "variant": "PT01"}]},
    lambda url: {"images": None, "imageURLHighRes": [url, "x"]},
    lambda url: {"images": [], "imageURL": [], "imUrl": url},
])  # fmt: skip
def test_the_fields_of_all_releases(category, run, data, server, image):  # noqa: F811
    reviews = [{"reviewerID": f"u{u}", "asin": f"B{i}", "unixReviewTime": 1_400_000_000 + i} for u in range(5) for i in (2, 0, 1)]
    items = [{"asin": f"B{i}", "title": f"lamp {i}", **image(f"{server.url}/B{i}")} for i in range(3)]
    assert run(prepare_amazon.main, *category(reviews, items, images=False), "--core", 3) == 0
    assert histories_of(data, "lamps") == [["B0", "B1", "B2"]] * 5
    assert server.asked == {f"/B{i}": 1 for i in range(3)}


def test_python_literals_of_2014_and_half_surrogate_pairs(category, run, data):
    reviews, items = many(users=8, items=5)
    category(reviews, items)  # draws the images
    lines = [repr({"asin": f"B{i}", "title": f"it's {i}", "imUrl": "x"}).encode() for i in range(4)]
    lines.append(b'{"asin": "B4", "title": "half \\ud83d pair", "imUrl": "x"}')
    assert run(prepare_amazon.main, *category(reviews, lines)) == 0
    assert read_dataset(data, "lamps").titles == ["it's 0", "it's 1", "it's 2", "it's 3", "half \ufffd pair"]
