"""A category of Amazon Reviews 2023 becomes a data set: by hand, against plain code, within a bound of memory, and by script."""
import csv
import gzip
import json
import os
import pickle
import signal
import sys
import tracemalloc
from collections import Counter

import numpy as np
import pytest
from filelock import FileLock
from hypothesis import given
from hypothesis import strategies as st

from scripts import prepare_amazon
from tests.conftest import draw_image
from tests.prepare.test_downloads import JPEG, answer, server  # noqa: F401
from utils.common.console import run_main
from utils.common.errors import PerPEFTError
from utils.data.dataset import read_dataset
from utils.data.histories import leave_last_out
from utils.items.data_check import check_dataset
from utils.prepare import interactions
from utils.prepare import writer as prepare
from utils.prepare.amazon import AmazonCategory, JsonLines, _address
from utils.prepare.downloads import Downloader
from utils.prepare.interactions import FirstPurchases, Purchases, core_of, count_each, key_of, sample_users
from utils.prepare.titles import clean_title


def review(user, item, time, **more):
    return {"user_id": user, "parent_asin": item, "asin": item, "timestamp": time, "rating": 5.0, "text": "good", **more}


def meta(item, title="a lamp", url="http://127.0.0.1/a.jpg", **more):
    return {"parent_asin": item, "title": title, "images": [{"large": url, "hi_res": None, "variant": "MAIN"}], **more}


def write_lines(path, lines):
    content = b"".join((line if isinstance(line, bytes) else json.dumps(line).encode()) + b"\n" for line in lines)
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


@pytest.fixture
def category(tmp_path):
    """Gives the options of the script for some lines; with `images`, images lie in a folder."""

    def make(reviews, items, images=True, ending=".jsonl.gz"):
        paths = write_lines(tmp_path / f"Lamps{ending}", reviews), write_lines(tmp_path / f"meta_Lamps{ending}", items)
        options = ["--reviews", paths[0], "--meta", paths[1], "--name", "lamps", "--train_dir", tmp_path / "data"]
        if images:
            folder = tmp_path / "images"
            folder.mkdir(exist_ok=True)
            for line in items:
                if isinstance(line, dict) and "images" in line:
                    draw_image(1).save(folder / f"{line['parent_asin']}.jpg")
            options += ["--images", folder]
        return options

    return make


def run(monkeypatch, *options, main=prepare_amazon.main):
    """Run the script; its exit code."""
    monkeypatch.setattr(sys, "argv", ["prepare", *map(str, options)])
    before = signal.getsignal(signal.SIGTERM)
    try:
        run_main(main)
    except SystemExit as end:
        return end.code
    finally:
        signal.signal(signal.SIGTERM, before)
    return 0


def histories_of(folder, name="lamps"):
    """Raw ids of every user's items, in order, the users in order."""
    dataset = read_dataset(folder, name)
    return [[dataset.raw_ids[item - 1] for item in dataset.histories[user]] for user in range(dataset.num_users)]


def many(users=12, items=6):
    """Reviews in which everyone buys everything, and the items."""
    reviews = [review(f"u{u}", f"B{i}", 100 * i + u) for i in range(items) for u in range(users)]
    return reviews, [meta(f"B{i}", f"lamp {i}") for i in range(items)]


# ---- purchases and core


PURCHASES = st.lists(
    st.tuples(st.integers(0, 6), st.integers(0, 6), st.integers(-3, 3).map(float)).map(lambda p: (f"u{p[0]}", f"i{p[1]}", p[2])),
    max_size=60,
)
KNOWN = [f"i{item}" for item in range(6)]  # so i6 is unknown


def plain_histories(purchases):
    """Each user's items by the time of their first purchase, by plain code."""
    ordered = sorted(purchases, key=lambda purchase: purchase[2])  # stable
    histories = {}
    for user, item, _ in ordered:
        if item in KNOWN and item not in histories.setdefault(user, []):
            histories[user].append(item)
    return {user: items for user, items in histories.items() if items}


def read_purchases(purchases):
    first = FirstPurchases([key_of(item) for item in KNOWN])
    for purchase in purchases:
        first.add(*purchase)
    return first, first.finish()


def as_lists(first, purchases):
    item_of = {key_of(item): item for item in KNOWN}
    lists = {}
    for user, item in zip(purchases.users.tolist(), purchases.items.tolist()):
        lists.setdefault(user, []).append(item_of[int(first.item_keys[item])])
    return list(lists.values())


@given(PURCHASES, st.sampled_from([1, 3, 1000]))
def test_first_purchases_in_time_order(purchases, waiting):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interactions, "WAITING", waiting)
        first, found = read_purchases(purchases)
    expected = plain_histories(purchases)
    assert as_lists(first, found) == [expected[user] for user in sorted(expected, key=key_of)]
    known = [purchase for purchase in purchases if purchase[1] in KNOWN]
    assert (first.added, first.unknown) == (len(purchases), len(purchases) - len(known))
    assert first.repeated == len(known) - len(found)


def plain_core(pairs, core):
    """Remove one user or item at a time until none has too few."""
    pairs = list(pairs)
    while True:
        counts = Counter(name for pair in pairs for name in pair)
        short = next((name for name, count in counts.items() if count < core), None)
        if short is None:
            return pairs
        pairs = [pair for pair in pairs if short not in pair]


@given(st.sets(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=80), st.integers(1, 6))
def test_core_against_plain_code(pairs, core):
    pairs = sorted(pairs)
    users, items = np.array(pairs, dtype=np.uint32).reshape(-1, 2).T
    found = core_of(Purchases(users, items), core)
    expected = plain_core([(f"u{user}", f"i{item}") for user, item in pairs], core)
    assert [(f"u{user}", f"i{item}") for user, item in zip(found.users, found.items)] == expected


def test_core_takes_as_many_rounds_as_it_needs():
    chain = [(user, item) for user in range(200) for item in (user, user + 1)]  # each round takes one from either end
    full = [(user, item) for user in range(300, 303) for item in range(300, 303)]
    users, items = np.array(chain + full, dtype=np.uint32).T
    assert len(core_of(Purchases(users, items), 2)) == 9


@given(PURCHASES, st.integers(1, 7), st.integers(1, 3))
def test_drawn_users_have_enough_and_come_whole(purchases, count, core):
    _, all_of_them = read_purchases(purchases)
    drawn = sample_users(all_of_them, count, core, seed=3)
    counts = np.bincount(all_of_them.users, minlength=1)
    rows = np.unique(drawn.users)
    assert len(rows) == min(count, (counts >= core).sum())
    assert len(drawn) == counts[rows].sum() and (counts[rows] >= core).all()
    _, backwards = read_purchases(purchases[::-1])
    assert np.array_equal(rows, np.unique(sample_users(backwards, count, core, seed=3).users))


@given(st.lists(st.integers(0, 30), max_size=40), st.integers(1, 50))
def test_counts_slice_by_slice(numbers, size):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interactions, "SLICE", size)
        counts = count_each(np.array(numbers, dtype=np.uint32))
    assert counts.tolist() == np.bincount(np.array(numbers, dtype=np.int64), minlength=1).tolist()


def test_seeds_draw_different_users():
    purchases = Purchases(np.arange(1000, dtype=np.uint32), np.zeros(1000, dtype=np.uint32))
    drawn = [sample_users(purchases, 100, 1, seed).users for seed in (0, 0, 1)]
    assert np.array_equal(drawn[0], drawn[1]) and not np.array_equal(drawn[0], drawn[2])


def test_memory_a_line_is_bounded(tmp_path, monkeypatch):
    """Twenty bytes a review and what the arrays leave free, though every user is another; nothing stays of the texts."""
    monkeypatch.setattr(interactions, "WAITING", 2048)
    items = write_lines(tmp_path / "meta.jsonl", [meta(f"B{i}", "t" * 300) for i in range(200)])
    peaks = {}
    for count in (10_000, 40_000):
        reviews = (review(f"A{line:030d}", f"B{line % 200}", line, text="x" * 200) for line in range(count))
        category = AmazonCategory(write_lines(tmp_path / f"{count}.jsonl", reviews), items)
        tracemalloc.start()
        first = FirstPurchases(category.item_keys())
        for purchase in category.purchases():
            first.add(*purchase)
        found = first.finish()
        core_of(found, 5)
        peaks[count] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert len(found) == count
    assert (peaks[40_000] - peaks[10_000]) / 30_000 < 36


# ---- titles, addresses, lines


@pytest.mark.parametrize("title, clean", [
    ("Lamp &amp; Shade", "Lamp & Shade"),
    ("&lt;b&gt;Lamp&lt;/b&gt; <br/>red<!-- new -->", "Lamp red"),
    ("  Lamp\t\n red\x00\x1b[31m ", "Lamp red [31m"),
    ("5 < 6 and 7 > 6, I <3 it", "5 < 6 and 7 > 6, I <3 it"),
    ("La\u00admp\u200b \ud800\ufeff\u202e", "Lamp"),
    ("Lämpe 灯 💡", "Lämpe 灯 💡"),
    ("<p></p>&nbsp;\u3000", ""),
])  # fmt: skip
def test_titles(title, clean):
    assert clean_title(title) == clean


@given(st.text())
def test_clean_titles_print_and_stay(title):
    clean = clean_title(title)
    assert clean.isprintable() and clean == " ".join(clean.split())
    clean.encode()


def test_the_main_image_counts_and_sizes_stand_in():
    main = {"variant": "MAIN", "large": None, "hi_res": "main", "thumb": "t"}
    assert _address([{"variant": "PT01", "large": "other"}, main]) == "main"
    assert _address([{"variant": "PT01", "large": "first"}, {"variant": "PT02", "large": "second"}]) == "first"
    assert _address([{"variant": "MAIN", "large": "", "hi_res": None}, {"thumb": "small"}]) == "small"
    for none in (None, [], {}, "x", [None, 3], [{"large": 5}]):
        assert _address(none) is None


@given(st.lists(st.one_of(
    st.binary(max_size=30),
    st.dictionaries(st.sampled_from(["user_id", "parent_asin", "timestamp", "title", "images"]),
                    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.lists(st.none()))),
), max_size=8))  # fmt: skip
def test_no_line_is_a_crash(tmp_path_factory, lines):
    path = write_lines(tmp_path_factory.mktemp("fuzz") / "lines.jsonl", lines)
    category = AmazonCategory(path, path)
    for read in (category.item_keys, lambda: list(category.purchases())):
        try:
            read()
        except PerPEFTError as error:
            assert "\n" not in str(error)
    assert category.items(np.array([1], dtype=np.uint64)) == {1: None}


@pytest.mark.parametrize("line", [
    b"{", b"[1]", b"null", b"\xff\xfe", b"[" * 100_000, b'{"user_id": "u", "parent_asin": "B0"}', b"9" * 5000,
    review("u", "B0", None), review("u", "B0", "5"), review("", "B0", 5), review("u", 3, 5), review("u", "B0", True),
    b'{"user_id": "u", "parent_asin": "B0", "timestamp": NaN}', review("u", "B0", 10**30),
])  # fmt: skip
def test_malformed_reviews_are_counted(tmp_path, line):
    category = AmazonCategory(write_lines(tmp_path / "r.jsonl", [line, b"  ", review("u", "B0", 5)]), tmp_path / "r.jsonl")
    assert list(category.purchases()) == [("u", "B0", 5.0)]
    assert (category.reviews.lines, category.malformed) == (2, 1)


def test_a_line_without_end_is_read_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr("utils.prepare.amazon.LONGEST_LINE", 1000)
    lines = JsonLines(write_lines(tmp_path / "r.jsonl.gz", [b"x" * 5500, review("u", "B0", 5)]))
    assert len(list(lines)) == 1 and lines.malformed == 6


# ---- the whole


def test_by_hand(category, monkeypatch, tmp_path, capsys):
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
    options = category(reviews, items[:4] + items[4:7])
    write_lines(tmp_path / "meta_Lamps.jsonl.gz", items)
    assert run(monkeypatch, *options, "--core", 3) == 0
    told = capsys.readouterr().out
    dataset = read_dataset(tmp_path / "data", "lamps")
    expected = {"ann": ["B2", "B1", "B3"], "bob": ["B3", "B1", "B2"], "cid": ["B1", "B2", "B3"]}
    assert histories_of(tmp_path / "data") == [expected[user] for user in sorted(expected, key=key_of)]
    assert dataset.raw_ids == ["B1", "B2", "B3"]
    assert dataset.titles == ["one & only", "two", "three"]
    assert len(leave_last_out(dataset.histories).evaluated_users) == 3
    assert "usable" in str(check_dataset(tmp_path / "data", "lamps", 3))
    rows = dict(row.rsplit(maxsplit=1) for row in told.splitlines() if row.startswith("  "))
    assert {name.strip(): count for name, count in rows.items()} == {
        "malformed lines": "1", "no title": "1", "id with a line break": "2",
        "read": "16", "malformed": "1", "of an item that is unknown or left out": "2",
        "of an item the user had bought before": "1", "outside the 3-core": "3", "kept": "9",
        "of items whose image failed, and what left the core with them": "0",
        "fetched": "3", "there already": "0", "failed": "0", "users": "3", "items": "3", "interactions": "9",
    }  # fmt: skip
    assert told.endswith(f"Next: python3 -m scripts.check_data --dataset lamps --train_dir {tmp_path / 'data'} --C 3\n")
    assert {path.name for path in (tmp_path / "data").iterdir() if not path.name.startswith(".")} == {
        "lamps_final.txt", "lamps_item2id_final.pickle", "lamps_texts_final.pickle", "lamps_images"
    }  # fmt: skip


def test_the_default_check_passes_and_packing_makes_no_difference(category, monkeypatch, tmp_path):
    files = {}
    for ending in (".jsonl", ".jsonl.gz"):
        assert run(monkeypatch, *category(*many(), ending=ending), "--restart") == 0
        assert check_dataset(tmp_path / "data", "lamps", 8).usable
        files[ending] = [(tmp_path / "data" / f"lamps{end}").read_bytes() for end in ("_final.txt", "_item2id_final.pickle")]
    assert files[".jsonl"] == files[".jsonl.gz"]


def test_images_from_the_web_and_what_fails(category, monkeypatch, tmp_path, server, capsys):  # noqa: F811
    reviews, items = many(users=9, items=7)
    items = [meta(line["parent_asin"], line["title"], f"{server.url}/{line['parent_asin']}") for line in items]
    # bea's five purchases count only as long as B6, whose image fails, does
    reviews += [review("bea", f"B{item}", item) for item in range(2, 7)]
    server.answers["/B6"] = answer(404, b"")
    options = category(reviews, items, images=False)
    assert run(monkeypatch, *options, "--core", 5) == 0
    told = capsys.readouterr().out
    assert histories_of(tmp_path / "data") == [[f"B{item}" for item in range(6)]] * 9
    assert check_dataset(tmp_path / "data", "lamps", 8).usable
    with (tmp_path / "data" / "lamps_failed_images.csv").open(newline="") as file:
        assert list(csv.reader(file)) == [["raw_id", "source", "reason"], ["B6", f"{server.url}/B6", "HTTP 404"]]
    assert "failed" in told and "lamps_failed_images.csv" in told
    assert [int(line.split()[-1]) for line in told.splitlines() if "left the core with them" in line] == [9 + 5]
    assert (tmp_path / "data" / "lamps_images" / "B0.jpg").read_bytes() == JPEG
    server.answers.clear()  # next time all goes well, and the old report goes
    assert run(monkeypatch, *options, "--restart") == 0
    assert len(histories_of(tmp_path / "data")) == 10
    assert not (tmp_path / "data" / "lamps_failed_images.csv").exists()
    assert server.asked == {**{f"/B{item}": 1 for item in range(6)}, "/B6": 2}


def test_without_any_image_there_is_no_data_set(category, monkeypatch, tmp_path, server, capsys):  # noqa: F811
    reviews, items = many()
    items = [meta(line["parent_asin"], "t", f"{server.url}/{line['parent_asin']}") for line in items]
    server.answers.update({f"/B{item}": answer(403, b"") for item in range(6)})
    assert run(monkeypatch, *category(reviews, items, images=False)) == 2
    assert "none of the 6 images could be had (the first: HTTP 403)" in capsys.readouterr().err
    assert not (tmp_path / "data" / "lamps_final.txt").exists()
    assert len((tmp_path / "data" / "lamps_failed_images.csv").read_text().splitlines()) == 7


def test_interrupted_the_same_command_goes_on(category, monkeypatch, tmp_path, server, capsys):  # noqa: F811
    reviews, items = many(items=12)
    items = [meta(line["parent_asin"], "t", f"{server.url}/{line['parent_asin']}") for line in items]
    options = [*category(reviews, items, images=False), "--workers", "1"]
    get = Downloader.get

    def interrupted(self, url):
        if url.endswith("B7"):
            signal.raise_signal(signal.SIGINT)
        return get(self, url)

    with monkeypatch.context() as patch:
        patch.setattr(Downloader, "get", interrupted)
        assert run(patch, *options) == 130
    told = capsys.readouterr().err
    assert "the images so far are in" in told and "the same command continues from there" in told
    assert not (tmp_path / "data" / "lamps_final.txt").exists()
    assert run(monkeypatch, *options) == 0
    assert check_dataset(tmp_path / "data", "lamps", 8).usable
    assert max(server.asked.values()) <= 2 and sum(server.asked.values()) <= 14  # at most those under way come twice


@pytest.mark.parametrize("ending", ["_item2id_final.pickle", "_texts_final.pickle", "_final.txt"])
def test_a_writing_that_fails_leaves_no_data_set(category, monkeypatch, tmp_path, ending):
    options = category(*many())
    assert run(monkeypatch, *options) == 0
    write = prepare.write_atomically

    def failing(path, fill):
        if path.name.endswith(ending):
            raise OSError(28, "No space left on device")
        write(path, fill)

    with monkeypatch.context() as patch:
        patch.setattr(prepare, "write_atomically", failing)
        assert run(patch, *options, "--restart") == 1
    assert not (tmp_path / "data" / "lamps_final.txt").exists()
    assert run(monkeypatch, *options) == 0


def test_what_is_there_is_not_replaced_unasked(category, monkeypatch, tmp_path, capsys):
    options = category(*many())
    assert run(monkeypatch, *options) == 0
    before = (tmp_path / "data" / "lamps_final.txt").read_text()
    assert run(monkeypatch, *options, "--core", 1) == 2
    assert "is there already" in capsys.readouterr().err
    assert run(monkeypatch, *options, "--core", 13, "--restart") == 2  # nothing to make: the old one stays
    assert "no user and no item has 13 purchases; lower --core" in capsys.readouterr().err
    assert (tmp_path / "data" / "lamps_final.txt").read_text() == before
    assert run(monkeypatch, *options, "--max_users", 9, "--restart") == 0
    assert len(histories_of(tmp_path / "data")) == 9


def test_one_process_at_a_time(category, monkeypatch, tmp_path, capsys):
    options = category(*many())
    (tmp_path / "data").mkdir()
    with FileLock(tmp_path / "data" / ".lamps_prepare.lock"):
        assert run(monkeypatch, *options) == 2
    assert "another process is making data set 'lamps'" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "../a", "demo", "x" * 201])
def test_names_that_cannot_be(category, monkeypatch, tmp_path, name):
    assert run(monkeypatch, *category(*many()), "--name", name) == 2
    assert not (tmp_path / "data").exists()


def test_files_of_no_use_are_one_sentence(category, monkeypatch, tmp_path, capsys):
    reviews, items = many()

    def told(*more, reviews=reviews, items=items, images=True):
        options = category(reviews, items, images)
        assert run(monkeypatch, *options, *more) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1
        return error

    assert "none of its 72 lines is an item of Amazon Reviews 2023" in told(items=[{"a": 1}] * 72, images=False)
    assert "none of its 6 lines is a review of Amazon Reviews 2023" in told(reviews=items, images=False)
    assert "none of its 0 lines" in told(reviews=[])
    assert "no item is of use (no title: 6)" in told(items=[meta(f"B{i}", "") for i in range(6)])
    assert "no item is of use (no image: 6)" in told(items=[meta(f"B{i}", "t", None) for i in range(6)], images=False)
    assert "do both files fit together?" in told(reviews=[review("u", "C1", 1)])
    assert "no user has the 3 purchases" in told("--core", 1, reviews=reviews[:24])
    assert "has 5 purchases; lower --core\n" in told(reviews=reviews[:24])
    assert "has 6 purchases; lower --core or raise --max_users\n" in told("--core", 6, "--max_users", 5)
    assert not list((tmp_path / "data").glob("lamps_*"))


def test_cut_and_missing_files(category, monkeypatch, tmp_path, capsys):
    options = category(*many())
    for place in (1, 3):
        whole = options[place].read_bytes()
        for content in (whole[:-20], whole[:-8] + b"\0" * 8, whole[:40] + b"\xff" * 20 + whole[60:]):
            options[place].write_bytes(content)
            assert run(monkeypatch, *options) == 2
            assert f"{options[place]} is cut off or damaged" in capsys.readouterr().err
        options[place].unlink()
        assert run(monkeypatch, *options) == 2
        assert f"{options[place]} is no file" in capsys.readouterr().err
        options[place].write_bytes(whole)
    assert run(monkeypatch, *options, "--images", tmp_path / "none") == 2
    assert "cannot be read (No such file or directory)" in capsys.readouterr().err


def test_own_images_of_any_kind(category, monkeypatch, tmp_path, capsys):
    options = category(*many(items=8))
    folder = options[-1]
    os.remove(folder / "B0.jpg")  # no image: left out before the core
    os.remove(folder / "B1.jpg")
    draw_image(2).save(folder / "B1.png")
    (folder / "B2.jpg").write_bytes(b"no image")
    assert run(monkeypatch, *options) == 0
    assert [len(history) for history in histories_of(tmp_path / "data")] == [6] * 12
    assert check_dataset(tmp_path / "data", "lamps", 8).usable
    with (tmp_path / "data" / "lamps_item2id_final.pickle").open("rb") as file:
        assert list(pickle.load(file).values()) == ["B1", "B3", "B4", "B5", "B6", "B7"]
    told = capsys.readouterr().out
    assert any(line.split() == ["no", "image", "1"] for line in told.splitlines())
