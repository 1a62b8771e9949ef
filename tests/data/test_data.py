"""Histories, raw ids and titles come out of the files as written, and all that is wrong with them is told at once."""
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import write_dataset
from utils.common.errors import PerPEFTError
from utils.data.dataset import MISSING_TITLE, available_datasets, read_dataset
from utils.data.histories import Histories, leave_last_out

ROOT = Path(__file__).parents[2]


def lists(histories):
    return [histories[user].tolist() for user in range(histories.num_users)]


@pytest.fixture
def folder(tmp_path):
    """A small sound data set `shop` of 5 items, to be damaged."""
    return write_dataset(tmp_path, "shop", {1: [1, 2, 3, 4, 5], 2: [2, 1]}, ["a", "b", "c", "d", "e"])


def write_final(folder, text):
    (folder / "shop_final.txt").write_bytes(text if isinstance(text, bytes) else text.encode())


def write_pickle(path, value):
    path.write_bytes(pickle.dumps(value))


def complaint(folder, **options):
    with pytest.raises(PerPEFTError) as raised:
        read_dataset(folder, "shop", **options)
    return str(raised.value)


# ---------------------------------------------------------------- the split


def test_leave_last_out_by_hand():
    split = leave_last_out(Histories.of_lists([[7], [7, 8], [1, 2, 3], [4, 5, 6, 7], [9, 9, 9, 9, 9]]))
    assert lists(split.train) == [[7], [7, 8], [1], [4, 5], [9, 9, 9]]
    assert lists(split.train_and_valid) == [[7], [7, 8], [1, 2], [4, 5, 6], [9, 9, 9, 9]]
    assert split.valid.tolist() == [0, 0, 2, 6, 9]
    assert split.test.tolist() == [0, 0, 3, 7, 9]
    assert split.evaluated_users.tolist() == [2, 3, 4]


@given(st.lists(st.lists(st.integers(1, 50), min_size=1, max_size=8), min_size=1, max_size=12))
def test_split_keeps_every_purchase_in_order(purchases):
    split = leave_last_out(Histories.of_lists(purchases))
    for user, items in enumerate(purchases):
        held_out = [split.valid[user], split.test[user]] if len(items) >= 3 else []
        assert split.train[user].tolist() + held_out == items
        assert split.train_and_valid[user].tolist() == (items[:-1] if held_out else items)
        assert (user in split.evaluated_users) == (len(items) >= 3)


@given(st.lists(st.lists(st.integers(1, 9), max_size=6), min_size=1, max_size=8), st.integers(1, 8), st.data())
def test_last_items_are_left_padded(purchases, count, data):
    users = data.draw(st.lists(st.integers(0, len(purchases) - 1), max_size=6))
    found = Histories.of_lists(purchases).last(np.array(users, dtype=np.int64), count)
    assert found.tolist() == [([0] * count + purchases[user])[-count:] for user in users]


# ---------------------------------------------------------------- reading


def test_files_come_out_as_written(tiny_dataset):
    dataset = read_dataset(tiny_dataset.train_dir, "tiny")
    assert dataset.user_ids.tolist() == sorted(tiny_dataset.histories)
    assert lists(dataset.histories) == [tiny_dataset.histories[user] for user in dataset.user_ids]
    assert dataset.titles == [title or MISSING_TITLE for title in tiny_dataset.titles]
    assert dataset.titles[4] == "No description available." and dataset.missing_titles == 1
    assert dataset.raw_ids[:2] == ["B001", "B002"] and dataset.num_items == 30
    assert [path.name for path in dataset.image_paths] == [f"B{item:03d}.jpg" for item in range(1, 31)]
    purchases = sum(map(len, tiny_dataset.histories.values()))
    assert dataset.counts() == {"users": 40, "items": 30, "interactions": purchases}


def test_interleaved_lines_and_gaps_between_user_numbers(folder):
    write_final(folder, "900 3\n5 1\n900 1\n5 2\n\n12  4\n900 3\n5\t3\r\n5 4")
    dataset = read_dataset(folder, "shop")
    assert dataset.user_ids.tolist() == [5, 12, 900]
    assert lists(dataset.histories) == [[1, 2, 3, 4], [4], [3, 1, 3]]


def test_items_that_nobody_bought_and_a_padding_entry_in_the_pickle_are_no_error(folder):
    raw_ids = {0: "padding", **{item: f"B{item:03d}" for item in range(1, 6)}}
    write_pickle(folder / "shop_item2id_final.pickle", raw_ids)
    write_final(folder, "1 1\n1 2\n1 1\n")
    dataset = read_dataset(folder, "shop")
    assert dataset.raw_ids == [f"B{item:03d}" for item in range(1, 6)]


def test_item_numbers_need_not_be_in_order_in_the_pickle(folder):
    write_pickle(folder / "shop_item2id_final.pickle", {item: f"B{item:03d}" for item in (3, 1, 5, 2, 4)})
    assert read_dataset(folder, "shop").raw_ids == [f"B{item:03d}" for item in range(1, 6)]


@pytest.mark.parametrize("title", ["", "  \n", None, float("nan"), 7])
def test_title_that_is_none_becomes_the_stand_in(folder, title):
    write_pickle(folder / "shop_texts_final.pickle", {"B001": title, "B002": "b", "B003": "c", "B004": "d", "B005": "e"})
    dataset = read_dataset(folder, "shop")
    assert dataset.titles == [MISSING_TITLE, "b", "c", "d", "e"] and dataset.missing_titles == 1


def test_without_contents_titles_and_images_may_be_absent(folder):
    (folder / "shop_texts_final.pickle").unlink()
    for path in (folder / "shop_images").iterdir():
        path.unlink()
    (folder / "shop_images").rmdir()
    assert read_dataset(folder, "shop", contents=False).num_items == 5
    message = complaint(folder)
    assert "shop_texts_final.pickle is missing" in message and "shop_images" in message


def test_every_line_is_read_at_a_realistic_size(folder):
    random = np.random.default_rng(0)
    users, items = random.integers(1, 2000, 50_000), random.integers(1, 6, 50_000)
    write_final(folder, "".join(f"{user} {item}\n" for user, item in zip(users, items)))
    dataset = read_dataset(folder, "shop")
    expected = {}
    for user, item in zip(users.tolist(), items.tolist()):
        expected.setdefault(user, []).append(item)
    assert lists(dataset.histories) == [expected[user] for user in sorted(expected)]


# ---------------------------------------------------------------- what is wrong is told


MALFORMED = ["one two", "1", "1 2 3", "1,2", "1.5 2", "1 2.0", "nan 2", "1 --5", "1 -", "\u0661 2", f"1 {10**20}", "\ufeff1 2"]


@pytest.mark.parametrize("line", MALFORMED)
def test_malformed_line_is_named_with_its_number(folder, line):
    write_final(folder, f"1 1\n1 2\n{line}\n1 3\n")
    message = complaint(folder)
    assert "line 3" in message and "(1)" in message and "shop_final.txt" in message


@pytest.mark.parametrize("line", ["0 1", "1 0", "-1 2", "3 -2"])
def test_number_below_one_is_named_with_its_line(folder, line):
    write_final(folder, f"1 1\n1 2\n1 3\n{line}\n")
    message = complaint(folder)
    assert "line 4" in message and "below 1" in message


def test_line_that_is_no_text_is_malformed(folder):
    write_final(folder, b"1 1\n1 2\n\xff\xfe\x00 2\n1 3\n")
    assert "line 3" in complaint(folder)


def test_all_problems_are_reported_together_with_counts_and_the_first_ten(folder):
    malformed = "".join(f"x{number} y\n" for number in range(12))
    write_final(folder, f"1 1\n1 2\n1 3\n{malformed}0 1\n1 8\n")
    write_pickle(
        folder / "shop_item2id_final.pickle",
        {1: "B001", 2: "B002", 3: "B001", 4: "two\nlines", 6: "", 7: "lone", "8": "B008", 9: 5},
    )
    (folder / "shop_images" / "B002.jpg").unlink()
    message = complaint(folder)
    first_ten = [f"line {number}" for number in range(4, 14)]
    assert re.search(r"\(12\): " + ", ".join(f"{line} 'x\\d+ y'" for line in first_ten) + " and 2 more", message)
    assert re.search(r"below 1 \(1\): line 16", message)
    assert re.search(r"gaps.*\(\d\): .*5", message)  # no item 5; 4 and 6 have no usable raw id
    assert re.search(r"without raw id.*\(1\): 8", message)
    assert re.search(r"duplicate.*\(1\): B001 \(items 1 and 3\)", message)
    for entry in ("4: 'two\\nlines'", "'8': 'B008'", "9: 5"):
        assert entry in message
    assert re.search(r"without an image.*B002\.jpg \(item 2\), .*lone\.jpg \(item 7\)", message)
    assert len(message) < 3000


def test_empty_files_are_said_to_be_empty(folder):
    write_final(folder, "")
    assert re.search(r"empty file \(1\): shop_final.txt", complaint(folder))
    write_final(folder, "\n\n  \n")
    assert re.search(r"empty file \(1\): shop_final.txt", complaint(folder))
    write_final(folder, "1 1\n1 2\n1 3\n")
    write_pickle(folder / "shop_item2id_final.pickle", {})
    assert re.search(r"empty file \(1\): shop_item2id_final.pickle", complaint(folder))


def test_empty_pickle_is_told_beside_other_problems(folder):
    write_final(folder, "1 1\n1 2\nbad\n1 3\n")
    write_pickle(folder / "shop_item2id_final.pickle", {})
    message = complaint(folder)
    assert "line 3" in message and "shop_item2id_final.pickle" in message


@pytest.mark.parametrize("content", [b"", b"no pickle at all", pickle.dumps({1: "B001"})[:-4], pickle.dumps([1, 2])])
def test_pickle_that_holds_no_dict_is_named(folder, content):
    (folder / "shop_item2id_final.pickle").write_bytes(content)
    assert "shop_item2id_final.pickle" in complaint(folder)
    (folder / "shop_item2id_final.pickle").unlink()
    assert "shop_item2id_final.pickle is missing" in complaint(folder)


class RunsACommand:
    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("name", ["shop_item2id_final.pickle", "shop_texts_final.pickle"])
def test_pickle_that_names_a_function_is_refused_and_not_run(folder, name):
    marker = folder / "was_run"
    payload = {"B001": RunsACommand(f"touch {marker}")}
    write_pickle(folder / name, payload)
    message = complaint(folder)
    assert name in message and "system" in message
    assert not marker.exists()
    pickle.loads((folder / name).read_bytes())  # proof that the payload is live
    assert marker.exists()


def test_stray_huge_item_number_is_told_without_filling_the_memory(folder):
    """Item numbers that were never renumbered, say a shop's own, must end in a message, not in a table of their size."""
    huge = 10**12
    write_final(folder, f"1 1\n1 2\n1 {huge}\n")
    write_pickle(folder / "shop_item2id_final.pickle", {1: "B001", 2: "B002", huge: "B003"})
    program = (
        "import resource, sys\n"
        "from utils.data.dataset import read_dataset\n"
        "from utils.common.errors import PerPEFTError\n"
        "resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30))\n"
        "try:\n    read_dataset(sys.argv[1], 'shop')\n"
        "except PerPEFTError as error:\n    print('told:', error)\n"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, "-c", program, str(folder)]
    outcome = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=100)
    assert outcome.stdout.startswith("told:") and str(huge) in outcome.stdout, outcome.stderr[-300:]


def test_data_in_which_nobody_can_be_evaluated_is_an_error(folder):
    write_final(folder, "1 1\n1 2\n2 1\n")
    assert "3 interactions" in complaint(folder)


def test_missing_images_may_be_let_pass(folder):
    (folder / "shop_images" / "B003.jpg").unlink()
    assert "B003.jpg (item 3)" in complaint(folder)
    assert read_dataset(folder, "shop", missing_images="blank").num_items == 5


def test_missing_data_set_message_names_what_lies_there(folder):
    write_dataset(folder, "grocer", {1: [1, 2, 3]}, ["a", "b", "c"])
    assert available_datasets(folder) == ["grocer", "shop"]
    with pytest.raises(PerPEFTError, match="'unknown'.*unknown_final.txt.*grocer, shop"):
        read_dataset(folder, "unknown")
    with pytest.raises(PerPEFTError, match="'arts'.*grocer, shop.*unzip_data.py"):  # the paper's: says how to get it
        read_dataset(folder, "arts")
    with pytest.raises(PerPEFTError, match="none"):
        read_dataset(folder / "nowhere", "shop")
