"""Whatever is wrong with a data set is found before training, all of it is told in one report, and nothing is read wrongly."""
import io
import os
import pickle
import re
import resource
import runpy
import signal
import struct
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.conftest import draw_image, tiny_options, write_dataset
from utils.common.errors import PerPEFTError
from utils.data import images as images
from utils.data.dataset import MISSING_TITLE, read_dataset
from utils.items.data_check import check_dataset
from utils.items.hidden_states import HiddenStateStore, states_path
from utils.items.store import read_image
from utils.run.pipeline import open_run

ROOT = Path(__file__).parents[2]
DEEP = 300_000  # levels of nesting, of which a third overflow the stack of what follows them by recursion
HISTORIES = {1: [1, 2, 3, 4, 5], 2: [2, 1, 3], 5: [4]}
TITLES = ["a lamp", "a mug", "a chair", "a clock", "a bag"]


@pytest.fixture
def folder(tmp_path):
    """A small sound data set `shop` of 5 items and 3 users, to be damaged."""
    return write_dataset(tmp_path / "dataset", "shop", HISTORIES, TITLES)


def image_path(folder, item):
    return folder / "shop_images" / f"B{item:03d}.jpg"


def jpeg(item=1, **options):
    buffer = io.BytesIO()
    draw_image(item).save(buffer, "JPEG", **options)
    return buffer.getvalue()


def write_pickle(folder, end, value):
    (folder / f"shop_{end}_final.pickle").write_bytes(pickle.dumps(value))


def complaint(folder, **options):
    with pytest.raises(PerPEFTError) as raised:
        read_dataset(folder, "shop", **options)
    return str(raised.value)


def bomb():
    """An image of 400 million pixels in 50 kilobytes."""
    buffer = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(buffer, "PNG")
    return buffer.getvalue()


def in_a_fork(function, addresses=2**30):
    """What a function tells in a copy of this process with little more room than it has, and the copy's exit code."""
    read_end, write_end = os.pipe()
    pid = os.fork()
    if not pid:
        os.dup2(write_end, 1)
        before = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (before + addresses, before + addresses))
        signal.alarm(60)
        try:
            function(lambda *words: os.write(1, (" ".join(map(str, words)) + "\n").encode()))
            os._exit(0)
        finally:
            os._exit(1)
    os.close(write_end)
    with open(read_end) as pipe:
        printed = pipe.read()
    return printed, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


# ---------------------------------------------------------------- one report for everything


def test_every_kind_of_problem_is_in_one_report(tmp_path, capsys):
    folder = write_dataset(tmp_path, "shop", {1: [1]}, [None] * 40, raw_ids=[f"R{item:02d}" for item in range(1, 41)])
    malformed = "".join(f"{number} x\n" for number in range(12))
    below_one = "".join(f"1 {-number}\n" for number in range(11))
    (folder / "shop_final.txt").write_text(f"1 1\n2 2\n{malformed}{below_one}2 77\n")
    raw_ids = {item: f"R{item:02d}" for item in range(1, 41) if item not in (20, 21)}
    write_pickle(folder, "item2id", {**raw_ids, 7: "R06", 8: 9, 9: "up\n"})
    images = folder / "shop_images"
    (images / "R01.jpg").write_bytes(b"")
    (images / "R02.jpg").write_bytes(jpeg()[:-100])
    (images / "R03.jpg").write_bytes(b"no image")
    (images / "R04.jpg").write_bytes(bomb())
    (images / "R05.jpg").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(40))
    for item in range(10, 20):
        (images / f"R{item}.jpg").unlink()
    (images / "R22.jpg").unlink()
    (images / "R23.jpg").unlink()
    report = complaint(folder, num_groups=3)
    assert re.search(r"not two integers \(12\): line 3 '0 x', .*line 12 '9 x' and 2 more", report)
    assert re.search(r"below 1 \(11\): line 15 '1 0', line 16 '1 -1', .*line 24 '1 -9' and 1 more", report)
    assert "no user with the 3 interactions that evaluation needs; most interactions of one user (1): 2" in report
    assert "fewer users than the 3 groups of --C (1): 2 users" in report
    assert re.search(r"not item number: raw id.*\(2\): 8: 9, 9: 'up\\n'", report)
    assert re.search(r"gaps in the item numbers .*\(4\): 8, 9, 20, 21\n", report)
    assert re.search(r"items of users without raw id .*\(1\): 77\n", report)
    assert re.search(r"duplicate raw ids .*\(1\): R06 \(items 6 and 7\)", report)
    missing = ", ".join(f"R{item}.jpg \\(item {item}\\)" for item in range(10, 20))
    assert re.search(rf"items without an image .*\(12\): {missing} and 2 more", report)
    unreadable = re.search(r"unreadable images .*\(5\): (.*)", report).group(1)
    for name, reason in (
        ("R01.jpg (item 1", "empty"), ("R02.jpg (item 2", "truncated"), ("R03.jpg (item 3", "not an image of a kind"),
        ("R04.jpg (item 4", "far too many pixels"), ("R05.jpg (item 5", "."),
    ):  # fmt: skip
        assert re.search(rf"{re.escape(name)}: [^,]*{reason}", unreadable), unreadable
    remarks = capsys.readouterr().err
    assert re.search(r"without a title.*\(36\): R01, R02, .* and 26 more", remarks)


def test_report_stays_short_and_quick_however_much_is_wrong(folder):
    (folder / "shop_final.txt").write_text("not a number\n0 1\n" * 100_000)
    write_pickle(folder, "item2id", dict.fromkeys(range(1, 200_000), "a/b"))
    begun = time.monotonic()
    report = complaint(folder)
    assert "(100000)" in report and "(199999)" in report
    assert len(report) < 3000
    assert time.monotonic() - begun < 60


def test_images_are_not_opened_where_nothing_else_is_wrong(folder, monkeypatch):
    monkeypatch.setattr(images.Image, "open", None)
    assert read_dataset(folder, "shop").num_items == 5


def test_images_are_not_tried_where_they_are_not_needed(folder):
    (folder / "shop_final.txt").write_text("bad\n1 1\n1 2\n1 3\n")
    image_path(folder, 2).write_bytes(b"")
    assert "B002.jpg (item 2" in complaint(folder)
    for options in ({"contents": False}, {"missing_images": "blank"}):
        assert "line 1" in complaint(folder, **options) and "B002" not in complaint(folder, **options)


def test_folder_of_images_that_is_not_there_is_told(folder):
    for path in (folder / "shop_images").iterdir():
        path.unlink()
    (folder / "shop_images").rmdir()
    (folder / "shop_final.txt").write_text("bad\n1 1\n1 2\n1 3\n")
    report = complaint(folder)
    assert "line 1" in report and "shop_images (No such file or directory)" in report


@pytest.mark.parametrize("raw_id", ["x\x1b[2Jy", "line\nbreak", "\u202ereversed"])
def test_names_out_of_the_data_cannot_steer_the_terminal(folder, raw_id, capsys):
    write_pickle(folder, "item2id", {**{item: f"B{item:03d}" for item in range(1, 5)}, 5: raw_id})
    report = complaint(folder) + capsys.readouterr().err
    assert raw_id not in report and raw_id.encode("unicode_escape").decode() in report


# ---------------------------------------------------------------- users and groups


def test_fewer_users_than_groups_is_an_error_and_as_many_are_enough(folder):
    assert read_dataset(folder, "shop", num_groups=3).num_users == 3
    assert "fewer users than the 4 groups of --C (1): 3 users" in complaint(folder, num_groups=4)


def test_user_with_every_item_is_remarked_by_their_own_number_and_no_problem(folder, capsys):
    histories = {7: [1, 2, 3], 1000: [5, 4, 3, 2, 1, 1, 2], 9: [5, 4, 3, 2, 1]}  # of 9's, the last two are held out
    lines = [f"{user} {item}\n" for user, items in histories.items() for item in items]
    (folder / "shop_final.txt").write_text("".join(lines))
    assert read_dataset(folder, "shop").num_users == 3
    assert re.search(r"every item in their training history.*left out of training.*\(1\): user 1000\n", capsys.readouterr().err)


def test_training_refuses_fewer_users_than_groups_before_it_begins(tiny_dataset, tiny_clip, tmp_path):
    options = tiny_options(tiny_dataset, tiny_clip, tmp_path / "runs", C=41)
    with pytest.raises(PerPEFTError, match="fewer users than the 41 groups of --C"), open_run(options):
        pass
    assert not (tmp_path / "runs").exists()


# ---------------------------------------------------------------- titles


def test_missing_titles_are_warned_of_once_with_the_first_ten(tmp_path, capsys):
    titles = [None if item % 2 else f"lamp {item}" for item in range(30)]
    folder = write_dataset(tmp_path, "shop", HISTORIES, titles, draw=False)
    read_dataset(folder, "shop", missing_images="blank")
    out, err = capsys.readouterr()
    first_ten = ", ".join(f"B{item:03d}" for item in range(2, 22, 2))
    assert err.count(f"replaced by '{MISSING_TITLE}' (15): {first_ten} and 5 more") == 1
    assert err.startswith("warning: data set 'shop':\n") and out == ""


def test_nothing_is_printed_where_nothing_is_missing(folder, capsys):
    read_dataset(folder, "shop")
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("title", [7, b"bytes", ["a", "list"], {"a": 1}, True, 10**18, float("inf")])
def test_title_that_is_no_text_is_warned_of_and_stood_in_for(folder, capsys, title):
    write_pickle(folder, "texts", {f"B{item:03d}": text for item, text in enumerate([title, *TITLES[1:]], 1)})
    dataset = read_dataset(folder, "shop")
    assert dataset.titles == [MISSING_TITLE, *TITLES[1:]] and dataset.missing_titles == 1
    assert re.search(r"title is not text.*\(1\): B001", capsys.readouterr().err)


@pytest.mark.parametrize("title", [None, "", " \t\n", float("nan")])
def test_title_that_is_nothing_counts_as_missing(folder, capsys, title):
    write_pickle(folder, "texts", {f"B{item:03d}": text for item, text in enumerate([title, *TITLES[1:]], 1)})
    assert read_dataset(folder, "shop").titles[0] == MISSING_TITLE
    assert re.search(r"without a title.*\(1\): B001", capsys.readouterr().err)


def test_title_with_half_a_surrogate_pair_can_still_be_written(folder):
    write_pickle(folder, "texts", {f"B{item:03d}": text for item, text in enumerate(["caf\ud83d lamp", *TITLES[1:]], 1)})
    title = read_dataset(folder, "shop").titles[0]
    assert title.encode() and title.startswith("caf") and title.endswith(" lamp")


def test_nested_title_is_told_without_unfolding_it(folder, capsys):
    laughs = ["ha"]
    for _ in range(16):  # 2 ** 16 laughs in 17 lists; with 60, whoever unfolds them never ends
        laughs = [laughs, laughs]
    write_pickle(folder, "texts", {f"B{item:03d}": text for item, text in enumerate([laughs, *TITLES[1:]], 1)})
    write_pickle(folder, "item2id", {**{item: f"B{item:03d}" for item in range(1, 6)}, 6: laughs})
    assert "6: <list>" in complaint(folder)
    assert "B001: <list>" in capsys.readouterr().err


# ---------------------------------------------------------------- purchases


GOOD_TEXTS = {
    "plain": b"1 1\n1 2\n1 3\n900 2\n",
    "CRLF": b"1 1\r\n1 2\r\n1 3\r\n900 2\r\n",
    "CR": b"1 1\r1 2\r1 3\r900 2\r",
    "byte order mark": b"\xef\xbb\xbf1 1\n1 2\n1 3\n900 2\n",
    "tabs, spaces, no last line end": b"1\t1\n  1   2  \n1 \t 3\n\n \n900 2",
    "leading zeros": b"001 01\n1 2\n1 3\n900 0002\n",
}


@pytest.mark.parametrize("kind", GOOD_TEXTS)
def test_ways_to_write_the_same_purchases(folder, kind):
    (folder / "shop_final.txt").write_bytes(GOOD_TEXTS[kind])
    dataset = read_dataset(folder, "shop")
    assert dataset.user_ids.tolist() == [1, 900]
    assert [dataset.histories[user].tolist() for user in (0, 1)] == [[1, 2, 3], [2]]


@pytest.mark.parametrize("kind", GOOD_TEXTS)
def test_lines_are_numbered_alike_however_they_end(folder, kind):
    """One bad line, and every line is read by the slower way that can name it: it must see the good ones as before."""
    text = GOOD_TEXTS[kind]
    end = b"\r\n" if b"\r\n" in text else b"\r" if b"\r" in text else b"\n"
    (folder / "shop_final.txt").write_bytes(text + (b"" if text.endswith(end) else end) + b"1 2 3" + end)
    line = 7 if b"\t" in text else 5
    assert re.search(rf"not two integers \(1\): line {line} '1 2 3'$", complaint(folder))


BAD_LINES = (
    b"1.0 2", b"1 2.0", b"1e0 2", b"1 nan", b"1 inf", b"1 2 3", b"1", b"1,2", b"1;2", b"x 2", b"1 0x2", b"1_0 2", b"# note",
    b"1 --2", b"1 -", b"- -", b"1 2-", b"1 \xff", b"\xe9 2", b"1 2\x00", b"\x00 2", b"1 \xd9\xa1", b"1 \xc2\xb2", b"'1' 2",
    b"1 9223372036854775808", b"1 99999999999999999999", b"1 -99999999999999999999", b"9" * 400 + b" 1", b"1 \xef\xbb\xbf2",
)  # fmt: skip


@pytest.mark.parametrize("line", BAD_LINES)
def test_line_that_is_not_two_whole_numbers_is_named(folder, line):
    (folder / "shop_final.txt").write_bytes(b"1 1\n1 2\n" + line + b"\n1 3\n")
    report = complaint(folder)
    assert re.search(r"(not two integers|below 1) \(1\): line 3 ", report)


@pytest.mark.parametrize("line", [b"0 1", b"1 0", b"-1 2", b"1 -1", b"-5 -7", b"00 1"])
def test_number_below_one_is_named(folder, line):
    (folder / "shop_final.txt").write_bytes(b"1 1\n1 2\n" + line + b"\n1 3\n")
    assert re.search(rf"below 1 \(1\): line 3 '{line.decode()}'", complaint(folder))


@pytest.mark.parametrize("where", ["bought", "named", "both", "a user"])
def test_huge_number_takes_no_memory(folder, where):
    huge = 10**12
    text = f"1 1\n1 2\n1 3\n{huge if where == 'a user' else 1} {huge if where in ('bought', 'both') else 4}\n"
    (folder / "shop_final.txt").write_text(text)
    if where in ("named", "both"):
        write_pickle(folder, "item2id", {**{item: f"B{item:03d}" for item in range(1, 6)}, huge: "B006"})

    def read(tell):
        try:
            tell(read_dataset(folder, "shop").user_ids.tolist())
        except PerPEFTError as error:
            tell(error)

    report, code = in_a_fork(read, addresses=2**27)
    assert code == 0 and str(huge) in report
    if where in ("named", "both"):
        assert re.search(rf"gaps .*\({huge - 6}\): 6, 7, 8, 9, 10, 11, 12, 13, 14, 15 and {huge - 16} more", report)
    elif where == "a user":
        assert report == f"[1, {huge}]\n"


@pytest.mark.parametrize("key", [2**63, -1, 1.5, True, None, "2", 10**30])
def test_key_that_is_no_item_number_is_named(folder, key):
    write_pickle(folder, "item2id", {**{item: f"B{item:03d}" for item in range(2, 6)}, key: "B006"})
    assert "shop_item2id_final.pickle" in complaint(folder)


@pytest.mark.parametrize("raw_id", [None, 5, b"B005", ["B005"], "half\ud83d", "", "two\nlines"])
def test_raw_id_that_is_no_line_of_text_is_named(folder, raw_id):
    write_pickle(folder, "item2id", {**{item: f"B{item:03d}" for item in range(1, 5)}, 5: raw_id})
    report = complaint(folder, missing_images="blank")
    assert re.search(r"not item number: raw id \(a non-empty text without a line break\) \(1\): 5: ", report)
    report.encode()


# ---------------------------------------------------------------- pickles made to harm


def number(size, code):
    return struct.pack(code, size)


HARMFUL_PICKLES = {
    "a key that takes 2 ** 60 steps to hash": b"\x80\x04}K\x01" + b"2\x86" * 60 + b"K\x01s.",
    "a key that overflows the stack": b"\x80\x04}K\x01" + b"\x85" * DEEP + b"K\x01s.",
    "such a key among several": b"\x80\x04}(K\x01K\x02K\x01" + b"\x85" * DEEP + b"K\x01u.",
    "such a key in the old way": b"(K\x01" + b"\x85" * DEEP + b"K\x01d.",
    "such a member of a set": b"\x80\x04\x8f(K\x01" + b"\x85" * DEEP + b"\x90.",
    "such a member of a frozenset": b"\x80\x04(K\x01" + b"\x85" * DEEP + b"\x91.",
    "an index of two billion in the memo": b"\x80\x02}r" + number(2**31 - 1, "<I") + b".",
    "an index of 200 million in the memo": b"\x80\x02}r" + number(200_000_000, "<I") + b".",
    "the same in text": b"}p200000000\n.",
    "bytes longer than any memory": b"\x80\x04\x8e" + number(2**62, "<Q") + b"abc.",
    "a text of two gigabytes": b"\x80\x04X" + number(2**31 - 1, "<I") + b"abc.",
    "a frame of eight gigabytes": b"\x80\x04\x95" + number(2**33, "<Q") + b"}.",
    "a number of two gigabytes": b"\x80\x04\x8b" + number(2**31 - 1, "<i") + b"abc.",
    "a number of a million digits": b"L" + b"9" * 1_000_000 + b"L\n.",
    "a bytearray of eight gigabytes": b"\x80\x05\x96" + number(2**33, "<Q") + b"abc.",
    "a buffer from elsewhere": b"\x80\x05\x97.",
    "very many lists in each other": b"\x80\x04" + b"]" * DEEP + b"a" * (DEEP - 1) + b".",
    "very many marks": b"\x80\x04" + b"(" * DEEP + b".",
    "numbers of one hash for keys": b"\x80\x04}("
    + b"".join(b"\x8a\x0d" + (step * (2**61 - 1)).to_bytes(13, "little") + b"K\x01" for step in range(1, 60_000))
    + b"u.",
}
READ_ONE = """
import resource, sys
from utils.common.errors import PerPEFTError
from utils.common.pickles import load_pickle
resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30))
try:
    print("read", type(load_pickle(sys.argv[1])).__name__)
except PerPEFTError as error:
    print("refused", error)
print(*(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


@pytest.mark.parametrize("kind", HARMFUL_PICKLES)
def test_pickle_made_to_harm_is_read_or_refused_in_little_time_and_memory(kind, tmp_path):
    path = tmp_path / "harmful.pickle"
    path.write_bytes(HARMFUL_PICKLES[kind])
    outcome = subprocess.run([sys.executable, "-c", READ_ONE, path], cwd=ROOT, capture_output=True, text=True, timeout=30)
    assert outcome.returncode == 0, (outcome.returncode, outcome.stderr[-500:])
    verdict, kilobytes = outcome.stdout.splitlines()
    assert verdict.startswith(("read", "refused")) and "MemoryError" not in verdict and len(verdict) < 500
    assert int(kilobytes) < 400_000


@pytest.mark.parametrize("value", [("a",), 10**40, {1}, bytearray(1)])
def test_value_that_is_not_plain_is_refused(folder, value):
    write_pickle(folder, "texts", {"B001": value})
    assert re.search(r"shop_texts_final.pickle is refused: .* Write it again with pickle.dump of a plain dict", complaint(folder))


# ---------------------------------------------------------------- images


def test_large_images_are_decoded_one_at_a_time(folder, monkeypatch):
    monkeypatch.setattr(images, "LARGE_PIXELS", 100)
    monkeypatch.setattr(images.os, "cpu_count", lambda: 8)
    inside, most = [], []
    lock = threading.Lock()

    def read(path):
        with images.decoded_image(path):
            with lock:
                inside.append(path)
                most.append(len(inside))
            time.sleep(0.02)
            with lock:
                inside.remove(path)

    paths = sorted((folder / "shop_images").iterdir())
    assert list(images.on_all_cores(read, paths)) == [None] * 5
    assert max(most) == 1
    monkeypatch.setattr(images, "LARGE_PIXELS", 10**9)
    most.clear()
    list(images.on_all_cores(read, paths))
    assert max(most) > 1


def test_image_of_every_bad_kind_is_refused_by_the_documented_errors(tmp_path):
    from transformers import CLIPImageProcessor

    path = tmp_path / "image.jpg"
    thin = io.BytesIO()
    Image.new("1", (60_000, 1)).save(thin, "PNG")  # after the resize, 13 million pixels wide
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\nshowpage\n"
    for content in (b"", b"\xff", jpeg()[:300], jpeg()[:-200], bytes(500), bomb(), thin.getvalue(), postscript):
        path.write_bytes(content)
        with pytest.raises((OSError, ValueError)):
            read_image(path, CLIPImageProcessor())
    path.unlink()
    path.mkdir()
    with pytest.raises(OSError):
        read_image(path, CLIPImageProcessor())


# ---------------------------------------------------------------- hidden states


def states_file(folder, value):
    path = states_path(folder, "shop")
    torch.save(value, path)
    return path


def sound_states():
    generator = torch.Generator().manual_seed(0)
    states = (torch.randn(5, 3, 8, generator=generator), torch.randn(5, 3, 4, generator=generator))
    return *states, [f"B{item:03d}" for item in range(1, 6)]


def open_states(folder):
    return HiddenStateStore.open(read_dataset(folder, "shop", contents=False), None)


def test_flipped_bit_among_the_numbers_is_found(folder):
    """It would leave a plausible number, so that nothing but the checksum can tell."""
    image_states, text_states, ids = sound_states()
    path = states_file(folder, (image_states, text_states, ids))
    whole = path.read_bytes()
    for states in (image_states, text_states):
        place = whole.index(states.numpy().tobytes()) + 8  # the lowest byte of the third number
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(PerPEFTError, match="damaged"):
            open_states(folder)
    path.write_bytes(whole)
    assert torch.equal(open_states(folder).fetch(np.array([3]), torch.device("cpu"))[0][0], image_states[2])


def test_file_in_the_format_of_old_torch_is_refused_with_how_to_convert_it(folder):
    path = states_path(folder, "shop")
    torch.save(sound_states(), path, _use_new_zipfile_serialization=False)
    with pytest.raises(PerPEFTError, match="format before version 1.6; convert it by python3 -c") as refused:
        open_states(folder)
    command = re.search(r'python3 -c "(.*)"', str(refused.value)).group(1)
    exec(command, {})
    assert torch.equal(open_states(folder).fetch(np.array([3]), torch.device("cpu"))[0][0], sound_states()[0][2])


def test_file_cut_off_anywhere_is_refused(folder):
    path = states_file(folder, sound_states())
    whole = path.read_bytes()
    for end in range(0, len(whole), 97):
        path.write_bytes(whole[:end])
        with pytest.raises(PerPEFTError, match="cannot be read"):
            open_states(folder)


def odd_states():
    image_states, text_states, ids = sound_states()
    return {
        "one number a hundred million times": (torch.zeros(1).expand(5, 3, 10**8), text_states, ids),
        "sparse": (image_states.to_sparse(), text_states, ids),
        "whole numbers": (image_states.long(), text_states, ids),
        "eight-bit floats": (image_states.to(torch.float8_e4m3fn), text_states, ids),
        "complex numbers": (image_states + 1j, text_states, ids),
        "no layers": (image_states[:, :0], text_states[:, :0], ids),
        "two dimensions": (image_states[0], text_states[0], ids),
        "ids that are lists": (image_states, text_states, [[raw_id] for raw_id in ids]),
        "ids that are a text": (image_states, text_states, "B0001"),
        "ids that are floats": (image_states, text_states, torch.rand(5)),
        "ids in two dimensions": (image_states, text_states, torch.zeros(5, 1).long()),
        "one id for all": (image_states, text_states, torch.zeros(1).long().expand(10**7)),
        "a dict": {"image": image_states, "text": text_states},
        "two parts": (image_states, text_states),
        "one tensor": image_states,
        "nothing": None,
        "ids of others": (image_states, text_states, [f"C{item}" for item in range(5)]),
        "an id twice": (image_states, text_states, [*ids[:4], ids[0]]),
        "no number": (image_states / 0 * 0, text_states, ids),
        "infinity": (image_states, text_states / 0, ids),
    }


@pytest.mark.parametrize("kind", odd_states())
def test_states_that_are_not_what_they_should_be_are_refused(folder, kind):
    path = states_file(folder, odd_states()[kind])
    with pytest.raises(PerPEFTError, match=re.escape(str(path))):
        open_states(folder)


def with_contents(folder, contents, compression=zipfile.ZIP_STORED):
    """A file of states with right checksums, in which what says what is where is replaced."""
    path = states_file(folder, sound_states())
    parts = {}
    with zipfile.ZipFile(path) as archive:
        parts = {member.filename: archive.read(member) for member in archive.infolist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in parts.items():
            archive.writestr(name, contents(content) if name.endswith("data.pkl") else content)
    return path


HARMFUL_CONTENTS = {
    "a key that takes 2 ** 60 steps to hash": lambda _: b"\x80\x02}K\x01q\x01" + b"h\x01\x86q\x01" * 60 + b"K\x01s.",
    "a key that overflows the stack": lambda _: b"\x80\x02}K\x01" + b"\x85" * DEEP + b"K\x01s.",
    "storage with such a name": lambda _: b"\x80\x02(X\x07\0\0\0storagectorch\nFloatStorage\nK\x01"
    + b"\x85" * DEEP
    + b"X\x03\0\0\0cpuK\x08tQ.",
    "a dict made of such pairs": lambda _: b"\x80\x02ccollections\nOrderedDict\n](K\x01"
    + b"\x85" * DEEP
    + b"K\x01\x86e\x85R.",
    "an array of a terabyte": lambda _: b"\x80\x02cbuiltins\nbytearray\n\x8a\x06" + (2**40).to_bytes(6, "little") + b"\x85R.",
    "a function that is no part of a tensor": lambda _: b"\x80\x02ctorch\nset_num_threads\nK\x01\x85R.",
    "a tensor larger than the file": lambda content: content.replace(b"K\x05K\x03K\x08\x87", b"J\xff\xff\xff\x7fK\x03K\x08\x87"),
}


def test_states_made_to_harm_are_refused_in_little_time_and_memory(folder):
    cases = {kind: with_contents(folder, contents).read_bytes() for kind, contents in HARMFUL_CONTENTS.items()}
    cases["packed"] = with_contents(folder, lambda content: content, zipfile.ZIP_DEFLATED).read_bytes()
    cases["sound"] = with_contents(folder, lambda content: content).read_bytes()
    dataset = read_dataset(folder, "shop", contents=False)

    def open_all(tell):
        for content in cases.values():
            states_path(folder, "shop").write_bytes(content)
            try:
                tell("read", HiddenStateStore.open(dataset, None).num_items)
            except PerPEFTError as error:
                tell("refused", error)

    printed, code = in_a_fork(open_all)
    verdicts = printed.splitlines()
    assert code == 0, (code, list(cases)[len(verdicts)])
    for kind, verdict in zip(list(cases)[:-1], verdicts[:-1], strict=True):
        assert verdict.startswith("refused") and "memory" not in verdict, (kind, verdict)
    assert verdicts[-1] == "read 5"  # taken apart and put together, the file itself is no reason to refuse


@pytest.mark.parametrize("note", ["", "{", "[]", "null", '"text"', "{}", "[" * 100_000, b"\xff\xfe"])
def test_note_that_does_not_say_which_clip_is_refused(folder, note):
    path = states_file(folder, sound_states())
    path.with_suffix(".json").write_bytes(note if isinstance(note, bytes) else note.encode())
    with pytest.raises(PerPEFTError, match="shop_preX.json"):
        HiddenStateStore.open(read_dataset(folder, "shop", contents=False), None, "some/clip")


# ---------------------------------------------------------------- check_data


@pytest.fixture
def run_check(monkeypatch):
    """Runs `python -m scripts.check_data` in this process and returns its exit code."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["check_data.py", *map(str, arguments)])
        monkeypatch.delitem(sys.modules, "scripts.check_data", raising=False)
        with pytest.raises(SystemExit) as ended:
            runpy.run_module("scripts.check_data", run_name="__main__")
        return ended.value.code

    handler = signal.getsignal(signal.SIGTERM)
    yield run
    signal.signal(signal.SIGTERM, handler)


def table(text):
    return dict(re.findall(r"^  (\S.*?) {2,}(\S.*)$", text, re.MULTILINE))


def test_check_prints_the_counts_of_a_sound_data_set(folder, run_check, capsys):
    write_pickle(folder, "texts", {f"B{item:03d}": f"lamp {item}" for item in range(1, 5)})
    assert run_check("--dataset", "shop", "--train_dir", folder, "--C", 2) == 0
    out, err = capsys.readouterr()
    assert table(out) == {
        "users": "3", "items": "5", "interactions": "9", "interactions per user (mean)": "3.00", "images found": "5",
        "titles missing": "1", "users evaluated": "2", "hidden states": "none yet",
    }  # fmt: skip
    assert re.search(r"worth knowing:\n.*without a title.*\(1\): B005", out) and out.endswith("\nusable\n")
    assert "error" not in err


def test_check_tells_everything_and_ends_with_code_2(folder, run_check, capsys):
    image_path(folder, 1).write_bytes(b"")
    image_path(folder, 2).unlink()
    (folder / "shop_final.txt").write_text("1 1\n1 2\n1 3\nbad\n")
    states_file(folder, (torch.zeros(5, 3, 8) / 0, torch.zeros(5, 3, 4), [f"B{item:03d}" for item in range(1, 6)]))
    assert run_check("--dataset", "shop", "--train_dir", folder) == 2
    out, err = capsys.readouterr()
    counts = table(out)
    assert counts["images found"] == "3" and counts["users"] == "1" and counts["hidden states"] == "unusable"
    for told in ("line 4 'bad'", "B001.jpg (item 1: the file is empty)", "B002.jpg (item 2)", "8 groups of --C", "NaN"):
        assert told in out.split("cannot be used:")[1]
    assert "usable\n" not in out.split("cannot be used:")[1] and "Traceback" not in err


def test_check_of_images_alone_and_with_blanks(folder, run_check, capsys):
    image_path(folder, 1).write_bytes(b"")
    image_path(folder, 2).unlink()
    common = ("--dataset", "shop", "--train_dir", folder, "--C", 1)
    assert run_check(*common) == 2
    assert "B001.jpg" in capsys.readouterr().out
    assert run_check(*common, "--missing_images", "blank") == 0
    out = capsys.readouterr().out
    assert table(out)["images found"] == "3"
    assert re.search(r"replaced by black ones \(2\): B002.jpg \(item 2\), B001.jpg \(item 1: the file is empty\)", out)


def test_check_finds_sound_hidden_states(folder):
    states_file(folder, sound_states())
    report = check_dataset(folder, "shop", 1)
    assert report.usable and table(str(report))["hidden states"] == "found"


def test_check_of_an_unknown_data_set_names_what_is_there(folder, run_check, capsys):
    assert run_check("--dataset", "shoop", "--train_dir", folder) == 2
    err = capsys.readouterr().err
    assert "shoop_final.txt is missing" in err and "shop" in err and "Traceback" not in err
    assert run_check("--dataset", "shoop", "--train_dir", folder, "--debug") == 2
    assert "Traceback" in capsys.readouterr().err
    assert run_check("--dataset", "shop", "--train_dir", folder, "--C", 0) == 2
    assert "--C" in capsys.readouterr().err
