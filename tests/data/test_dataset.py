"""Histories, raw ids, titles and images come out of the files as written; all that is wrong with them is in one report."""
import pickle
import re
import time

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from scripts import check_data
from tests.conftest import RAW_IDS, TITLES, draw_image, encoded, exit_code, tiny_options, write_dataset
from tests.forks import in_a_fork
from utils.common.errors import PerPEFTError
from utils.data import images
from utils.data.dataset import MISSING_TITLE, read_dataset
from utils.data.histories import Histories, leave_last_out, sorted_distinct
from utils.items.data_check import check_dataset
from utils.items.hidden_states import states_path
from utils.run.opening import open_run


def lists(histories):
    return [histories[user].tolist() for user in range(histories.num_users)]


def put(folder, end, content):
    """Replace a file of the data set by bytes, a text, or the pickle of a value."""
    content = content.encode() if isinstance(content, str) else content
    (folder / f"shop_{end}").write_bytes(content if isinstance(content, bytes) else pickle.dumps(content))


def write_title(folder, title):
    """Replace the first item's title."""
    put(folder, "texts_final.pickle", dict(zip(RAW_IDS, [title, *TITLES[1:]])))


def image_path(folder, item):
    return folder / "shop_images" / f"B{item:03d}.jpg"


def complaint(folder, **options):
    with pytest.raises(PerPEFTError) as raised:
        read_dataset(folder, "shop", **options)
    return str(raised.value)


@given(st.lists(st.lists(st.integers(1, 9), max_size=8), min_size=1, max_size=8), st.integers(1, 8), st.data())
def test_histories_keep_every_interaction_in_order(histories, count, data):
    found = Histories.of_lists(histories)
    split = leave_last_out(found)
    for user, items in enumerate(histories):
        held_out = items[-2:] if len(items) >= 3 else []
        assert [split.valid[user], split.test[user]] == (held_out or [0, 0])
        assert split.train[user].tolist() + held_out == items
        assert split.train_and_valid[user].tolist() == (items[:-1] if held_out else items)
        assert (user in split.evaluated_users) == (len(items) >= 3)
    assert found.has_every_item(2).tolist() == [len(set(items)) == 2 for items in histories]
    assert lists(found) == histories and found.lengths.tolist() == list(map(len, histories))
    assert found.users.tolist() == [user for user, items in enumerate(histories) for _ in items]
    assert sorted_distinct(found.items).tolist() == sorted({item for items in histories for item in items})
    users = data.draw(st.lists(st.integers(0, len(histories) - 1), max_size=6))
    last = found.last(np.array(users, dtype=np.int64), count)
    assert last.tolist() == [([0] * count + histories[user])[-count:] for user in users]


def test_files_come_out_as_written(tiny_dataset):
    dataset = read_dataset(tiny_dataset.train_dir, "tiny")
    assert dataset.user_ids.tolist() == sorted(tiny_dataset.histories)
    assert lists(dataset.histories) == [tiny_dataset.histories[user] for user in dataset.user_ids]
    assert dataset.titles == [title or MISSING_TITLE for title in tiny_dataset.titles]
    assert dataset.titles[4] == "No description available." and dataset.missing_titles == 1
    assert dataset.raw_ids[:2] == ["B001", "B002"] and dataset.num_items == 30
    assert [path.name for path in dataset.image_paths] == [f"B{item:03d}.jpg" for item in range(1, 31)]
    interactions = sum(map(len, tiny_dataset.histories.values()))
    assert dataset.counts() == {"users": 40, "items": 30, "interactions": interactions}


def test_odd_but_sound_files_print_nothing_and_no_image_is_opened(folder, capsys, monkeypatch):
    """Items without users, in any order, a padding entry, and a title of an item of another shop."""
    monkeypatch.setattr(images.Image, "open", None)
    put(folder, "item2id_final.pickle", {3: "B003", 0: "padding", 1: "B001", 5: "B005", 2: "B002", 4: "B004"})
    put(folder, "texts_final.pickle", {**dict(zip(RAW_IDS, TITLES)), "B999": "of another shop"})
    put(folder, "final.txt", "1 1\n1 2\n1 1\n")
    dataset = read_dataset(folder, "shop")
    assert dataset.raw_ids == RAW_IDS and dataset.titles == TITLES
    assert capsys.readouterr() == ("", "")


GOOD_TEXTS = {
    "plain": b"1 1\n1 2\n1 3\n900 2\n",
    "CRLF": b"1 1\r\n1 2\r\n1 3\r\n900 2\r\n",
    "CR": b"1 1\r1 2\r1 3\r900 2\r",
    "byte order mark": b"\xef\xbb\xbf1 1\n1 2\n1 3\n900 2\n",
    "tabs, spaces, no last line end": b"1\t1\n  1   2  \n1 \t 3\n\n \n900 2",
    "leading zeros": b"001 01\n1 2\n1 3\n900 0002\n",
    "users interleaved": b"1 1\n900 2\n1 2\n1 3\n",
}


@pytest.mark.parametrize("kind", GOOD_TEXTS)
def test_ways_to_write_the_same_interactions(folder, kind):
    text = GOOD_TEXTS[kind]
    put(folder, "final.txt", text)
    dataset = read_dataset(folder, "shop")
    assert dataset.user_ids.tolist() == [1, 900]
    assert lists(dataset.histories) == [[1, 2, 3], [2]]
    end = re.search(b"\r?\n|\r", text).group()  # lines are numbered alike however they end
    put(folder, "final.txt", text.removesuffix(end) + end + b"1 2 3" + end)
    assert re.search(rf"not two integers \(1\): line {7 if b'	' in text else 5} '1 2 3'$", complaint(folder))


def test_users_in_any_order_keep_the_order_of_their_items(folder):
    items = [step * step % 5 + 1 for step in range(200)]
    put(folder, "final.txt", "".join(f"{user} {item}\n" for item in items for user in (2**63 - 1, 1, 30)))
    dataset = read_dataset(folder, "shop", contents=False)
    assert dataset.user_ids.tolist() == [1, 30, 2**63 - 1] and lists(dataset.histories) == [items] * 3


def test_every_kind_of_problem_is_in_one_report(tmp_path, capsys):
    folder = write_dataset(tmp_path, "shop", {1: [1]}, [None] * 40, raw_ids=[f"R{item:02d}" for item in range(1, 41)])
    malformed = "".join(f"{number} x\n" for number in range(20_000))
    below_one = "".join(f"1 {-number}\n" for number in range(11))
    put(folder, "final.txt", f"1 1\n2 2\n{below_one}{malformed}2 77\n")
    raw_ids = {item: f"R{item:02d}" for item in range(1, 41) if item not in (20, 39)}
    put(folder, "item2id_final.pickle", {**raw_ids, 7: "R06", 8: 9, 9: "up\n"})
    images = folder / "shop_images"
    bomb = encoded(Image.new("1", (20_000, 20_000)), "PNG")  # 400 million pixels in 50 kilobytes
    thin = encoded(Image.new("1", (60_000, 1)), "PNG")  # after the resize, 13 million pixels wide
    bad_images = {
        1: (b"", "empty"), 2: (encoded(draw_image(1))[:-100], "truncated"), 3: (b"no image", "not an image of a kind"),
        4: (bomb, "far too many pixels"), 5: (b"\x89PNG\r\n\x1a\n" + bytes(40), "not an image"), 24: (thin, "60000 x 1 pixels"),
    }  # fmt: skip
    for item, (content, _) in bad_images.items():
        (images / f"R{item:02d}.jpg").write_bytes(content)
    for item in (*range(10, 20), 22, 23):
        (images / f"R{item}.jpg").unlink()
    report = complaint(folder, num_groups=3)
    assert len(report) < 3000
    assert re.search(r"not two integers \(20000\): line 14 '0 x', .*line 23 '9 x' and 19990 more", report)
    assert re.search(r"below 1 \(11\): line 3 '1 0', line 4 '1 -1', .*line 12 '1 -9' and 1 more", report)
    assert "no user with the 3 interactions that evaluation needs; most interactions of one user (1): 2" in report
    assert "fewer users than the 3 groups of --C (1): 2 users" in report
    assert re.search(r"not item number: raw id.*\(2\): 8: 9, 9: 'up\\n'", report)
    assert re.search(r"gaps in the item numbers .*\(4\): 8, 9, 20, 39\n", report)
    assert re.search(r"items of users without raw id .*\(1\): 77\n", report)
    assert re.search(r"duplicate raw ids .*\(1\): R06 \(items 6 and 7\)", report)
    missing = ", ".join(f"R{item}.jpg \\(item {item}\\)" for item in range(10, 20))
    assert re.search(rf"items without an image .*\(12\): {missing} and 2 more", report)
    unreadable = re.search(r"unreadable images .*\(6\): (.*)", report).group(1)
    for item, (_, reason) in bad_images.items():
        assert re.search(rf"R{item:02d}\.jpg \(item {item}: [^,]*{reason}", unreadable), unreadable
    assert re.search(r"without a title.*\(36\): R01, R02, .* and 26 more", capsys.readouterr().err)


def test_titles_and_images_are_not_checked_if_they_are_not_needed(folder):
    put(folder, "final.txt", "bad\n1 1\n1 2\n1 3\n")
    image_path(folder, 2).write_bytes(b"")
    assert "B002.jpg (item 2" in complaint(folder)
    for options in ({"contents": False}, {"missing_images": "blank"}):
        assert "line 1" in complaint(folder, **options) and "B002" not in complaint(folder, **options)
    image_path(folder, 3).unlink()
    put(folder, "final.txt", "1 1\n1 2\n1 3\n")
    assert "B003.jpg (item 3)" in complaint(folder)
    assert read_dataset(folder, "shop", missing_images="blank").num_items == 5
    (folder / "shop_texts_final.pickle").unlink()
    (folder / "shop_images").rename(folder / "elsewhere")
    assert read_dataset(folder, "shop", contents=False).num_items == 5
    message = complaint(folder)
    assert "shop_texts_final.pickle is missing" in message and "shop_images (No such file or directory)" in message


def test_missing_data_set_message_names_what_is_there(folder):
    write_dataset(folder, "grocer", {1: [1, 2, 3]}, ["a", "b", "c"])
    with pytest.raises(PerPEFTError, match="'unknown'.*unknown_final.txt.*grocer, shop"):
        read_dataset(folder, "unknown")
    with pytest.raises(PerPEFTError, match="'arts'.*grocer, shop.*unzip_data.py"):  # the paper's: says how to get it
        read_dataset(folder, "arts")
    with pytest.raises(PerPEFTError, match="none.*your_data.md"):
        read_dataset(folder / "nowhere", "shop")


def test_fewer_users_than_groups(folder, tiny_dataset, tiny_clip, tmp_path):
    assert read_dataset(folder, "shop", num_groups=3).num_users == 3
    options = tiny_options(tiny_dataset, tiny_clip, tmp_path / "runs", C=41)
    with pytest.raises(PerPEFTError, match="fewer users than the 41 groups of --C"), open_run(options):
        pass
    assert not (tmp_path / "runs").exists()


def test_user_with_every_item_is_a_remark_with_their_own_number(folder, capsys):
    histories = {7: [1, 2, 3], 1000: [5, 4, 3, 2, 1, 1, 2], 9: [5, 4, 3, 2, 1]}  # of 9's, the last two are held out
    put(folder, "final.txt", "".join(f"{user} {item}\n" for user, items in histories.items() for item in items))
    assert read_dataset(folder, "shop").num_users == 3
    assert re.search(r"every item in their training history.*left out of training.*\(1\): user 1000\n", capsys.readouterr().err)


BAD_LINES = (
    b"one two", b"1.0 2", b"1 2.0", b"1e0 2", b"1 nan", b"1 inf", b"1 2 3", b"1", b"1,2", b"1;2", b"1 0x2", b"1_0 2", b"# note",
    b"1 --2", b"1 -", b"- -", b"1 2-", b"1 \xff", b"\xe9 2", b"1 2\x00", b"\x00 2", b"1 \xd9\xa1", b"1 \xc2\xb2", b"'1' 2",
    b"1 9223372036854775808", b"1 99999999999999999999", b"1 -99999999999999999999", b"9" * 5000 + b" 1", b"1 \xef\xbb\xbf2",
)  # fmt: skip
BELOW_ONE = (b"0 1", b"1 0", b"-1 2", b"1 -1", b"-5 -7", b"00 1")
NO_DICTS = (b"", b"no pickle at all", pickle.dumps({1: "B001"})[:-4], [1, 2], {})
NO_NUMBERS = (2**62, 2**63, -1, 1.5, True, None, "2", 10**30)
NO_IDS = (None, 5, b"B005", ["B005"], "half\ud83d", "", "two\nlines", "lines\n" * 1000)
CONTROLLING = ("x\x1b[2Jy", "line\nbreak", "\u202ereversed")
LAUGHS = ["ha"]
for _ in range(16):  # 2 ** 16 laughs in 17 lists; with 60, unfolding them never ends
    LAUGHS = [LAUGHS, LAUGHS]


def raw_ids(more):
    return {**dict(enumerate(RAW_IDS, 1)), **more}


DAMAGED = [  # the file, its content, words of the report
    *(("final.txt", b"1 1\n1 2\n" + line + b"\n1 3\n", r"shop_final.txt (that are not two integers|with .*) \(1\): line 3 ")
      for line in BAD_LINES),
    *(("final.txt", b"1 1\n1 2\n" + line + b"\n1 3\n", rf"below 1 \(1\): line 3 '{line.decode()}'") for line in BELOW_ONE),
    *(("final.txt", text, r"empty file \(1\): shop_final.txt") for text in (b"", b"\n\n  \n")),
    *(("item2id_final.pickle", value, "shop_item2id_final.pickle") for value in NO_DICTS),
    *(("item2id_final.pickle", {**dict(enumerate(RAW_IDS[1:], 2)), key: "B006"}, "item2id_final.pickle") for key in NO_NUMBERS),
    *(("item2id_final.pickle", raw_ids({5: value}), r"item number: raw id \(a non-empty text without a line break\) \(1\): 5: ")
      for value in NO_IDS),
    *(("item2id_final.pickle", raw_ids({5: value}), re.escape(value.encode("unicode_escape").decode())) for value in CONTROLLING),
    ("item2id_final.pickle", raw_ids({6: LAUGHS}), "6: <list>"),
]  # fmt: skip


@pytest.mark.parametrize("end, content, words", DAMAGED)
def test_what_is_wrong_in_a_file_is_named(folder, capsys, end, content, words):
    put(folder, end, content)
    report = complaint(folder) + capsys.readouterr().err
    assert re.search(words, report)
    assert all(letter.isprintable() for letter in report.replace("\n", ""))  # names in the data cannot control the terminal
    assert len(report.encode()) < 2000


HUGE = 10**12
GAPS = rf"gaps .*\({HUGE - 6}\): 6, 7, 8, 9, 10, 11, 12, 13, 14, 15 and {HUGE - 16} more"


@pytest.mark.parametrize("last_line, more_ids, words", [
    (f"1 {HUGE}", {}, rf"without raw id .*\(1\): {HUGE}"), ("1 4", {HUGE: "B006"}, GAPS),
    (f"1 {HUGE}", {HUGE: "B006"}, GAPS), (f"{HUGE} 4", {}, r"users +2\n(.*\n)+usable"),
])  # fmt: skip
def test_huge_number_takes_no_memory(folder, last_line, more_ids, words):
    put(folder, "final.txt", f"1 1\n1 2\n1 3\n{last_line}\n")
    put(folder, "item2id_final.pickle", raw_ids(more_ids))
    report, code = in_a_fork(lambda write: write(check_dataset(folder, "shop", 1).text), addresses=2**27)
    assert code == 0 and re.search(words, report)


NOT_TEXT, NOTHING = (7, b"bytes", LAUGHS, {"a": 1}, True, 10**18, float("inf")), (None, "", " \t\n", float("nan"))


@pytest.mark.parametrize("title", NOT_TEXT + NOTHING)
def test_title_that_is_nothing_or_not_text_is_replaced(folder, capsys, title):
    write_title(folder, title)
    dataset = read_dataset(folder, "shop")
    assert dataset.titles == [MISSING_TITLE, *TITLES[1:]] and dataset.missing_titles == 1
    kind = "items without a title" if title in NOTHING else "items whose title is not text"
    remark = rf"warning: data set 'shop':\n  {kind}, replaced by '{MISSING_TITLE}' \(1\): B001.{{,30}}\n"
    out, err = capsys.readouterr()
    assert out == "" and re.fullmatch(remark, err)


def test_title_with_half_a_surrogate_pair_can_still_be_written(folder):
    write_title(folder, "caf\ud83d lamp")
    title = read_dataset(folder, "shop").titles[0]
    assert title.encode() and title.startswith("caf") and title.endswith(" lamp")


@pytest.mark.parametrize("large", [True, False])
def test_large_images_are_decoded_one_at_a_time(folder, monkeypatch, large):
    monkeypatch.setattr(images, "LARGE_PIXELS", 100 if large else 10**9)
    monkeypatch.setattr(images.os, "cpu_count", lambda: 8)
    inside, most = [], []

    def read(path):
        with images.decoded_image(path):
            inside.append(path)
            most.append(len(inside))
            time.sleep(0.02)
            inside.remove(path)

    paths = sorted((folder / "shop_images").iterdir())
    assert list(images.on_all_cores(read, paths)) == [None] * 5
    assert (max(most) == 1) == large


@pytest.fixture
def run_check(folder, capsys):
    """Runs check_data in this process and returns its exit code, output and errors."""
    arguments = ("--train_dir", folder, "--dataset")
    return lambda *more: (exit_code((*arguments, *more), check_data.main), *capsys.readouterr())


def table(text):
    return dict(re.findall(r"^  (\S.*?) {2,}(\S.*)$", text, re.MULTILINE))


def test_check_prints_the_counts_of_a_sound_data_set(folder, run_check):
    write_title(folder, None)
    code, out, err = run_check("shop", "--C", 2)
    assert table(out) == {
        "users": "3", "items": "5", "interactions": "9", "interactions per user (mean)": "3.00", "images found": "5",
        "titles missing": "1", "users evaluated": "2", "hidden states": "none yet",
    }  # fmt: skip
    assert re.search(r"worth knowing:\n.*without a title.*\(1\): B001", out) and out.endswith("\nusable\n")
    assert code == 0 and "error" not in err
    torch.save((torch.zeros(5, 3, 8), torch.zeros(5, 3, 4), RAW_IDS), states_path(folder, "shop"))
    assert table(check_dataset(folder, "shop", 1).text)["hidden states"] == "found"


def test_check_reports_everything_and_ends_with_code_2(folder, run_check):
    image_path(folder, 1).write_bytes(b"")
    image_path(folder, 2).unlink()
    code, out, _ = run_check("shop", "--C", 1, "--missing_images", "blank")
    assert code == 0 and table(out)["images found"] == "3"
    assert re.search(r"replaced by black ones \(2\): B002.jpg \(item 2\), B001.jpg \(item 1: the file is empty\)", out)
    put(folder, "final.txt", "1 1\n1 2\n1 3\nbad\n")
    torch.save((torch.zeros(5, 3, 8) / 0, torch.zeros(5, 3, 4), RAW_IDS), states_path(folder, "shop"))
    code, out, err = run_check("shop")
    counts = table(out)
    assert counts["images found"] == "3" and counts["users"] == "1" and counts["hidden states"] == "unusable"
    for part in ("line 4 'bad'", "B001.jpg (item 1: the file is empty)", "B002.jpg (item 2)", "8 groups of --C", "NaN"):
        assert part in out.split("cannot be used:")[1]
    assert code == 2 and "usable\n" not in out.split("cannot be used:")[1] and "Traceback" not in err


def test_check_of_an_unknown_data_set_names_what_is_there(run_check):
    code, _, err = run_check("shoop")
    assert code == 2 and "shoop_final.txt is missing" in err and "shop" in err and "Traceback" not in err
    assert "Traceback" in run_check("shoop", "--debug")[2]
    code, _, err = run_check("shop", "--C", 0)
    assert code == 2 and "--C" in err
